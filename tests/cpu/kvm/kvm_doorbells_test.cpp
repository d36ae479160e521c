#include "cpu/kvm/kvm_doorbells.h"

#include <gmock/gmock.h>

#include "base/fd.h"
#include "cpu/kvm/payloads.h"
#include "cpu/kvm/test_machine.h"

namespace kvartz::cpu::kvm {
namespace {

constexpr uint64_t kBells = kMmio + 0x3000, kCollected = kMmio + 0x2000;

class KvmDoorbellsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    REQUIRE_KVM();
    machine_ = TestMachine::Create();
    ASSERT_NE(machine_, nullptr);
  }
  // Notes the writes that reach a device.
  class Recorder final : public IoHandler {
   public:
    uint64_t IoRead(uint64_t, unsigned) override { return 0; }
    void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
      writes.push_back({offset, size, true, value});
    }
    std::vector<Access> writes;
  };
  std::unique_ptr<TestMachine> machine_;
};

uint64_t CountOf(const EventFd& event) {
  uint64_t count = 0;
  return read(event.fd(), &count, sizeof(count)) == sizeof(count) ? count : 0;
}

TEST_F(KvmDoorbellsTest, SignalInsteadOfReachingTheDevice) {
  Recorder memory_device, port_device;
  EventFd any = EventFd::Create().value(), seven = EventFd::Create().value();
  EventFd nine = EventFd::Create().value(), port = EventFd::Create().value();
  Region region = IoRegion("bells", kBells, 0x1000, memory_device);
  region.doorbells = {
      {.offset = 0, .event_fd = any.fd()},
      {.offset = 8, .size = 4, .match_value = true, .value = 7, .event_fd = seven.fd()}};
  machine_->memory().Add(std::move(region));
  region = IoRegion("port bells", 0x520, 8, port_device);
  region.doorbells = {
      {.offset = 0, .size = 2, .match_value = true, .value = 9, .event_fd = nine.fd()},
      {.offset = 4, .event_fd = port.fd()}};
  machine_->ports().Add(std::move(region));
  machine_->Start(pl_doorbells);
  EXPECT_EQ(machine_->Run(), 8u);
  EXPECT_EQ(CountOf(any), 2u);
  EXPECT_EQ(CountOf(seven), 1u);
  EXPECT_EQ(CountOf(nine), 1u);
  EXPECT_EQ(CountOf(port), 1u);
  EXPECT_THAT(memory_device.writes, testing::ElementsAre(Access{8, 4, true, 8}));
  EXPECT_THAT(port_device.writes, testing::ElementsAre(Access{0, 2, true, 10}));
}

TEST_F(KvmDoorbellsTest, GoWithTheirRegionAndMoveWithIt) {
  Recorder device;
  EventFd event = EventFd::Create().value();
  Region region = IoRegion("bells", kBells, 0x1000, device);
  region.doorbells = {{.offset = 0, .event_fd = event.fd()}};
  auto id = machine_->memory().Add(region);
  machine_->memory().SetDoorbells(id, {});
  machine_->Start(pl_doorbells);
  machine_->Run();
  EXPECT_EQ(CountOf(event), 0u);
  EXPECT_EQ(device.writes.size(), 4u);

  machine_->memory().Remove(id);
  region.base = kBells + 0x100000;
  id = machine_->memory().Add(region);
  machine_->memory().Remove(id);
  region.base = kBells;
  machine_->memory().Add(region);
  machine_->Start(pl_doorbells);
  machine_->Run();
  EXPECT_EQ(CountOf(event), 2u);
}

TEST_F(KvmDoorbellsTest, CollectedWritesComeInOrderBeforeTheNextAccess) {
  struct Last final : IoHandler {
    explicit Last(Recorder& r) : recorder(r) {}
    uint64_t IoRead(uint64_t, unsigned) override { return 0; }
    void IoWrite(uint64_t, unsigned, uint64_t) override { seen_before = recorder.writes.size(); }
    Recorder& recorder;
    size_t seen_before = 0;
  };
  Recorder device;
  Last last(device);
  Region region = IoRegion("collected", kCollected, 0x1000, device);
  region.collect_writes = true;
  machine_->memory().Add(std::move(region));
  region = IoRegion("last", kMmio, 0x1000, last);
  region.priority = 1;
  machine_->memory().Add(std::move(region));
  machine_->Start(pl_collected);
  EXPECT_EQ(machine_->Run(), 7u);
  ASSERT_EQ(device.writes.size(), 10u);
  for (uint64_t i = 1; i <= 10; ++i) {
    EXPECT_EQ(device.writes[i - 1], (Access{4 * i, 4, true, i}));
  }
  EXPECT_EQ(last.seen_before, 10u);
}

}  // namespace
}  // namespace kvartz::cpu::kvm
