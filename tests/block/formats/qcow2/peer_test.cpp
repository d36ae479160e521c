// Both ways with QEMU's tools: what they made is read and changed here, what was made here they
// check, read and change.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "block/dirty_bitmap.h"
#include "block/test_disk.h"

namespace kvartz::block {
namespace {

using testing::HasSubstr;

struct Feature {
  const char* options;
  uint64_t size;
};

constexpr Feature kFeatures[] = {
    {"compat=0.10", 3 * kMiB},
    {"compat=1.1", 3 * kMiB},
    {"cluster_size=512", 200 * 1024},
    {"cluster_size=2M", 9 * kMiB},
    {"cluster_size=4096,refcount_bits=1", 2 * kMiB},
    {"cluster_size=512,refcount_bits=64", 2 * kMiB},
    {"refcount_bits=2,lazy_refcounts=on", 2 * kMiB},
    {"extended_l2=on", 3 * kMiB},
    {"extended_l2=on,cluster_size=2M", 9 * kMiB},
    {"compression_type=zstd", 3 * kMiB},
    {"preallocation=metadata", 3 * kMiB},
    {"preallocation=full,cluster_size=1024", 1 * kMiB},
    {"preallocation=falloc", 3 * kMiB},
    {"cluster_size=65536", 512},
    {"cluster_size=65536", 0},
    {"cluster_size=65536", 64ull << 40},
    {"cluster_size=2M", 1ull << 50},
};

class Qcow2Peer : public testing::TestWithParam<Feature> {
 protected:
  void SetUp() override { NEEDS_PEER(); }
  // Fails the test unless it exits with 0.
  std::string Peer(const std::string& command) {
    CommandResult result = RunCommand("cd " + dir_.path() + " && " + command);
    EXPECT_EQ(result.status, 0) << command << "\n" << result.output;
    return result.output;
  }
  // The contents that qemu-io is told to write.
  void PeerWrites(const std::string& file) {
    uint64_t size = GetParam().size;
    if (size < kMiB) return;
    Peer(
        "qemu-io -c 'write -P 17 4096 100000' -c 'write -P 34 300000 200000' "
        "-c 'write -z -u 310000 20000' -c 'write -P 51 " +
        std::to_string(size - 512) + " 512' -c 'discard 65536 65536' " + file);
  }
  void ExpectPeersContents(TestDisk& disk) {
    uint64_t size = GetParam().size;
    if (size < kMiB) return;
    EXPECT_EQ(disk.Read(4096, 60000), std::string(60000, 17));
    EXPECT_EQ(disk.Read(300000, 10000), std::string(10000, 34));
    EXPECT_EQ(disk.Read(310000, 20000), std::string(20000, 0));
    EXPECT_EQ(disk.Read(330000, 170000), std::string(170000, 34));
    EXPECT_EQ(disk.Read(size - 512, 512), std::string(512, 51));
    EXPECT_EQ(disk.Read(500000, 24000), std::string(24000, 0));
  }
  TempDir dir_{TempDir::Place::kMemory};
  std::unique_ptr<EventLoop> loop_ = MakeLoop();
};

TEST_P(Qcow2Peer, TheirsAreReadAndChanged) {
  auto [options, size] = GetParam();
  Peer("qemu-img create -q -f qcow2 -o " + std::string(options) + " a.qcow2 " +
       std::to_string(size));
  PeerWrites("a.qcow2");
  std::string path = dir_.path() + "/a.qcow2";
  TestDisk disk(*loop_);
  ASSERT_EQ(disk.Open(path), "");
  EXPECT_EQ(disk.node->size_bytes(), size);
  EXPECT_EQ(disk.Check(), "");
  ExpectPeersContents(disk);
  if (size >= kMiB) {
    EXPECT_EQ(disk.Write(700000, std::string(123456, 'k')), 0);
    EXPECT_EQ(disk.WriteZeroes(4096, 50000, true), 0);
    EXPECT_EQ(disk.Read(4096, 50000), std::string(50000, 0));
  }
  EXPECT_EQ(disk.Close(), "");
  Peer("qemu-img check a.qcow2");
  if (size < kMiB) return;
  Peer(
      "qemu-io -c 'read -P 107 700000 123456' -c 'read -P 0 4096 50000' "
      "-c 'read -P 17 54096 10000' -c 'read -P 34 330000 170000' a.qcow2");
}

TEST_P(Qcow2Peer, OursAreAcceptedAndChanged) {
  auto [options, size] = GetParam();
  std::string path = dir_.path() + "/a.qcow2";
  TestDisk disk(*loop_);
  ASSERT_EQ(disk.Create(path, std::string(options) + ",size=" + std::to_string(size)), "");
  Peer("qemu-img check a.qcow2");
  ASSERT_EQ(disk.Open(path), "");
  std::string big(300000, '\0');
  for (size_t i = 0; i < big.size(); i++) big[i] = static_cast<char>(i / 999);
  if (size >= kMiB) {
    EXPECT_EQ(disk.Write(33333, big), 0);
    EXPECT_EQ(disk.Write(size - 1000, std::string(1000, 51)), 0);
  }
  EXPECT_EQ(disk.Close(), "");
  Peer("qemu-img check a.qcow2");
  PeerWrites("a.qcow2");
  Peer("qemu-img check a.qcow2");
  ASSERT_EQ(disk.Open(path), "");
  ExpectPeersContents(disk);
  if (size >= kMiB) {
    EXPECT_EQ(disk.Read(140000, 11000), big.substr(140000 - 33333, 11000));
  }
  EXPECT_EQ(disk.Check(), "");
}

INSTANTIATE_TEST_SUITE_P(Features, Qcow2Peer, testing::ValuesIn(kFeatures),
                         [](const auto& feature) {
                           std::string name = feature.param.options;
                           for (char& c : name) c = isalnum(c) ? c : '_';
                           return name + "_" + std::to_string(feature.param.size);
                         });

class Qcow2PeerMore : public testing::Test {
 protected:
  void SetUp() override { NEEDS_PEER(); }
  std::string Peer(const std::string& command) {
    CommandResult result = RunCommand("cd " + dir_.path() + " && " + command);
    EXPECT_EQ(result.status, 0) << command << "\n" << result.output;
    return result.output;
  }
  std::string Noise(uint64_t size) {
    std::string text(size, '\0');
    for (char& c : text) c = static_cast<char>("abcdefgh\0"[random_() % 9]);
    return text;
  }
  TempDir dir_{TempDir::Place::kMemory};
  std::unique_ptr<EventLoop> loop_ = MakeLoop();
  std::mt19937_64 random_{7};
};

TEST_F(Qcow2PeerMore, CompressedClusters) {
  std::string data = Noise(2 * kMiB);
  WriteFile(dir_.path() + "/raw", data);
  for (const char* type : {"zlib", "zstd"}) {
    Peer("qemu-img convert -c -O qcow2 -o compression_type=" + std::string(type) +
         ",cluster_size=32k raw theirs");
    TestDisk disk(*loop_);
    ASSERT_EQ(disk.Open(dir_.path() + "/theirs"), "");
    EXPECT_EQ(disk.Read(0, data.size()), data);
    EXPECT_EQ(disk.Check(), "");
    disk.Close();
    ASSERT_EQ(disk.Create(dir_.path() + "/ours",
                          "size=2M,cluster_size=32k,compression_type=" + std::string(type)),
              "");
    ASSERT_EQ(disk.Open(dir_.path() + "/ours"), "");
    EXPECT_EQ(disk.WriteCompressed(0, data), 0);
    EXPECT_EQ(disk.Close(), "");
    Peer("qemu-img check ours && qemu-img compare -f raw -F qcow2 raw ours");
    EXPECT_LT(ReadFile(dir_.path() + "/ours").size(), data.size() * 6 / 10);
  }
}

TEST_F(Qcow2PeerMore, Snapshots) {
  Peer("qemu-img create -q -f qcow2 -o cluster_size=4k a 1M");
  Peer(
      "qemu-io -c 'write -P 1 0 500k' a && qemu-img snapshot -c one a && "
      "qemu-io -c 'write -P 2 0 300k' a && qemu-img snapshot -c two a && "
      "qemu-io -c 'write -P 3 100k 300k' a");
  TestDisk disk(*loop_);
  ASSERT_EQ(disk.Open(dir_.path() + "/a"), "");
  SnapshotStore* store = disk.node->snapshots();
  ASSERT_EQ(store->List().size(), 2u);
  EXPECT_EQ(store->List()[0].name, "one");
  EXPECT_EQ(store->List()[1].disk_size, kMiB);
  EXPECT_EQ(disk.Read(100 << 10, 300 << 10), std::string(300 << 10, 3));
  auto three = disk.InFiber([&] { return store->Create({.name = "three", .date_sec = 1}); });
  ASSERT_TRUE(three) << three.error().what;
  EXPECT_EQ(disk.Check(), "");
  EXPECT_EQ(TestDisk::Text(disk.InFiber([&] { return store->Apply("one"); })), "");
  EXPECT_EQ(disk.Read(0, 500 << 10), std::string(500 << 10, 1));
  EXPECT_EQ(TestDisk::Text(disk.InFiber([&] { return store->Delete("two"); })), "");
  EXPECT_EQ(disk.Check(), "");
  EXPECT_EQ(disk.Close(), "");
  Peer(
      "qemu-img check a && qemu-img snapshot -a three a && qemu-io -c 'read -P 3 100k 300k' "
      "-c 'read -P 2 0 100k' -c 'read -P 1 400k 100k' a && qemu-img check a");
  EXPECT_THAT(Peer("qemu-img snapshot -l a"), HasSubstr("three"));
  ASSERT_EQ(disk.Open(dir_.path() + "/a", "qcow2", {.read_only = true}), "");
  store = disk.node->snapshots();
  EXPECT_EQ(TestDisk::Text(disk.InFiber([&] { return store->ShowReadOnly("one"); })), "");
  EXPECT_EQ(disk.Read(0, 500 << 10), std::string(500 << 10, 1));
}

TEST_F(Qcow2PeerMore, VmStateGoesWithTheSnapshot) {
  TestDisk disk(*loop_);
  std::string path = dir_.path() + "/a", state = Noise(300000);
  ASSERT_EQ(disk.Create(path, "size=1M,cluster_size=4k"), "");
  ASSERT_EQ(disk.Open(path), "");
  SnapshotStore* store = disk.node->snapshots();
  std::span<const uint8_t> bytes(reinterpret_cast<const uint8_t*>(state.data()), state.size());
  ASSERT_EQ(TestDisk::Text(disk.InFiber([&] { return store->WriteVmState(0, bytes); })), "");
  SnapshotInfo info = {.name = "vm", .vm_state_size = state.size()};
  ASSERT_TRUE(disk.InFiber([&] { return store->Create(info); }));
  EXPECT_EQ(disk.Check(), "");
  EXPECT_EQ(disk.Close(), "");
  Peer("qemu-img check a");
  ASSERT_EQ(disk.Open(path), "");
  store = disk.node->snapshots();
  ASSERT_EQ(TestDisk::Text(disk.InFiber([&] { return store->Apply("vm"); })), "");
  std::string back(state.size() + 10, '?');
  std::span<uint8_t> to(reinterpret_cast<uint8_t*>(back.data()), back.size());
  ASSERT_EQ(TestDisk::Text(disk.InFiber([&] { return store->ReadVmState(0, to); })), "");
  EXPECT_EQ(back, state + std::string(10, '\0'));
}

TEST_F(Qcow2PeerMore, Bitmaps) {
  Peer(
      "qemu-img create -q -f qcow2 a 64M && qemu-img bitmap --add -g 64k a seen && "
      "qemu-img bitmap --add --disable a off && qemu-io -c 'write 1M 1M' a");
  TestDisk disk(*loop_);
  std::string path = dir_.path() + "/a";
  ASSERT_EQ(disk.Open(path), "");
  BitmapStore* store = disk.node->bitmaps();
  ASSERT_EQ(store->List().size(), 2u);
  EXPECT_TRUE(store->List()[0].enabled);
  EXPECT_FALSE(store->List()[1].enabled);
  std::shared_ptr<DirtyBitmap> seen = store->Find("seen");
  ASSERT_TRUE(seen);
  EXPECT_EQ(seen->dirty_bytes(), kMiB);
  EXPECT_EQ(disk.Write(10 * kMiB, std::string(100, 'x')), 0);
  EXPECT_EQ(seen->dirty_bytes(), kMiB + 65536);
  EXPECT_EQ(TestDisk::Text(disk.InFiber([&] { return store->Add({.name = "ours"}); })), "");
  EXPECT_EQ(disk.Write(20 * kMiB, std::string(65536, 'x')), 0);
  // While it is open they are marked on disk as in use.
  EXPECT_THAT(Peer("qemu-img info -U a"), HasSubstr("in-use"));
  EXPECT_EQ(disk.Close(), "");
  std::string info = Peer("qemu-img check a && qemu-img info a");
  EXPECT_THAT(info, HasSubstr("name: ours"));
  EXPECT_THAT(info, testing::Not(HasSubstr("in-use")));
  // What is dirty, by the peer's block status over its own export.
  Peer("qemu-img bitmap --merge seen a off && qemu-img bitmap --remove a seen");
  ASSERT_EQ(disk.Open(path), "");
  store = disk.node->bitmaps();
  ASSERT_EQ(store->List().size(), 2u);
  EXPECT_EQ(store->Find("off")->dirty_bytes(), kMiB + 2 * 65536);
  EXPECT_EQ(store->Find("ours")->dirty_bytes(), 65536u);
  EXPECT_EQ(TestDisk::Text(disk.InFiber([&] { return store->Remove("off"); })), "");
  EXPECT_EQ(disk.Check(), "");
  EXPECT_EQ(disk.Close(), "");
  Peer("qemu-img check a");
}

TEST_F(Qcow2PeerMore, BitmapsOfAnImageThatWasNotClosedAreInconsistent) {
  std::string path = dir_.path() + "/a";
  Peer("qemu-img create -q -f qcow2 a 1M && qemu-img bitmap --add a b");
  TestDisk disk(*loop_);
  ASSERT_EQ(disk.Open(path), "");
  WriteFile(dir_.path() + "/copy", ReadFile(path));
  ASSERT_EQ(disk.Close(), "");
  ASSERT_EQ(disk.Open(dir_.path() + "/copy"), "");
  BitmapStore* store = disk.node->bitmaps();
  ASSERT_EQ(store->List().size(), 1u);
  EXPECT_TRUE(store->List()[0].in_use);
  EXPECT_FALSE(store->Find("b"));
  EXPECT_EQ(TestDisk::Text(disk.InFiber([&] { return store->Remove("b"); })), "");
  EXPECT_EQ(disk.Close(), "");
  Peer("qemu-img check copy");
}

TEST_F(Qcow2PeerMore, LongChains) {
  std::string data = Noise(kMiB);
  WriteFile(dir_.path() + "/0", data);
  std::string format = "raw";
  for (int i = 1; i <= 100; i++) {
    std::string below = std::to_string(i - 1), name = std::to_string(i);
    TestDisk disk(*loop_);
    ASSERT_EQ(
        disk.Create(dir_.path() + "/" + name, "backing_file=" + below + ",backing_fmt=" + format),
        "");
    format = "qcow2";
    if (i % 10 != 0) continue;
    ASSERT_EQ(disk.Open(dir_.path() + "/" + name), "");
    uint64_t at = static_cast<uint64_t>(i) * 8000;
    EXPECT_EQ(disk.Write(at, std::string(3000, 'L')), 0);
    data.replace(at, 3000, std::string(3000, 'L'));
  }
  TestDisk disk(*loop_);
  ASSERT_EQ(disk.Open(dir_.path() + "/100"), "");
  EXPECT_EQ(disk.Read(0, kMiB), data);
  EXPECT_EQ(disk.Close(), "");
  WriteFile(dir_.path() + "/raw", data);
  Peer("qemu-img compare -F raw 100 raw");
}

TEST_F(Qcow2PeerMore, ADamagedImageIsMended) {
  std::string path = dir_.path() + "/a";
  Peer("qemu-img create -q -f qcow2 -o cluster_size=4k a 1M && qemu-io -c 'write -P 1 0 1M' a");
  std::string bytes = ReadFile(path);
  std::string broken = bytes;
  broken.replace(0x2000 + 2 * 20, 2, std::string(2, '\0'));      // a refcount too small
  broken.replace(0x2000 + 2 * 1000, 2, std::string("\0\7", 2));  // leaks
  WriteFile(path, broken);
  TestDisk disk(*loop_);
  ASSERT_EQ(disk.Open(path, "qcow2", {.for_check = true}), "");
  CheckResult result;
  EXPECT_THAT(disk.Check(Repair::kNone, &result), HasSubstr("ERROR cluster 20 refcount=0"));
  EXPECT_GE(result.corruptions, 1u);
  EXPECT_EQ(result.leaks, 1u);
  disk.Check(Repair::kLeaks, &result);
  EXPECT_EQ(result.leaks_fixed, 1u);
  EXPECT_EQ(disk.Check(Repair::kAll, &result), "");
  EXPECT_EQ(disk.Close(), "");
  Peer("qemu-img check a && qemu-io -c 'read -P 1 0 1M' a");
  // Without any refcounts.
  broken = bytes;
  broken.replace(0x1000, 0x1000, std::string(0x1000, '\xee'));
  WriteFile(path, broken);
  ASSERT_EQ(disk.Open(path, "qcow2", {.for_check = true}), "");
  EXPECT_EQ(disk.Check(Repair::kAll, &result), "");
  EXPECT_EQ(disk.Close(), "");
  Peer("qemu-img check a && qemu-io -c 'read -P 1 0 1M' a");
}

TEST_F(Qcow2PeerMore, Amend) {
  std::string path = dir_.path() + "/a";
  Peer("qemu-img create -q -f qcow2 a 4M && qemu-io -c 'write -P 1 0 1M' -c 'write -z 512k 1M' a");
  TestDisk disk(*loop_);
  auto amend = [&](const std::string& text) {
    EXPECT_EQ(disk.Open(path), "");
    Options options = Options::Parse(text).value();
    std::string error =
        TestDisk::Text(disk.InFiber([&] { return disk.node->editor()->Amend(options, nullptr); }));
    EXPECT_EQ(disk.Close(), "");
    Peer("qemu-img check a && qemu-io -c 'read -P 1 0 512k' -c 'read -P 0 512k 1M' a");
    return error;
  };
  EXPECT_EQ(amend("refcount_bits=64"), "");
  EXPECT_EQ(amend("refcount_bits=1,lazy_refcounts=on"), "");
  EXPECT_THAT(amend("compat=0.10"), HasSubstr("need compat=1.1"));
  EXPECT_EQ(amend("refcount_bits=16,lazy_refcounts=off"), "");
  EXPECT_EQ(amend("compat=0.10"), "");
  EXPECT_THAT(Peer("qemu-img info a"), HasSubstr("compat: 0.10"));
  EXPECT_EQ(amend("compat=1.1,size=8M"), "");
  EXPECT_THAT(amend("cluster_size=4k"), HasSubstr("can't be changed"));
  EXPECT_THAT(amend("colour=red"), HasSubstr("has no option 'colour'"));
}

TEST_F(Qcow2PeerMore, FilesThatAnImageNamesAreNotOpenedUnlessAllowed) {
  WriteFile(dir_.path() + "/secret", std::string(kMiB, 's'));
  Peer("qemu-img create -q -f qcow2 -b secret -F raw a");
  Peer("qemu-img create -q -f qcow2 -o data_file=secret b 1M");
  TestDisk disk(*loop_);
  disk.env().follow_backing = disk.env().follow_data_file = false;
  EXPECT_THAT(disk.Open(dir_.path() + "/a"), HasSubstr("isn't followed"));
  EXPECT_THAT(disk.Open(dir_.path() + "/b"), HasSubstr("isn't followed"));
}

TEST_F(Qcow2PeerMore, LoopsOfBackingFilesAreRefused) {
  Peer(
      "qemu-img create -q -f qcow2 a 1M && qemu-img create -q -f qcow2 -b a -F qcow2 b && "
      "qemu-img rebase -q -u -b b -F qcow2 a");
  TestDisk disk(*loop_);
  EXPECT_THAT(disk.Open(dir_.path() + "/a", "qcow2", {.read_only = true}),
              HasSubstr("the backing files form a loop"));
}

}  // namespace
}  // namespace kvartz::block
