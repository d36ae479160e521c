// 32-bit code: every row of the general instructions that the host's CPU can run in compatibility
// mode, with random operands, against that CPU.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <random>

#include "cpu/cpuid.h"
#include "cpu/x86/host_modes.h"
#include "cpu/x86/interp/machine.h"

namespace kvartz::cpu::x86 {
namespace {

// The same addresses on the host and in the guest: data, stack (with the initial registers on top),
// then the host's code.
constexpr uint32_t kData32 = 0x300000, kStack32 = 0x301000, kCode32 = 0x302000, kSave32 = 0x303000,
                   kBytes = 0x4000;
constexpr uint32_t kRegisters = kStack32 + 0x800;  // as POPA takes them, then EFLAGS
constexpr uint32_t kInitialEsp = kRegisters + 36;

class CodeBuilder {
 public:
  explicit CodeBuilder(uint8_t* at) : at_(at) {}
  void Bytes(std::span<const uint8_t> bytes) {
    std::memcpy(at_, bytes.data(), bytes.size());
    at_ += bytes.size();
  }
  void Bytes(std::initializer_list<uint8_t> bytes) {
    Bytes(std::span(bytes.begin(), bytes.size()));
  }
  void Number(uint32_t value) {
    std::memcpy(at_, &value, 4);
    at_ += 4;
  }

 private:
  uint8_t* at_;
};

class Host32 {
 public:
  Host32() {
    void* map = mmap(reinterpret_cast<void*>(uintptr_t{kData32}), kBytes,
                     PROT_READ | PROT_WRITE | PROT_EXEC,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    usable_ = map == reinterpret_cast<void*>(uintptr_t{kData32});
    if (map != MAP_FAILED && !usable_) {
      munmap(map, kBytes);
    }
  }
  ~Host32() {
    if (usable_) {
      munmap(reinterpret_cast<void*>(uintptr_t{kData32}), kBytes);
    }
  }
  bool usable() const { return usable_; }
  static uint8_t* at(uint32_t address) { return reinterpret_cast<uint8_t*>(uintptr_t{address}); }
  static uint32_t saved(unsigned index) {
    uint32_t value;
    std::memcpy(&value, at(kSave32 + 4 * index), 4);
    return value;
  }

  // Registers and flags are at kRegisters already; afterwards saved(0..7) are the registers,
  // saved(8) EFLAGS.
  static void Run(std::span<const uint8_t> instruction) {
    CodeBuilder entry(
        at(kCode32));  // 64-bit: rbx, rbp and rsp are kept; the far call needs a stack below 4 GiB
    entry.Bytes({0x53, 0x55, 0x48, 0x89, 0xe5, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57});
    entry.Bytes({0x49, 0x89, 0xe4});                             // mov r12, rsp
    entry.Bytes({0xb8, 0x2b, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xc0});  // DS and ES: __USER_DS
    entry.Bytes({0xbc});                                         // mov esp, stack
    entry.Number(kSave32 + 0x800);
    entry.Bytes({0xff, 0x1c, 0x25});  // call far [save + 0x100]
    entry.Number(kSave32 + 0x100);
    entry.Bytes(
        {0x4c, 0x89, 0xe4, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3});
    const uint32_t target = kCode32 + 0x100;
    const uint16_t selector = kUser32Cs;
    std::memcpy(at(kSave32 + 0x100), &target, 4);
    std::memcpy(at(kSave32 + 0x104), &selector, 2);
    CodeBuilder code(at(target));
    code.Bytes({0x89, 0x25});  // mov [save + 0x40], esp
    code.Number(kSave32 + 0x40);
    code.Bytes({0xbc});
    code.Number(kRegisters);
    code.Bytes({0x61, 0x9d});  // popa; popf
    code.Bytes(instruction);
    for (unsigned i = 0; i < 8; ++i) {  // mov [save + 4 * i], register
      code.Bytes({0x89, static_cast<uint8_t>(0x05 | i << 3)});
      code.Number(kSave32 + 4 * i);
    }
    code.Bytes({0x8b, 0x25});  // mov esp, [save + 0x40]
    code.Number(kSave32 + 0x40);
    code.Bytes({0x9c, 0x8f, 0x05});  // pushf; pop [save + 32]
    code.Number(kSave32 + 32);
    code.Bytes({0xfc, 0xcb});  // cld; retf
    reinterpret_cast<void (*)()>(uintptr_t{kCode32})();
  }

 private:
  bool usable_ = false;
};

// False for what can't be compared, or could leave the test's memory.
bool Comparable(const Row& row) {
  constexpr uint32_t kOther = kBranch | kRep | kOnly64 | kEndsBlock;
  if ((row.attributes & kOther) != 0) {
    return false;
  }
  for (const char* name : {"RDRAND", "RDSEED", "LEAVE", "ENTER", "XLAT", "BOUND"}) {
    if (std::strcmp(row.mnemonic, name) == 0) {
      return false;
    }
  }
  return std::strncmp(row.encoding, "NP 0F AE", 8) != 0;
}

// Random code of a row; memory operands are absolute, in the data page.
std::vector<uint8_t> MakeCode(const Row& row, std::mt19937& random) {
  std::vector<uint8_t> code;
  const bool memory =
      row.has_modrm && (row.memory == Tri::kYes || (row.memory == Tri::kAny && random() % 2 == 0));
  if (memory && (row.attributes & kLock) != 0 && random() % 3 == 0) {
    code.push_back(0xf0);
  }
  if (!row.vex &&
      (row.prefix == PrefixRule::k66 || (row.prefix == PrefixRule::kAny && random() % 3 == 0))) {
    code.push_back(0x66);
  }
  if (!row.vex) {
    if (row.prefix == PrefixRule::kF3 || row.prefix == PrefixRule::kF2) {
      code.push_back(row.prefix == PrefixRule::kF3 ? 0xf3 : 0xf2);
    }
    if (row.map != OpcodeMap::kPrimary) {
      code.push_back(0x0f);
    }
    if (row.map == OpcodeMap::k0f38 || row.map == OpcodeMap::k0f3a) {
      code.push_back(row.map == OpcodeMap::k0f38 ? 0x38 : 0x3a);
    }
  } else {
    const unsigned pp = row.prefix == PrefixRule::k66   ? 1
                        : row.prefix == PrefixRule::kF3 ? 2
                        : row.prefix == PrefixRule::kF2 ? 3
                                                        : 0;
    bool uses_vvvv = false;
    for (const Operand& operand : row.operands) {
      uses_vvvv |= operand.kind == OperandKind::kVvvv;
    }
    code.push_back(0xc4);
    code.push_back(static_cast<uint8_t>(0xe0 | static_cast<unsigned>(row.map)));
    code.push_back(static_cast<uint8_t>((uses_vvvv ? (8 | random() % 8) << 3 : 0x78) | pp));
  }
  code.push_back(static_cast<uint8_t>(row.opcode + (row.opcode_register ? random() % 8 : 0)));
  if (row.has_modrm) {
    auto modrm = static_cast<uint8_t>((random() & 0x38 & ~row.modrm_mask) | row.modrm_value);
    modrm = static_cast<uint8_t>(memory                   ? modrm | 5
                                 : row.modrm_mask >= 0xf8 ? modrm
                                                          : modrm | 0xc0 | (random() & 7));
    code.push_back(modrm);
    if (memory) {
      const uint32_t address = kData32 + 0x400 + random() % 0x800;
      for (unsigned i = 0; i < 4; ++i) {
        code.push_back(static_cast<uint8_t>(address >> (8 * i)));
      }
    }
  }
  const bool moffs = row.imm[0] == ImmKind::kMoffs;
  const uint32_t address = kData32 + random() % 0xff0;
  for (unsigned i = 0; i < 8; ++i) {
    code.push_back(static_cast<uint8_t>(moffs ? address >> (8 * i % 32) : random()));
  }
  return code;
}

bool LeavesTheData(const Insn& insn) {
  // A bit string's index reaches anywhere; BSWAP of 16 bits is undefined.
  const char* name = insn.row->mnemonic;
  return (std::strncmp(name, "BT", 2) == 0 && insn.has_memory() &&
          insn.row->imm[0] == ImmKind::kNone) ||
         (std::strcmp(name, "BSWAP") == 0 && insn.operand_size == 2);
}

TEST(CompatibilityMode, EveryGeneralRowAgreesWithTheHost) {
  Host32 host;
  if (!HostRuns32BitCode()) {
    GTEST_SKIP() << kNo32BitCode;
  }
  if (!host.usable()) {
    GTEST_SKIP() << "addresses from " << std::hex << kData32 << " are taken on this host";
  }
  TestMachine machine(CodeMode::k32);
  DecodeContext context;
  context.mode = CodeMode::k32;
  context.features = FeatureSet::FromCpuid(HostCpuid());
  std::mt19937 random(7);
  unsigned rows = 0, runs = 0;
  for (const Row& row : InsnRows()) {
    if ((row.attributes & kNative) != 0) {
      break;  // the general instructions are the first table
    }
    if (!Comparable(row) || !context.features.Has(row.features[0]) ||
        !context.features.Has(row.features[1])) {
      continue;
    }
    unsigned row_runs = 0;
    for (unsigned round = 0; round < 150; ++round) {
      const std::vector<uint8_t> bytes = MakeCode(row, random);
      Insn insn;
      if (Decode(context, bytes, &insn) != DecodeStatus::kOk || insn.row != &row ||
          LeavesTheData(insn)) {
        continue;
      }
      for (uint32_t i = 0; i < 0x2000; i += 4) {
        machine.Store<uint32_t>(kData32 + i, static_cast<uint32_t>(random()));
      }
      const uint32_t flags = 0x202 | (static_cast<uint32_t>(random()) & rflags::kStatus);
      uint32_t values[8];
      for (unsigned i = 0; i < 8; ++i) {
        const uint32_t choice = static_cast<uint32_t>(random());
        values[i] = choice % 4 == 0   ? choice >> 24
                    : choice % 4 == 1 ? 0u - (choice >> 24)
                                      : static_cast<uint32_t>(random());
        machine.Store<uint32_t>(kRegisters + 4 * (7 - i), values[i]);
        machine.cpu.gpr[i] = values[i];
      }
      machine.Store<uint32_t>(kRegisters + 32, flags);
      machine.cpu.gpr[kRsp] = kInitialEsp;
      std::memcpy(Host32::at(kData32), machine.ram(kData32), 0x2000);
      machine.cpu.rflags = flags;
      std::memcpy(machine.ram(TestMachine::kCode), bytes.data(), bytes.size());
      FlushBlocks(machine.cpu);
      machine.cpu.rip = TestMachine::kCode;
      if (machine.Step()) {
        continue;  // divisions: the faults have tests of their own
      }
      Host32::Run(insn.code());
      const uint64_t compared = (rflags::kStatus | rflags::kDf) & ~uint64_t{row.flags.undefined};
      ASSERT_EQ(machine.cpu.rflags & compared, Host32::saved(8) & compared)
          << row.mnemonic << " " << row.encoding << " round " << round;
      for (unsigned i = 0; i < 8; ++i) {
        ASSERT_EQ(machine.cpu.gpr[i], Host32::saved(i))
            << row.mnemonic << " " << row.encoding << " register " << i << " round " << round;
      }
      ASSERT_EQ(std::memcmp(machine.ram(kData32), Host32::at(kData32), 0x2000), 0)
          << row.mnemonic << " " << row.encoding;
      ++row_runs;
    }
    EXPECT_GT(row_runs, 0u) << row.mnemonic << " " << row.encoding;
    rows += row_runs != 0;
    runs += row_runs;
  }
  EXPECT_GT(rows, 200u);
  std::printf("%u rows, %u runs\n", rows, runs);
}

}  // namespace
}  // namespace kvartz::cpu::x86
