#include "device/virtio/virtio_balloon.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "device/virtio/test_machine.h"

namespace kvartz::test {
namespace {

class VirtioBalloonTest : public testing::Test {
 protected:
  void Open(Properties properties = {}) {
    ASSERT_NE(machine_.Plug("virtio-balloon-pci", properties), nullptr) << machine_.error;
    balloon_ = dynamic_cast<VirtioBalloon*>(VirtioDeviceOf(*machine_.device()));
    driver_ = std::make_unique<ModernDriver>(machine_);
  }
  void Start(uint16_t queues = 3) {
    ASSERT_TRUE(driver_->Negotiate(0xff));
    for (uint16_t i = 0; i < queues; ++i) driver_->SetUpQueue(i);
    driver_->Start();
    machine_.Settle();
  }
  // A page of RAM with something in it; its address.
  uint64_t FilledPages(int count) {
    uint64_t gpa;
    std::memset(machine_.Allocate(4096u * static_cast<unsigned>(count), &gpa, 4096), 0x77,
                4096u * static_cast<unsigned>(count));
    return gpa;
  }
  bool Zero(uint64_t gpa, size_t size) {
    return std::count(machine_.ram(gpa), machine_.ram(gpa + size), 0) ==
           static_cast<ptrdiff_t>(size);
  }
  TestMachine machine_;
  VirtioBalloon* balloon_ = nullptr;
  std::unique_ptr<ModernDriver> driver_;
};

TEST_F(VirtioBalloonTest, TargetReachesTheGuestAndBack) {
  Open({{"deflate-on-oom", "on"}});
  Start();
  EXPECT_EQ(driver_->features() & 7, 6u);  // statistics, deflate on OOM
  EXPECT_EQ(balloon_->GuestBytes(), kRamBytes);
  uint64_t told = 0;
  balloon_->OnChange([&](uint64_t bytes) { told = bytes; });
  driver_->ReadIsr();
  balloon_->SetTarget(kRamBytes - (4 << 20));
  EXPECT_EQ(driver_->ReadIsr(), 2);
  EXPECT_EQ(driver_->ReadConfig(0, 4), 1024u);
  driver_->WriteConfig(4, 4, 1000);
  machine_.Settle();
  EXPECT_EQ(told, kRamBytes - 1000 * 4096);
  driver_->WriteConfig(0, 4, 5);  // the target is the host's
  EXPECT_EQ(driver_->ReadConfig(0, 4), 1024u);
  driver_->WriteConfig(4, 4, 0xffffffff);
  EXPECT_EQ(balloon_->GuestBytes(), 0u);
}

TEST_F(VirtioBalloonTest, InflatedPagesReadAsZeros) {
  Open();
  Start();
  uint64_t pages = FilledPages(4), list;
  machine_.ram_block().dirty().SetEnabled(true);
  uint8_t* at = machine_.Allocate(20, &list);
  uint32_t numbers[] = {static_cast<uint32_t>(pages / 4096),
                        static_cast<uint32_t>(pages / 4096 + 1),
                        static_cast<uint32_t>(pages / 4096 + 3), 0xffffffff, 0xfd000};
  std::memcpy(at, numbers, 20);
  EXPECT_EQ(driver_->Transact(0, {{list, 20, false}}), 0u);
  EXPECT_TRUE(Zero(pages, 8192));
  EXPECT_FALSE(Zero(pages + 8192, 4096));
  EXPECT_TRUE(Zero(pages + 3 * 4096, 4096));
  bool marked = false;
  machine_.ram_block().dirty().Collect([&](uint64_t page) { marked |= page == pages / 4096 + 3; });
  EXPECT_TRUE(marked);
  EXPECT_EQ(driver_->Transact(1, {{list, 12, false}}), 0u);
  machine_.ram(pages)[0] = 1;  // and is there again
  EXPECT_FALSE(driver_->needs_reset());
}

TEST_F(VirtioBalloonTest, FreePagesAreReported) {
  Open({{"free-page-reporting", "on"}});
  Start(4);
  uint64_t pages = FilledPages(4);
  EXPECT_EQ(driver_->Transact(3, {{pages, 8192, true}, {pages + 3 * 4096, 4096, true}}), 0u);
  EXPECT_TRUE(Zero(pages, 8192));
  EXPECT_FALSE(Zero(pages + 8192, 4096));
  EXPECT_TRUE(Zero(pages + 3 * 4096, 4096));
}

TEST_F(VirtioBalloonTest, Statistics) {
  Open();
  Start();
  uint64_t list;
  uint8_t* at = machine_.Allocate(20, &list);
  auto put = [&](int index, uint16_t tag, uint64_t value) {
    std::memcpy(at + 10 * index, &tag, 2);
    std::memcpy(at + 10 * index + 2, &value, 8);
  };
  put(0, 4, 123456);  // free memory
  put(1, 0x1234, 1);  // unknown: passed over
  driver_->ring(2).Add({{list, 20, false}});
  driver_->Kick(2);
  machine_.Settle();
  EXPECT_FALSE(driver_->ring(2).Take());  // kept until new ones are wanted
  EXPECT_EQ(balloon_->stats().values[4], 123456u);
  EXPECT_GT(balloon_->stats().updated_s, 0);
  EXPECT_FALSE(balloon_->stats().values[5]);
  balloon_->SetStatsInterval(1);
  EXPECT_TRUE(machine_.TurnUntil([&] { return driver_->ring(2).Take().has_value(); }));
  balloon_->SetStatsInterval(0);
}

TEST_F(VirtioBalloonTest, AListWithoutEnd) {
  Open();
  Start();
  EXPECT_FALSE(driver_->Transact(0, {{0, 1 << 20, false}}));
  EXPECT_TRUE(driver_->needs_reset());
}

}  // namespace
}  // namespace kvartz::test
