// General instructions: what the random comparison with the host's CPU in 64-bit mode can't reach.
// Expected values follow the SDM's pseudocode (vol. 2); decimal arithmetic is compared with the
// host's CPU in compatibility mode.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include "cpu/x86/host_modes.h"
#include "cpu/x86/interp/machine.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr uint64_t kBcdFlags = rflags::kStatus;

// Runs one instruction on the host in a 32-bit code segment: EAX and the status flags in and out.
class CompatibilityMode {
 public:
  CompatibilityMode() {
    void* map = mmap(nullptr, 8192, PROT_READ | PROT_WRITE | PROT_EXEC,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    page_ = map == MAP_FAILED ? nullptr : static_cast<uint8_t*>(map);
    if (page_ == nullptr) {
      return;
    }
    static constexpr uint8_t kStub[] = {
        0x53, 0x55,              // push rbx, rbp
        0x48, 0x89, 0xfb,        // mov rbx, rdi
        0x48, 0x89, 0xe5,        // mov rbp, rsp
        0x48, 0x8b, 0x63, 0x18,  // mov rsp, [rbx + stack]
        0x8b, 0x03,              // mov eax, [rbx]
        0xff, 0x73, 0x08, 0x9d,  // push [rbx + flags_in]; popfq
        0xff, 0x5b, 0x20,        // call far [rbx + far_offset]
        0x9c, 0x8f, 0x43, 0x10,  // pushfq; pop [rbx + flags_out]
        0x89, 0x03,              // mov [rbx], eax
        0x48, 0x89, 0xec,        // mov rsp, rbp
        0x5d, 0x5b, 0xc3,        // pop rbp, rbx; ret
    };
    std::memcpy(page_, kStub, sizeof kStub);
    frame_ = reinterpret_cast<Frame*>(page_ + 512);
  }
  ~CompatibilityMode() {
    if (page_ != nullptr) {
      munmap(page_, 8192);
    }
  }
  bool usable() const { return page_ != nullptr; }

  void Run(std::span<const uint8_t> instruction, uint32_t* eax, uint64_t* flags) {
    uint8_t* code = page_ + 1024;
    std::memcpy(code, instruction.data(), instruction.size());
    code[instruction.size()] = 0xcb;  // retf
    *frame_ = {.eax = *eax,
               .flags_in = 0x202 | (*flags & kBcdFlags),
               .flags_out = 0,
               .stack = reinterpret_cast<uint64_t>(page_ + 8192 - 64),
               .far_offset = static_cast<uint32_t>(reinterpret_cast<uint64_t>(code)),
               .far_selector = kUser32Cs};
    reinterpret_cast<void (*)(Frame*)>(page_)(frame_);
    *eax = static_cast<uint32_t>(frame_->eax);
    *flags = frame_->flags_out & kBcdFlags;
  }

 private:
  struct Frame {
    uint64_t eax, flags_in, flags_out, stack;
    uint32_t far_offset;
    uint16_t far_selector;
  };
  uint8_t* page_ = nullptr;
  Frame* frame_ = nullptr;
};

TEST(Integer, DecimalArithmeticAgreesWithTheHost) {
  CompatibilityMode host;
  if (!HostRuns32BitCode()) {
    GTEST_SKIP() << kNo32BitCode;
  }
  if (!host.usable()) {
    GTEST_SKIP() << "no memory below 4 GiB for 32-bit code";
  }
  const std::vector<uint8_t> instructions[] = {
      {0x27}, {0x2f}, {0x37}, {0x3f}, {0xd4, 10}, {0xd4, 7}, {0xd5, 10}, {0xd5, 200}, {0xd6}};
  TestMachine machine(CodeMode::k32);
  for (const auto& instruction : instructions) {
    machine.SetCode(instruction);
    Insn insn;
    DecodeContext context;
    context.mode = CodeMode::k32;
    ASSERT_EQ(Decode(context, instruction, &insn), DecodeStatus::kOk);
    const uint64_t compared = kBcdFlags & ~uint64_t{insn.row->flags.undefined};
    for (uint32_t i = 0; i < 0x10000; i += (instruction.size() > 1 ? 1 : 3)) {
      for (const uint64_t flags_in :
           {uint64_t{0}, rflags::kAf, rflags::kCf, rflags::kAf | rflags::kCf}) {
        uint32_t eax = 0xabcd0000 | i;
        uint64_t flags = flags_in;
        machine.cpu.rip = TestMachine::kCode;
        machine.cpu.gpr[kRax] = eax;
        machine.cpu.rflags = 2 | flags;
        host.Run(instruction, &eax, &flags);
        ASSERT_FALSE(machine.Step());
        ASSERT_EQ(machine.cpu.gpr[kRax], eax)
            << insn.row->mnemonic << " " << std::hex << i << " " << flags_in;
        ASSERT_EQ(machine.cpu.rflags & compared, flags & compared)
            << insn.row->mnemonic << " " << std::hex << i << " " << flags_in;
      }
    }
  }
}

TEST(Integer, AamByZeroAndDivisionErrors) {
  TestMachine machine(CodeMode::k32);
  machine.SetCode({0xd4, 0x00});
  EXPECT_EQ(machine.Step(), kDE);
  TestMachine wide;
  wide.SetCode({0x48, 0xf7, 0xf1});  // div rcx
  wide.cpu.gpr[kRcx] = 0;
  EXPECT_EQ(wide.Step(), kDE);
  EXPECT_EQ(wide.cpu.rip, TestMachine::kCode);
  wide.cpu.gpr[kRcx] = 5;
  wide.cpu.gpr[kRdx] = 5;  // quotient of 65 bits
  EXPECT_EQ(wide.Step(), kDE);
  wide.cpu.gpr[kRdx] = 4;
  wide.cpu.gpr[kRax] = ~0ull;
  EXPECT_FALSE(wide.Step());
  EXPECT_EQ(wide.cpu.gpr[kRax], ~0ull);
  EXPECT_EQ(wide.cpu.gpr[kRdx], 4u);
  wide.SetCode({0x48, 0xf7, 0xf9});  // idiv rcx: the smallest number by -1, in 64 and in 128 bits
  wide.cpu.gpr[kRcx] = ~0ull;
  wide.cpu.gpr[kRax] = 1ull << 63;
  wide.cpu.gpr[kRdx] = ~0ull;
  EXPECT_EQ(wide.Step(), kDE);
  wide.cpu.gpr[kRax] = 0;
  wide.cpu.gpr[kRdx] = 1ull << 63;
  EXPECT_EQ(wide.Step(), kDE);
  wide.SetCode({0xf7, 0xf9});  // idiv ecx: -2^31 * 2 / 2
  wide.cpu.gpr[kRcx] = 2;
  wide.cpu.gpr[kRax] = 0;
  wide.cpu.gpr[kRdx] = 0xffffffff;
  EXPECT_FALSE(wide.Step());
  EXPECT_EQ(wide.cpu.gpr[kRax], 0x80000000u);
}

TEST(Integer, ModifyingReadOnlyMemoryFaultsAsAWrite) {
  TestMachine machine;
  for (const uint64_t page : {TestMachine::kReadOnly, TestMachine::kNotPresent}) {
    for (const bool locked : {false, true}) {
      machine.SetCode(locked ? std::vector<uint8_t>{0xf0, 0x01, 0x03}
                             : std::vector<uint8_t>{0x01, 0x03});  // add [rbx], eax
      machine.cpu.gpr[kRbx] = page + 8;
      machine.cpu.gpr[kRax] = 1;
      machine.cpu.rflags = 0x8d7;
      ASSERT_EQ(machine.Step(), kPF);
      EXPECT_EQ(machine.cpu.fault.error, page == TestMachine::kReadOnly ? 7u : 6u);
      EXPECT_EQ(machine.cpu.cr2, page + 8);
      EXPECT_EQ(machine.cpu.rflags, 0x8d7u);
      EXPECT_EQ(machine.cpu.rip, TestMachine::kCode);
    }
  }
}

TEST(Integer, AccessesAcrossPagesChangeAllOrNothing) {
  TestMachine machine;
  const uint64_t edge = TestMachine::kNotPresent - 4;
  machine.Store<uint32_t>(edge, 0x11223344);
  machine.SetCode({0x48, 0x83, 0x03, 0x01});  // add qword [rbx], 1
  machine.cpu.gpr[kRbx] = edge;
  ASSERT_EQ(machine.Step(), kPF);
  EXPECT_EQ(machine.cpu.cr2, TestMachine::kNotPresent);
  EXPECT_EQ(machine.Load<uint32_t>(edge), 0x11223344u);
  // Across two pages that are there: plain, locked, exchanged.
  const uint64_t middle = TestMachine::kData + 0x1000 - 4;
  machine.Store<uint64_t>(middle, 0xffffffff);
  machine.cpu.gpr[kRbx] = middle;
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.Load<uint64_t>(middle), 0x100000000u);
  machine.SetCode({0xf0, 0x48, 0x83, 0x2b, 0x01});  // lock sub qword [rbx], 1
  machine.cpu.gpr[kRbx] = middle;
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.Load<uint64_t>(middle), 0xffffffffu);
  machine.SetCode({0x48, 0x87, 0x03});  // xchg [rbx], rax
  machine.cpu.gpr[kRax] = 7;
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.Load<uint64_t>(middle), 7u);
  EXPECT_EQ(machine.cpu.gpr[kRax], 0xffffffffu);
}

TEST(Integer, CompareExchangeOfPairs) {
  TestMachine machine;
  machine.SetCode({0xf0, 0x48, 0x0f, 0xc7, 0x0f});  // lock cmpxchg16b [rdi]
  machine.cpu.gpr[kRdi] = TestMachine::kData;
  machine.Store<uint64_t>(TestMachine::kData, 1);
  machine.Store<uint64_t>(TestMachine::kData + 8, 2);
  machine.cpu.gpr[kRax] = 1;
  machine.cpu.gpr[kRdx] = 3;
  machine.cpu.gpr[kRbx] = 10;
  machine.cpu.gpr[kRcx] = 20;
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.cpu.rflags & rflags::kZf, 0u);
  EXPECT_EQ(machine.cpu.gpr[kRdx], 2u);
  machine.cpu.rip = TestMachine::kCode;
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.cpu.rflags & rflags::kZf, rflags::kZf);
  EXPECT_EQ(machine.Load<uint64_t>(TestMachine::kData), 10u);
  EXPECT_EQ(machine.Load<uint64_t>(TestMachine::kData + 8), 20u);
  machine.cpu.rip = TestMachine::kCode;
  machine.cpu.gpr[kRdi] += 8;
  EXPECT_EQ(machine.Step(), kGP);  // not aligned
}

TEST(Integer, RepeatedMoveStopsExactlyAtAFault) {
  TestMachine machine;
  machine.SetCode({0xf3, 0xa4});  // rep movsb
  for (uint64_t i = 0; i < 0x3000; ++i) {
    *machine.ram(TestMachine::kData + i) = static_cast<uint8_t>(i * 7);
  }
  machine.cpu.gpr[kRsi] = TestMachine::kData;
  machine.cpu.gpr[kRdi] = TestMachine::kNotPresent - 0x1800;
  machine.cpu.gpr[kRcx] = 0x3000;
  ASSERT_EQ(machine.Run(), kPF);
  EXPECT_EQ(machine.cpu.gpr[kRcx], 0x1800u);
  EXPECT_EQ(machine.cpu.gpr[kRsi], TestMachine::kData + 0x1800);
  EXPECT_EQ(machine.cpu.gpr[kRdi], TestMachine::kNotPresent);
  EXPECT_EQ(machine.cpu.cr2, TestMachine::kNotPresent);
  EXPECT_EQ(machine.cpu.fault.error, 6u);
  EXPECT_EQ(machine.cpu.rip, TestMachine::kCode);
  EXPECT_EQ(std::memcmp(machine.ram(TestMachine::kNotPresent - 0x1800),
                        machine.ram(TestMachine::kData), 0x1800),
            0);
}

TEST(Integer, RepeatedMoveOverlapsAsByteByByte) {
  for (const int distance : {1, 3, 8, 100}) {
    TestMachine machine;
    machine.SetCode({0xf3, 0xa4, 0x0f, 0x0b});
    std::vector<uint8_t> expected(0x2100);
    for (size_t i = 0; i < expected.size(); ++i) {
      expected[i] = *machine.ram(TestMachine::kData + i) = static_cast<uint8_t>(i * 13 + 1);
    }
    for (size_t i = 0; i < 0x1800; ++i) {
      expected[static_cast<size_t>(distance) + i] = expected[i];
    }
    machine.cpu.gpr[kRsi] = TestMachine::kData;
    machine.cpu.gpr[kRdi] = TestMachine::kData + static_cast<unsigned>(distance);
    machine.cpu.gpr[kRcx] = 0x1800;
    ASSERT_EQ(machine.Run(), kUD);
    EXPECT_EQ(std::memcmp(machine.ram(TestMachine::kData), expected.data(), expected.size()), 0)
        << distance;
    EXPECT_EQ(machine.cpu.gpr[kRcx], 0u);
  }
}

TEST(Integer, StringsBackwardsAndByAddressSize) {
  TestMachine machine;
  machine.SetCode({0xfd, 0x67, 0xf3, 0xab, 0x0f, 0x0b});  // std; rep stos dword [edi] with ECX
  machine.cpu.gpr[kRdi] = 0xffffffff00000000 | (TestMachine::kData + 12);
  machine.cpu.gpr[kRcx] = 0xffffffff00000003;
  machine.cpu.gpr[kRax] = 0x01020304;
  ASSERT_EQ(machine.Run(), kUD);
  EXPECT_EQ(machine.Load<uint32_t>(TestMachine::kData), 0u);
  EXPECT_EQ(machine.Load<uint32_t>(TestMachine::kData + 4), 0x01020304u);
  EXPECT_EQ(machine.Load<uint32_t>(TestMachine::kData + 12), 0x01020304u);
  EXPECT_EQ(machine.cpu.gpr[kRdi], TestMachine::kData);  // written as 32-bit registers
  EXPECT_EQ(machine.cpu.gpr[kRcx], 0u);
  // repne scasb finds the byte and stops behind it
  machine.SetCode({0xfc, 0xf2, 0xae, 0x0f, 0x0b});
  machine.Store<uint8_t>(TestMachine::kData + 0x800, 0x5a);
  machine.cpu.gpr[kRdi] = TestMachine::kData;
  machine.cpu.gpr[kRcx] = 0x1000;
  machine.cpu.gpr[kRax] = 0x5a;
  ASSERT_EQ(machine.Run(), kUD);
  EXPECT_EQ(machine.cpu.gpr[kRdi], TestMachine::kData + 0x801);
  EXPECT_EQ(machine.cpu.gpr[kRcx], 0x1000u - 0x801);
  EXPECT_NE(machine.cpu.rflags & rflags::kZf, 0u);
}

TEST(Integer, StackFrames) {
  TestMachine machine;
  machine.SetCode({0xc8, 0x20, 0x00, 0x03, 0xc9});  // enter 32, 3; leave
  const uint64_t old_frame = TestMachine::kStack + 0x100;
  machine.cpu.gpr[kRbp] = old_frame;
  machine.Store<uint64_t>(old_frame - 8, 0xaa);
  machine.Store<uint64_t>(old_frame - 16, 0xbb);
  ASSERT_FALSE(machine.Step());
  const uint64_t frame = TestMachine::kStack - 8;
  EXPECT_EQ(machine.cpu.gpr[kRbp], frame);
  EXPECT_EQ(machine.Load<uint64_t>(frame), old_frame);
  EXPECT_EQ(machine.Load<uint64_t>(frame - 8), 0xaau);
  EXPECT_EQ(machine.Load<uint64_t>(frame - 16), 0xbbu);
  EXPECT_EQ(machine.Load<uint64_t>(frame - 24), frame);
  EXPECT_EQ(machine.cpu.gpr[kRsp], frame - 24 - 32);
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.cpu.gpr[kRbp], old_frame);
  EXPECT_EQ(machine.cpu.gpr[kRsp], TestMachine::kStack);

  TestMachine protected32(CodeMode::k32);
  protected32.SetCode({0x60, 0x61});  // pusha; popa
  for (unsigned i = 0; i < 8; ++i) {
    if (i != kRsp) {
      protected32.cpu.gpr[i] = i + 1;
    }
  }
  ASSERT_FALSE(protected32.Step());
  EXPECT_EQ(protected32.cpu.gpr[kRsp], TestMachine::kStack - 32);
  for (unsigned i = 0; i < 8; ++i) {
    EXPECT_EQ(protected32.Load<uint32_t>(TestMachine::kStack - 4 * (i + 1)),
              i == kRsp ? TestMachine::kStack : i + 1);
    if (i != kRsp) {
      protected32.cpu.gpr[i] = 0;
    }
  }
  ASSERT_FALSE(protected32.Step());
  EXPECT_EQ(protected32.cpu.gpr[kRsp], TestMachine::kStack);
  EXPECT_EQ(protected32.cpu.gpr[kRdi], kRdi + 1u);
}

TEST(Integer, PushAndPopOfTheStackPointer) {
  TestMachine machine;
  machine.SetCode(
      {0x54, 0x8f, 0x44, 0x24, 0x08});  // push rsp; pop [rsp+8]: the address uses the popped rSP
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.Load<uint64_t>(TestMachine::kStack - 8), TestMachine::kStack);
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.Load<uint64_t>(TestMachine::kStack + 8), TestMachine::kStack);
  EXPECT_EQ(machine.cpu.gpr[kRsp], TestMachine::kStack);
  machine.SetCode({0x8f, 0x03});  // pop [rbx] that faults leaves rSP
  machine.cpu.gpr[kRbx] = TestMachine::kReadOnly;
  ASSERT_EQ(machine.Step(), kPF);
  EXPECT_EQ(machine.cpu.gpr[kRsp], TestMachine::kStack);
  machine.SetCode({0x5c});  // pop rsp
  machine.Store<uint64_t>(TestMachine::kStack, 0x1234);
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.cpu.gpr[kRsp], 0x1234u);
}

TEST(Integer, NonCanonicalTargets) {
  TestMachine machine;
  machine.SetCode({0xff, 0xe0});  // jmp rax
  machine.cpu.gpr[kRax] = 0x0000800000000000;
  EXPECT_EQ(machine.Step(), kGP);
  EXPECT_EQ(machine.cpu.rip, TestMachine::kCode);
  machine.SetCode({0xff, 0xd0});  // call rax pushes nothing
  machine.Store<uint64_t>(TestMachine::kStack - 8, 0x77);
  EXPECT_EQ(machine.Step(), kGP);
  EXPECT_EQ(machine.cpu.gpr[kRsp], TestMachine::kStack);
  EXPECT_EQ(machine.Load<uint64_t>(TestMachine::kStack - 8), 0x77u);
  machine.SetCode({0xc3});
  machine.Store<uint64_t>(TestMachine::kStack, 0x8000000000000000);
  EXPECT_EQ(machine.Step(), kGP);
  EXPECT_EQ(machine.cpu.gpr[kRsp], TestMachine::kStack);
}

TEST(Integer, RealModeAddressesWrap) {
  TestMachine machine(CodeMode::k16);
  machine.cpu.seg[kCs].base = TestMachine::kCode;
  machine.cpu.seg[kDs].base = TestMachine::kData;
  machine.SetCode({0x8a, 0x00, 0xd7});  // mov al, [bx+si]; xlat
  machine.cpu.rip = 0;
  machine.cpu.gpr[kRbx] = 0xffff0000ffffff00;
  machine.cpu.gpr[kRsi] = 0x0110;
  machine.Store<uint8_t>(TestMachine::kData + 0x10, 0xf8);
  machine.Store<uint8_t>(TestMachine::kData + 0xfff8, 0x99);
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.cpu.gpr[kRax] & 0xff, 0xf8u);
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.cpu.gpr[kRax] & 0xff, 0x99u);
  // A jump wraps within 16 bits, and a word behind the limit is #GP.
  machine.SetCode({0xeb, 0x80});
  machine.cpu.rip = 0;
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.cpu.rip, 0xff82u);
  machine.SetCode({0x8b, 0x07});  // mov ax, [bx]
  machine.cpu.rip = 0;
  machine.cpu.gpr[kRbx] = 0xffff;
  EXPECT_EQ(machine.Step(), kGP);
}

TEST(Integer, LoopsByAddressSize) {
  TestMachine machine(CodeMode::k32);
  machine.SetCode({0xe2, 0xfe});  // loop self
  machine.cpu.gpr[kRcx] = 2;
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.cpu.rip, TestMachine::kCode);
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.cpu.rip, TestMachine::kCode + 2);
  machine.SetCode({0x67, 0xe2, 0xfd});  // with CX: ECX above is untouched
  machine.cpu.gpr[kRcx] = 0x50000;
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.cpu.gpr[kRcx], 0x5ffffu);
  machine.SetCode({0x67, 0xe3, 0x10});  // jcxz
  machine.cpu.gpr[kRcx] = 0x50000;
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.cpu.rip, TestMachine::kCode + 0x13);
}

TEST(Integer, BitStringsReachBeyondTheirOperand) {
  TestMachine machine;
  machine.SetCode({0x0f, 0xab, 0x0b});  // bts [rbx], ecx
  machine.cpu.gpr[kRbx] = TestMachine::kData;
  machine.cpu.gpr[kRcx] = static_cast<uint32_t>(-33);
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.Load<uint32_t>(TestMachine::kData - 8), 0x80000000u);
  EXPECT_EQ(machine.cpu.rflags & rflags::kCf, 0u);
  machine.SetCode(
      {0x0f, 0xba, 0x2b, 0x21});  // bts dword [rbx], 33: an immediate is taken modulo 32
  ASSERT_FALSE(machine.Step());
  EXPECT_EQ(machine.Load<uint32_t>(TestMachine::kData), 2u);
}

TEST(Integer, BoundRaisesBr) {
  TestMachine machine(CodeMode::k32);
  machine.SetCode({0x62, 0x03});  // bound eax, [ebx]
  machine.cpu.gpr[kRbx] = TestMachine::kData;
  machine.Store<int32_t>(TestMachine::kData, -5);
  machine.Store<int32_t>(TestMachine::kData + 4, 5);
  machine.cpu.gpr[kRax] = static_cast<uint32_t>(-5);
  EXPECT_FALSE(machine.Step());
  machine.cpu.rip = TestMachine::kCode;
  machine.cpu.gpr[kRax] = 6;
  EXPECT_EQ(machine.Step(), kBR);
}

}  // namespace
}  // namespace kvartz::cpu::x86
