// Expected values: IA-PC HPET specification 1.0a, 2.3.
#include "device/timer/hpet.h"

#include <gtest/gtest.h>

#include "device/test_env.h"

namespace kvartz {
namespace {

struct HpetTest : testing::Test {
  HpetTest() : hpet(machine.Env("hpet"), {&lines, 0xff0000, [this](bool on) { legacy = on; }}) {
    test::MiniMachine::ResetDevice(hpet);
  }
  uint64_t Read(uint64_t offset, unsigned size = 8) {
    LockGuard guard(hpet.lock());
    uint64_t value = hpet.IoRead(offset, size);
    return size == 8 ? value : value & 0xffffffff;
  }
  void Write(uint64_t offset, uint64_t value, unsigned size = 8) {
    LockGuard guard(hpet.lock());
    hpet.IoWrite(offset, size, value);
  }

  test::MiniMachine machine;
  test::RecordedLines lines;
  bool legacy = false;
  Hpet hpet;
};

TEST_F(HpetTest, CapabilitiesAndCounter) {
  EXPECT_EQ(Read(0) >> 32, 10'000'000u) << "femtoseconds a tick";
  EXPECT_EQ(Read(0) & 0xffffffff, 0x8086a201u);
  machine.clock.Advance(1'000'000);
  EXPECT_EQ(Read(0xf0), 0u) << "stopped";
  Write(0xf0, 1000);
  Write(0x10, 1);
  machine.clock.Advance(1'000'000);
  EXPECT_EQ(Read(0xf0), 101'000u);
  EXPECT_EQ(Read(0xf4, 4), 0u);
  Write(0x10, 0);
  machine.clock.Advance(1'000'000);
  EXPECT_EQ(Read(0xf0), 101'000u);
}

TEST_F(HpetTest, OneShotAtARoute) {
  Write(0x100, 18 << 9 | 4);
  Write(0x108, 500'000);  // 5 ms
  Write(0x10, 1);
  machine.Pass(4'900'000);
  EXPECT_EQ(lines.rises[18], 0);
  machine.Pass(200'000);
  EXPECT_EQ(lines.rises[18], 1);
  EXPECT_FALSE(lines.levels[18]) << "edge";
  machine.Pass(50'000'000);
  EXPECT_EQ(lines.rises[18], 1);
}

TEST_F(HpetTest, PeriodicInLegacyReplacement) {
  Write(0x10, 2);
  EXPECT_TRUE(legacy);
  Write(0x100, 1 << 6 | 1 << 3 | 1 << 2);
  Write(0x108, 100'000);  // sets comparator and period: 1 ms
  Write(0x10, 3);
  machine.Pass(100'000'000);
  EXPECT_NEAR(lines.rises[0], 100, 1);
  Write(0x10, 1);
  EXPECT_FALSE(legacy);
}

TEST_F(HpetTest, LevelUntilTheStatusIsCleared) {
  Write(0x120, 20 << 9 | 4 | 2);
  Write(0x128, 1000);
  Write(0x10, 1);
  machine.Pass(1'000'000);
  EXPECT_TRUE(lines.levels[20]);
  EXPECT_EQ(Read(0x20), 2u);
  Write(0x20, 2);
  EXPECT_FALSE(lines.levels[20]);
  EXPECT_EQ(Read(0x20), 0u);
}

TEST_F(HpetTest, MessageDelivery) {
  Write(0x110, 0xfee0100000000041);
  Write(0x100, 1 << 14 | 4);
  Write(0x108, 1000);
  Write(0x10, 1);
  machine.Pass(1'000'000);
  ASSERT_EQ(machine.messages.size(), 1u);
  EXPECT_EQ(machine.messages[0], std::make_pair(uint64_t{0xfee01000}, uint32_t{0x41}));
}

TEST_F(HpetTest, StateMoves) {
  Write(0x100, 18 << 9 | 4);
  Write(0x108, 500'000);
  Write(0x10, 1);
  test::RecordedLines other_lines;
  Hpet other(machine.Env("hpet"), {&other_lines, 0xff0000, {}});
  EXPECT_TRUE(test::StateMoves(hpet, other));
  machine.Pass(6'000'000);
  EXPECT_EQ(other_lines.rises[18], 1);
}

}  // namespace
}  // namespace kvartz
