#include "device/virtio/virtio_rng.h"

#include <gtest/gtest.h>

#include "device/virtio/test_machine.h"

namespace kvartz::test {
namespace {

TEST(VirtioRng, FillsWhatTheDriverGives) {
  TestMachine machine;
  ASSERT_NE(machine.Plug("virtio-rng-pci", {}), nullptr);
  ModernDriver driver(machine);
  ASSERT_TRUE(driver.Negotiate(0));
  driver.SetUpQueue(0);
  driver.Start();
  uint64_t a, b;
  machine.Allocate(100, &a);
  machine.Allocate(200, &b);
  EXPECT_EQ(driver.Transact(0, {{a, 100, true}, {b, 200, true}}), 300u);
  EXPECT_EQ(driver.Transact(0, {{a, 100, false}}), 0u);
  EXPECT_FALSE(driver.needs_reset());
}

TEST(VirtioRng, QuotaOfAPeriod) {
  TestMachine machine;
  ASSERT_NE(machine.Plug("virtio-rng-pci", {{"max-bytes", "10"}, {"period", "20"}}), nullptr);
  ModernDriver driver(machine);
  ASSERT_TRUE(driver.Negotiate(0));
  driver.SetUpQueue(0);
  driver.Start();
  uint64_t gpa;
  machine.Allocate(64, &gpa);
  int64_t start = machine.loop().clock().NowNs();
  EXPECT_EQ(driver.Transact(0, {{gpa, 64, true}}), 10u);
  EXPECT_EQ(driver.Transact(0, {{gpa, 64, true}}), 10u);
  EXPECT_GE(machine.loop().clock().NowNs() - start, 20'000'000);
  EXPECT_EQ(machine.Plug("virtio-rng-pci", {{"period", "0"}}), nullptr);
}

}  // namespace
}  // namespace kvartz::test
