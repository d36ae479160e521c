// Expected values: Intel 82093AA datasheet (290566), ch. 3; message format: SDM vol. 3, 11.11.
#include "device/irq/ioapic.h"

#include <gtest/gtest.h>

#include "device/test_env.h"

namespace kvartz {
namespace {

struct IoApicTest : testing::Test {
  IoApicTest() : ioapic(machine.Env("ioapic")) {}
  void Write(uint8_t reg, uint32_t value) {
    LockGuard guard(ioapic.lock());
    ioapic.IoWrite(0x00, 4, reg);
    ioapic.IoWrite(0x10, 4, value);
  }
  uint32_t Read(uint8_t reg) {
    LockGuard guard(ioapic.lock());
    ioapic.IoWrite(0x00, 4, reg);
    return ioapic.IoRead(0x10, 4);
  }
  void SetEntry(unsigned pin, uint64_t entry) {
    Write(0x11 + 2 * pin, entry >> 32);
    Write(0x10 + 2 * pin, entry);
  }

  test::MiniMachine machine;
  IoApic ioapic;
};

TEST_F(IoApicTest, Registers) {
  EXPECT_EQ(Read(1) & 0xff, 0x20u);
  EXPECT_EQ(Read(1) >> 16 & 0xff, 23u);
  EXPECT_EQ(Read(0x10), 0x10000u) << "masked after reset";
  Write(0, 0xff000000);
  EXPECT_EQ(Read(0), 0x0f000000u);
  Write(0x10, 0xffffffff);
  EXPECT_EQ(Read(0x10), 0x1afffu) << "delivery status and remote IRR are read-only";
  EXPECT_EQ(Read(0xff), 0u);
}

TEST_F(IoApicTest, EdgeSendsOneMessage) {
  SetEntry(4, 0x0300000000000831);  // destination 3, logical, vector 0x31
  ioapic.SetIrq(4, true);
  ioapic.SetIrq(4, true);
  ASSERT_EQ(machine.messages.size(), 1u);
  EXPECT_EQ(machine.messages[0].first, 0xfee03004u);
  EXPECT_EQ(machine.messages[0].second, 0x4031u) << "asserted, edge, fixed, vector";
  ioapic.SetIrq(4, false);
  ioapic.SetIrq(4, true);
  EXPECT_EQ(machine.messages.size(), 2u);
}

TEST_F(IoApicTest, EdgeAtMaskedPinIsLost) {
  SetEntry(4, 0x10031);
  ioapic.SetIrq(4, true);
  SetEntry(4, 0x00031);
  EXPECT_TRUE(machine.messages.empty());
}

TEST_F(IoApicTest, LevelWaitsForEoi) {
  SetEntry(10, 0x8055);
  ioapic.SetIrq(10, true);
  EXPECT_EQ(machine.messages.size(), 1u);
  EXPECT_EQ(machine.messages[0].second & 0x80ffu, 0x8055u);
  EXPECT_TRUE(Read(0x10 + 20) & 1 << 14) << "remote IRR";
  ioapic.SetIrq(10, false);
  ioapic.SetIrq(10, true);
  EXPECT_EQ(machine.messages.size(), 1u);
  ioapic.EndOfInterrupt(0x56);
  EXPECT_EQ(machine.messages.size(), 1u) << "another vector";
  ioapic.EndOfInterrupt(0x55);
  EXPECT_EQ(machine.messages.size(), 2u) << "still asserted";
  ioapic.SetIrq(10, false);
  {
    LockGuard guard(ioapic.lock());
    ioapic.IoWrite(0x40, 4, 0x55);  // the EOI register
  }
  EXPECT_FALSE(Read(0x10 + 20) & 1 << 14);
  EXPECT_EQ(machine.messages.size(), 2u);
}

TEST_F(IoApicTest, LevelAssertedWhileMasked) {
  SetEntry(10, 0x18055);
  ioapic.SetIrq(10, true);
  EXPECT_TRUE(machine.messages.empty());
  SetEntry(10, 0x8055);
  EXPECT_EQ(machine.messages.size(), 1u);
  SetEntry(10, 0x0055);
  EXPECT_FALSE(Read(0x10 + 20) & 1 << 14) << "edge mode ends the remote IRR";
}

TEST_F(IoApicTest, LowestPriorityHasTheHint) {
  SetEntry(1, 0xff00000000000922);
  ioapic.SetIrq(1, true);
  ASSERT_EQ(machine.messages.size(), 1u);
  EXPECT_EQ(machine.messages[0].first, 0xfeeff00cu);
}

TEST_F(IoApicTest, StateMoves) {
  SetEntry(10, 0x8055);
  ioapic.SetIrq(10, true);
  IoApic other(machine.Env("ioapic"));
  EXPECT_TRUE(test::StateMoves(ioapic, other));
  machine.messages.clear();
  other.EndOfInterrupt(0x55);
  EXPECT_EQ(machine.messages.size(), 1u);
}

}  // namespace
}  // namespace kvartz
