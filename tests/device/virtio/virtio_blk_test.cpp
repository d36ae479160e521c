#include "device/virtio/virtio_blk.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "block/disk.h"
#include "device/virtio/test_machine.h"

namespace kvartz::test {
namespace {

constexpr uint64_t kPacked = 1ull << 34, kEventIdx = 1ull << 29, kIndirectDesc = 1ull << 28;
constexpr uint64_t kFlush = 1 << 9, kConfigWce = 1 << 11, kDiscard = 1 << 13,
                   kWriteZeroes = 1 << 14;
constexpr uint32_t kIn = 0, kOut = 1, kFlushCommand = 4, kGetId = 8, kDiscardCommand = 11,
                   kWriteZeroesCommand = 13;
constexpr uint8_t kOk = 0, kIoError = 1, kUnsupported = 2;

class VirtioBlkTest : public testing::TestWithParam<uint64_t> {
 protected:
  static constexpr uint64_t kDiskBytes = 1 << 20;

  void SetUp() override {
    char path[] = "/tmp/kvartz-blk-XXXXXX";
    fd_ = mkstemp(path);
    path_ = path;
    ASSERT_EQ(ftruncate(fd_, kDiskBytes), 0);
  }
  void TearDown() override {
    machine_.Unplug();
    disk_.reset();
    node_.reset();
    close(fd_);
    std::filesystem::remove(path_);
  }
  void Open(Properties properties = {}, bool read_only = false) {
    block::ImageOptions options;
    options.path = path_;
    options.format = "raw";
    options.read_only = read_only;
    auto node = block::OpenImage(machine_.loop(), options);
    ASSERT_TRUE(node) << node.error().what;
    node_ = *node;
    MakeDisk(machine_.loop());
    properties.Set("drive", "d0");
    properties.Set("packed", "on");
    ASSERT_NE(machine_.Plug("virtio-blk-pci", properties), nullptr) << machine_.error;
    driver_ = std::make_unique<ModernDriver>(machine_);
  }
  void MakeDisk(EventLoop& loop) {
    disk_ = std::make_unique<block::Disk>(loop, "d0");
    disk_->ReplaceNode(node_);
    machine_.disk_port.disk = disk_.get();
  }
  void Start(uint64_t features = kFlush | kConfigWce | kDiscard | kWriteZeroes) {
    ASSERT_TRUE(driver_->Negotiate(features | GetParam()));
    driver_->SetUpQueue(0);
    driver_->Start();
    header_ = machine_.Allocate(16, &header_gpa_);
    data_ = machine_.Allocate(8192, &data_gpa_);
    status_ = machine_.Allocate(1, &status_gpa_);
  }
  // One request; its status, or 0xff if the device gave none.
  uint8_t Request(uint32_t type, uint64_t sector, std::vector<Piece> data) {
    std::memset(header_, 0, 16);
    std::memcpy(header_, &type, 4);
    std::memcpy(header_ + 8, &sector, 8);
    *status_ = 0xff;
    data.insert(data.begin(), {header_gpa_, 16, false});
    data.push_back({status_gpa_, 1, true});
    length_ = driver_->Transact(0, data, GetParam() & kIndirectDesc);
    return *status_;
  }
  std::vector<uint8_t> OnDisk(uint64_t offset, size_t size) {
    std::vector<uint8_t> bytes(size);
    EXPECT_EQ(pread(fd_, bytes.data(), size, static_cast<off_t>(offset)),
              static_cast<ssize_t>(size));
    return bytes;
  }

  TestMachine machine_;
  int fd_ = -1;
  std::string path_;
  std::shared_ptr<block::Node> node_;
  std::unique_ptr<block::Disk> disk_;
  std::unique_ptr<ModernDriver> driver_;
  uint8_t *header_ = nullptr, *data_ = nullptr, *status_ = nullptr;
  uint64_t header_gpa_ = 0, data_gpa_ = 0, status_gpa_ = 0;
  std::optional<uint32_t> length_;
};

TEST_P(VirtioBlkTest, ReadsAndWrites) {
  Open();
  Start();
  EXPECT_EQ(driver_->ReadConfig(0, 4), kDiskBytes / 512);
  EXPECT_EQ(driver_->ReadConfig(12, 4), 254u);  // seg_max
  EXPECT_EQ(driver_->ReadConfig(20, 4), 512u);  // blk_size
  for (int i = 0; i < 4096; ++i) data_[i] = static_cast<uint8_t>(i * 7);
  EXPECT_EQ(Request(kOut, 8, {{data_gpa_, 1024, false}, {data_gpa_ + 1024, 3072, false}}), kOk);
  EXPECT_EQ(length_, 1u);
  EXPECT_EQ(std::memcmp(OnDisk(4096, 4096).data(), data_, 4096), 0);
  EXPECT_EQ(Request(kIn, 9, {{data_gpa_ + 4096, 2048, true}}), kOk);
  EXPECT_EQ(length_, 2049u);
  EXPECT_EQ(std::memcmp(data_ + 4096, data_ + 512, 2048), 0);
  EXPECT_EQ(Request(kFlushCommand, 0, {}), kOk);
  EXPECT_FALSE(driver_->needs_reset());
}

TEST_P(VirtioBlkTest, HeaderAndDataInOnePiece) {
  // Drivers may lay requests out as they like (2.7.4.2).
  Open();
  Start();
  uint64_t gpa;
  uint8_t* all = machine_.Allocate(16 + 512, &gpa);
  std::memset(all, 0x5a, 16 + 512);
  uint32_t type = kOut;
  uint64_t sector = 3;
  std::memcpy(all, &type, 4);
  std::memcpy(all + 8, &sector, 8);
  EXPECT_EQ(driver_->Transact(0, {{gpa, 7, false}, {gpa + 7, 521, false}, {status_gpa_, 1, true}}),
            1u);
  EXPECT_EQ(*status_, kOk);
  EXPECT_EQ(OnDisk(3 * 512, 512), std::vector<uint8_t>(512, 0x5a));
  // And the status byte at the end of the data.
  type = kIn;
  std::memcpy(header_, &type, 4);
  std::memcpy(header_ + 8, &sector, 8);
  EXPECT_EQ(driver_->Transact(0, {{header_gpa_, 16, false}, {data_gpa_, 513, true}}), 513u);
  EXPECT_EQ(data_[511], 0x5a);
  EXPECT_EQ(data_[512], kOk);
}

TEST_P(VirtioBlkTest, IdOfTheDisk) {
  Open({{"serial", "S-0123456789abcdefXYZ"}});
  Start();
  EXPECT_EQ(Request(kGetId, 0, {{data_gpa_, 20, true}}), kOk);
  EXPECT_EQ(std::string(reinterpret_cast<char*>(data_), 20), "S-0123456789abcdefXY");
}

TEST_P(VirtioBlkTest, DiscardAndWriteZeroes) {
  Open();
  Start();
  EXPECT_EQ(Request(kOut, 0, {{data_gpa_, 512, false}}), kOk);
  struct {
    uint64_t sector;
    uint32_t sectors, flags;
  } range{16, 16, 0};
  std::memset(data_, 0xaa, 8192);
  EXPECT_EQ(Request(kOut, 16, {{data_gpa_, 8192, false}}), kOk);
  std::memcpy(data_, &range, 16);
  EXPECT_EQ(Request(kWriteZeroesCommand, 0, {{data_gpa_, 16, false}}), kOk);
  EXPECT_EQ(OnDisk(16 * 512, 8192), std::vector<uint8_t>(8192, 0));
  range.flags = 2;  // reserved
  std::memcpy(data_, &range, 16);
  EXPECT_EQ(Request(kWriteZeroesCommand, 0, {{data_gpa_, 16, false}}), kUnsupported);
  range.flags = 1;  // unmap is for write zeroes only
  std::memcpy(data_, &range, 16);
  EXPECT_EQ(Request(kDiscardCommand, 0, {{data_gpa_, 16, false}}), kUnsupported);
  range = {kDiskBytes / 512, 1, 0};
  std::memcpy(data_, &range, 16);
  EXPECT_EQ(Request(kDiscardCommand, 0, {{data_gpa_, 16, false}}), kIoError);
  range = {~0ull, 2, 0};
  std::memcpy(data_, &range, 16);
  EXPECT_EQ(Request(kDiscardCommand, 0, {{data_gpa_, 16, false}}), kIoError);
  range = {0, 8, 0};
  std::memcpy(data_, &range, 16);
  EXPECT_EQ(Request(kDiscardCommand, 0, {{data_gpa_, 16, false}}), kOk);
  EXPECT_EQ(Request(kDiscardCommand, 0, {{data_gpa_, 32, false}}),
            kIoError);  // one segment at most
}

TEST_P(VirtioBlkTest, BadRequestsAreAnswered) {
  Open();
  Start();
  EXPECT_EQ(Request(kIn, kDiskBytes / 512, {{data_gpa_, 512, true}}), kIoError);
  EXPECT_EQ(Request(kIn, ~0ull, {{data_gpa_, 512, true}}), kIoError);
  EXPECT_EQ(Request(kIn, ~0ull / 512, {{data_gpa_, 512, true}}), kIoError);
  EXPECT_EQ(Request(kIn, 0, {{data_gpa_, 100, true}}), kIoError);
  EXPECT_EQ(Request(kIn, 0, {}), kOk);
  EXPECT_EQ(Request(99, 0, {}), kUnsupported);
  EXPECT_EQ(Request(0x80000000, 0, {}), kUnsupported);
  EXPECT_FALSE(driver_->needs_reset());
  // Without a place for the status there is no answer.
  EXPECT_FALSE(driver_->Transact(0, {{header_gpa_, 16, false}}));
  EXPECT_TRUE(driver_->needs_reset());
  Start();
  EXPECT_EQ(Request(kIn, 0, {{data_gpa_, 512, true}}), kOk);
  EXPECT_FALSE(driver_->Transact(0, {{header_gpa_, 8, false}, {status_gpa_, 1, true}}));
  EXPECT_TRUE(driver_->needs_reset());
}

TEST_P(VirtioBlkTest, ReadOnlyDisk) {
  Open({}, true);
  Start();
  EXPECT_TRUE(driver_->offered() >> 5 & 1);
  EXPECT_FALSE(driver_->offered() & (kDiscard | kWriteZeroes));
  EXPECT_EQ(Request(kOut, 0, {{data_gpa_, 512, false}}), kIoError);
  EXPECT_EQ(Request(kIn, 0, {{data_gpa_, 512, true}}), kOk);
}

TEST_P(VirtioBlkTest, WriteCacheSwitch) {
  Open({{"write-cache", "on"}});
  Start();
  EXPECT_EQ(driver_->ReadConfig(32, 1), 1u);
  driver_->WriteConfig(32, 1, 0);
  EXPECT_EQ(driver_->ReadConfig(32, 1), 0u);
  EXPECT_EQ(Request(kOut, 0, {{data_gpa_, 512, false}}), kOk);
}

TEST_P(VirtioBlkTest, ManyAtOnceAndAResetMeanwhile) {
  Open();
  Start();
  DriverRing& ring = driver_->ring(0);
  std::memset(header_, 0, 16);
  for (int i = 0; i < 64; ++i) {
    uint64_t status;
    machine_.Allocate(1, &status);
    ring.Add({{header_gpa_, 16, false}, {data_gpa_, 4096, true}, {status, 1, true}},
             GetParam() & kIndirectDesc);
  }
  driver_->Kick(0);
  machine_.loop().RunOnce(0);
  driver_->SetStatus(0);
  // 2.4.2: zero only when nothing reaches guest memory any more.
  EXPECT_TRUE(machine_.TurnUntil([&] { return driver_->status() == 0; }));
  Start();
  EXPECT_EQ(Request(kIn, 0, {{data_gpa_, 512, true}}), kOk);
}

TEST_P(VirtioBlkTest, QuiescedSavedAndLoaded) {
  Open();
  Start();
  DriverRing& ring = driver_->ring(0);
  std::memset(header_, 0, 16);
  for (int i = 0; i < 5; ++i) {
    ring.Add({{header_gpa_, 16, false}, {data_gpa_, 4096, true}, {status_gpa_, 1, true}});
  }
  driver_->Kick(0);
  machine_.loop().RunOnce(0);
  // What was begun is finished, what wasn't stays in the ring.
  auto* device = machine_.device();
  device->Quiesce();
  ring.Add({{header_gpa_, 16, false}, {data_gpa_, 4096, true}, {status_gpa_, 1, true}});
  driver_->Kick(0);
  machine_.Settle();
  int taken = 0;
  while (ring.Take()) ++taken;
  EXPECT_LE(taken, 5);
  std::vector<uint8_t> saved = SaveState([&](StateVisitor& v) {
    LockGuard guard(device->lock());
    device->VisitState(v);
  });
  device = machine_.Plug("virtio-blk-pci", {{"drive", "d0"}, {"packed", "on"}});
  Result<> loaded = LoadState(saved, [&](StateVisitor& v) {
    LockGuard guard(device->lock());
    device->VisitState(v);
  });
  ASSERT_TRUE(loaded) << loaded.error().what;
  EXPECT_TRUE(machine_.TurnUntil([&] {
    while (ring.Take()) ++taken;
    return taken == 6;
  }));
  EXPECT_EQ(Request(kIn, 0, {{data_gpa_, 512, true}}), kOk);
}

TEST_P(VirtioBlkTest, OnAnIoThread) {
  auto thread_loop = EventLoop::Create(EventLoop::Backend::kAuto).value();
  block::ImageOptions options;
  options.path = path_;
  options.format = "raw";
  node_ = block::OpenImage(*thread_loop, options).value();
  MakeDisk(*thread_loop);
  Thread thread("io", [&] { thread_loop->Run(); });
  ASSERT_NE(
      machine_.Plug("virtio-blk-pci",
                    {{"drive", "d0"}, {"iothread", "io0"}, {"num-queues", "2"}, {"packed", "on"}}),
      nullptr)
      << machine_.error;
  driver_ = std::make_unique<ModernDriver>(machine_);
  Start();
  for (int i = 0; i < 50; ++i) EXPECT_EQ(Request(kOut, 1, {{data_gpa_, 512, false}}), kOk);
  machine_.Unplug();
  thread_loop->Stop();
  thread.Join();
  disk_.reset();
  node_.reset();
}

TEST_P(VirtioBlkTest, WrongOptionsAreRefused) {
  Open();
  const std::pair<Properties, const char*> bad[] = {
      {{}, "drive= is missing: name a -drive or -blockdev by its id"},
      {{{"drive", "nix"}}, "drive=nix: there is no such disk"},
      {{{"drive", "d0"}, {"queue-size", "100"}}, "queue-size: a power of two from 4 to 1024"},
      {{{"drive", "d0"}, {"num-queues", "0"}}, "num-queues: from 1 to 256"},
      {{{"drive", "d0"}, {"logical_block_size", "1000"}},
       "logical_block_size and physical_block_size: powers of two from 512 to 32768"},
  };
  for (const auto& [properties, message] : bad) {
    EXPECT_EQ(machine_.Plug("virtio-blk-pci", properties), nullptr);
    EXPECT_EQ(machine_.error, message);
  }
}

INSTANTIATE_TEST_SUITE_P(Rings, VirtioBlkTest,
                         testing::Values(0, kEventIdx, kIndirectDesc | kEventIdx, kPacked,
                                         kPacked | kIndirectDesc | kEventIdx));

}  // namespace
}  // namespace kvartz::test
