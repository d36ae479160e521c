// Expected values: Intel 8254 datasheet (231164).
#include "device/timer/pit_8254.h"

#include <gtest/gtest.h>

#include "device/test_env.h"
#include "device/timer/ticks.h"

namespace kvartz {
namespace {

struct PitTest : testing::Test {
  PitTest() : pit(machine.Env("pit"), IrqLine(lines, 0)) { test::MiniMachine::ResetDevice(pit); }
  void Write(uint16_t port, uint8_t value) {
    LockGuard guard(pit.lock());
    pit.IoWrite(port, 1, value);
  }
  uint8_t Read(uint16_t port) {
    LockGuard guard(pit.lock());
    return pit.IoRead(port, 1);
  }
  uint16_t Latched(unsigned counter) {
    Write(0x43, counter << 6);
    uint8_t low = Read(0x40 + counter);
    return low | Read(0x40 + counter) << 8;
  }
  void AdvanceTicks(uint64_t ticks) {
    machine.clock.Advance(TicksToNs(ticks, Pit8254::kFrequency));
  }

  test::MiniMachine machine;
  test::RecordedLines lines;
  Pit8254 pit;
};

TEST_F(PitTest, Mode2InterruptsAtItsRate) {
  Write(0x43, 0x34);
  Write(0x40, 11932 & 0xff), Write(0x40, 11932 >> 8);  // 100 Hz
  int before = lines.rises[0];
  machine.Pass(1'000'000'000);
  EXPECT_NEAR(lines.rises[0] - before, 100, 1);
}

TEST_F(PitTest, PeriodsThatPassedAreOneInterrupt) {
  Write(0x43, 0x34);
  Write(0x40, 11932 & 0xff), Write(0x40, 11932 >> 8);
  int before = lines.rises[0];
  machine.clock.Advance(5'000'000'000);
  machine.loop->RunOnce(0);
  EXPECT_EQ(lines.rises[0] - before, 1);
}

TEST_F(PitTest, Mode0IsOneShot) {
  Write(0x43, 0x30);
  Write(0x40, 0xe8), Write(0x40, 0x03);
  EXPECT_FALSE(lines.levels[0]);
  AdvanceTicks(990);
  machine.loop->RunOnce(0);
  EXPECT_FALSE(lines.levels[0]);
  AdvanceTicks(100);
  machine.loop->RunOnce(0);
  EXPECT_TRUE(lines.levels[0]);
  machine.Pass(100'000'000);
  EXPECT_EQ(lines.rises[0], 1);
}

TEST_F(PitTest, CountsDown) {
  Write(0x43, 0x30);
  Write(0x40, 0x00), Write(0x40, 0x10);
  AdvanceTicks(0x100);
  EXPECT_EQ(Latched(0), 0x0f00);
  AdvanceTicks(0x1000);
  EXPECT_EQ(Latched(0), 0xff00) << "mode 0 counts on through zero";
  Write(0x43, 0x34);
  Write(0x40, 0x00), Write(0x40, 0x10);
  AdvanceTicks(0x1100);
  EXPECT_EQ(Latched(0), 0x0f00) << "mode 2 reloads";
}

TEST_F(PitTest, Bcd) {
  Write(0x43, 0x31);
  Write(0x40, 0x00), Write(0x40, 0x10);  // 1000
  AdvanceTicks(1);
  EXPECT_EQ(Latched(0), 0x0999);
}

TEST_F(PitTest, LatchHoldsAndReadBackHasStatus) {
  Write(0x43, 0x30);
  Write(0x40, 0x00), Write(0x40, 0x10);
  AdvanceTicks(0x10);
  Write(0x43, 0x00);
  AdvanceTicks(0x10);
  EXPECT_EQ(Read(0x40), 0xf0);
  EXPECT_EQ(Read(0x40), 0x0f);
  Write(0x43, 0xe2);  // status of counter 0
  EXPECT_EQ(Read(0x40), 0x30) << "output low, count loaded, both bytes, mode 0";
  Write(0x43, 0x34);
  Write(0x43, 0xe2);
  EXPECT_EQ(Read(0x40), 0xf4) << "output high, null count, mode 2";
}

// How Linux and SeaBIOS time their CPU: counter 2 in mode 0, its gate and output in port 0x61.
TEST_F(PitTest, Counter2ForCalibration) {
  Write(0x61, (Read(0x61) & ~2) | 1);
  Write(0x43, 0xb0);
  Write(0x42, 0x9b), Write(0x42, 0x2e);  // 11931 ticks, 10 ms
  EXPECT_FALSE(Read(0x61) & 0x20);
  AdvanceTicks(11900);
  EXPECT_FALSE(Read(0x61) & 0x20);
  AdvanceTicks(40);
  EXPECT_TRUE(Read(0x61) & 0x20);
  EXPECT_EQ(lines.rises[0], 0);
}

TEST_F(PitTest, GateStopsCounter2) {
  Write(0x61, 1);
  Write(0x43, 0xb0);
  Write(0x42, 0x00), Write(0x42, 0x10);
  AdvanceTicks(0x100);
  Write(0x61, 0);
  AdvanceTicks(0x5000);
  EXPECT_EQ(Latched(2), 0x0f00);
  Write(0x61, 1);
  AdvanceTicks(0x100);
  EXPECT_EQ(Latched(2), 0x0e00);
}

TEST_F(PitTest, StateMoves) {
  Write(0x43, 0x34);
  Write(0x40, 0x00), Write(0x40, 0x10);
  AdvanceTicks(0x123);
  test::RecordedLines other_lines;
  Pit8254 other(machine.Env("pit"), IrqLine(other_lines, 0));
  EXPECT_TRUE(test::StateMoves(pit, other));
  int before = other_lines.rises[0];
  machine.Pass(20'000'000);
  EXPECT_GT(other_lines.rises[0], before);
}

}  // namespace
}  // namespace kvartz
