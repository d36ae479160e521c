#include "device/virtio/virtqueue.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "device/virtio/test_machine.h"

namespace kvartz::test {
namespace {

constexpr uint64_t kEventIdx = 1ull << 29, kIndirectDesc = 1ull << 28, kPacked = 1ull << 34;

struct Mode {
  DriverRing::Format format;
  bool event_index;
  bool indirect;
};

class VirtqueueModes : public testing::TestWithParam<Mode> {
 protected:
  void SetUp() override {
    ring_ =
        std::make_unique<DriverRing>(machine_, GetParam().format, kSize, GetParam().event_index);
    queue_.registers = {kSize, true, Gpa(ring_->desc), Gpa(ring_->driver), Gpa(ring_->device)};
    queue_.SetFeatures((GetParam().event_index ? kEventIdx : 0) |
                       (GetParam().indirect ? kIndirectDesc : 0) |
                       (GetParam().format == DriverRing::Format::kPacked ? kPacked : 0));
    queue_.SetLive(true);
    memory_ = machine_.Allocate(4096, &gpa_);
  }
  uint16_t Add(const std::vector<Piece>& pieces) { return ring_->Add(pieces, GetParam().indirect); }

  static constexpr uint16_t kSize = 8;
  TestMachine machine_;
  Virtqueue queue_{machine_.memory(), kSize};
  std::unique_ptr<DriverRing> ring_;
  VirtqElement element_;
  uint8_t* memory_ = nullptr;
  uint64_t gpa_ = 0;
};

TEST_P(VirtqueueModes, BuffersGoAroundManyTimes) {
  EXPECT_FALSE(queue_.Pop(&element_));
  for (int round = 0; round < 3 * kSize + 1; ++round) {
    memory_[0] = static_cast<uint8_t>(round);
    uint16_t id = Add({{gpa_, 10, false}, {gpa_ + 16, 6, false}, {gpa_ + 64, 100, true}});
    ASSERT_TRUE(queue_.Pop(&element_));
    EXPECT_EQ(element_.readable_bytes, 16u);
    EXPECT_EQ(element_.writable_bytes, 100u);
    uint8_t first = 0;
    EXPECT_EQ(element_.CopyOut(0, &first, 1), 1u);
    EXPECT_EQ(first, round);
    EXPECT_EQ(element_.CopyOut(10, &first, 1), 1u);
    EXPECT_EQ(element_.CopyIn(99, &first, 5), 1u);
    queue_.Push(element_, 77);
    std::optional<Used> used = ring_->Take();
    ASSERT_TRUE(used);
    EXPECT_EQ(used->id, id);
    EXPECT_EQ(used->length, 77u);
    EXPECT_FALSE(ring_->Take());
    EXPECT_FALSE(queue_.Pop(&element_));
  }
  EXPECT_FALSE(queue_.broken());
}

TEST_P(VirtqueueModes, OutOfOrderAndBatches) {
  VirtqElement second;
  for (int round = 0; round < 5; ++round) {
    uint16_t a = Add({{gpa_, 10, true}}), b = Add({{gpa_, 20, true}});
    ASSERT_TRUE(queue_.Pop(&element_) && queue_.Pop(&second));
    EXPECT_EQ(queue_.in_flight(), 2);
    queue_.Fill(second, 2);
    queue_.Fill(element_, 1);
    EXPECT_FALSE(ring_->Take());  // nothing before it is published
    queue_.Publish();
    std::optional<Used> first_used = ring_->Take(), second_used = ring_->Take();
    ASSERT_TRUE(first_used && second_used);
    EXPECT_EQ(first_used->id, b);
    EXPECT_EQ(second_used->id, a);
    EXPECT_EQ(second_used->length, 1u);
  }
}

TEST_P(VirtqueueModes, RewindMakesElementsAvailableAgain) {
  for (int round = 0; round < kSize + 2; ++round) {
    uint16_t a = Add({{gpa_, 10, true}});
    Add({{gpa_, 20, true}});
    Virtqueue::Position position = queue_.position();
    ASSERT_TRUE(queue_.Pop(&element_) && queue_.Pop(&element_));
    queue_.Rewind(position);
    EXPECT_EQ(queue_.in_flight(), 0);
    ASSERT_TRUE(queue_.Pop(&element_));
    EXPECT_EQ(element_.id, a);
    queue_.Push(element_, 0);
    ASSERT_TRUE(queue_.Pop(&element_));
    queue_.Push(element_, 0);
    EXPECT_TRUE(ring_->Take() && ring_->Take());
  }
}

TEST_P(VirtqueueModes, InterruptsOnlyWhenWanted) {
  auto serve = [&] {
    Add({{gpa_, 10, true}});
    EXPECT_TRUE(queue_.Pop(&element_));
    queue_.Push(element_, 0);
    bool notify = queue_.ShouldNotify();
    EXPECT_TRUE(ring_->Take());
    return notify;
  };
  serve();
  EXPECT_FALSE(queue_.ShouldNotify());  // nothing new
  for (int lap = 0; lap < 6; ++lap) {
    if (GetParam().event_index) {
      ring_->WantEventAfter(3);
      EXPECT_FALSE(serve());
      EXPECT_FALSE(serve());
      EXPECT_TRUE(serve()) << lap;
      EXPECT_FALSE(serve());
    } else {
      ring_->SetInterrupts(true);
      EXPECT_TRUE(serve());
      ring_->SetInterrupts(false);
      EXPECT_FALSE(serve());
      EXPECT_FALSE(serve());
    }
  }
}

TEST_P(VirtqueueModes, KicksOnlyWhenWanted) {
  for (int lap = 0; lap < 2 * kSize; ++lap) {
    EXPECT_FALSE(queue_.EnableKicks());
    Add({{gpa_, 10, true}});
    EXPECT_TRUE(ring_->DeviceWantsKick());
    EXPECT_TRUE(queue_.Pop(&element_));
    queue_.DisableKicks();
    Add({{gpa_, 10, true}});
    EXPECT_FALSE(ring_->DeviceWantsKick());
    EXPECT_TRUE(queue_.EnableKicks());  // it must be looked at again
    queue_.Push(element_, 0);
    EXPECT_TRUE(queue_.Pop(&element_));
    queue_.Push(element_, 0);
    EXPECT_TRUE(ring_->Take() && ring_->Take());
  }
}

TEST_P(VirtqueueModes, StateGoesOnInAnotherQueue) {
  for (int i = 0; i < kSize - 1; ++i) {
    Add({{gpa_, 10, true}});
    ASSERT_TRUE(queue_.Pop(&element_));
    queue_.Push(element_, 0);
    ASSERT_TRUE(ring_->Take());
  }
  Add({{gpa_, 10, true}});
  std::vector<uint8_t> saved = SaveState([&](StateVisitor& v) { queue_.VisitState(v); });
  Virtqueue other(machine_.memory(), kSize);
  ASSERT_TRUE(LoadState(saved, [&](StateVisitor& v) { other.VisitState(v); }));
  other.SetFeatures((GetParam().event_index ? kEventIdx : 0) |
                    (GetParam().indirect ? kIndirectDesc : 0) |
                    (GetParam().format == DriverRing::Format::kPacked ? kPacked : 0));
  other.SetLive(true);
  for (int i = 0; i < 2 * kSize; ++i) {
    ASSERT_TRUE(other.Pop(&element_));
    other.Push(element_, 5);
    ASSERT_TRUE(ring_->Take());
    EXPECT_TRUE(i > 0 || other.ShouldNotify());
    Add({{gpa_, 10, true}});
  }
  EXPECT_FALSE(other.broken());
}

TEST_P(VirtqueueModes, WritesAreMarkedDirty) {
  machine_.ram_block().dirty().SetEnabled(true);
  auto dirty = [&] {
    std::vector<uint64_t> pages;
    machine_.ram_block().dirty().Collect([&](uint64_t page) { pages.push_back(page); });
    return pages;
  };
  uint64_t data;
  machine_.Allocate(8192, &data, 4096);
  Add({{data, 8192, true}});
  ASSERT_TRUE(queue_.Pop(&element_));
  dirty();  // mapping marks too
  queue_.Push(element_, 4097);
  std::vector<uint64_t> pages = dirty();
  for (uint64_t page : {data / 4096, data / 4096 + 1,
                        ring_->format() == DriverRing::Format::kPacked ? ring_->desc / 4096
                                                                       : ring_->device / 4096}) {
    EXPECT_NE(std::ranges::find(pages, page), pages.end()) << page;
  }
}

INSTANTIATE_TEST_SUITE_P(All, VirtqueueModes,
                         testing::Values(Mode{DriverRing::Format::kSplit, false, false},
                                         Mode{DriverRing::Format::kSplit, true, false},
                                         Mode{DriverRing::Format::kSplit, true, true},
                                         Mode{DriverRing::Format::kPacked, false, false},
                                         Mode{DriverRing::Format::kPacked, true, false},
                                         Mode{DriverRing::Format::kPacked, true, true}));

// ---- rings that break the rules

class HostileRing : public testing::Test {
 protected:
  HostileRing() {
    machine_.Allocate(4096, &desc_, 4096);
    machine_.Allocate(4096, &driver_, 4096);
    machine_.Allocate(4096, &device_, 4096);
    machine_.Allocate(4096, &buffer_, 4096);
  }
  void Start(uint64_t features = kIndirectDesc) {
    queue_.Reset();
    queue_.registers = {kSize, true, Gpa(desc_), Gpa(driver_), Gpa(device_)};
    queue_.SetFeatures(features);
    queue_.SetLive(true);
  }
  void Descriptor(uint64_t table, unsigned index, uint64_t address, uint32_t length, uint16_t third,
                  uint16_t fourth) {
    uint8_t* at = machine_.ram(table) + 16 * index;
    std::memcpy(at, &address, 8);
    std::memcpy(at + 8, &length, 4);
    std::memcpy(at + 12, &third, 2);
    std::memcpy(at + 14, &fourth, 2);
  }
  void Avail(uint16_t head, uint16_t idx = 1) {
    std::memcpy(machine_.ram(driver_) + 4, &head, 2);
    std::memcpy(machine_.ram(driver_) + 2, &idx, 2);
  }
  void ExpectBroken(const char* why) {
    EXPECT_FALSE(queue_.Pop(&element_));
    ASSERT_TRUE(queue_.broken()) << why;
    EXPECT_STREQ(queue_.why_broken(), why);
    EXPECT_FALSE(queue_.Pop(&element_));
    EXPECT_FALSE(queue_.EnableKicks());
    EXPECT_FALSE(queue_.ShouldNotify());
  }
  static constexpr uint16_t kSize = 8;
  TestMachine machine_;
  Virtqueue queue_{machine_.memory(), kSize};
  VirtqElement element_;
  uint64_t desc_, driver_, device_, buffer_;
};

TEST_F(HostileRing, SplitChains) {
  Start();
  Avail(kSize);
  ExpectBroken("descriptor index");
  Start();
  Avail(0, kSize + 1);
  ExpectBroken("available index");
  Start();  // a loop
  Descriptor(desc_, 0, buffer_, 16, 1, 0);
  Avail(0);
  ExpectBroken("descriptor chain too long");
  Start();
  Descriptor(desc_, 0, buffer_, 16, 1, kSize);
  ExpectBroken("descriptor index");
  Start();
  Descriptor(desc_, 0, buffer_, 16, 3, 1);
  Descriptor(desc_, 1, buffer_, 16, 0, 0);
  ExpectBroken("readable descriptor after a writable one");
  Start();
  Descriptor(desc_, 0, kRamBytes - 8, 16, 0, 0);
  ExpectBroken("buffer outside of RAM");
  Start();
  Descriptor(desc_, 0, ~0ull - 7, 16, 0, 0);
  ExpectBroken("buffer outside of RAM");
  Start();  // as large as all of RAM, over and over
  for (unsigned i = 0; i < kSize; ++i)
    Descriptor(desc_, i, 0, kRamBytes, 1, static_cast<uint16_t>((i + 1) % kSize));
  ExpectBroken("element larger than 4 GiB");
}

TEST_F(HostileRing, IndirectTables) {
  Start();
  Avail(0);
  Descriptor(desc_, 0, buffer_, 24, 4, 0);
  ExpectBroken("indirect descriptor");
  Start();
  Descriptor(desc_, 0, buffer_, 0, 4, 0);
  ExpectBroken("indirect descriptor");
  Start(0);  // not negotiated
  Descriptor(desc_, 0, buffer_, 16, 4, 0);
  ExpectBroken("indirect descriptor");
  Start();
  Descriptor(desc_, 0, buffer_, 16, 5, 1);
  ExpectBroken("indirect descriptor with a next one");
  Start();
  Descriptor(desc_, 0, kRamBytes, 16, 4, 0);
  ExpectBroken("indirect table outside of RAM");
  Start();
  Descriptor(desc_, 0, buffer_, 16, 4, 0);
  Descriptor(buffer_, 0, buffer_, 16, 4, 0);
  ExpectBroken("indirect descriptor within an indirect table");
  Start();
  Descriptor(buffer_, 0, buffer_, 16, 1, 1);
  ExpectBroken("descriptor index");
  Start();
  Descriptor(buffer_, 0, buffer_, 16, 1, 0);
  ExpectBroken("descriptor chain too long");
  Start();  // direct ones before an indirect one are allowed (2.7.5.3.2), and so is the table's
            // write flag
  Descriptor(desc_, 0, buffer_, 8, 1, 1);
  Descriptor(desc_, 1, buffer_, 16, 6, 0);
  Descriptor(buffer_, 0, buffer_, 24, 2, 0);
  EXPECT_TRUE(queue_.Pop(&element_));
  EXPECT_EQ(element_.readable_bytes, 8u);
  EXPECT_EQ(element_.writable_bytes, 24u);
}

TEST_F(HostileRing, PackedRings) {
  constexpr uint16_t kA = 1 << 7;
  Start(kPacked | kIndirectDesc);
  for (unsigned i = 0; i < kSize; ++i) Descriptor(desc_, i, buffer_, 16, 0, kA | 1);
  ExpectBroken("descriptor chain longer than the ring");
  Start(kPacked | kIndirectDesc);
  Descriptor(desc_, 0, kRamBytes - 1, 2, 0, kA);
  ExpectBroken("buffer outside of RAM");
  Start(kPacked | kIndirectDesc);
  Descriptor(desc_, 0, buffer_, 16, 0, kA | 5);
  ExpectBroken("indirect descriptor with a next one");
  Start(kPacked);
  Descriptor(desc_, 0, buffer_, 16, 0, kA | 4);
  ExpectBroken("indirect descriptor");
  Start(kPacked | kIndirectDesc);
  Descriptor(desc_, 0, buffer_, 16 * 2000, 0, kA | 4);
  std::memset(machine_.ram(buffer_), 0, 16 * 2000);
  ExpectBroken("descriptor chain too long");
}

TEST_F(HostileRing, RegistersThatPointNowhere) {
  for (auto member : {&Virtqueue::Registers::desc, &Virtqueue::Registers::driver,
                      &Virtqueue::Registers::device}) {
    for (uint64_t address : {kRamBytes, ~uint64_t{15}, kRamBytes - 16}) {
      Start();
      queue_.registers.*member = Gpa(address);
      if (address == kRamBytes - 16 && member == &Virtqueue::Registers::driver)
        queue_.registers.driver = Gpa(address + 14);
      ExpectBroken("ring outside of RAM");
    }
    Start();
    queue_.registers.*member = Gpa(desc_ + 1);
    ExpectBroken("ring alignment");
  }
  Start();
  queue_.registers.size = 7;
  ExpectBroken("queue size");
}

TEST_F(HostileRing, MoreInFlightThanFits) {
  Start();
  Descriptor(desc_, 0, buffer_, 16, 2, 0);
  for (uint16_t i = 1; i <= kSize; ++i) {
    Avail(0, i);
    std::memset(machine_.ram(driver_) + 4, 0, 2 * kSize);
    ASSERT_TRUE(queue_.Pop(&element_));
  }
  Avail(0, kSize + 1);
  ExpectBroken("more elements in flight than the queue holds");
}

TEST_F(HostileRing, SavedStateOutOfRange) {
  Start(kPacked);
  Virtqueue larger(machine_.memory(), 256);
  larger.registers.size = 256;
  std::vector<uint8_t> saved = SaveState([&](StateVisitor& v) { larger.VisitState(v); });
  EXPECT_FALSE(LoadState(saved, [&](StateVisitor& v) { queue_.VisitState(v); }));
}

}  // namespace
}  // namespace kvartz::test
