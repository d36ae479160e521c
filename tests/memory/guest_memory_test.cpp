#include "memory/guest_memory.h"

#include <gtest/gtest.h>

#include <numeric>

namespace kvartz {
namespace {

class NullHandler : public IoHandler {
 public:
  uint64_t IoRead(uint64_t, unsigned) override { return 0; }
  void IoWrite(uint64_t, unsigned, uint64_t) override {}
};

// RAM at 0..64 KiB, ROM at 64..68 KiB, a device at 68..72 KiB, more RAM at 80 KiB (4 KiB) with a
// hole before it.
class GuestMemoryTest : public testing::Test {
 protected:
  void SetUp() override {
    low_ = Add(RegionKind::kRam, 0, 0x10000, 0);
    rom_ = Add(RegionKind::kRom, 0x10000, 0x1000, 0);
    space_.Add({.name = "io", .base = 0x11000, .size = 0x1000, .handler = &handler_});
    high_ = Add(RegionKind::kRam, 0x14000, 0x1000, 0x3000);
  }
  std::shared_ptr<RamBlock> Add(RegionKind kind, uint64_t base, uint64_t size, uint64_t offset) {
    auto ram = RamBlock::Create("ram", size + offset);
    EXPECT_TRUE(ram);
    (*ram)->dirty().SetEnabled(true);
    space_.Add({.name = "ram",
                .kind = kind,
                .base = base,
                .size = size,
                .ram = *ram,
                .ram_offset = offset});
    return *ram;
  }
  static std::vector<uint64_t> Dirty(RamBlock& ram) {
    std::vector<uint64_t> pages;
    ram.dirty().Collect([&](uint64_t page) { pages.push_back(page); });
    return pages;
  }
  NullHandler handler_;
  AddressSpace space_{"memory", 1ull << 40};
  std::shared_ptr<RamBlock> low_, rom_, high_;
  GuestMemory memory_{space_};
};

TEST_F(GuestMemoryTest, WritesAndReadsBack) {
  uint64_t value = 0x1122334455667788, back = 0;
  EXPECT_TRUE(memory_.WriteObject(Gpa(0x1ffc), value));
  EXPECT_TRUE(memory_.ReadObject(Gpa(0x1ffc), &back));
  EXPECT_EQ(back, value);
  EXPECT_EQ(low_->host()[0x1ffc], 0x88);
  EXPECT_EQ(Dirty(*low_), (std::vector<uint64_t>{1, 2}));
  EXPECT_TRUE(memory_.WriteObject(Gpa(0x14008), value));
  EXPECT_EQ(high_->host()[0x3008], 0x88);
  EXPECT_EQ(Dirty(*high_), (std::vector<uint64_t>{3}));
}

TEST_F(GuestMemoryTest, RomIsOnlyRead) {
  rom_->host()[0] = 7;
  uint8_t byte = 0;
  EXPECT_TRUE(memory_.Read(Gpa(0x10000), &byte, 1));
  EXPECT_EQ(byte, 7);
  EXPECT_FALSE(memory_.Write(Gpa(0x10000), &byte, 1));
  std::vector<iovec> out;
  EXPECT_TRUE(memory_.Map(Gpa(0x10000), 1, GuestMemory::Access::kRead, &out));
  EXPECT_FALSE(memory_.Map(Gpa(0x10000), 1, GuestMemory::Access::kWrite, &out));
}

TEST_F(GuestMemoryTest, DevicesHolesAndWrapsAreNotReachable) {
  uint8_t buffer[64] = {};
  for (uint64_t gpa : {0x11000ul, 0x12000ul, 0x10ff0ul, 0x14ff0ul, UINT64_MAX - 3, UINT64_MAX}) {
    EXPECT_FALSE(memory_.Read(Gpa(gpa), buffer, sizeof(buffer))) << std::hex << gpa;
    EXPECT_FALSE(memory_.Write(Gpa(gpa), buffer, sizeof(buffer))) << std::hex << gpa;
  }
  std::vector<iovec> out = {{buffer, 1}};
  EXPECT_FALSE(memory_.Map(Gpa(0), UINT64_MAX, GuestMemory::Access::kRead, &out));
  EXPECT_FALSE(memory_.Map(Gpa(0x14000), 1ull << 62, GuestMemory::Access::kRead, &out));
  EXPECT_EQ(out.size(), 1u);
}

TEST_F(GuestMemoryTest, AWriteThatDoesNotFitWritesNothing) {
  uint8_t ones[32];
  std::fill(std::begin(ones), std::end(ones), 0xff);
  EXPECT_FALSE(memory_.Write(Gpa(0xfff0), ones, sizeof(ones)));  // runs into ROM
  EXPECT_EQ(low_->host()[0xfff0], 0);
  EXPECT_TRUE(Dirty(*low_).empty());
}

TEST_F(GuestMemoryTest, MapGivesThePiecesInOrder) {
  // Split RAM in two by an overlay; both halves are RAM, apart in the host.
  auto overlay = RamBlock::Create("overlay", 0x1000);
  ASSERT_TRUE(overlay);
  space_.Add({.name = "overlay",
              .kind = RegionKind::kRam,
              .base = 0x4000,
              .size = 0x1000,
              .priority = 1,
              .ram = *overlay});
  std::vector<iovec> out;
  ASSERT_TRUE(memory_.Map(Gpa(0x3f00), 0x1200, GuestMemory::Access::kWrite, &out));
  ASSERT_EQ(out.size(), 3u);
  EXPECT_EQ(out[0].iov_base, low_->host() + 0x3f00);
  EXPECT_EQ(out[0].iov_len, 0x100u);
  EXPECT_EQ(out[1].iov_base, (*overlay)->host());
  EXPECT_EQ(out[1].iov_len, 0x1000u);
  EXPECT_EQ(out[2].iov_base, low_->host() + 0x5000);
  EXPECT_EQ(Dirty(*low_), (std::vector<uint64_t>{3, 5}));
  memory_.MarkDirty(Gpa(0x3f00), 0x1200);
  EXPECT_EQ(Dirty(*low_), (std::vector<uint64_t>{3, 5}));
  EXPECT_EQ(memory_.MapContiguous(Gpa(0x3f00), 0x200, GuestMemory::Access::kRead), nullptr);
  EXPECT_EQ(memory_.MapContiguous(Gpa(0x5000), 0x200, GuestMemory::Access::kRead),
            low_->host() + 0x5000);
}

TEST_F(GuestMemoryTest, PiecesThatTouchInTheHostAreOne) {
  // One block mapped by two regions side by side.
  auto ram = RamBlock::Create("split", 0x2000);
  ASSERT_TRUE(ram);
  for (uint64_t half : {0, 1}) {
    space_.Add({.name = "half",
                .kind = RegionKind::kRam,
                .base = 0x20000 + half * 0x1000,
                .size = 0x1000,
                .ram = *ram,
                .ram_offset = half * 0x1000});
  }
  std::vector<iovec> out;
  ASSERT_TRUE(memory_.Map(Gpa(0x20800), 0x1000, GuestMemory::Access::kRead, &out));
  EXPECT_EQ(out.size(), 1u);
  EXPECT_EQ(memory_.MapContiguous(Gpa(0x20800), 0x1000, GuestMemory::Access::kRead),
            (*ram)->host() + 0x800);
}

TEST_F(GuestMemoryTest, SixteenBitAccessesAreAligned) {
  EXPECT_TRUE(memory_.StoreRelease16(Gpa(0x102), 0xbeef));
  uint16_t value = 0;
  EXPECT_TRUE(memory_.LoadAcquire16(Gpa(0x102), &value));
  EXPECT_EQ(value, 0xbeef);
  EXPECT_FALSE(memory_.LoadAcquire16(Gpa(0x103), &value));
  EXPECT_FALSE(memory_.StoreRelease16(Gpa(0x103), 1));
  EXPECT_FALSE(memory_.LoadAcquire16(Gpa(0x12000), &value));
}

TEST_F(GuestMemoryTest, HeldViewsKeepTheirMemory) {
  auto ram = RamBlock::Create("gone", 0x1000);
  ASSERT_TRUE(ram);
  auto id = space_.Add(
      {.name = "gone", .kind = RegionKind::kRam, .base = 0x30000, .size = 0x1000, .ram = *ram});
  auto held = memory_.Hold();
  uint8_t* host = memory_.MapContiguous(Gpa(0x30000), 16, GuestMemory::Access::kWrite);
  ASSERT_NE(host, nullptr);
  ram->reset();
  space_.Remove(id);
  host[0] = 1;  // still there
  EXPECT_EQ(memory_.MapContiguous(Gpa(0x30000), 16, GuestMemory::Access::kWrite), nullptr);
}

}  // namespace
}  // namespace kvartz
