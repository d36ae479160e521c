#include "cpu/kvm/kvm_memory.h"

#include <gmock/gmock.h>

#include <cstring>

#include "cpu/kvm/payloads.h"
#include "cpu/kvm/test_machine.h"

namespace kvartz::cpu::kvm {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr uint64_t kHot = 0x40000000, kRom = 0x50000000;
constexpr uint64_t kFirstPage = kPages / 4096;

class KvmMemoryTest : public ::testing::Test {
 protected:
  void SetUp() override { REQUIRE_KVM(); }
  // Page `index` of kPages shows guest-physical `gpa`.
  static void MapPage(TestMachine& machine, unsigned index, uint64_t gpa) {
    machine.Write(kPt + 8 * index, gpa | 7);
  }
  static std::shared_ptr<RamBlock> Ram(const std::string& name, uint64_t first_word) {
    std::shared_ptr<RamBlock> ram = RamBlock::Create(name, 0x200000).value();
    std::memcpy(ram->host(), &first_word, sizeof(first_word));
    return ram;
  }
};

TEST_F(KvmMemoryTest, ComesAndGoesWhileTheGuestRuns) {
  auto machine = TestMachine::Create();
  MapPage(*machine, 16, kHot);
  auto ram = Ram("hot", 0xaaaa);
  auto id = machine->memory().Add(RamRegion("hot", kHot, ram));
  machine->Start(pl_hot);
  machine->Resume();
  ASSERT_TRUE(machine->WaitReports(1));
  machine->memory().Remove(id);
  machine->SetShared(0, 1);
  ASSERT_TRUE(machine->WaitReports(2));
  auto other = Ram("other", 0xbbbb);
  machine->memory().Add(RamRegion("other", kHot, other));
  machine->SetShared(0, 2);
  EXPECT_TRUE(machine->WaitDone());
  // Present, absent (all ones), another block.
  EXPECT_THAT(machine->reports(), ElementsAre(0xaaaa, 0xffffffff, 0xbbbb));
  uint64_t written;
  std::memcpy(&written, ram->host(), sizeof(written));
  EXPECT_EQ(written & 0xffff, 0x1234u);
}

// Slots are made and taken away under a CPU that writes next to them all the time.
TEST_F(KvmMemoryTest, ChangesDontDisturbTheRest) {
  auto machine = TestMachine::Create();
  auto ram = Ram("hot", 1);
  machine->Start(pl_hot_spin);
  machine->Resume();
  ASSERT_TRUE(machine->WaitReports(1));
  for (int round = 0; round < 50; ++round) {
    auto id = machine->memory().Add(RamRegion("hot", kHot + 0x200000 * (round % 3), ram));
    machine->memory().Remove(id);
  }
  machine->SetShared(0, 1);
  EXPECT_TRUE(machine->WaitDone());
  EXPECT_GT(machine->Read(kPages + 0x11000), 0u);
  EXPECT_THAT(machine->failures(), IsEmpty());
}

TEST_F(KvmMemoryTest, RomRunsAndRefusesWrites) {
  struct Flash final : IoHandler {
    uint64_t IoRead(uint64_t, unsigned) override { return 0; }
    void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
      writes.push_back({offset, size, true, value});
    }
    std::vector<Access> writes;
  } flash;
  auto machine = TestMachine::Create();
  MapPage(*machine, 18, kRom);
  auto rom = Ram("rom", 0x600d);
  constexpr uint8_t kCode[] = {0xb9, 0x78, 0x56, 0x34, 0x12, 0xc3};  // mov ecx, 0x12345678; ret
  std::memcpy(rom->host() + 0x100, kCode, sizeof(kCode));
  Region region = RamRegion("rom", kRom, rom);
  region.kind = RegionKind::kRom;
  region.handler = &flash;
  machine->memory().Add(std::move(region));
  machine->Start(pl_rom);
  EXPECT_EQ(machine->Run(), 24u);
  EXPECT_THAT(machine->reports(), ElementsAre(0x600d, 0x600d, 0x12345678));
  EXPECT_THAT(flash.writes, ElementsAre(Access{0, 4, true, 0x77777777}));
}

void ExpectDirtyPages(uint32_t ring, bool user_writes) {
  auto machine = TestMachine::Create({.dirty_ring = ring});
  ASSERT_NE(machine, nullptr);
  auto dirty = [&] {
    EXPECT_TRUE(machine->accel().SyncDirty().has_value());
    std::vector<uint64_t> pages;
    machine->ram().dirty().Collect([&](uint64_t page) {
      if (page >= kFirstPage && page < kFirstPage + 512) pages.push_back(page - kFirstPage);
    });
    return pages;
  };
  machine->Start(pl_dirty);
  ASSERT_TRUE(machine->accel().SetDirtyTracking(true).has_value());
  machine->Resume();
  ASSERT_TRUE(machine->WaitReports(1));
  if (user_writes) {
    EXPECT_THAT(dirty(), ElementsAre(0, 3, 7));
  } else {
    EXPECT_THAT(dirty(), testing::IsSupersetOf({0, 3}));
  }
  EXPECT_THAT(dirty(), IsEmpty());
  machine->SetShared(0, 1);
  ASSERT_TRUE(machine->WaitReports(2));
  EXPECT_THAT(dirty(), ElementsAre(9));
  machine->Park();
  EXPECT_TRUE(machine->accel().SetDirtyTracking(false).has_value());
  machine->SetShared(0, 2);
  EXPECT_EQ(machine->Run(), 20u);
}

TEST_F(KvmMemoryTest, DirtyLogNamesThePagesOfBothRings) { ExpectDirtyPages(0, true); }

TEST_F(KvmMemoryTest, DirtyRingNamesThePages) { ExpectDirtyPages(4096, OnHardware()); }

TEST_F(KvmMemoryTest, FullDirtyRingIsEmptied) {
  auto machine = TestMachine::Create({.dirty_ring = 1024});
  constexpr uint64_t kCount = 2000, kFirst = 0x600000 / 4096;  // twice what the ring holds
  machine->SetShared(0, kCount);
  machine->Start(pl_touch_all);
  ASSERT_TRUE(machine->accel().SetDirtyTracking(true).has_value());
  EXPECT_EQ(machine->Run(), 21u);
  ASSERT_TRUE(machine->accel().SyncDirty().has_value());
  std::vector<uint64_t> pages;
  machine->ram().dirty().Collect([&](uint64_t page) {
    if (page >= kFirst) pages.push_back(page - kFirst);
  });
  ASSERT_EQ(pages.size(), kCount);
  EXPECT_EQ(pages.front(), 0u);
  EXPECT_EQ(pages.back(), kCount - 1);
}

TEST_F(KvmMemoryTest, MemoryThatGoesLeavesItsDirtyPagesBehind) {
  auto machine = TestMachine::Create();
  MapPage(*machine, 16, kHot);
  auto ram = Ram("hot", 0xaaaa);
  auto id = machine->memory().Add(RamRegion("hot", kHot, ram));
  ASSERT_TRUE(machine->accel().SetDirtyTracking(true).has_value());
  machine->Start(pl_hot);
  machine->Resume();
  ASSERT_TRUE(machine->WaitReports(1));
  machine->memory().Remove(id);
  machine->SetShared(0, 2);
  EXPECT_TRUE(machine->WaitDone());
  std::vector<uint64_t> pages;
  ram->dirty().Collect([&](uint64_t page) { pages.push_back(page); });
  EXPECT_THAT(pages, ElementsAre(0));
}

TEST_F(KvmMemoryTest, TooLargeARingIsRefused) {
  AddressSpace memory("memory", 1ull << 40), ports("ports", 1 << 16);
  struct Host final : AccelHost {
    uint8_t AcknowledgePic() override { return 0; }
    void BroadcastEoi(uint8_t) override {}
    void TripleFault(unsigned) override {}
    void EngineFailed(unsigned, const std::string&) override {}
  } host;
  AccelConfig config;
  config.memory = &memory;
  config.ports = &ports;
  config.host = &host;
  config.kvm.dirty_ring_entries = 1 << 24;
  Result<std::unique_ptr<Accel>> accel = CreateKvm(config);
  ASSERT_FALSE(accel.has_value());
  EXPECT_THAT(accel.error().what, testing::HasSubstr("dirty-ring-size"));
}

}  // namespace
}  // namespace kvartz::cpu::kvm
