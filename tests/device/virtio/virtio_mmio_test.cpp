#include "device/virtio/virtio_mmio.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "device/virtio/test_machine.h"

namespace kvartz::test {
namespace {

// virtio 1.2, 4.2.2.
class VirtioMmioTest : public testing::Test {
 protected:
  uint32_t Get(uint64_t offset) {
    return static_cast<uint32_t>(machine_.Read(TestMachine::kMmio + offset, 4));
  }
  void Set(uint64_t offset, uint32_t value) {
    machine_.Write(TestMachine::kMmio + offset, 4, value);
  }
  DriverRing Start() {
    Set(0x70, 0);
    Set(0x70, 3);
    Set(0x24, 1);
    Set(0x20, 1);
    Set(0x70, 11);
    EXPECT_EQ(Get(0x70), 11u);
    Set(0x30, 0);
    DriverRing ring(machine_, DriverRing::Format::kSplit, static_cast<uint16_t>(Get(0x34)), false);
    Set(0x38, ring.size());
    Set(0x80, static_cast<uint32_t>(ring.desc));
    Set(0x84, 0);
    Set(0x90, static_cast<uint32_t>(ring.driver));
    Set(0x94, 0);
    Set(0xa0, static_cast<uint32_t>(ring.device));
    Set(0xa4, 0);
    Set(0x44, 1);
    Set(0x70, 15);
    return ring;
  }
  TestMachine machine_;
};

TEST_F(VirtioMmioTest, Identity) {
  ASSERT_NE(machine_.PlugMmio("virtio-rng-device", {}), nullptr) << machine_.error;
  EXPECT_EQ(Get(0), 0x74726976u);
  EXPECT_EQ(Get(4), 2u);
  EXPECT_EQ(Get(8), 4u);
  EXPECT_EQ(Get(0xb0), 0xffffffffu);
  Set(0x14, 1);
  EXPECT_EQ(Get(0x10) & 1, 1u);  // VIRTIO_F_VERSION_1
  Set(0x30, 1);
  EXPECT_EQ(Get(0x34), 0u);  // no second queue
}

TEST_F(VirtioMmioTest, RequestInterruptAcknowledgement) {
  ASSERT_NE(machine_.PlugMmio("virtio-rng-device", {}), nullptr);
  DriverRing ring = Start();
  uint64_t gpa;
  uint8_t* data = machine_.Allocate(64, &gpa);
  std::fill(data, data + 64, 0);
  ring.Add({{gpa, 64, true}});
  Set(0x50, 0);
  std::optional<Used> used;
  ASSERT_TRUE(machine_.TurnUntil([&] { return (used = ring.Take()).has_value(); }));
  EXPECT_EQ(used->length, 64u);
  EXPECT_NE(std::count(data, data + 64, 0), 64);
  EXPECT_TRUE(machine_.intx);
  EXPECT_EQ(Get(0x60), 1u);
  Set(0x64, 1);
  EXPECT_FALSE(machine_.intx);
  EXPECT_EQ(Get(0x60), 0u);
}

TEST_F(VirtioMmioTest, QueueIsGivenUp) {
  ASSERT_NE(machine_.PlugMmio("virtio-rng-device", {}), nullptr);
  Start();
  EXPECT_EQ(Get(0x44), 1u);
  Set(0x80, 0x12345000);  // not while it is ready
  Set(0x44, 0);
  EXPECT_EQ(Get(0x44), 0u);
  DriverRing again = Start();
  uint64_t gpa;
  machine_.Allocate(64, &gpa);
  again.Add({{gpa, 64, true}});
  Set(0x50, 0);
  EXPECT_TRUE(machine_.TurnUntil([&] { return again.Take().has_value(); }));
}

TEST_F(VirtioMmioTest, SavedAndLoaded) {
  Device* device = machine_.PlugMmio("virtio-rng-device", {});
  DriverRing ring = Start();
  device->Quiesce();
  uint64_t gpa;
  machine_.Allocate(64, &gpa);
  ring.Add({{gpa, 64, true}});
  Set(0x50, 0);
  machine_.Settle();
  EXPECT_FALSE(ring.Take());
  std::vector<uint8_t> saved = SaveState([&](StateVisitor& v) { device->VisitState(v); });
  device = machine_.PlugMmio("virtio-rng-device", {});
  ASSERT_TRUE(LoadState(saved, [&](StateVisitor& v) {
    LockGuard guard(device->lock());
    device->VisitState(v);
  }));
  EXPECT_TRUE(machine_.TurnUntil([&] { return ring.Take().has_value(); }));
  EXPECT_EQ(Get(0x60), 1u);
}

}  // namespace
}  // namespace kvartz::test
