// Expected values: PCI Local Bus 3.0, ch. 6.
#include "device/pci/pci_device.h"

#include <gtest/gtest.h>

#include "device/pci/pci_config.h"
#include "device/test_env.h"

namespace kvartz {
namespace {

using namespace pci;

// A function with one BAR of each kind, MSI-X and MSI.
struct Sample final : PciDevice, IoHandler {
  explicit Sample(const DeviceEnv& env)
      : PciDevice(
            env, {.vendor = 0x1af4, .device = 0x1041, .class_code = 0x020000, .interrupt_pin = 1}) {
    AddBar(0, PciBarKind::kIo, 32, this, 4);
    AddBar(1, PciBarKind::kMemory32, 4096, this);
    AddBar(2, PciBarKind::kMemory64, 16384, this);
    AddMsix(4, 3);
    AddMsi(2);
    vendor_cap = AddCapability(kCapVendor, 16);
  }
  void VisitState(StateVisitor& v) override {
    v.Version(1);
    PciDevice::VisitState(v);
  }
  uint64_t IoRead(uint64_t offset, unsigned) override { return 0x1000 + offset; }
  void IoWrite(uint64_t offset, unsigned, uint64_t value) override { last_write = {offset, value}; }
  using PciDevice::BarAddress;
  using PciDevice::NotifyMsi;
  using PciDevice::NotifyMsix;
  using PciDevice::SetBarDoorbells;
  using PciDevice::SetIntx;
  uint8_t vendor_cap;
  std::pair<uint64_t, uint64_t> last_write;
};

struct PciTest : testing::Test {
  PciTest() : bus(lines), device(machine.Env("sample")) {
    EXPECT_EQ(*bus.Plug(device, 3 << 3), 3 << 3);
  }
  uint32_t Read(unsigned offset, unsigned size) { return bus.ConfigRead(3 << 3, offset, size); }
  void Write(unsigned offset, unsigned size, uint32_t value) {
    bus.ConfigWrite(3 << 3, offset, size, value);
  }
  uint8_t FindCap(uint8_t id) {
    for (uint8_t at = Read(kCapabilities, 1); at; at = Read(at + 1, 1)) {
      if (Read(at, 1) == id) return at;
    }
    return 0;
  }

  test::MiniMachine machine;
  test::RecordedLines lines;
  PciBus bus;
  Sample device;
};

TEST_F(PciTest, IdentityAndAbsence) {
  EXPECT_EQ(Read(0, 4), 0x10411af4u);
  EXPECT_EQ(Read(kClass, 2), 0x0000u);
  EXPECT_EQ(Read(kClass + 2, 1), 0x02u);
  EXPECT_EQ(bus.ConfigRead(4 << 3, 0, 4), 0xffffffffu);
  EXPECT_EQ(bus.ConfigRead(4 << 3, 0, 1), 0xffu);
  Write(0, 4, 0);
  EXPECT_EQ(Read(0, 4), 0x10411af4u) << "read-only";
}

TEST_F(PciTest, BarSizing) {
  Write(kBar0, 4, 0xffffffff);
  EXPECT_EQ(Read(kBar0, 4), 0xffffffe1u);
  Write(kBar0 + 4, 4, 0xffffffff);
  EXPECT_EQ(Read(kBar0 + 4, 4), 0xfffff000u);
  Write(kBar0 + 8, 4, 0xffffffff), Write(kBar0 + 12, 4, 0xffffffff);
  EXPECT_EQ(Read(kBar0 + 8, 4), 0xffffc004u);
  EXPECT_EQ(Read(kBar0 + 12, 4), 0xffffffffu);
}

TEST_F(PciTest, BarsFollowTheCommandRegister) {
  ViewCache memory(machine.memory), ports(machine.ports);
  Write(kBar0, 4, 0xc000), Write(kBar0 + 4, 4, 0xfe000000), Write(kBar0 + 8, 4, 0),
      Write(kBar0 + 12, 4, 1);
  EXPECT_EQ(BusRead(memory, 0xfe000004, 4), 0xffffffffu);
  Write(kCommand, 2, kCommandMemory);
  EXPECT_EQ(BusRead(memory, 0xfe000004, 4), 0x1004u);
  EXPECT_EQ(BusRead(memory, 0x100000010, 4), 0x1010u);
  EXPECT_EQ(BusRead(ports, 0xc008, 2), 0xffffu);
  Write(kCommand, 2, kCommandMemory | kCommandIo);
  EXPECT_EQ(BusRead(ports, 0xc008, 2), 0x1008u);
  Write(kBar0 + 4, 4, 0xfe100000);
  EXPECT_EQ(BusRead(memory, 0xfe000004, 4), 0xffffffffu);
  BusWrite(memory, 0xfe100020, 4, 77);
  EXPECT_EQ(device.last_write, std::make_pair(uint64_t{0x20}, uint64_t{77}));
  test::MiniMachine::ResetDevice(device);
  EXPECT_EQ(BusRead(memory, 0xfe100004, 4), 0xffffffffu);
  EXPECT_EQ(Read(kBar0 + 4, 4), 0u);
  EXPECT_EQ(Read(kBar0, 4), 1u);
}

TEST_F(PciTest, BarsThatWouldWrapAreNotDecoded) {
  Write(kCommand, 2, kCommandMemory | kCommandIo);
  Write(kBar0, 4, 0xffffffff), Write(kBar0 + 4, 4, 0xffffffff);
  uint64_t base;
  EXPECT_FALSE(device.BarAddress(0, &base));
  EXPECT_FALSE(device.BarAddress(1, &base));
  Write(kBar0 + 4, 4, 0);
  EXPECT_FALSE(device.BarAddress(1, &base));
}

TEST_F(PciTest, IntxLevelsDisableAndSharing) {
  Sample second(machine.Env("second"));
  ASSERT_TRUE(bus.Plug(second, 7 << 3));  // the same line: (7 - 3) is a multiple of 4
  device.SetIntx(true);
  EXPECT_TRUE(lines.levels[3]);
  EXPECT_TRUE(Read(kStatus, 2) & kStatusInterrupt);
  second.SetIntx(true);
  device.SetIntx(false);
  EXPECT_TRUE(lines.levels[3]);
  second.SetIntx(false);
  EXPECT_FALSE(lines.levels[3]);
  device.SetIntx(true);
  Write(kCommand, 2, kCommandIntxDisable);
  EXPECT_FALSE(lines.levels[3]);
  EXPECT_TRUE(Read(kStatus, 2) & kStatusInterrupt) << "the status bit shows the request";
  Write(kCommand, 2, 0);
  EXPECT_TRUE(lines.levels[3]);
  bus.Unplug(device);
  EXPECT_FALSE(lines.levels[3]);
}

TEST_F(PciTest, MsixDeliversMasksAndPends) {
  uint8_t cap = FindCap(kCapMsix);
  ASSERT_NE(cap, 0);
  EXPECT_EQ(Read(cap + 2, 2) & 0x7ff, 2u);
  EXPECT_EQ(Read(cap + 4, 4), 4u);
  Write(kBar0 + 16, 4, 0xfe200000);
  Write(kCommand, 2, kCommandMemory | kCommandMaster);
  ViewCache memory(machine.memory);
  EXPECT_EQ(BusRead(memory, 0xfe20000c, 4), 1u) << "masked after reset";
  BusWrite(memory, 0xfe200010, 4, 0xfee01000), BusWrite(memory, 0xfe200018, 4, 0x4041);
  device.NotifyMsix(1);
  EXPECT_TRUE(machine.messages.empty()) << "not enabled";
  Write(cap + 2, 2, 0x8000);
  device.NotifyMsix(1);
  EXPECT_TRUE(machine.messages.empty());
  uint64_t pba = Read(cap + 8, 4) & ~7u;
  EXPECT_EQ(BusRead(memory, 0xfe200000 + pba, 4), 2u);
  BusWrite(memory, 0xfe20001c, 4, 0);
  ASSERT_EQ(machine.messages.size(), 1u);
  EXPECT_EQ(machine.messages[0], std::make_pair(uint64_t{0xfee01000}, uint32_t{0x4041}));
  EXPECT_EQ(BusRead(memory, 0xfe200000 + pba, 4), 0u);
  device.NotifyMsix(1);
  EXPECT_EQ(machine.messages.size(), 2u);
  Write(cap + 2, 2, 0xc000);  // function mask
  device.NotifyMsix(1);
  EXPECT_EQ(machine.messages.size(), 2u);
  Write(cap + 2, 2, 0x8000);
  EXPECT_EQ(machine.messages.size(), 3u);
  device.NotifyMsix(99);
  EXPECT_EQ(machine.messages.size(), 3u);
  device.SetIntx(true);
  EXPECT_FALSE(lines.levels[3]) << "MSI-X takes the place of the pin";
}

TEST_F(PciTest, MsiMultipleVectorsAndMask) {
  uint8_t cap = FindCap(kCapMsi);
  ASSERT_NE(cap, 0);
  Write(cap + 4, 4, 0xfee00000), Write(cap + 8, 4, 0), Write(cap + 12, 2, 0x40);
  Write(kCommand, 2, kCommandMaster);
  Write(cap + 2, 2, 2 << 4 | 1);
  device.NotifyMsi(3);
  ASSERT_EQ(machine.messages.size(), 1u);
  EXPECT_EQ(machine.messages[0].second, 0x43u);
  Write(cap + 16, 4, 1 << 2);
  device.NotifyMsi(2);
  EXPECT_EQ(machine.messages.size(), 1u);
  Write(cap + 16, 4, 0);
  ASSERT_EQ(machine.messages.size(), 2u);
  EXPECT_EQ(machine.messages[1].second, 0x42u);
}

TEST_F(PciTest, PlugFindsFreeSlotsAndNamesTakenOnes) {
  Sample other(machine.Env("other"));
  Result<uint8_t> taken = bus.Plug(other, 3 << 3);
  ASSERT_FALSE(taken);
  EXPECT_NE(taken.error().what.find("'sample'"), std::string::npos);
  EXPECT_EQ(*bus.Plug(other, -1), 1 << 3);
}

TEST_F(PciTest, SeveralFunctionsOfASlotAreForMultifunctionDevices) {
  Sample first(machine.Env("first")), second(machine.Env("second")), third(machine.Env("third"));
  Result<uint8_t> hidden = bus.Plug(second, 3 << 3 | 1);
  ASSERT_FALSE(hidden);
  EXPECT_NE(hidden.error().what.find("multifunction=on"), std::string::npos);
  ASSERT_TRUE(bus.Plug(second, 4 << 3 | 1));
  EXPECT_FALSE(bus.Plug(first, 4 << 3));
  first.SetMultifunction();
  ASSERT_TRUE(bus.Plug(first, 4 << 3));
  EXPECT_EQ(bus.ConfigRead(4 << 3, kHeaderType, 1), 0x80u);
  EXPECT_EQ(bus.ConfigRead(4 << 3 | 1, kHeaderType, 1), 0u);
  EXPECT_TRUE(bus.Plug(third, 4 << 3 | 7));
}

TEST_F(PciTest, StateMoves) {
  Write(kBar0 + 4, 4, 0xfe000000);
  Write(kCommand, 2, kCommandMemory | kCommandMaster);
  device.SetIntx(true);
  test::MiniMachine other_machine;
  test::RecordedLines other_lines;
  PciBus other_bus(other_lines);
  Sample other(other_machine.Env("sample"));
  ASSERT_TRUE(other_bus.Plug(other, 3 << 3));
  std::string why;
  EXPECT_TRUE(test::StateMoves(device, other, &why)) << why;
  EXPECT_TRUE(other_lines.levels[3]);
  ViewCache memory(other_machine.memory);
  EXPECT_EQ(BusRead(memory, 0xfe000004, 4), 0x1004u);
}

}  // namespace
}  // namespace kvartz
