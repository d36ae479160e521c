// Programs with known results that change what translated code was made from, or are interrupted
// while they run. With translation and without.
#include <gtest/gtest.h>

#include <string_view>

#include "cpu/x86/guest_case.h"
#include "cpu/x86/jit/engine.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr uint64_t kRounds = 2000;

class SpecialProgramTest : public testing::TestWithParam<bool> {
 protected:
  SpecialProgramTest() : guest_(Mode::kLong64, 0, "max", 1, SoftOptions{.jit = GetParam()}) {
    guest_.initial.gpr[kRcx] = kRounds;
  }
  GuestCase guest_;
};

// Two functions take turns at one address.
GUEST_CODE(special_triple, "lea 1(%rax,%rax,2), %rax; ret")
GUEST_CODE(special_shift, "shr $1, %rax; xor $0x55, %rax; ret")
GUEST_CODE(special_remap_page, R"(
1: mov %ecx, %edx
  and $1, %edx
  shl $12, %edx
  or $0x100003, %edx
  mov %rdx, 0x13c00            # the entry of the page at 0x180000
  invlpg 0x180000
  mov $0x180000, %ebx
  call *%rbx
  dec %ecx
  jnz 1b
  out %al, $0xf4)")
GUEST_CODE(special_remap_all, R"(
1: mov %ecx, %edx
  and $1, %edx
  shl $12, %edx
  or $0x100003, %edx
  mov %rdx, 0x13c00
  mov %cr3, %rbx
  mov %rbx, %cr3
  mov $0x180000, %ebx
  call *%rbx
  dec %ecx
  jnz 1b
  out %al, $0xf4)")

TEST_P(SpecialProgramTest, CodeIsMappedElsewhere) {
  uint64_t expected = 0x123456789;
  for (uint64_t round = kRounds; round > 0; --round)
    expected = round & 1 ? (expected >> 1) ^ 0x55 : expected * 3 + 1;
  for (auto code : {CODE_OF(special_remap_page), CODE_OF(special_remap_all)}) {
    guest_.Load(CODE_OF(special_triple), kTestPage);
    guest_.Load(CODE_OF(special_shift), kOtherPage);
    guest_.Load(code);
    guest_.initial.gpr[kRax] = 0x123456789;
    Outcome end = guest_.Run();
    EXPECT_EQ(end.vector, -1);
    EXPECT_EQ(end.state.gpr[kRax], expected);
  }
}

// Each round changes an instruction just ahead, one behind, and one in another page.
GUEST_CODE(special_other, ".byte 0x48, 0x83, 0xc0, 0; ret")  // add $0, %rax
GUEST_CODE(special_store, R"(
1: mov %cl, 2f+1(%rip)
  incb 3f+3(%rip)
2: .byte 0x04, 0               # add $0, %al
  mov %cl, 0x100003
  mov $0x100000, %ebx
  call *%rbx
3: .byte 0x48, 0x8d, 0x40, 0   # lea 0(%rax), %rax
  nopl 0x12345(%rax,%rax,8)
  dec %ecx
  jnz 1b
  out %al, $0xf4)")

TEST_P(SpecialProgramTest, CodeIsWrittenAheadAndBehind) {
  guest_.Load(CODE_OF(special_store));
  guest_.Load(CODE_OF(special_other), kTestPage);
  guest_.initial.gpr[kRax] = 0;
  Outcome end = guest_.Run();
  EXPECT_EQ(end.vector, -1);
  uint64_t expected = 0;
  for (uint64_t round = kRounds, behind = 1; round > 0; --round, ++behind) {
    const auto low = static_cast<uint8_t>(round);
    expected = (expected & ~uint64_t{0xff}) | static_cast<uint8_t>(expected + low);
    expected += static_cast<uint64_t>(static_cast<int64_t>(static_cast<int8_t>(low)));
    expected += static_cast<uint64_t>(static_cast<int64_t>(static_cast<int8_t>(behind)));
  }
  EXPECT_EQ(end.state.gpr[kRax], expected);
}

// Registers that no host register is left for, loaded from pages that change each time: what checks
// and their slow paths do with the scratch registers that hold them.
GUEST_CODE(special_walk, R"(
  mov $0x190000, %r15d
  mov $0x191000, %r11d
  mov %r11, (%r15)
  mov %r15, (%r11)
  movq $3, 8(%r15)
  movq $5, 8(%r11)
1: mov (%r15), %r15
  add 8(%r15), %rax
  mov 8(%r15), %r10
  lea (%r10,%r10,2), %r10
  mov %r10, %r11
  add %r11d, %ebx
  cmp %rbx, %r10
  adc $0, %rbp
  push %r11
  pop %r10
  mov 8(%r15,%r10,8), %r11     # 0: nothing is there
  add %r10, %r11
  mov %rcx, %r10
  xor %r10, %rsi
  add %r11, %rdi
  dec %ecx
  jnz 1b
  out %al, $0xf4)")

TEST_P(SpecialProgramTest, RegistersInMemoryWalkThroughPages) {
  guest_.Load(CODE_OF(special_walk));
  for (unsigned reg : {kRax, kRbx, kRbp, kRsi, kRdi}) guest_.initial.gpr[reg] = 0;
  Outcome end = guest_.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRax], kRounds / 2 * (3 + 5));
  EXPECT_EQ(end.state.gpr[kRbx], kRounds / 2 * (9 + 15));
  EXPECT_EQ(end.state.gpr[kRbp], kRounds - 1);
  EXPECT_EQ(end.state.gpr[kRdi], kRounds / 2 * (9 + 15));
  uint64_t mixed = 0;
  for (uint64_t round = kRounds; round > 0; --round) mixed ^= round;
  EXPECT_EQ(end.state.gpr[kRsi], mixed);
  EXPECT_EQ(end.state.gpr[15], 0x190000);
}

// Of every form that can be read from memory when it runs.
GUEST_CODE(special_immediates, R"(
1: imul $0x9e3779b1, %ecx, %ebp
  mov %ebp, 11f-4(%rip)
  bswap %ebp
  mov %ebp, 12f-8(%rip)
  not %ebp
  mov %ebp, 12f-4(%rip)
  mov %ebp, 13f-4(%rip)
  rol $7, %ebp
  mov %ebp, 14f-4(%rip)
  mov %ebp, 15f-4(%rip)
  rol $7, %ebp
  mov %ebp, 16f-4(%rip)
  mov %ebp, 17f-4(%rip)
  mov %bpl, 18f-1(%rip)
  rol $7, %ebp
  mov %ebp, 19f-4(%rip)
  mov %ebp, 20f-4(%rip)
  mov %bpl, 21f-1(%rip)
  mov %ebp, 22f-4(%rip)
  mov %bpl, 23f-1(%rip)
  call 2f
  dec %ecx
  jnz 1b
  out %al, $0xf4
2: mov $0x11111111, %eax
11: movabs $0x1111111111111111, %rdx
12: mov $0x11111111, %rbx
13: add $0x11111111, %rax
14: adc $0x11111111, %edx
15: sub $0x11111111, %rsi
16: sbb $0x11111111, %edi
17: adc $0x11, %r8
18: and $0x11111111, %rbx
19: or $0x11111111, %r9
20: xor $0x11, %r12
21: lea (%rsi,%rbx), %r13
  add %rax, %r14
  cmp $0x11111111, %r13
22: adc $0, %r14
  cmp $0x11, %edi
23: adc %rdx, %r14
  ret)")

TEST(LoadedImmediatesTest, FollowWhatIsWritten) {
  Outcome ends[2];
  for (const bool jit : {false, true}) {
    GuestCase guest(Mode::kLong64, 0, "max", 1, SoftOptions{.jit = jit});
    guest.initial.gpr[kRcx] = kRounds;
    guest.Load(CODE_OF(special_immediates));
    ends[jit] = guest.Run();
    EXPECT_EQ(ends[jit].vector, -1);
    if (!jit) continue;
    const auto rows = guest.board.vcpu().JitStatistics();
    ASSERT_TRUE(rows);
    for (const EngineStatistic& row : *rows) {
      if (std::string_view(row.name) != "units translated") continue;
      EXPECT_LT(row.value, 100);
    }
  }
  for (unsigned reg = 0; reg < 16; ++reg)
    EXPECT_EQ(ends[true].state.gpr[reg], ends[false].state.gpr[reg]) << reg;
}

// The local APIC's timer interrupts a loop of carries at random places.
GUEST_CODE(special_timer, R"(
  mov %ecx, %esi
  mov $0x1b, %ecx
  rdmsr
  or $0xc00, %eax
  wrmsr                        # x2APIC
  mov $0x80f, %ecx
  mov $0x1ff, %eax
  xor %edx, %edx
  wrmsr
  mov $0x832, %ecx
  mov $0x20050, %eax           # periodic, vector 0x50
  wrmsr
  mov $0x83e, %ecx
  mov $0xb, %eax               # undivided
  wrmsr
  mov $0x838, %ecx
  mov $50000, %eax
  wrmsr
  sti
  xor %eax, %eax
  xor %ebx, %ebx
  mov $1, %r8d
  clc
1: adc %r8, %rax
  adc $-1, %rbx
  lea 1(%r8), %r8
  mov %rax, 0x9100
  mov 0x9100, %rax
  dec %esi
  jnz 1b
  cmpl $20, 0x9000             # until enough have come
  mov $1000, %esi
  jb 1b
  cli
  out %al, $0xf4)")
GUEST_CODE(special_tick, R"(
  push %rax
  push %rcx
  push %rdx
  incl 0x9000
  xor %eax, %eax
  xor %edx, %edx
  mov $0x80b, %ecx
  wrmsr
  pop %rdx
  pop %rcx
  pop %rax
  iretq)")

TEST_P(SpecialProgramTest, TimerInterruptsLeaveNoTrace) {
  guest_.Load(CODE_OF(special_timer));
  guest_.Load(CODE_OF(special_tick), 0x9800);
  guest_.SetGate(0x50, 0xe, 0, kCode64, 0x9800);
  Outcome end = guest_.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_GE(guest_.Get<uint32_t>(kData), 20u);
  // However many rounds there were: the same with additions that have a carry.
  uint64_t sum = 0, high = 0;
  bool carry = false;
  for (uint64_t r8 = 1, rounds = 0; r8 < end.state.gpr[kR8]; ++r8, ++rounds) {
    // Each further thousand starts after CMPL, which found too few.
    if (rounds >= kRounds && (rounds - kRounds) % 1000 == 0) carry = true;
    const auto first = static_cast<unsigned __int128>(sum) + r8 + carry;
    sum = static_cast<uint64_t>(first);
    const auto second =
        static_cast<unsigned __int128>(high) + ~uint64_t{0} + static_cast<uint64_t>(first >> 64);
    high = static_cast<uint64_t>(second);
    carry = (second >> 64) != 0;
  }
  EXPECT_EQ(end.state.gpr[kRax], sum);
  EXPECT_EQ(end.state.gpr[kRbx], high);
}

// A page may be read and not written. What one instruction learnt when it read there isn't enough
// for another that writes, also when both would keep their translations in the same place: there
// are at most 512.
GUEST_CODE(special_read_only, R"(
  mov 0x100000, %eax
  .set special_at, 0x20000
  .rept 511
  mov special_at, %eax
  .set special_at, special_at + 0x800
  .endr
  mov %eax, 0x100000
  out %al, $0xf4)")

TEST_P(SpecialProgramTest, ReadingAllowsNoWriting) {
  guest_.Load(CODE_OF(special_read_only));
  guest_.SetPte(kTestPage, kTestPage | 1);
  guest_.Put<uint32_t>(kTestPage, 0x1234);
  guest_.initial.cr0 |= cr0::kWp;
  Outcome end = guest_.Run();
  EXPECT_EQ(end.vector, kPF);
  EXPECT_EQ(end.error, 3u);  // present, a write
  EXPECT_EQ(end.state.cr2, kTestPage);
  EXPECT_EQ(guest_.Get<uint32_t>(kTestPage), 0x1234u);
}

// 64-bit code leaves something in the upper halves of the registers that 32-bit code takes for
// addresses; sums wrap at 4 GiB, into the first page, too.
GUEST_CODE(special_narrow, R"(
1: movabs $0x700009000, %rbx
  movabs $0x7fffff00009000, %rdi
  movabs $0xfffff12300000010, %rsi
  pushq $0x08
  lea 2f(%rip), %rax
  push %rax
  lretq
.code32
2: add (%ebx), %ebp
  add 0x1000(%edi), %ebp
  add 0x8ff0(%esi), %ebp
  mov $0xfffffff0, %edx
  add 0x9010(%edx), %ebp
  add 0x14(%edx), %ebp
  lea 0xff0(%esi), %edi
  add -0xffc(%edi), %ebp
  push %ebp
  pop %ebp
  ljmp $0x18, $(0x8000 + 3f - special_narrow_begin)
.code64
3: dec %ecx
  jnz 1b
  out %al, $0xf4)")

TEST_P(SpecialProgramTest, AddressesOf32BitsStayBelow4GiB) {
  guest_.Load(CODE_OF(special_narrow));
  guest_.Put<uint32_t>(kData, 0x1111);
  guest_.Put<uint32_t>(kData + 0x1000, 0x2222);
  guest_.Put<uint32_t>(4, 0x33333333);
  guest_.initial.gpr[kRbp] = 0;
  Outcome end = guest_.Run();
  EXPECT_EQ(end.vector, -1);
  const uint64_t round = 3 * 0x1111 + 0x2222 + 2 * uint64_t{0x33333333};
  EXPECT_EQ(end.state.gpr[kRbp], static_cast<uint32_t>(kRounds * round));
  // Nothing was reached for outside of the guest's memory.
  const jit::Engine* jit = guest_.board.vcpu().jit();
  EXPECT_EQ(jit == nullptr ? 0 : jit->counters().traps, 0u);
}

INSTANTIATE_TEST_SUITE_P(Jit, SpecialProgramTest, testing::Bool(),
                         [](const testing::TestParamInfo<bool>& param) {
                           return param.param ? "on" : "off";
                         });

}  // namespace
}  // namespace kvartz::cpu::x86
