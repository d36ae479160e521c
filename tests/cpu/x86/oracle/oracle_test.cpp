// The own engine against the host's CPU: random user-mode instructions of every row of the
// instruction tables. By the interpreter's functions alone, and as blocks on a whole machine, with
// translation and without.
//
// KVARTZ_ORACLE_CASES and KVARTZ_ORACLE_SEED choose how many cases and which (default: a slice for
// every build).
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "cpu/cpuid.h"
#include "cpu/x86/host_modes.h"
#include "cpu/x86/oracle/board_cpu.h"
#include "cpu/x86/oracle/case_generator.h"
#include "cpu/x86/oracle/native_cpu.h"
#include "cpu/x86/oracle/soft_cpu.h"

namespace kvartz::cpu::x86::oracle {
namespace {

uint64_t Setting(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 0) : otherwise;
}

std::string Hex(const uint8_t* bytes, size_t size) {
  std::string text;
  char two[4];
  for (size_t i = 0; i < size; ++i) {
    snprintf(two, sizeof(two), "%02x", bytes[i]);
    text += two;
  }
  return text;
}

// What differs between the two, one line each; empty if nothing does.
class Comparison {
 public:
  Comparison(const Case& test, const Outcome& native, const Outcome& soft)
      : test_(test), native_(native), soft_(soft) {
    Number("fault", native.fault, soft.fault);
    if (native.fault != soft.fault) {
      Number("fault address", native.fault_address, soft.fault_address);
      Number("error code", native.error, soft.error);
    }
    if (native.fault == soft.fault && native.fault != kNoFault) {
      Number("error code", native.error, soft.error);
      // CMPS may look at either operand first.
      if (test.undefined_encoding || std::string_view(test.insn.row->mnemonic) != "CMPS")
        Number("fault address", native.fault_address, soft.fault_address);
    }
    static const char* const kNames[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                         "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
    const unsigned count = test.mode == Mode::k64 ? 16 : 8;
    for (unsigned i = 0; i < count; ++i)
      Number(kNames[i], native.registers.gpr[i], soft.registers.gpr[i]);
    Number("rip", native.registers.rip, soft.registers.rip);
    Flags();
    Vectors();
  }
  void Memory(const uint8_t* native, const uint8_t* soft) {
    if (std::memcmp(native, soft, kDataSize) == 0) return;
    for (uint64_t i = 0; i < kDataSize; ++i) {
      if (native[i] == soft[i]) continue;
      text_ += "  memory at " + std::to_string(i) + ": host " + Hex(native + i, 8) + " kvartz " +
               Hex(soft + i, 8) + "\n";
      return;
    }
  }
  const std::string& text() const { return text_; }

 private:
  void Number(const char* what, uint64_t native, uint64_t soft) {
    if (native == soft) return;
    char line[128];
    snprintf(line, sizeof(line), "  %s: host %#lx kvartz %#lx\n", what, native, soft);
    text_ += line;
  }
  void Flags() {
    uint64_t mask = rflags::kStatus | rflags::kDf;
    if (!test_.undefined_encoding && native_.fault == kNoFault)
      mask &= ~uint64_t{test_.insn.row->flags.undefined};
    Number("flags", native_.registers.rflags & mask, soft_.registers.rflags & mask);
  }
  void Bytes(const std::string& what, const uint8_t* native, const uint8_t* soft, unsigned size) {
    if (std::memcmp(native, soft, size) == 0) return;
    text_ += "  " + what + ": host " + Hex(native, size) + " kvartz " + Hex(soft, size) + "\n";
  }
  void Vectors() {
    const XsaveArea& n = native_.registers.fpu;
    const XsaveArea& s = soft_.registers.fpu;
    // How far a gather had got when it faulted, and what its pending mask elements hold, is the
    // implementation's choice.
    const bool faulted_gather =
        native_.fault != kNoFault && !test_.undefined_encoding && test_.insn.has(kVsib);
    const unsigned count = faulted_gather ? 0 : test_.mode == Mode::k64 ? 16 : 8;
    if (std::memcmp(n.xmm, s.xmm, 16 * count) != 0 ||
        std::memcmp(n.ymm_high, s.ymm_high, 16 * count) != 0) {
      for (unsigned i = 0; i < count; ++i) {
        Bytes("xmm" + std::to_string(i), n.xmm[i], s.xmm[i], 16);
        Bytes("ymm high " + std::to_string(i), n.ymm_high[i], s.ymm_high[i], 16);
      }
    }
    for (unsigned i = 0; i < 8; ++i) Bytes("st" + std::to_string(i), n.st[i], s.st[i], 10);
    Number("fcw", n.fcw, s.fcw);
    Number("fsw", n.fsw, s.fsw);
    Number("ftw", n.ftw, s.ftw);
    Number("mxcsr", n.mxcsr, s.mxcsr);
  }

  const Case& test_;
  const Outcome& native_;
  const Outcome& soft_;
  std::string text_;
};

class OracleTest : public testing::Test {
 protected:
  explicit OracleTest(std::unique_ptr<CaseRunner> soft = std::make_unique<SoftCpu>())
      : features_(FeatureSet::FromCpuid(HostCpuid())),
        generator_(Setting("KVARTZ_ORACLE_SEED", 1), features_),
        soft_(std::move(soft)) {
    RandomMemory();
  }

  void RandomMemory() {
    std::vector<uint8_t> bytes(kDataSize);
    for (uint64_t at = 0; at < kDataSize; at += 64)
      generator_.FillInteresting(bytes.data() + at, 64);
    native_.SetData(bytes.data());
    std::memcpy(soft_->data(), bytes.data(), kDataSize);
  }

  // Runs one case on both; the differences.
  std::string Try(const Case& test) {
    for (const Poke& poke : test.pokes) {
      std::memcpy(reinterpret_cast<void*>(poke.address), &poke.value, 8);
      std::memcpy(soft_->data() + (poke.address - kData), &poke.value, 8);
    }
    std::memcpy(before_.data(), soft_->data(), kDataSize);
    const Outcome soft = soft_->Run(test);
    const std::string text = HostDiffers(test, soft);
    if (text.empty()) return "";
    // A virtualised host under load isn't the same CPU every time: it may lose GS's base, or raise
    // what a page fault of its own led to. A difference is one if it is there each time.
    std::string again = text;
    for (unsigned i = 0; i < kHostRuns && !again.empty(); ++i) {
      native_.SetData(before_.data());
      again = HostDiffers(test, soft);
    }
    std::memcpy(soft_->data(), native_.data(), kDataSize);
    if (!again.empty()) return text;
    ++host_lapses_;
    printf("The host did something else when it ran this again (%s):\n%s",
           Hex(test.code.data(), test.code.size()).c_str(), text.c_str());
    return "";
  }

  std::string HostDiffers(const Case& test, const Outcome& soft) {
    native_.SetCode(test.registers.rip, test.code);
    const Outcome native = native_.Run(test.registers, test.mode);
    // AMD's CALL pushes before it looks at its target; ours, as the SDM has it, looks first.
    const bool both_fault = !test.undefined_encoding && native.fault == kPF && soft.fault == kGP &&
                            std::string_view(test.insn.row->mnemonic) == "CALL";
    if (both_fault) return "";
    Comparison comparison(test, native, soft);
    comparison.Memory(native_.data(), soft_->data());
    return comparison.text();
  }

  // All rows, `slice` cases unless told otherwise.
  void Everything(uint64_t slice);

  FeatureSet features_;
  CaseGenerator generator_;
  NativeCpu native_;
  std::unique_ptr<CaseRunner> soft_;
  static constexpr unsigned kHostRuns = 16;
  std::vector<uint8_t> before_ = std::vector<uint8_t>(kDataSize);  // data, before the case
  uint64_t host_lapses_ = 0;
};

void OracleTest::Everything(uint64_t slice) {
  const uint64_t wanted = Setting("KVARTZ_ORACLE_CASES", slice);
  const std::string only =
      std::getenv("KVARTZ_ORACLE_ONLY") ? std::getenv("KVARTZ_ORACLE_ONLY") : "";
  std::vector<const Row*> rows;
  for (const Row& row : InsnRows()) {
    if (!WhyExcluded(row) && (only.empty() || only == row.mnemonic)) rows.push_back(&row);
  }
  ASSERT_FALSE(rows.empty());
  std::map<std::string, unsigned> failures;
  std::map<const Row*, uint64_t> tried;
  uint64_t done = 0, differences = 0;
  const bool has_32bit = HostRuns32BitCode();
  if (!has_32bit) printf("Cases in 64-bit mode only: %s\n", kNo32BitCode);
  Case test;
  for (uint64_t round = 0; done < wanted && round < wanted * 20; ++round) {
    const Row& row = *rows[round % rows.size()];
    const Mode mode = generator_.Chance(25) && has_32bit ? Mode::k32 : Mode::k64;
    if (!generator_.Generate(row, mode, &test)) continue;
    ++done;
    ++tried[&row];
    if (done % 65536 == 0) RandomMemory();
    const std::string text = Try(test);
    if (text.empty()) continue;
    ++differences;
    if (++failures[row.mnemonic] <= 2) {
      ADD_FAILURE() << row.mnemonic << " \"" << row.encoding << "\" "
                    << (mode == Mode::k64 ? "64" : "32") << "-bit, code "
                    << Hex(test.code.data(), test.code.size())
                    << (test.registers.rflags & rflags::kTf ? " TF" : "") << "\n"
                    << text;
    }
  }
  unsigned untried = 0;
  for (const Row* row : rows) untried += !tried.contains(row);
  printf(
      "%lu cases over %zu rows (%u never came up: features or modes that the host lacks), %lu "
      "differences in %zu "
      "instructions, %lu times the host did something else when it ran a case again\n",
      done, rows.size(), untried, differences, failures.size(), host_lapses_);
  EXPECT_EQ(differences, 0u);
}

class OracleBlockTest : public OracleTest, public testing::WithParamInterface<bool> {
 protected:
  OracleBlockTest() : OracleTest(std::make_unique<BoardCpu>(SoftOptions{.jit = GetParam()})) {}
};

TEST_F(OracleTest, EveryRowAgreesWithTheHost) { Everything(200000); }

TEST_P(OracleBlockTest, EveryRowAgreesWithTheHost) { Everything(60000); }

INSTANTIATE_TEST_SUITE_P(Jit, OracleBlockTest, testing::Bool(),
                         [](const testing::TestParamInfo<bool>& param) {
                           return param.param ? "on" : "off";
                         });

}  // namespace
}  // namespace kvartz::cpu::x86::oracle
