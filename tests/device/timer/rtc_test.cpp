// Expected values: Motorola MC146818A datasheet (1984); dates by date(1).
#include "device/timer/rtc.h"

#include <gtest/gtest.h>

#include "device/test_env.h"

namespace kvartz {
namespace {

constexpr int64_t kSecond = 1'000'000'000;
constexpr int64_t kLeapDay = 1709251198;  // Thu Feb 29 23:59:58 UTC 2024

struct RtcTest : testing::Test {
  RtcTest() : rtc(machine.Env("rtc"), IrqLine(lines, 8), wall, kLeapDay) {
    test::MiniMachine::ResetDevice(rtc);
  }
  uint8_t Read(uint8_t index) {
    LockGuard guard(rtc.lock());
    rtc.IoWrite(0, 1, index);
    return rtc.IoRead(1, 1);
  }
  void Write(uint8_t index, uint8_t value) {
    LockGuard guard(rtc.lock());
    rtc.IoWrite(0, 1, index);
    rtc.IoWrite(1, 1, value);
  }
  void Pass(int64_t ns) {
    while (ns > 0) {
      int64_t step = std::min<int64_t>(ns, 1'000'000);
      wall.Advance(step);
      machine.clock.Advance(step);
      machine.loop->RunOnce(0);
      ns -= step;
    }
  }
  std::string Time() {
    char text[32];
    snprintf(text, sizeof text, "%02x%02x-%02x-%02x %02x:%02x:%02x %x", Read(0x32), Read(9),
             Read(8), Read(7), Read(4), Read(2), Read(0), Read(6));
    return text;
  }

  test::MiniMachine machine;
  test::RecordedLines lines;
  ManualClock wall;
  Rtc rtc;
};

TEST_F(RtcTest, ShowsTheTimeInBcd) {
  EXPECT_EQ(Time(), "2024-02-29 23:59:58 5");
  Pass(2 * kSecond);
  EXPECT_EQ(Time(), "2024-03-01 00:00:00 6");
}

TEST_F(RtcTest, BinaryAndTwelveHours) {
  Write(11, 0x06);
  EXPECT_EQ(Read(0), 58);
  EXPECT_EQ(Read(4), 23);
  Write(11, 0x00);
  EXPECT_EQ(Read(4), 0x91) << "11 pm";
  Pass(2 * kSecond);
  EXPECT_EQ(Read(4), 0x12) << "midnight is 12 am";
}

TEST_F(RtcTest, SetStopsAndSetsTheClock) {
  Write(11, 0x82);
  Write(9, 0x99), Write(0x32, 0x19), Write(8, 0x12), Write(7, 0x31), Write(4, 0x23), Write(2, 0x59),
      Write(0, 0x50);
  Pass(5 * kSecond);
  EXPECT_EQ(Read(0), 0x50);
  Write(11, 0x02);
  EXPECT_EQ(Time().substr(0, 19), "1999-12-31 23:59:50");
  Pass(10 * kSecond);
  EXPECT_EQ(Time(), "2000-01-01 00:00:00 7");
}

TEST_F(RtcTest, UpdateInProgressBeforeTheSecond) {
  EXPECT_FALSE(Read(10) & 0x80);
  Pass(kSecond - 200'000);
  EXPECT_TRUE(Read(10) & 0x80);
  Pass(200'000);
  EXPECT_FALSE(Read(10) & 0x80);
}

TEST_F(RtcTest, UpdateEndedInterrupt) {
  Write(11, 0x12);
  Pass(kSecond - 1'000'000);
  EXPECT_FALSE(lines.levels[8]);
  Pass(2'000'000);
  EXPECT_TRUE(lines.levels[8]);
  EXPECT_EQ(Read(12) & 0x90, 0x90);
  EXPECT_FALSE(lines.levels[8]);
  EXPECT_EQ(Read(12), 0x00) << "reading clears";
  Pass(kSecond);
  EXPECT_TRUE(lines.levels[8]);
}

TEST_F(RtcTest, FlagsWithoutInterrupts) {
  Read(12);
  Pass(kSecond);
  EXPECT_EQ(Read(12) & 0x10, 0x10);
  EXPECT_FALSE(lines.levels[8]);
}

TEST_F(RtcTest, AlarmAtItsTime) {
  Write(1, 0x05), Write(3, 0x00), Write(5, 0x00);
  Write(11, 0x22);
  Pass(6 * kSecond);
  EXPECT_FALSE(lines.levels[8]);
  Pass(kSecond + 1'000'000);
  EXPECT_TRUE(lines.levels[8]);
  EXPECT_EQ(Read(12) & 0xa0, 0xa0);
}

TEST_F(RtcTest, AlarmWithWildcardsComesEverySecond) {
  Write(1, 0xc0), Write(3, 0xff), Write(5, 0xff);
  Write(11, 0x22);
  for (int i = 0; i < 3; i++) {
    Pass(kSecond);
    EXPECT_TRUE(lines.levels[8]) << i;
    Read(12);
  }
}

TEST_F(RtcTest, PeriodicInterrupt) {
  Write(10, 0x2a);  // 64 Hz
  Write(11, 0x42);
  int count = 0;
  for (int i = 0; i < 1000; i++) {
    Pass(1'000'000);
    if (lines.levels[8]) {
      count++;
      EXPECT_EQ(Read(12) & 0xc0, 0xc0);
    }
  }
  EXPECT_NEAR(count, 64, 1);
}

TEST_F(RtcTest, MemoryAndState) {
  rtc.SetByte(0x5f, 3);
  EXPECT_EQ(Read(0x5f), 3);
  Write(0x0f, 0x0a);
  EXPECT_EQ(rtc.byte(0x0f), 0x0a);
  EXPECT_EQ(Read(13), 0x80) << "valid";
  test::RecordedLines other_lines;
  Rtc other(machine.Env("rtc"), IrqLine(other_lines, 8), wall, 0);
  EXPECT_TRUE(test::StateMoves(rtc, other));
  LockGuard guard(other.lock());
  other.IoWrite(0, 1, 9);
  EXPECT_EQ(other.IoRead(1, 1), 0x24);
}

}  // namespace
}  // namespace kvartz
