// Expected values: IBM PS/2 technical reference, "Keyboard/auxiliary device controller".
#include "device/char/i8042.h"

#include <gtest/gtest.h>

#include "device/char/debug_ports.h"
#include "device/test_env.h"

namespace kvartz {
namespace {

using Request = MachineControl::Request;

TEST(I8042, SelfTestsAndCommandByte) {
  test::MiniMachine machine;
  I8042 kbc(machine.Env("i8042"));
  test::MiniMachine::ResetDevice(kbc);
  EXPECT_EQ(kbc.IoRead(0x64, 1) & 3, 0u) << "both buffers empty";
  kbc.IoWrite(0x64, 1, 0xaa);
  EXPECT_EQ(kbc.IoRead(0x64, 1) & 1, 1u);
  EXPECT_EQ(kbc.IoRead(0x60, 1), 0x55u);
  EXPECT_EQ(kbc.IoRead(0x64, 1) & 1, 0u);
  kbc.IoWrite(0x64, 1, 0xab);
  EXPECT_EQ(kbc.IoRead(0x60, 1), 0x00u);
  kbc.IoWrite(0x64, 1, 0x60);
  kbc.IoWrite(0x60, 1, 0x35);
  kbc.IoWrite(0x64, 1, 0x20);
  EXPECT_EQ(kbc.IoRead(0x60, 1), 0x35u);
  kbc.IoWrite(0x64, 1, 0xd3);
  kbc.IoWrite(0x60, 1, 0x5a);
  EXPECT_EQ(kbc.IoRead(0x64, 1) & 0x21, 0x21u) << "from the auxiliary device";
  EXPECT_EQ(kbc.IoRead(0x60, 1), 0x5au);
}

TEST(I8042, ResetLines) {
  test::MiniMachine machine;
  I8042 kbc(machine.Env("i8042"));
  kbc.IoWrite(0x64, 1, 0xff);
  EXPECT_TRUE(machine.requests.empty()) << "pulses no line";
  kbc.IoWrite(0x64, 1, 0xfe);
  kbc.IoWrite(0x64, 1, 0xd1);
  kbc.IoWrite(0x60, 1, 0xfe);
  kbc.IoWrite(0x92, 1, 0x02);
  EXPECT_EQ(kbc.IoRead(0x92, 1), 0x02u);
  kbc.IoWrite(0x92, 1, 0x03);
  ASSERT_EQ(machine.requests.size(), 3u);
  for (const auto& [request, who] : machine.requests) EXPECT_EQ(request, Request::kReset) << who;
}

TEST(DebugExit, EndsWithTheCode) {
  test::MiniMachine machine;
  DebugExit device(machine.Env("exit"));
  device.IoWrite(0, 1, 0x10);
  EXPECT_EQ(machine.exit_code, 0x21);
}

}  // namespace
}  // namespace kvartz
