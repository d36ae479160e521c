// The state of vCPUs and VM goes to another VM, through its saved form, while a program runs.
#include <gmock/gmock.h>

#include <cstring>

#include "base/state_visitor.h"
#include "cpu/kvm/kvm_vcpu.h"
#include "cpu/kvm/payloads.h"
#include "cpu/kvm/test_machine.h"

namespace kvartz::cpu::kvm {
namespace {

class KvmStateTest : public ::testing::Test {
 protected:
  void SetUp() override { REQUIRE_KVM(); }
};

// Everything of a parked machine but its RAM.
std::vector<uint8_t> Save(TestMachine& machine, unsigned cpus) {
  return SaveState([&](StateVisitor& v) {
    v.Section("vm", [&] { machine.accel().VisitState(v); });
    for (unsigned i = 0; i < cpus; ++i) {
      X86State state;
      Result<> result = machine.vcpu(i).GetState(&state);
      EXPECT_TRUE(result.has_value()) << result.error().what;
      v.Section("cpu" + std::to_string(i), [&] { state.VisitState(v); });
    }
  });
}

Result<> Load(TestMachine& machine, unsigned cpus, std::span<const uint8_t> bytes) {
  return LoadState(bytes, [&](StateVisitor& v) {
    v.Section("vm", [&] { machine.accel().VisitState(v); });
    for (unsigned i = 0; i < cpus; ++i) {
      X86State state;
      v.Section("cpu" + std::to_string(i), [&] { state.VisitState(v); });
      if (v.failed()) return;
      if (Result<> result = machine.vcpu(i).SetState(state); !result) v.Reject(result.error().what);
    }
  });
}

// But for the page of the local APIC, whose timer counts on.
std::string Dump(TestMachine& machine) {
  return DumpState([&](StateVisitor& v) {
    v.Section("vm", [&] { machine.accel().VisitState(v); });
    X86State state;
    EXPECT_TRUE(machine.vcpu().GetState(&state).has_value());
    state.lapic.fill(0);
    v.Section("cpu", [&] { state.VisitState(v); });
  });
}

void CopyRam(TestMachine& from, TestMachine& to) {
  std::memcpy(to.ram().host(), from.ram().host(), kRamSize);
}

uint64_t Live(TestMachine& machine, uint64_t gpa) {
  return __atomic_load_n(reinterpret_cast<uint64_t*>(machine.ram().host() + gpa), __ATOMIC_ACQUIRE);
}

// Until the word at `gpa` exceeds `value`.
bool WaitAbove(TestMachine& machine, uint64_t gpa, uint64_t value) {
  int64_t deadline = MonotonicClock::Instance().NowNs() + 60'000'000'000;
  while (Live(machine, gpa) <= value) {
    if (MonotonicClock::Instance().NowNs() > deadline) return false;
    sched_yield();
  }
  return true;
}

// A ring-3 loop that checks its vector, x87 and FS registers, interrupted by a periodic timer, goes
// on in a fresh VM.
void MoveRunningPayload(IrqchipMode mode) {
  constexpr uint64_t kTimerCount = kCounters + 8 * 0x46, kLoops = kShared + 0x20;
  bool avx = HostCpuid().Has("avx");
  auto source = TestMachine::Create({.irqchip = mode});
  auto target = TestMachine::Create({.irqchip = mode});
  source->Write(0x9180, 0x5aa5);
  source->SetShared(5, avx);
  X86State state = source->LongMode(pl_move);
  if (OnHardware()) {
    state.cr4 |= 0x40000;  // OSXSAVE
    state.xcr0 = avx ? 7 : 3;
  }
  Result<> started = source->vcpu().SetState(state);
  ASSERT_TRUE(started.has_value()) << started.error().what;
  source->Resume();
  ASSERT_TRUE(source->WaitReports(1));
  ASSERT_TRUE(WaitAbove(*source, kTimerCount, 1));
  source->Park();

  std::vector<uint8_t> saved = Save(*source, 1);
  CopyRam(*source, *target);
  Result<> loaded = Load(*target, 1, saved);
  ASSERT_TRUE(loaded.has_value()) << loaded.error().what;
  EXPECT_EQ(Dump(*target), Dump(*source));

  uint64_t ticks = target->Read(kTimerCount), loops = target->Read(kLoops);
  target->Resume();
  EXPECT_TRUE(WaitAbove(*target, kTimerCount, ticks + 1));  // the timer runs on
  EXPECT_TRUE(WaitAbove(*target, kLoops, loops));
  target->SetShared(1, 1);  // enough
  EXPECT_TRUE(target->WaitDone());
  target->Park();
  EXPECT_EQ(target->done_value(), 29u);
  EXPECT_THAT(target->reports(), testing::ElementsAre(0x900d));
  EXPECT_EQ(source->Read(kTimerCount), ticks);  // the source stood still
}

TEST_F(KvmStateTest, RunningProgramMovesToAnotherVm) { MoveRunningPayload(IrqchipMode::kKernel); }
TEST_F(KvmStateTest, RunningProgramMovesToAnotherVmSplitIrqchip) {
  MoveRunningPayload(IrqchipMode::kUser);
}

TEST_F(KvmStateTest, EveryRegisterComesBack) {
  auto machine = TestMachine::Create();
  X86State state = machine->LongMode(pl_done);
  for (unsigned i = 0; i < 16; ++i) state.gpr[i] = 0x1111111111111111ull * (i + 1) % 0x7fffffffffff;
  state.rflags = 0x246;
  state.seg[kFs].base = 0x123456789000;
  state.seg[kGs].base = 0x987654000;
  state.cr2 = 0xabcdef;
  state.cr8 = 5;
  state.lapic[0x80] = 0x50;  // the task priority, CR8 by another name
  state.lapic[0xa0] = 0x50;  // and the processor priority that follows from it
  for (unsigned i = 0; i < 4; ++i) state.dr[i] = 0x1000 * (i + 1);
  state.dr[7] = 0x455;
  state.xsave[160] = 0x77;  // XMM0
  state.xsave[512] |= 2;
  state.msrs[0xc0000102] = 0x5555000;
  state.msrs[0x174] = 0x10;
  state.msrs[0x277] = 0x0606060606060606;
  state.events.nmi_masked = true;
  state.events.nmi_pending = true;
  state.events.interrupt_shadow = 2;
  ASSERT_TRUE(machine->vcpu().SetState(state).has_value());
  X86State back;
  ASSERT_TRUE(machine->vcpu().GetState(&back).has_value());
  auto dump = [](X86State& s) {
    s.msrs[0x10] = 0;  // runs
    return DumpState([&](StateVisitor& v) { v.Section("cpu", [&] { s.VisitState(v); }); });
  };
  EXPECT_EQ(dump(back), dump(state));
}

TEST_F(KvmStateTest, RefusesWhatTheHostLacks) {
  auto machine = TestMachine::Create();
  X86State state = machine->LongMode(pl_done);
  state.xsave.resize(16384);
  state.xsave[16383] = 1;
  EXPECT_FALSE(machine->vcpu().SetState(state).has_value());
  state = machine->LongMode(pl_done);
  state.msrs[0x12345678] = 9;
  Result<> result = machine->vcpu().SetState(state);
  ASSERT_FALSE(result.has_value());
  EXPECT_THAT(result.error().what, testing::HasSubstr("0x12345678"));
  state.msrs[0x12345678] = 0;  // what is not there reads zero
  EXPECT_TRUE(machine->vcpu().SetState(state).has_value());
}

TEST_F(KvmStateTest, StateOfAnotherIrqchipIsRefused) {
  auto kernel = TestMachine::Create();
  auto split = TestMachine::Create({.irqchip = IrqchipMode::kUser});
  std::vector<uint8_t> saved = Save(*kernel, 1);
  Result<> result = Load(*split, 1, saved);
  ASSERT_FALSE(result.has_value());
  EXPECT_THAT(result.error().what, testing::HasSubstr("irqchip"));
}

// SDM vol. 3 table 10-1, whatever ran before.
TEST_F(KvmStateTest, ResetForgetsWhatRan) {
  auto machine = TestMachine::Create();
  X86State fresh;
  ASSERT_TRUE(machine->vcpu().GetState(&fresh).has_value());
  machine->Start(pl_reset_probe);
  EXPECT_EQ(machine->Run(), 35u);
  ASSERT_TRUE(machine->accel().ResetVm().has_value());
  Result<> result = machine->vcpu().Reset();
  ASSERT_TRUE(result.has_value()) << result.error().what;
  X86State state;
  ASSERT_TRUE(machine->vcpu().GetState(&state).has_value());
  EXPECT_EQ(state.rip, 0xfff0u);
  EXPECT_EQ(state.seg[kCs].base, 0xffff0000u);
  EXPECT_EQ(state.efer, 0u);
  EXPECT_EQ(state.cr0, 0x60000010u);
  EXPECT_EQ(state.apic_base, 0xfee00900u);
  EXPECT_EQ(state.mp_state, MpState::kRunnable);
  for (auto& [index, value] : fresh.msrs) {
    if (index == 0x10) continue;
    EXPECT_EQ(state.msrs[index], value) << std::hex << index;
  }
  EXPECT_EQ(state.lapic, fresh.lapic);
  machine->Start(pl_done);
  EXPECT_EQ(machine->Run(), 0x600du);
}

TEST_F(KvmStateTest, GuestTimeStandsStillWhileStopped) {
  auto machine = TestMachine::Create();
  machine->Start(pl_spin);
  machine->Resume();
  ASSERT_TRUE(machine->WaitReports(1));
  machine->Park();
  X86State first, second;
  ASSERT_TRUE(machine->vcpu().GetState(&first).has_value());
  ASSERT_TRUE(machine->vcpu().GetState(&second).has_value());
  EXPECT_EQ(first.msrs[0x10], second.msrs[0x10]);
  EXPECT_GT(first.msrs[0x10], 0u);
}

}  // namespace
}  // namespace kvartz::cpu::kvm
