// The engine's own interface: kicks, reset, state in and out, a second machine that goes on where
// the first stopped.
#include "cpu/x86/engine.h"

#include <sys/resource.h>

#include "cpu/x86/guest_case.h"

namespace kvartz::cpu::x86 {
namespace {

GUEST_CODE(eng_spin, "1: incq 0x9000; jmp 1b")
GUEST_CODE(eng_sleep, "cli; movl $1, 0x9000; hlt")
GUEST_CODE(eng_count, R"(
  mov $0x1122334455667788, %r9
  movq %r9, %xmm3
  fninit
  fld1
  fldpi
  mov $0x10000, %ecx
1: incq 0x9000
  dec %ecx
  jnz 1b
  out %al, $0xf4               # first half ends here
  movq %xmm3, %rax
  fstpl 0x9100
  mov $0x10000, %ecx
2: incq 0x9000
  dec %ecx
  jnz 2b
  out %al, $0xf4)")

TEST(Engine, NoExecutableMemoryIsAnError) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a process that has no such memory yet
  EXPECT_EXIT(
      {
        rlimit none = {};
        setrlimit(RLIMIT_NOFILE, &none);
        auto accel = CreateSoftEngine({});
        if (!accel) fprintf(stderr, "%s\n", accel.error().what.c_str());
        _exit(accel ? 1 : 0);
      },
      testing::ExitedWithCode(0), "executable memory.*Too many open files");
}

GUEST_CODE(eng_nmi, "mov $1000000, %ecx; 1: dec %ecx; jnz 1b; out %al, $0xf4")

// An NMI is taken at once although something else is asked of the CPU at the same time.
TEST(Engine, NmiWithAKick) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(eng_nmi));
  ASSERT_TRUE(guest.board.vcpu().SetState(guest.initial));
  __atomic_store_n(&guest.board.cpu().requests, request::kKick | request::kNmi, __ATOMIC_SEQ_CST);
  EXPECT_EQ(guest.Continue().vector, kNMI);
}

TEST(Engine, NmiInAnInterruptShadow) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(eng_nmi));
  guest.initial.events.interrupt_shadow = 1;
  ASSERT_TRUE(guest.board.vcpu().SetState(guest.initial));
  __atomic_store_n(&guest.board.cpu().requests, request::kShadow | request::kNmi, __ATOMIC_SEQ_CST);
  Outcome end = guest.Continue();
  EXPECT_EQ(end.vector, kNMI);
  EXPECT_EQ(end.rip, kCode + 5);  // behind the one instruction that the shadow covers
}

TEST(Engine, KickEndsRun) {
  for (auto code : {CODE_OF(eng_spin), CODE_OF(eng_sleep)}) {
    GuestCase guest(Mode::kLong64);
    guest.Load(code);
    ASSERT_TRUE(guest.board.vcpu().SetState(guest.initial));
    Thread kicker("kicker", [&] {
      while (__atomic_load_n(guest.at(0x9000), __ATOMIC_ACQUIRE) == 0) sched_yield();
      guest.board.vcpu().Kick();
    });
    EXPECT_EQ(guest.board.vcpu().Run(), Vcpu::Exit::kKicked);
  }
}

TEST(Engine, KickBeforeRunEndsItAtOnce) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(eng_spin));
  ASSERT_TRUE(guest.board.vcpu().SetState(guest.initial));
  guest.board.vcpu().Kick();
  EXPECT_EQ(guest.board.vcpu().Run(), Vcpu::Exit::kKicked);
}

TEST(Engine, ResetState) {
  BareBoard board(1 << 20, 2);
  X86State state;
  ASSERT_TRUE(board.vcpu().GetState(&state));
  EXPECT_EQ(state.rip, 0xfff0u);
  EXPECT_EQ(state.seg[kCs].base, 0xffff0000u);
  EXPECT_EQ(state.seg[kCs].selector, 0xf000);
  EXPECT_EQ(state.cr0, 0x60000010u);
  EXPECT_EQ(state.rflags, 2u);
  EXPECT_EQ(state.dr[6], 0xffff0ff0u);
  EXPECT_EQ(state.dr[7], 0x400u);
  EXPECT_EQ(state.apic_base, 0xfee00900u);
  EXPECT_EQ(state.mp_state, MpState::kRunnable);
  ASSERT_TRUE(board.vcpu(1).GetState(&state));
  EXPECT_EQ(state.apic_base, 0xfee00800u);
  EXPECT_EQ(state.mp_state, MpState::kUninitialized);
  EXPECT_EQ(state.lapic[0x23], 1);  // its id
}

TEST(Engine, AnotherMachineGoesOn) {
  GuestCase first(Mode::kLong64);
  first.initial.cr4 |= cr4::kOsfxsr;
  first.initial.rflags |= rflags::kDf;
  first.Load(CODE_OF(eng_count));
  Outcome half = first.Run();
  EXPECT_EQ(half.vector, -1);
  EXPECT_EQ(first.Get<uint64_t>(0x9000), 0x10000u);

  // By way of the saved stream, as a migration.
  auto bytes = SaveState([&](StateVisitor& v) { half.state.VisitState(v); });
  X86State loaded;
  ASSERT_TRUE(LoadState(bytes, [&](StateVisitor& v) { loaded.VisitState(v); }));
  GuestCase second(Mode::kLong64);
  memcpy(second.board.ram(), first.board.ram(), 1 << 21);
  second.initial = loaded;
  Outcome end = second.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(second.Get<uint64_t>(0x9000), 0x20000u);
  EXPECT_EQ(end.state.gpr[kRax], 0x1122334455667788u);
  double pi = second.Get<double>(0x9100);
  EXPECT_EQ(pi, 3.14159265358979323846);
  EXPECT_TRUE(end.state.rflags & rflags::kDf);
  EXPECT_GE(end.state.msrs[0x10], half.state.msrs[0x10]);  // the TSC goes on
}

// After RESET all x87 exceptions are unmasked and the stack is full: an overflow, pending with
// CR0.NE clear, is ignored.
GUEST_CODE(eng_fpu_error,
           "fld1; fld1; fld1; fnstsw %ax; mov %cr0, %rbx; or $0x20, %bl; mov %rbx, %cr0; fld1")

TEST(Engine, PendingFloatingPointError) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(eng_fpu_error));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kMF);  // with NE
  EXPECT_EQ(end.state.gpr[kRax] & 0x80c1, 0x80c1u);
}

// A machine that is saved while it waits for its timer is woken by it after the restore.
GUEST_CODE(eng_deadline, R"(
  mov $0x1b, %ecx
  rdmsr
  or $0xc00, %eax
  wrmsr
  mov $0x80f, %ecx
  mov $0x1ff, %eax
  xor %edx, %edx
  wrmsr
  mov $0x832, %ecx
  mov $0x40050, %eax
  wrmsr
  rdtsc
  shl $32, %rdx
  or %rdx, %rax
  add $20000000, %rax
  mov %rax, %rdx
  shr $32, %rdx
  mov $0x6e0, %ecx
  wrmsr
  out %al, $0xf4
  sti
1: hlt
  jmp 1b)")

TEST(Engine, TimersSurviveTheRestore) {
  GuestCase first(Mode::kLong64);
  first.Load(CODE_OF(eng_deadline));
  Outcome half = first.Run();
  EXPECT_EQ(half.vector, -1);
  EXPECT_NE(half.state.msrs[0x6e0], 0u);
  GuestCase second(Mode::kLong64);
  memcpy(second.board.ram(), first.board.ram(), 1 << 21);
  second.initial = half.state;
  EXPECT_EQ(second.Run().vector, 0x50);
}

// What is set comes back, register by register.
TEST(Engine, StateRoundTrip) {
  GuestCase guest(Mode::kLong64);
  X86State& state = guest.initial;
  for (unsigned i = 0; i < 16; i++) state.gpr[i] = 0x0101010101010101u * i;
  state.cr2 = 0xdeadbeef000;
  state.xcr0 = 3;
  state.dr[0] = 0x1234;
  state.msrs[0x277] = 0x0007010600070106;
  state.msrs[0xc0000082] = 0xffffffff81000000;
  state.msrs[0xc0000102] = 0xffff888000000000;
  state.seg[kFs].base = 0x7f0000001000;
  state.lapic[0x80] = 0x20;  // TPR
  state.lapic[0x2f0 / 16 * 16] = 0;
  state.cr8 = 2;
  ASSERT_TRUE(guest.board.vcpu().SetState(state));
  X86State back;
  ASSERT_TRUE(guest.board.vcpu().GetState(&back));
  EXPECT_EQ(back.gpr, state.gpr);
  EXPECT_EQ(back.cr2, state.cr2);
  EXPECT_EQ(back.cr3, state.cr3);
  EXPECT_EQ(back.xcr0, 3u);
  EXPECT_EQ(back.cr8, 2u);
  EXPECT_EQ(back.dr[0], 0x1234u);
  EXPECT_EQ(back.msrs[0x277], 0x0007010600070106u);
  EXPECT_EQ(back.msrs[0xc0000082], 0xffffffff81000000u);
  EXPECT_EQ(back.msrs[0xc0000102], 0xffff888000000000u);
  EXPECT_EQ(back.seg[kFs].base, 0x7f0000001000u);
  EXPECT_EQ(back.efer, state.efer);
}

TEST(Engine, HostileStateIsTamed) {
  GuestCase guest(Mode::kLong64);
  X86State state = guest.initial;
  state.cr4 = ~0ull;
  state.efer = ~0ull;
  state.xcr0 = ~0ull;
  state.rflags = ~0ull;
  state.apic_base = ~0ull;
  state.cr3 = ~0ull;
  state.xsave.assign(832, 0xff);
  state.lapic.fill(0xff);
  state.rip = ~0ull;
  for (auto& s : state.seg) s.attributes = ~0u;
  ASSERT_TRUE(guest.board.vcpu().SetState(state));
  guest.initial = state;
  (void)guest.Run();  // whatever it does, the engine survives: a triple fault
  EXPECT_EQ(guest.board.triple_faults, 1);
}

TEST(Engine, CpuidOfTheEngine) {
  BareBoard board(1 << 20);
  const CpuidTable& table = board.accel().cpuid(0);
  EXPECT_EQ(table.Lookup(0x40000000, 0).ebx, 0x4b4d564bu);  // "KVMK"
  EXPECT_EQ(table.Lookup(0x40000010, 0).eax, 1'000'000u);
  for (const char* feature : {"x2apic", "tsc-deadline", "invtsc", "pcid", "smap", "smep", "umip",
                              "fsgsbase", "pdpe1gb", "nx"}) {
    EXPECT_TRUE(table.Has(feature)) << feature;
  }
  for (const char* feature : {"la57", "vmx", "svm", "monitor", "avx512f", "pku"})
    EXPECT_FALSE(table.Has(feature)) << feature;
  BareBoard plain(1 << 20, 1, "max,kvm=off");
  EXPECT_EQ(plain.accel().cpuid(0).Lookup(0x40000000, 0).ebx, 0x7261764bu);  // "Kvar"
}

}  // namespace
}  // namespace kvartz::cpu::x86
