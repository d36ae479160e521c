#include "cpu/kvm/kvm_irq.h"

#include <gmock/gmock.h>
#include <poll.h>

#include "base/fd.h"
#include "cpu/kvm/payloads.h"
#include "cpu/kvm/test_machine.h"

namespace kvartz::cpu::kvm {
namespace {

using ::testing::ElementsAre;

constexpr uint64_t kMsiAddress = 0xfee00000;

class KvmIrqTest : public ::testing::Test {
 protected:
  void SetUp() override { REQUIRE_KVM(); }
  // The payload waits for `count` interrupts of `vector`, and has said so.
  std::unique_ptr<TestMachine> Waiting(const char* label, unsigned vector, uint64_t count,
                                       IrqchipMode mode = IrqchipMode::kKernel) {
    auto machine = TestMachine::Create({.irqchip = mode});
    machine->SetShared(0, vector);
    machine->SetShared(1, count);
    machine->Start(label);
    machine->Resume();
    EXPECT_TRUE(machine->WaitReports(1));
    return machine;
  }
};

bool WaitReadable(const EventFd& event) {
  pollfd poll_fd{.fd = event.fd(), .events = POLLIN, .revents = 0};
  return poll(&poll_fd, 1, 60000) == 1;
}

TEST_F(KvmIrqTest, SelfIpi) {
  for (IrqchipMode mode : {IrqchipMode::kKernel, IrqchipMode::kUser}) {
    auto machine = TestMachine::Create({.irqchip = mode});
    machine->Start(pl_self_ipi);
    EXPECT_EQ(machine->Run(), 11u);
    EXPECT_EQ(machine->Counter(0x41), 1u);
    EXPECT_EQ(machine->reports()[0] & 0xff, 0x14u);  // an integrated APIC's version
  }
}

TEST_F(KvmIrqTest, X2apicRegisters) {
  auto machine = TestMachine::Create();
  machine->Start(pl_x2apic);
  EXPECT_EQ(machine->Run(), 12u);
  EXPECT_EQ(machine->Counter(0x42), 1u);
  EXPECT_THAT(machine->reports(), ElementsAre(0));  // id
}

TEST_F(KvmIrqTest, ApicTimerTicks) {
  auto machine = TestMachine::Create();
  machine->Start(pl_apic_timer);
  EXPECT_EQ(machine->Run(), 13u);
  EXPECT_GE(machine->Counter(0x43), 3u);
}

TEST_F(KvmIrqTest, TscDeadlineWakesOnceAndDisarms) {
  auto machine = TestMachine::Create();
  machine->Start(pl_tsc_deadline);
  EXPECT_EQ(machine->Run(), 14u);
  EXPECT_EQ(machine->Counter(0x44), 1u);
  EXPECT_THAT(machine->reports(), ElementsAre(0));
}

TEST_F(KvmIrqTest, PitThroughThePic) {
  auto machine = TestMachine::Create();
  machine->Start(pl_pit);
  EXPECT_EQ(machine->Run(), 15u);
  EXPECT_GE(machine->Counter(0x30), 5u);
}

TEST_F(KvmIrqTest, LinesReachThePicPair) {
  auto machine = TestMachine::Create();
  machine->Start(pl_pic);
  machine->Resume();
  ASSERT_TRUE(machine->WaitReports(1));
  machine->accel().SetGsi(4, true);
  machine->accel().SetGsi(4, false);
  ASSERT_TRUE(machine->WaitReports(2));
  machine->accel().SetGsi(12, true);
  machine->accel().SetGsi(12, false);
  EXPECT_TRUE(machine->WaitDone());
  EXPECT_EQ(machine->Counter(0x34), 1u);
  EXPECT_EQ(machine->Counter(0x3c), 1u);
}

TEST_F(KvmIrqTest, LinesReachTheIoapic) {
  auto machine = TestMachine::Create();
  machine->SetShared(1, 1);
  machine->Start(pl_ioapic);
  machine->Resume();
  ASSERT_TRUE(machine->WaitReports(1));
  machine->accel().SetGsi(5, true);  // edge
  machine->accel().SetGsi(5, false);
  ASSERT_TRUE(machine->WaitReports(2));
  machine->accel().SetGsi(9, true);  // level
  ASSERT_TRUE(machine->WaitReports(3));
  machine->accel().SetGsi(9, false);
  machine->accel().SetGsi(0, true);  // ISA line 0 is pin 2
  EXPECT_TRUE(machine->WaitDone());
  EXPECT_EQ(machine->done_value(), 17u);
  EXPECT_EQ(machine->Counter(0x45), 1u);
  EXPECT_GE(machine->Counter(0x49), 1u);
  EXPECT_EQ(machine->Counter(0x50), 1u);
}

TEST_F(KvmIrqTest, Messages) {
  for (const char* label : {pl_wait, pl_halt_wait}) {
    auto machine = Waiting(label, 0x47, 1);
    machine->accel().SendMsi(kMsiAddress, 0x47);
    EXPECT_TRUE(machine->WaitDone());
    EXPECT_EQ(machine->Counter(0x47), 1u);
  }
}

// Each is acknowledged before the next: none may be lost.
TEST_F(KvmIrqTest, NoMessageIsLost) {
  constexpr uint64_t kCount = 300;
  auto machine = Waiting(pl_halt_wait, 0x47, kCount);
  for (uint64_t i = 1; i <= kCount; ++i) {
    machine->accel().SendMsi(kMsiAddress, 0x47);
    if (i == kCount) break;
    auto arrived = [&] {
      return __atomic_load_n(
                 reinterpret_cast<uint64_t*>(machine->ram().host() + kCounters + 8 * 0x47),
                 __ATOMIC_ACQUIRE) >= i;
    };
    int64_t deadline = MonotonicClock::Instance().NowNs() + 60'000'000'000;
    while (!arrived() && MonotonicClock::Instance().NowNs() < deadline) sched_yield();
    ASSERT_TRUE(arrived()) << i;
  }
  EXPECT_TRUE(machine->WaitDone());
  EXPECT_EQ(machine->Counter(0x47), kCount);
}

TEST_F(KvmIrqTest, DescriptorsRaiseMessages) {
  for (IrqchipMode mode : {IrqchipMode::kKernel, IrqchipMode::kUser}) {
    auto machine = Waiting(pl_halt_wait, 0x48, 1, mode);
    EventFd event = EventFd::Create().value(), other = EventFd::Create().value();
    Result<uint64_t> wrong = machine->accel().AddIrqFd(other.fd(), kMsiAddress, 0x77);
    Result<uint64_t> right = machine->accel().AddIrqFd(event.fd(), kMsiAddress, 0x48);
    ASSERT_TRUE(wrong.has_value() && right.has_value());
    machine->accel().RemoveIrqFd(*wrong);
    other.Signal();
    event.Signal();
    EXPECT_TRUE(machine->WaitDone());
    machine->Park();
    EXPECT_EQ(machine->Counter(0x48), 1u);
    EXPECT_EQ(machine->Counter(0x77), 0u);
    machine->accel().RemoveIrqFd(*right);
    machine->accel().RemoveIrqFd(12345);  // unknown: nothing
  }
}

TEST_F(KvmIrqTest, DescriptorThatIsNoneIsRefused) {
  auto machine = TestMachine::Create();
  EXPECT_FALSE(machine->accel().AddIrqFd(-1, kMsiAddress, 0x48).has_value());
  EXPECT_FALSE(machine->kvm().interrupts().AddLineFd(0, -1, 24).has_value());
}

TEST_F(KvmIrqTest, DescriptorsPullLevelLinesUntilTheEndOfInterrupt) {
  auto machine = Waiting(pl_irqfd_line, 0, 2);
  EventFd event = EventFd::Create().value(), ended = EventFd::Create().value();
  Result<uint64_t> id = machine->kvm().interrupts().AddLineFd(event.fd(), ended.fd(), 10);
  ASSERT_TRUE(id.has_value()) << id.error().what;
  event.Signal();
  ASSERT_TRUE(WaitReadable(ended));
  EXPECT_TRUE(ended.Consume());
  event.Signal();
  EXPECT_TRUE(machine->WaitDone());
  ASSERT_TRUE(WaitReadable(ended));
  machine->Park();
  EXPECT_EQ(machine->Counter(0x4b), 2u);
  machine->accel().RemoveIrqFd(*id);
}

// Split irqchip: the IOAPIC is a device that sends level messages, and hears of their end.
TEST_F(KvmIrqTest, EndOfLevelMessagesIsReported) {
  constexpr uint32_t kLevel = 0x8000 | 0x4000 | 0x4a;
  auto machine = TestMachine::Create({.irqchip = IrqchipMode::kUser});
  machine->Start(pl_level);
  machine->Resume();
  ASSERT_TRUE(machine->WaitReports(1));
  machine->accel().SendMsi(kMsiAddress, kLevel);
  ASSERT_TRUE(machine->WaitReports(2));
  ASSERT_TRUE(machine->WaitEois(1));
  machine->accel().SendMsi(kMsiAddress, kLevel);
  EXPECT_TRUE(machine->WaitDone());
  EXPECT_TRUE(machine->WaitEois(2));
  machine->Park();
  EXPECT_THAT(machine->eois(), ElementsAre(0x4a, 0x4a));
}

// Split irqchip: the PIC's interrupt waits for STI, wakes a halted CPU, and is acknowledged once
// each.
TEST_F(KvmIrqTest, PicOutsideInterruptsWhenTheGuestCan) {
  auto machine = TestMachine::Create({.irqchip = IrqchipMode::kUser});
  std::atomic<int> acknowledged{0};
  machine->on_acknowledge = [&] {
    int number = acknowledged++;
    machine->accel().SetPicOutput(false);
    return static_cast<uint8_t>(0x60 + number);
  };
  machine->Start(pl_extint);
  machine->Resume();
  ASSERT_TRUE(machine->WaitReports(1));
  machine->accel().SetPicOutput(true);
  ASSERT_TRUE(machine->WaitReports(3));
  EXPECT_EQ(machine->reports()[1], 0u);  // held back while interrupts were off
  machine->accel().SetPicOutput(true);
  EXPECT_TRUE(machine->WaitDone());
  EXPECT_EQ(machine->Counter(0x60), 1u);
  EXPECT_EQ(machine->Counter(0x61), 1u);
  EXPECT_EQ(acknowledged, 2);
}

}  // namespace
}  // namespace kvartz::cpu::kvm
