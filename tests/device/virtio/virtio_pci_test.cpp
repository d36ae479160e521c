#include "device/virtio/virtio_pci.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "device/virtio/test_machine.h"

namespace kvartz::test {
namespace {

constexpr uint64_t kVersion1 = 1ull << 32, kEventIdx = 1ull << 29, kIndirectDesc = 1ull << 28,
                   kPacked = 1ull << 34;

TEST(VirtioPci, IdentitiesAreTheSpecifications) {
  // virtio 1.2, 4.1.2: transitional ids 0x1000 (net), 0x1001 (block), 0x1005 (entropy); modern
  // 0x1040 + id.
  TestMachine machine;
  struct Row {
    const char* driver;
    uint32_t id;
    uint8_t revision;
    uint16_t subsystem;
  };
  const Row rows[] = {
      {"virtio-rng-pci", 0x10051af4, 0, 4},
      {"virtio-rng-pci-transitional", 0x10051af4, 0, 4},
      {"virtio-rng-pci-non-transitional", 0x10441af4, 1, 0x1100},
      {"virtio-net-pci", 0x10001af4, 0, 1},
      {"virtio-net-pci-non-transitional", 0x10411af4, 1, 0x1100},
  };
  for (const Row& row : rows) {
    ASSERT_NE(machine.Plug(row.driver, {}), nullptr) << machine.error;
    EXPECT_EQ(machine.ConfigRead(0, 4), row.id) << row.driver;
    EXPECT_EQ(machine.ConfigRead(8, 1), row.revision) << row.driver;
    EXPECT_EQ(machine.ConfigRead(0x2e, 2), row.subsystem) << row.driver;
    EXPECT_EQ(machine.ConfigRead(0x3d, 1), 1u);
  }
}

TEST(VirtioPci, PropertiesThatContradictAreRefused) {
  TestMachine machine;
  EXPECT_EQ(machine.Plug("virtio-rng-pci", {{"disable-legacy", "on"}, {"disable-modern", "on"}}),
            nullptr);
  EXPECT_EQ(machine.Plug("virtio-rng-pci-transitional", {{"disable-legacy", "on"}}), nullptr);
  EXPECT_EQ(machine.Plug("virtio-rng-pci", {{"max_bytes", "1"}}), nullptr);
  EXPECT_EQ(machine.error,
            "device virtio-rng-pci has no property 'max_bytes': did you mean 'max-bytes'?");
  EXPECT_EQ(machine.Plug("virtio-rng-pci", {{"iommu_platform", "on"}}), nullptr);
  ASSERT_NE(machine.Plug("virtio-rng-pci", {{"disable-legacy", "on"}}), nullptr);
  EXPECT_EQ(machine.ConfigRead(0, 4), 0x10441af4u);
  ASSERT_NE(machine.Plug("virtio-rng-pci", {{"disable-modern", "on"}, {"vectors", "0"}}), nullptr);
  EXPECT_EQ(machine.ConfigRead(0x34, 1), 0u);
}

TEST(VirtioPci, FeaturesMustBeOfferedAndModern) {
  TestMachine machine;
  ASSERT_NE(machine.Plug("virtio-rng-pci", {}), nullptr);
  ModernDriver driver(machine);
  EXPECT_TRUE(driver.Negotiate(kEventIdx));
  EXPECT_EQ(driver.offered() & (kVersion1 | kEventIdx | kIndirectDesc),
            kVersion1 | kEventIdx | kIndirectDesc);
  EXPECT_EQ(driver.offered() & kPacked, 0u);
  // A feature that wasn't offered.
  driver.SetStatus(0);
  driver.SetStatus(3);
  driver.SetCommon(8, 4, 1);
  driver.SetCommon(12, 4, 1 | 1u << 2);
  driver.SetStatus(11);
  EXPECT_EQ(driver.status(), 3);
  // Without VIRTIO_F_VERSION_1.
  driver.SetStatus(0);
  driver.SetStatus(3);
  driver.SetStatus(11);
  EXPECT_EQ(driver.status(), 3);
  // Not offered where it is switched off.
  ASSERT_NE(machine.Plug("virtio-rng-pci", {{"event_idx", "off"}, {"packed", "on"}}), nullptr);
  ModernDriver second(machine);
  EXPECT_TRUE(second.Negotiate(~0ull & (kPacked | kEventIdx)));
  EXPECT_EQ(second.features(), kVersion1 | kPacked);
}

TEST(VirtioPci, InterruptsByPinWithIsr) {
  TestMachine machine;
  ASSERT_NE(machine.Plug("virtio-rng-pci", {}), nullptr);
  ModernDriver driver(machine);
  ASSERT_TRUE(driver.Negotiate(0));
  driver.SetUpQueue(0);
  driver.Start();
  uint64_t gpa;
  machine.Allocate(64, &gpa);
  EXPECT_EQ(driver.Transact(0, {{gpa, 64, true}}), 64u);
  EXPECT_TRUE(machine.intx);
  EXPECT_EQ(machine.ConfigRead(6, 2) & 8, 8u);
  EXPECT_EQ(driver.ReadIsr(), 1);
  EXPECT_FALSE(machine.intx);
  EXPECT_EQ(driver.ReadIsr(), 0);
}

TEST(VirtioPci, InterruptsByMsix) {
  TestMachine machine;
  ASSERT_NE(machine.Plug("virtio-rng-pci", {}), nullptr);
  uint8_t cap = static_cast<uint8_t>(machine.ConfigRead(0x34, 1));
  while (machine.ConfigRead(cap, 1) != 0x11)
    cap = static_cast<uint8_t>(machine.ConfigRead(cap + 1, 1));
  EXPECT_EQ(machine.ConfigRead(cap + 2, 2) & 0x7ff, 1u);  // two vectors
  machine.Write(TestMachine::kMsixBar, 4, 0xfee00000);
  machine.Write(TestMachine::kMsixBar + 8, 4, 0x41);
  machine.Write(TestMachine::kMsixBar + 12, 4, 0);
  machine.ConfigWrite(cap + 2, 2, 0x8000);
  ModernDriver driver(machine);
  ASSERT_TRUE(driver.Negotiate(0));
  DriverRing& ring = driver.SetUpQueue(0);  // takes vector 0
  driver.Start();
  driver.SetCommon(26, 2, 2);  // a vector that there isn't
  EXPECT_EQ(driver.Common(26, 2), 0xffffu);
  driver.SetCommon(26, 2, 0);
  uint64_t gpa;
  machine.Allocate(64, &gpa);
  ASSERT_EQ(driver.Transact(0, {{gpa, 8, true}}), 8u);
  ASSERT_EQ(machine.messages.size(), 1u);
  EXPECT_EQ(machine.messages[0], std::pair(uint64_t{0xfee00000}, uint32_t{0x41}));
  EXPECT_FALSE(machine.intx);
  ring.SetInterrupts(false);
  ASSERT_EQ(driver.Transact(0, {{gpa, 8, true}}), 8u);
  EXPECT_EQ(machine.messages.size(), 1u);
}

TEST(VirtioPci, ConfigurationAccessWindow) {
  TestMachine machine;
  ASSERT_NE(machine.Plug("virtio-rng-pci", {}), nullptr);
  uint8_t cap = static_cast<uint8_t>(machine.ConfigRead(0x34, 1));
  while (machine.ConfigRead(cap, 1) != 9 || machine.ConfigRead(cap + 3, 1) != 5) {
    cap = static_cast<uint8_t>(machine.ConfigRead(cap + 1, 1));
  }
  machine.ConfigWrite(cap + 4, 1, 4);
  machine.ConfigWrite(cap + 8, 4, 18);  // num_queues
  machine.ConfigWrite(cap + 12, 4, 2);
  EXPECT_EQ(machine.ConfigRead(cap + 16, 2), 1u);
  machine.ConfigWrite(cap + 8, 4, 20);  // device_status
  machine.ConfigWrite(cap + 12, 4, 1);
  machine.ConfigWrite(cap + 16, 1, 3);
  EXPECT_EQ(machine.ConfigRead(cap + 16, 1), 3u);
  machine.ConfigWrite(cap + 8, 4, 0xffffffff);
  EXPECT_EQ(machine.ConfigRead(cap + 12, 4), 1u);
  machine.ConfigRead(cap + 16, 4);
}

TEST(VirtioPci, LegacyDriver) {
  // 4.1.4.10, as a driver of the first version uses it.
  TestMachine machine;
  ASSERT_NE(machine.Plug("virtio-rng-pci", {}), nullptr);
  constexpr uint16_t kPort = TestMachine::kLegacyPort;
  machine.Out(kPort + 18, 1, 0);
  machine.Out(kPort + 18, 1, 3);
  EXPECT_EQ(machine.In(kPort, 4) >> 28 & 3, 3u);
  machine.Out(kPort + 4, 4, 0);
  machine.Out(kPort + 14, 2, 0);
  uint64_t size = machine.In(kPort + 12, 2);
  ASSERT_EQ(size, 8u);
  uint64_t gpa, buffer;
  uint8_t* ring = machine.Allocate(3 * 4096, &gpa, 4096);
  uint8_t* data = machine.Allocate(32, &buffer);
  std::memset(ring, 0, 3 * 4096);
  std::memset(data, 0, 32);
  machine.Out(kPort + 8, 4, gpa >> 12);
  EXPECT_EQ(machine.In(kPort + 8, 4), gpa >> 12);
  machine.Out(kPort + 18, 1, 7);
  struct {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
  } descriptor{buffer, 32, 2, 0};
  std::memcpy(ring, &descriptor, 16);
  uint16_t one = 1;
  std::memcpy(ring + 16 * size + 2, &one, 2);
  machine.Out(kPort + 16, 2, 0);
  uint16_t* used = reinterpret_cast<uint16_t*>(ring + 4096 + 2);
  ASSERT_TRUE(machine.TurnUntil([&] { return *used == 1; }));
  EXPECT_EQ(machine.In(kPort + 19, 1), 1u);
  EXPECT_NE(std::count(data, data + 32, 0), 32);
  machine.Out(kPort + 18, 1, 0);
  EXPECT_EQ(machine.In(kPort + 8, 4), 0u);
}

TEST(VirtioPci, NoDmaWithoutBusMaster) {
  TestMachine machine;
  ASSERT_NE(machine.Plug("virtio-rng-pci", {}), nullptr);
  ModernDriver driver(machine);
  ASSERT_TRUE(driver.Negotiate(0));
  DriverRing& ring = driver.SetUpQueue(0);
  machine.ConfigWrite(4, 2, 3);
  driver.Start();
  uint64_t gpa;
  machine.Allocate(64, &gpa);
  ring.Add({{gpa, 64, true}});
  driver.Kick(0);
  machine.Settle();
  EXPECT_FALSE(ring.Take());
  machine.ConfigWrite(4, 2, 7);
  machine.Settle();
  EXPECT_TRUE(ring.Take());
}

TEST(VirtioPci, MachineResetForgetsEverything) {
  TestMachine machine;
  PciDevice* pci = machine.Plug("virtio-rng-pci", {});
  ModernDriver driver(machine);
  ASSERT_TRUE(driver.Negotiate(0));
  driver.SetUpQueue(0);
  driver.Start();
  for (ResetPhase phase : {ResetPhase::kEnter, ResetPhase::kHold, ResetPhase::kExit}) {
    LockGuard guard(pci->lock());
    pci->Reset(phase);
  }
  machine.ConfigWrite(0x20, 4, TestMachine::kModernBar);
  machine.ConfigWrite(0x04, 2, 7);
  EXPECT_EQ(driver.status(), 0);
  EXPECT_EQ(driver.Common(28, 2), 0u);
  EXPECT_EQ(driver.Common(26, 2), 0xffffu);
}

}  // namespace
}  // namespace kvartz::test
