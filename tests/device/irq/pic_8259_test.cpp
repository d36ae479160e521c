// Expected values: Intel 8259A datasheet (231468).
#include "device/irq/pic_8259.h"

#include <gtest/gtest.h>

#include "device/test_env.h"

namespace kvartz {
namespace {

struct PicTest : testing::Test {
  PicTest() : pic(machine.Env("pic"), IrqLine(lines, 0)) {
    // As a PC does: vectors 0x20 and 0x28, nothing masked.
    Write(0x20, 0x11), Write(0x21, 0x20), Write(0x21, 4), Write(0x21, 1);
    Write(0xa0, 0x11), Write(0xa1, 0x28), Write(0xa1, 2), Write(0xa1, 1);
  }
  void Write(uint16_t port, uint8_t value) {
    LockGuard guard(pic.lock());
    pic.IoWrite(port, 1, value);
  }
  uint8_t Read(uint16_t port) {
    LockGuard guard(pic.lock());
    return pic.IoRead(port, 1);
  }
  uint8_t InService(uint16_t port) {
    Write(port, 0x0b);
    return Read(port);
  }
  bool output() const { return lines.levels[0]; }

  test::MiniMachine machine;
  test::RecordedLines lines;
  PicPair pic;
};

TEST_F(PicTest, EdgeIsDeliveredOnce) {
  pic.SetIrq(1, true);
  EXPECT_TRUE(output());
  EXPECT_EQ(pic.Acknowledge(), 0x21);
  EXPECT_FALSE(output());
  EXPECT_EQ(InService(0x20), 0x02);
  Write(0x20, 0x20);
  EXPECT_EQ(InService(0x20), 0x00);
  EXPECT_FALSE(output()) << "the line is still high, but there was no new edge";
  pic.SetIrq(1, false);
  pic.SetIrq(1, true);
  EXPECT_TRUE(output());
}

TEST_F(PicTest, PriorityAndNesting) {
  pic.SetIrq(4, true);
  EXPECT_EQ(pic.Acknowledge(), 0x24);
  pic.SetIrq(6, true);
  EXPECT_FALSE(output()) << "less urgent than what is in service";
  pic.SetIrq(0, true);
  EXPECT_TRUE(output());
  EXPECT_EQ(pic.Acknowledge(), 0x20);
  Write(0x20, 0x20);  // non-specific: ends line 0
  EXPECT_EQ(InService(0x20), 0x10);
  Write(0x20, 0x64);  // specific: ends line 4
  EXPECT_EQ(pic.Acknowledge(), 0x26);
}

TEST_F(PicTest, SlaveArrivesByTheCascade) {
  pic.SetIrq(12, true);
  EXPECT_EQ(pic.Acknowledge(), 0x2c);
  EXPECT_EQ(InService(0x20), 0x04);
  EXPECT_EQ(InService(0xa0), 0x10);
  pic.SetIrq(9, true);
  EXPECT_FALSE(output()) << "the cascade line is in service";
  Write(0xa0, 0x20);
  Write(0x20, 0x20);
  EXPECT_EQ(pic.Acknowledge(), 0x29);
}

TEST_F(PicTest, MaskedAndSpurious) {
  Write(0x21, 0x08);
  pic.SetIrq(3, true);
  EXPECT_FALSE(output());
  Write(0x21, 0x00);
  EXPECT_TRUE(output());
  Write(0x21, 0x08);
  EXPECT_EQ(pic.Acknowledge(), 0x27) << "the request went away: the spurious vector";
  EXPECT_EQ(InService(0x20), 0);
}

TEST_F(PicTest, LevelTriggeredByElcr) {
  Write(0x4d1, 0x0c);  // lines 10 and 11
  EXPECT_EQ(Read(0x4d1), 0x0c);
  Write(0x4d0, 0xff);
  EXPECT_EQ(Read(0x4d0), 0xf8) << "timer, keyboard and cascade are always edge-triggered";
  pic.SetIrq(10, true);
  EXPECT_EQ(pic.Acknowledge(), 0x2a);
  Write(0xa0, 0x20), Write(0x20, 0x20);
  EXPECT_TRUE(output()) << "the line is still asserted";
  EXPECT_EQ(pic.Acknowledge(), 0x2a);
  pic.SetIrq(10, false);
  Write(0xa0, 0x20), Write(0x20, 0x20);
  EXPECT_FALSE(output());
}

TEST_F(PicTest, RotationAndSpecialMask) {
  Write(0x20, 0xc2);  // set priority: line 2 lowest, 3 highest
  pic.SetIrq(1, true), pic.SetIrq(5, true);
  EXPECT_EQ(pic.Acknowledge(), 0x25);
  Write(0x20, 0xa0);  // rotate on non-specific EOI: 5 becomes lowest
  pic.SetIrq(5, false), pic.SetIrq(5, true), pic.SetIrq(6, true);
  EXPECT_EQ(pic.Acknowledge(), 0x26);
  Write(0x21, 0x40);
  EXPECT_FALSE(output());
  Write(0x20, 0x68);  // special mask: a masked line in service doesn't hold up others
  EXPECT_TRUE(output());
  EXPECT_EQ(pic.Acknowledge(), 0x21);
}

TEST_F(PicTest, PollAndAutoEoi) {
  pic.SetIrq(5, true);
  Write(0x20, 0x0c);
  EXPECT_EQ(Read(0x20), 0x85);
  EXPECT_EQ(InService(0x20), 0x20);
  Write(0x20, 0x20);
  Write(0x20, 0x11), Write(0x21, 0x20), Write(0x21, 4), Write(0x21, 3);
  pic.SetIrq(3, true);
  EXPECT_EQ(pic.Acknowledge(), 0x23);
  EXPECT_EQ(InService(0x20), 0);
}

TEST_F(PicTest, StateMoves) {
  pic.SetIrq(4, true);
  pic.Acknowledge();
  pic.SetIrq(12, true);
  test::RecordedLines other_lines;
  PicPair other(machine.Env("pic"), IrqLine(other_lines, 0));
  EXPECT_TRUE(test::StateMoves(pic, other));
  EXPECT_EQ(other_lines.levels[0], output());
}

}  // namespace
}  // namespace kvartz
