// Programs with known results whose x87 and MMX registers live in the host's unit for a while, and
// must be found in the guest's when something looks. With translation and without.
#include <gtest/gtest.h>

#include "cpu/x86/guest_case.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr uint64_t kRounds = 500;

class X87Test : public testing::TestWithParam<bool> {
 protected:
  X87Test() : guest_(Mode::kLong64, 0, "max", 1, SoftOptions{.jit = GetParam()}) {
    guest_.initial.cr0 |= cr0::kNe | cr0::kMp;
    guest_.initial.cr4 |= cr4::kOsfxsr | cr4::kOsxmmexcpt | cr4::kOsxsave;
    guest_.initial.gpr[kRcx] = kRounds;
    guest_.Put<uint16_t>(kData, 0x37b);  // division by zero unmasked
  }

  static XsaveArea Fpu(const Outcome& end) {
    XsaveArea area;
    std::memcpy(static_cast<void*>(&area), end.state.xsave.data(),
                std::min(end.state.xsave.size(), sizeof(area)));
    return area;
  }

  GuestCase guest_;
};

// The division's exception comes at the next instruction that waits: behind a store of MXCSR's
// like, other work, and a look at the status.
GUEST_CODE(x87_pending, R"(
  fninit
  fldz
  fldcw 0x9000
  fld1
  lea 1f(%rip), %rdi
  lea 2f(%rip), %rsi
1: fdiv %st(1), %st
  mov $5, %ebx
  fnstcw 0x9010
  fnstsw %ax
  fnstsw 0x9012
  .byte 0xeb, 0                # jmp to a unit of its own
  nop
2: flds 0x9100
  out %al, $0xf4)")
GUEST_CODE(x87_pending_mmx, R"(
  fninit
  fldz
  fldcw 0x9000
  fld1
  lea 1f(%rip), %rdi
  lea 2f(%rip), %rsi
1: fdiv %st(1), %st
  mov $5, %ebx
  fnstcw 0x9010
  fnstsw %ax
  fnstsw 0x9012
2: paddb %mm1, %mm0
  out %al, $0xf4)")
GUEST_CODE(x87_pending_wait, R"(
  fninit
  fldz
  fldcw 0x9000
  fld1
  lea 1f(%rip), %rdi
  lea 2f(%rip), %rsi
1: fdiv %st(1), %st
  mov $5, %ebx
  fnstcw 0x9010
  fnstsw %ax
  fnstsw 0x9012
2: fwait
  out %al, $0xf4)")

TEST_P(X87Test, PendingExceptionComesAtTheNextInstructionThatWaits) {
  for (auto code : {CODE_OF(x87_pending), CODE_OF(x87_pending_mmx), CODE_OF(x87_pending_wait)}) {
    guest_.Load(code);
    Outcome end = guest_.Run();
    EXPECT_EQ(end.vector, kMF);
    EXPECT_EQ(end.rip, end.state.gpr[kRsi]);
    EXPECT_EQ(end.state.gpr[kRbx], 5u);
    EXPECT_EQ(end.state.gpr[kRax] & 0xffff, 0xb084u);  // B, ES, ZE; TOP 6
    EXPECT_EQ(guest_.Get<uint16_t>(kData + 0x10), 0x37b);
    EXPECT_EQ(guest_.Get<uint16_t>(kData + 0x12), 0xb084);
    const XsaveArea fpu = Fpu(end);
    EXPECT_EQ(fpu.fip, end.state.gpr[kRdi]);
    EXPECT_EQ(fpu.fop, 0x0f1);  // D8 F1
    EXPECT_EQ(fpu.fsw, 0xb084);
    EXPECT_EQ(fpu.ftw, 0xc0);
    EXPECT_EQ(fpu.st[0][9], 0x3f);  // still 1
  }
}

// With CR0.NE clear the error goes to a pin that nothing is connected to.
TEST_P(X87Test, PendingExceptionIsNothingWithoutNe) {
  guest_.initial.cr0 &= ~cr0::kNe;
  guest_.Load(CODE_OF(x87_pending));
  EXPECT_EQ(guest_.Run().vector, -1);
}

GUEST_CODE(x87_disabled, R"(
  fninit
  fld1
  fadd %st, %st
  mov %cr0, %rax
  or %rdx, %rax
  mov %rax, %cr0
  lea 1f(%rip), %rsi
  cmp $0, %ebx
  jne 2f
1: fadd %st, %st
  out %al, $0xf4
2: lea 3f(%rip), %rsi
3: paddb %mm1, %mm0
  out %al, $0xf4)")

TEST_P(X87Test, DisabledUnitRaisesAndKeepsItsState) {
  guest_.Load(CODE_OF(x87_disabled));
  for (const bool mmx : {false, true}) {
    for (const uint64_t bit : {cr0::kTs, cr0::kEm}) {
      guest_.initial.gpr[kRdx] = bit;
      guest_.initial.gpr[kRbx] = mmx ? 1 : 0;
      Outcome end = guest_.Run();
      EXPECT_EQ(end.vector, mmx && bit == cr0::kEm ? kUD : kNM);
      EXPECT_EQ(end.rip, end.state.gpr[kRsi]);
      const XsaveArea fpu = Fpu(end);
      EXPECT_EQ(fpu.fsw, 0x3800);
      EXPECT_EQ(fpu.ftw, 0x80);
      EXPECT_EQ(fpu.st[0][9], 0x40);  // 2
      EXPECT_EQ(fpu.st[0][8], 0);
    }
  }
}

// What is interpreted in between, and memory touched for the first time, go by way of C++.
GUEST_CODE(x87_helpers, R"(
  fninit
  mov %ecx, %esi
  fld1
  fldz
  mov $0x20000, %edi
  xor %ebp, %ebp
  movq %rbp, %xmm1
  mov $1, %ebp
  movq %rbp, %xmm2
1: fadd %st(1), %st
  xor %eax, %eax
  cpuid
  paddq %xmm2, %xmm1
  fadd %st(1), %st
  fistl (%rdi)
  fiaddl (%rdi)
  fisubl (%rdi)
  add $0x404, %edi
  and $0x2ffff, %edi
  or $0x20000, %edi
  dec %esi
  jnz 1b
  fistpll 0x9100
  movq %xmm1, 0x9108
  fnstcw 0x9110
  out %al, $0xf4)")

TEST_P(X87Test, StateSurvivesHelpers) {
  guest_.Load(CODE_OF(x87_helpers));
  Outcome end = guest_.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(guest_.Get<uint64_t>(kData + 0x100), 2 * kRounds);
  EXPECT_EQ(guest_.Get<uint64_t>(kData + 0x108), kRounds);
  EXPECT_EQ(guest_.Get<uint16_t>(kData + 0x110), 0x37f);
  EXPECT_EQ(Fpu(end).ftw, 0x80);
}

// Two tasks take turns: one counts in ST(0), the other in MM3.
GUEST_CODE(x87_switch_fxsave, R"(
  fninit
  fxsave64 0x9400
  fxsave64 0x9800
  fxrstor64 0x9400
  fld1
  fldz
1: fadd %st(1), %st
  fxsave64 0x9400
  fxrstor64 0x9800
  mov $3, %eax
  movd %eax, %mm2
  paddd %mm2, %mm3
  fxsave64 0x9800
  fxrstor64 0x9400
  dec %ecx
  jnz 1b
  fistpll 0x9100
  fxrstor64 0x9800
  movq %mm3, 0x9108
  emms
  out %al, $0xf4)")
GUEST_CODE(x87_switch_xsave, R"(
  mov %ecx, %esi
  xor %ecx, %ecx
  xor %edx, %edx
  mov $7, %eax
  xsetbv
  mov %esi, %ecx
  fninit
  xsave64 0x9400
  xsavec64 0x9800
  fld1
  fldz
1: fadd %st(1), %st
  mov $7, %eax
  xsave64 0x9400
  xrstor64 0x9800
  mov $3, %eax
  movd %eax, %mm2
  paddd %mm2, %mm3
  mov $7, %eax
  xsavec64 0x9800
  xrstor64 0x9400
  dec %ecx
  jnz 1b
  fistpll 0x9100
  xrstor64 0x9800
  movq %mm3, 0x9108
  emms
  out %al, $0xf4)")

TEST_P(X87Test, TasksAreSwitched) {
  for (auto code : {CODE_OF(x87_switch_fxsave), CODE_OF(x87_switch_xsave)}) {
    guest_.Put<uint64_t>(kData + 0x100, 0);
    guest_.Put<uint64_t>(kData + 0x108, 0);
    std::memset(guest_.at(kData + 0x400), 0, 0x800);
    guest_.Load(code);
    Outcome end = guest_.Run();
    EXPECT_EQ(end.vector, -1);
    EXPECT_EQ(guest_.Get<uint64_t>(kData + 0x100), kRounds);
    EXPECT_EQ(guest_.Get<uint64_t>(kData + 0x108), 3 * kRounds);
    EXPECT_EQ(Fpu(end).ftw, 0);
    EXPECT_EQ(Fpu(end).fsw & 0x3800, 0);
  }
}

// Pointers are those of the guest's instruction, be they looked at from another page, and whatever
// the address is made of.
GUEST_CODE(x87_pointers, R"(
  fninit
  mov $0x9000, %r10d
  mov $0x10, %r11d
  mov $0x100000, %ebx
  lea 1f(%rip), %r14
  flds 0x140(%r10,%r11,4)
1: fld %st(0)
  fnstcw 0x9000
  call *%rbx
  lea 2f(%rip), %r14
2: fadds 0x9184
  call *%rbx
  lea 3f(%rip), %r14
3: fchs
  fldcw 0x9000
  pxor %mm0, %mm0
  call *%rbx
  out %al, $0xf4)")
GUEST_CODE(x87_look, R"(
  push %r14
  fxsave64 0x9600
  mov 0x9608, %rax
  sub %r14, %rax
  mov %rax, 0x9010(,%rdx,8)
  mov 0x9610, %rax
  mov %rax, 0x9030(,%rdx,8)
  movzwl 0x9606, %eax
  mov %rax, 0x9050(,%rdx,8)
  inc %edx
  pop %r14
  ret)")

TEST_P(X87Test, PointersAreTheGuests) {
  guest_.Load(CODE_OF(x87_pointers));
  guest_.Load(CODE_OF(x87_look), kTestPage);
  guest_.initial.gpr[kRdx] = 0;
  for (unsigned run = 0; run < 3; ++run) {
    Outcome end = guest_.Run();
    EXPECT_EQ(end.vector, -1);
    const uint64_t expected[][3] = {// FIP from where the program says, FDP, FOP
                                    {0, 0x9180, 0x1c0},  // fld st0
                                    {0, 0x9184, 0x004},
                                    {0, 0x9184, 0x1e0}};
    for (unsigned i = 0; i < 3; ++i) {
      EXPECT_EQ(guest_.Get<uint64_t>(kData + 0x10 + 8 * i), expected[i][0]) << i;
      EXPECT_EQ(guest_.Get<uint64_t>(kData + 0x30 + 8 * i), expected[i][1]) << i;
      EXPECT_EQ(guest_.Get<uint64_t>(kData + 0x50 + 8 * i), expected[i][2]) << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Jit, X87Test, testing::Bool(),
                         [](const testing::TestParamInfo<bool>& param) {
                           return param.param ? "on" : "off";
                         });

}  // namespace
}  // namespace kvartz::cpu::x86
