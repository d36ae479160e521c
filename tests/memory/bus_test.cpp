// BusRead and BusWrite.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "memory/address_space.h"
#include "memory/gpa.h"

namespace kvartz {
namespace {

using testing::ElementsAre;

// Registers that hold what was written, and a list of the accesses.
class Device : public IoHandler {
 public:
  uint64_t IoRead(uint64_t offset, unsigned size) override {
    accesses.push_back("r" + std::to_string(size) + "@" + std::to_string(offset));
    uint64_t value = 0;
    for (unsigned i = 0; i < size; i++) value |= uint64_t{bytes[offset + i]} << i * 8;
    return value | ~0ull << (size - 1) * 8 << 8;  // rubbish above `size` must not matter
  }
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
    EXPECT_TRUE(size == 8 || value >> size * 8 == 0);
    accesses.push_back("w" + std::to_string(size) + "@" + std::to_string(offset));
    for (unsigned i = 0; i < size; i++) bytes[offset + i] = static_cast<uint8_t>(value >> i * 8);
  }
  uint8_t bytes[64] = {};
  std::vector<std::string> accesses;
};

class BusTest : public testing::Test {
 protected:
  AddressSpace::RegionId AddDevice(uint64_t base, uint64_t size, unsigned min_access,
                                   unsigned max_access, std::vector<Doorbell> doorbells = {}) {
    return space_.Add({.name = "device",
                       .kind = RegionKind::kIo,
                       .base = base,
                       .size = size,
                       .handler = &device_,
                       .lock = &lock_,
                       .min_access = min_access,
                       .max_access = max_access,
                       .doorbells = std::move(doorbells)});
  }
  std::shared_ptr<RamBlock> AddRam(RegionKind kind, uint64_t base, IoHandler* handler = nullptr) {
    auto ram = RamBlock::Create("ram", kPageSize);
    EXPECT_TRUE(ram);
    space_.Add({.name = "ram",
                .kind = kind,
                .base = base,
                .size = kPageSize,
                .ram = *ram,
                .handler = handler});
    return *ram;
  }
  AddressSpace space_{"memory", 1ull << 40};
  ViewCache view_{space_};
  Device device_;
  Mutex lock_;
};

TEST_F(BusTest, NothingThereReadsAsOnesAndSwallowsWrites) {
  EXPECT_EQ(BusRead(view_, 0x1000, 1), 0xffu);
  EXPECT_EQ(BusRead(view_, 0x1000, 2), 0xffffu);
  EXPECT_EQ(BusRead(view_, UINT64_MAX - 3, 8), ~0ull);
  BusWrite(view_, 0x1000, 8, 0);
}

TEST_F(BusTest, RamOfEverySizeAlignedOrNotAndMarkedDirty) {
  auto ram = AddRam(RegionKind::kRam, 0x10000);
  ram->dirty().SetEnabled(true);
  for (unsigned size : {1u, 2u, 4u, 8u}) {
    for (uint64_t at : {0x10000u, 0x10101u, 0x10ff8u}) {
      uint64_t value = 0x8877665544332211;
      BusWrite(view_, at, size, value);
      uint64_t mask = size == 8 ? ~0ull : (1ull << size * 8) - 1;
      EXPECT_EQ(BusRead(view_, at, size), value & mask);
      EXPECT_EQ(ram->host()[at - 0x10000], 0x11);
    }
  }
  int pages = 0;
  ram->dirty().Collect([&](uint64_t page) { pages += page == 0; });
  EXPECT_EQ(pages, 1);
}

TEST_F(BusTest, RomKeepsItsContents) {
  auto rom = AddRam(RegionKind::kRom, 0xf0000);
  rom->host()[4] = 0x5a;
  BusWrite(view_, 0xf0004, 1, 0);
  EXPECT_EQ(BusRead(view_, 0xf0004, 1), 0x5au);
}

TEST_F(BusTest, WritesToFlashReachItsHandler) {
  auto rom = AddRam(RegionKind::kRom, 0xf0000, &device_);
  BusWrite(view_, 0xf0004, 1, 0x40);
  EXPECT_EQ(BusRead(view_, 0xf0004, 1), 0u);
  EXPECT_THAT(device_.accesses, ElementsAre("w1@4"));
}

TEST_F(BusTest, WideAccessesAreSplitAtWhatTheDeviceTakes) {
  AddDevice(0x1000, 64, 1, 4);
  BusWrite(view_, 0x1008, 8, 0x1122334455667788);
  EXPECT_EQ(BusRead(view_, 0x1008, 8), 0x1122334455667788u);
  EXPECT_THAT(device_.accesses, ElementsAre("w4@8", "w4@12", "r4@8", "r4@12"));
}

TEST_F(BusTest, NarrowAccessesAreWidenedToWhatTheDeviceTakes) {
  AddDevice(0x1000, 64, 4, 4);
  BusWrite(view_, 0x1004, 4, 0x44332211);
  EXPECT_EQ(BusRead(view_, 0x1005, 1), 0x22u);
  EXPECT_EQ(BusRead(view_, 0x1006, 2), 0x4433u);
  EXPECT_EQ(BusRead(view_, 0x1003, 2),
            0x1100u);  // the end of one register and the start of the next
  EXPECT_THAT(device_.accesses, ElementsAre("w4@4", "r4@4", "r4@4", "r4@0", "r4@4"));
  device_.accesses.clear();
  BusWrite(view_, 0x1009, 1, 0xab);
  EXPECT_EQ(BusRead(view_, 0x1008, 4), 0xab00u);
}

TEST_F(BusTest, AccessesAreCutAtTheEndsOfRanges) {
  auto ram = AddRam(RegionKind::kRam, 0x1000 - kPageSize);
  AddDevice(0x1000, 64, 1, 8);
  ram->host()[kPageSize - 1] = 0x99;
  device_.bytes[0] = 0x01;
  device_.bytes[1] = 0x02;
  device_.bytes[2] = 0x03;
  EXPECT_EQ(BusRead(view_, 0xfff, 4), 0x03020199u);
  EXPECT_THAT(device_.accesses, ElementsAre("r2@0", "r1@2"));
  // Beyond its end nothing answers.
  device_.bytes[63] = 0x77;
  EXPECT_EQ(BusRead(view_, 0x103f, 2), 0xff77u);
}

TEST_F(BusTest, TheDeviceIsLockedDuringTheCall) {
  class Checker : public IoHandler {
   public:
    explicit Checker(Mutex& mutex) : mutex_(mutex) {}
    uint64_t IoRead(uint64_t, unsigned) override { return Free() ? 1 : 0; }
    void IoWrite(uint64_t, unsigned, uint64_t) override { was_free |= Free(); }
    bool Free() {
      bool taken = false;
      Thread other("other", [&]() KVARTZ_TSA(no_thread_safety_analysis) {
        taken = mutex_.TryLock();
        if (taken) mutex_.Unlock();
      });
      other.Join();
      return taken;
    }
    bool was_free = false;

   private:
    Mutex& mutex_;
  } checker(lock_);
  space_.Add({.name = "checker", .base = 0x2000, .size = 8, .handler = &checker, .lock = &lock_});
  EXPECT_EQ(BusRead(view_, 0x2000, 1), 0u);
  BusWrite(view_, 0x2000, 1, 0);
  EXPECT_FALSE(checker.was_free);
  EXPECT_TRUE(checker.Free());
}

TEST_F(BusTest, DoorbellsSignalInsteadOfCalling) {
  auto any = EventFd::Create(), sized = EventFd::Create(), exact = EventFd::Create();
  ASSERT_TRUE(any && sized && exact);
  AddDevice(0x1000, 64, 1, 4,
            {{.offset = 0, .event_fd = any->fd()},
             {.offset = 4, .size = 2, .event_fd = sized->fd()},
             {.offset = 8, .size = 2, .match_value = true, .value = 3, .event_fd = exact->fd()}});
  BusWrite(view_, 0x1000, 4, 77);
  EXPECT_TRUE(any->Consume());
  BusWrite(view_, 0x1004, 2, 77);
  EXPECT_TRUE(sized->Consume());
  BusWrite(view_, 0x1008, 2, 0x10003);  // what is above the access doesn't count
  EXPECT_TRUE(exact->Consume());
  EXPECT_TRUE(device_.accesses.empty());
  BusWrite(view_, 0x1004, 4, 77);
  BusWrite(view_, 0x1008, 2, 4);
  BusWrite(view_, 0x1001, 1, 0);
  EXPECT_FALSE(any->Consume() || sized->Consume() || exact->Consume());
  EXPECT_EQ(BusRead(view_, 0x1000, 4), 0u);
  EXPECT_THAT(device_.accesses, ElementsAre("w4@4", "w2@8", "w1@1", "r4@0"));
}

// A write to a BAR register moves the device's own region while the bus is inside it.
TEST_F(BusTest, AHandlerMayChangeTheMap) {
  class Mover : public IoHandler {
   public:
    Mover(AddressSpace& space, ViewCache& view) : space_(space), view_(view) { Place(0x3000); }
    uint64_t IoRead(uint64_t, unsigned) override { return 0x42; }
    void IoWrite(uint64_t offset, unsigned, uint64_t value) override {
      if (offset != 0) return;
      space_.Remove(id_);
      Place(value);
      view_.Get();
    }
    void Place(uint64_t base) {
      id_ =
          space_.Add({.name = "mover", .base = base, .size = 8, .handler = this, .max_access = 2});
    }

   private:
    AddressSpace& space_;
    ViewCache& view_;
    AddressSpace::RegionId id_ = 0;
  } mover(space_, view_);
  BusWrite(view_, 0x3000, 4, 0x5000);
  EXPECT_EQ(BusRead(view_, 0x5000, 1), 0x42u);
  EXPECT_EQ(BusRead(view_, 0x3000, 1), 0xffu);
}

}  // namespace
}  // namespace kvartz
