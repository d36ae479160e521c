// The local APIC as guests see it: interrupts, priorities, timers, IPIs, start-up of a second CPU.
// SDM vol. 3 ch. 9 and 11.
#include "cpu/x86/lapic.h"

#include "cpu/x86/guest_case.h"

namespace kvartz::cpu::x86 {
namespace {

// x2APIC registers are MSRs 0x800 + offset / 16.
#define APIC_WRITE(reg, value) \
  "mov $(0x800+" #reg "), %ecx; mov $" #value ", %eax; xor %edx, %edx; wrmsr;"
#define APIC_READ(reg) "mov $(0x800+" #reg "), %ecx; rdmsr;"
#define X2APIC_ON "mov $0x1b, %ecx; rdmsr; or $0xc00, %eax; wrmsr;" APIC_WRITE(0xf, 0x1ff)

GUEST_CODE(apic_self_ipi, X2APIC_ON APIC_WRITE(0x3f, 0x41) "nop; sti; nop; nop; out %al, $0xf4")
GUEST_CODE(apic_priority, X2APIC_ON APIC_WRITE(0x8, 0x50) APIC_WRITE(0x3f, 0x41)
                              APIC_WRITE(0x3f, 0x5f) "sti; nop; nop;" APIC_WRITE(0x3f, 0x61) "hlt")
GUEST_CODE(apic_tpr_lowered,
           X2APIC_ON APIC_WRITE(0x8, 0x50)
               APIC_WRITE(0x3f, 0x41) "sti; nop; xor %eax, %eax; mov %rax, %cr8; nop; hlt")
GUEST_CODE(apic_registers,
           X2APIC_ON APIC_READ(0x2) "mov %eax, %ebx;" APIC_READ(0x3) "mov %eax, %esi;" APIC_READ(
               0xd) "mov %eax, %edi; out %al, $0xf4")
GUEST_CODE(apic_bad_register, X2APIC_ON APIC_READ(0x4))
GUEST_CODE(apic_xapic_msr, "mov $0x802, %ecx; rdmsr")
GUEST_CODE(apic_esr, X2APIC_ON APIC_WRITE(0x28, 0) APIC_WRITE(0x30, 0x40005) APIC_WRITE(0x28, 0)
                         APIC_READ(0x28) "out %al, $0xf4")
GUEST_CODE(apic_one_shot, X2APIC_ON APIC_WRITE(0x32, 0x50) APIC_WRITE(0x3e, 0xb)
                              APIC_WRITE(0x38, 1000000) "sti; 1: hlt; jmp 1b")
GUEST_CODE(apic_count, X2APIC_ON APIC_WRITE(0x32, 0x10050) APIC_WRITE(0x3e, 3) APIC_WRITE(0x38, 0x7fffffff)
           APIC_READ(0x39) "mov %eax, %ebx;" "rdtsc; mov %eax, %esi; 1: rdtsc; sub %esi, %eax; cmp $1600000, %eax; jb 1b;" APIC_READ(0x39)
           "sub %eax, %ebx; out %al, $0xf4")
GUEST_CODE(apic_deadline, X2APIC_ON APIC_WRITE(0x32, 0x40050)
           "rdtsc; shl $32, %rdx; or %rdx, %rax; add $500000, %rax; mov %rax, %rbx; mov %rax, %rdx; shr $32, %rdx;"
           "mov $0x6e0, %ecx; wrmsr; sti; 1: hlt; jmp 1b")
GUEST_CODE(apic_deadline_running, X2APIC_ON APIC_WRITE(0x32, 0x40050)
           "rdtsc; shl $32, %rdx; or %rdx, %rax; add $500000, %rax; mov %rax, %rdx; shr $32, %rdx;"
           "mov $0x6e0, %ecx; wrmsr; sti; 1: jmp 1b")
GUEST_CODE(apic_no_deadline_mode,
           X2APIC_ON APIC_WRITE(
               0x32, 0x50) "mov $0x6e0, %ecx; mov $-1, %eax; cltd; wrmsr; rdmsr; out %al, $0xf4")
// Periodic: three ticks, counted by the handler at 0x9800.
GUEST_CODE(apic_periodic,
           X2APIC_ON APIC_WRITE(0x32, 0x20050) APIC_WRITE(0x3e, 0xb)
               APIC_WRITE(0x38, 200000) "sti; 1: hlt; cmpl $3, 0x9000; jb 1b; cli; out %al, $0xf4")
GUEST_CODE(apic_tick, "incl 0x9000;" APIC_WRITE(0xb, 0) "iretq")
// The same in xAPIC mode, through the page.
GUEST_CODE(apic_mmio, R"(
  mov $0xfee00000, %ebx
  movl $0x1ff, 0xf0(%rbx)
  mov 0x20(%rbx), %esi
  mov 0x30(%rbx), %edi
  movl $0x0, 0x310(%rbx)
  movl $0x40044, 0x300(%rbx)    # self
  sti
  nop
  nop
  out %al, $0xf4)")
GUEST_CODE(apic_off,
           "mov $0x1b, %ecx; rdmsr; and $~0x800, %eax; wrmsr; mov $1, %eax; cpuid; out %al, $0xf4")
GUEST_CODE(
    apic_bad_mode,
    "mov $0x1b, %ecx; rdmsr; or $0xc00, %eax; wrmsr; and $~0x400, %eax; wrmsr; out %al, $0xf4")

TEST(Lapic, SelfIpiAfterTheShadowOfSti) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(apic_self_ipi));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, 0x41);
  // STI's own shadow covers one NOP.
  EXPECT_EQ(end.rip, kCode + CODE_OF(apic_self_ipi).size() - 3);
}

TEST(Lapic, Priorities) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(apic_priority));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, 0x61);  // 0x41 and 0x5f are of TPR's class or below
  GuestCase lowered(Mode::kLong64);
  lowered.Load(CODE_OF(apic_tpr_lowered));
  EXPECT_EQ(lowered.Run().vector, 0x41);
}

TEST(Lapic, Registers) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(apic_registers));
  Outcome end = guest.Run();
  EXPECT_EQ(end.state.gpr[kRbx], 0u);
  EXPECT_EQ(end.state.gpr[kRsi] & 0xff00ff, 0x050014u);
  EXPECT_EQ(end.state.gpr[kRdi], 1u);  // x2APIC LDR of id 0
  guest.Load(CODE_OF(apic_bad_register));
  EXPECT_EQ(guest.Run().vector, kGP);
  guest.Load(CODE_OF(apic_xapic_msr));
  EXPECT_EQ(guest.Run().vector, kGP);
}

TEST(Lapic, IllegalVectorIsReported) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(apic_esr));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRax], 0x20u);  // send illegal vector
}

TEST(Lapic, Modes) {
  GuestCase off(Mode::kLong64);
  off.Load(CODE_OF(apic_off));
  Outcome end = off.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRdx] & 0x200, 0u);  // CPUID.APIC follows
  GuestCase bad(Mode::kLong64);
  bad.Load(CODE_OF(apic_bad_mode));
  EXPECT_EQ(bad.Run().vector, kGP);  // x2APIC to xAPIC isn't allowed
}

TEST(Lapic, MemoryMapped) {
  GuestCase guest(Mode::kLong64);
  guest.Put<uint64_t>(kTablesAt + 0x1000 + 3 * 8, (kTablesAt + 0x4000) | 3);
  guest.Put<uint64_t>(kTablesAt + 0x4000 + 0x1f7 * 8, 0xfee00083);
  guest.Load(CODE_OF(apic_mmio));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, 0x44);
  EXPECT_EQ(end.state.gpr[kRsi], 0u);
  EXPECT_EQ(end.state.gpr[kRdi] & 0xff00ff, 0x050014u);
}

TEST(Lapic, OneShotTimerWakesHlt) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(apic_one_shot));
  int64_t start = guest.board.clock().NowNs();
  EXPECT_EQ(guest.Run().vector, 0x50);
  EXPECT_GE(guest.board.clock().NowNs() - start, 1'000'000);
}

TEST(Lapic, CountRunsAtOneGigahertzOverTheDivisor) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(apic_count));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  // At least 1.6 ms of a 1 GHz TSC at divisor 16; much more only if the host pauses the test.
  EXPECT_GE(end.state.gpr[kRbx] & 0xffffffff, 100'000u);
  EXPECT_LE(end.state.gpr[kRbx] & 0xffffffff, 60'000'000u);
}

TEST(Lapic, TscDeadline) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(apic_deadline));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, 0x50);
  EXPECT_GE(static_cast<uint64_t>(guest.board.clock().NowNs()), end.state.gpr[kRbx]);
  EXPECT_EQ(end.state.msrs[0x6e0], 0u);  // disarmed when it fired
  GuestCase running(Mode::kLong64);
  running.Load(CODE_OF(apic_deadline_running));
  EXPECT_EQ(running.Run().vector, 0x50);
  GuestCase other(Mode::kLong64);
  other.Load(CODE_OF(apic_no_deadline_mode));
  end = other.Run();
  EXPECT_EQ(end.state.gpr[kRax], 0u);  // writes are ignored in other modes
}

TEST(Lapic, PeriodicTimer) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(apic_periodic));
  guest.Load(CODE_OF(apic_tick), 0xa000);
  guest.SetGate(0x50, 0xe, 0, kCode64, 0xa000);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_GE(guest.Get<uint32_t>(0x9000), 3u);  // another may come before CLI if the host is slow
}

// ---- messages from devices, NMI

GUEST_CODE(apic_wait, X2APIC_ON "movl $1, 0x9000; sti; 1: hlt; jmp 1b")
GUEST_CODE(apic_wait_masked, X2APIC_ON "movl $1, 0x9000; cli; 1: hlt; jmp 1b")

void WaitFor(GuestCase& guest, uint64_t address) {
  while (__atomic_load_n(guest.at(address), __ATOMIC_ACQUIRE) == 0) sched_yield();
}

TEST(Lapic, MessageSignalledInterrupt) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(apic_wait));
  Thread device("device", [&] {
    WaitFor(guest, 0x9000);
    guest.board.accel().SendMsi(0xfee00000, 0x4077);
  });
  EXPECT_EQ(guest.Run().vector, 0x77);
}

TEST(Lapic, NmiIsDeliveredWithInterruptsOff) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(apic_wait_masked));
  Thread device("device", [&] {
    WaitFor(guest, 0x9000);
    guest.board.vcpu().Nmi();
  });
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kNMI);
  EXPECT_TRUE(end.state.events.nmi_masked);
}

GUEST_CODE(apic_pic, "movl $1, 0x9000; sti; 1: hlt; jmp 1b")

TEST(Lapic, PicReachesTheBootstrapProcessor) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(apic_pic));
  Thread device("device", [&] {
    WaitFor(guest, 0x9000);
    guest.board.accel().SetPicOutput(true);
  });
  EXPECT_EQ(guest.Run().vector, 0xff);  // what the board's AcknowledgePic says
}

// ---- two CPUs

// The second one starts in real mode at 0xa000, counts with LOCK, and tells that it is there.
GUEST_CODE(apic_ap, R"(
  .code16
  cli
  xor %ax, %ax
  mov %ax, %ds
  movw $0x5555, 0x9100
  mov $100000, %ecx
1: lock incl 0x9000
  dec %ecx
  jnz 1b
  movl $1, 0x9200
2: hlt
  jmp 2b)")
GUEST_CODE(apic_bsp, X2APIC_ON
           "mov $0x830, %ecx; mov $1, %edx; mov $0xc500, %eax; wrmsr;"  // INIT to APIC id 1
           "mov $0x60a, %eax; wrmsr;"                                   // SIPI, vector 0x0a
           R"(
  mov $100000, %ecx
1: lock incl 0x9000
  dec %ecx
  jnz 1b
2: pause
  cmpl $1, 0x9200
  jne 2b
  out %al, $0xf4)")

TEST(Lapic, InitAndStartup) {
  GuestCase guest(Mode::kLong64, 0, "max", 2);
  guest.Load(CODE_OF(apic_bsp));
  guest.Load(CODE_OF(apic_ap), 0xa000);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(guest.Get<uint16_t>(0x9100), 0x5555u);
  EXPECT_EQ(guest.Get<uint32_t>(0x9000), 200000u);
}

// A locked increment that crosses a page stops the world instead.
GUEST_CODE(apic_ap_split, R"(
  .code16
  cli
  xor %ax, %ax
  mov %ax, %ds
  mov $2000, %ecx
1: lock incl 0x9ffe
  dec %ecx
  jnz 1b
  movl $1, 0x9200
2: hlt
  jmp 2b)")
GUEST_CODE(apic_bsp_split, X2APIC_ON
           "mov $0x830, %ecx; mov $1, %edx; mov $0xc500, %eax; wrmsr; mov $0x60b, %eax; wrmsr;"
           R"(
  mov $2000, %ecx
1: lock incl 0x9ffe
  dec %ecx
  jnz 1b
2: pause
  cmpl $1, 0x9200
  jne 2b
  out %al, $0xf4)")

TEST(Lapic, SplitLocksAreAtomic) {
  GuestCase guest(Mode::kLong64, 0, "max", 2);
  guest.Load(CODE_OF(apic_bsp_split));
  guest.Load(CODE_OF(apic_ap_split), 0xb000);
  EXPECT_EQ(guest.Run().vector, -1);
  EXPECT_EQ(guest.Get<uint32_t>(0x9ffe), 4000u);
}

// Code that one CPU writes and the other runs: each round the second CPU must see the new
// immediate.
GUEST_CODE(apic_ap_runs_code, R"(
  .code16
  cli
  xor %ax, %ax
  mov %ax, %ds
1: cmpl $0, 0x9300
  je 1b
  call 2f
  mov %eax, 0x9304
  movl $0, 0x9300
  jmp 1b
  .org apic_ap_runs_code_begin + 0x100
2: mov $0, %eax
  ret)")
GUEST_CODE(apic_bsp_writes_code, X2APIC_ON
           "mov $0x830, %ecx; mov $1, %edx; mov $0xc500, %eax; wrmsr; mov $0x60b, %eax; wrmsr;"
           R"(
  mov $30, %ebx
1: mov %ebx, 0xb102
  movl $1, 0x9300
2: pause
  cmpl $0, 0x9300
  jne 2b
  cmp %ebx, 0x9304
  jne 3f
  dec %ebx
  jnz 1b
3: out %al, $0xf4)")

TEST(Lapic, CrossModifyingCode) {
  GuestCase guest(Mode::kLong64, 0, "max", 2);
  guest.Load(CODE_OF(apic_bsp_writes_code));
  guest.Load(CODE_OF(apic_ap_runs_code), 0xb000);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRbx], 0u);
}

}  // namespace
}  // namespace kvartz::cpu::x86
