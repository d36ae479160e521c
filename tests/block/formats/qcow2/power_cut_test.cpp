// Loss of power at any moment: what was flushed is there, nothing is corrupt.
//
//   KVARTZ_BLOCK_CUTS   how many cuts
//   KVARTZ_BLOCK_SEED   the first run's seed
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "block/formats/qcow2/layout.h"
#include "block/memory_node.h"
#include "block/test_disk.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kSector = 512;
constexpr int kCutsOfARun = 20;

// What was done to a sector.
struct Change {
  size_t begun = 0;            // in events of the file
  uint64_t done = UINT64_MAX;  // by the test's own clock
  uint64_t tag = 0;            // what the sector is full of
  bool weak = false;           // a discard: may have no effect
};

class PowerCutRun {
 public:
  PowerCutRun(EventLoop& loop, uint64_t seed) : loop_(loop), random_(seed), seed_(seed) {}

  void Run() {
    Create();
    if (testing::Test::HasFatalFailure()) return;
    for (int i = 0; i < 30 && !testing::Test::HasFailure(); i++) Step();
    size_t end = file_->now();
    if (OneIn(2)) {
      uint64_t begun = ++clock_;
      EXPECT_EQ(disk_.Close(), "");
      end = file_->now();
      flushes_.push_back({begun, end});
    }
    for (int i = 0; i < kCutsOfARun && !testing::Test::HasFailure(); i++) CutAt(Below(end + 1));
    if (disk_.node) disk_.Close();
  }

 private:
  uint64_t Below(uint64_t limit) { return limit == 0 ? 0 : random_() % limit; }
  bool OneIn(uint64_t n) { return Below(n) == 0; }

  NodePtr OpenOn(std::shared_ptr<MemoryNode> file, bool for_check) {
    auto opened = RunInFiber(loop_, [&]() -> Result<NodePtr> {
      Options options;
      options.Set("driver", "qcow2");
      options.SetNode("file", file);
      if (base_) options.SetNode("backing", base_);
      NodeOptions node = {.discard_unmap = true, .for_check = for_check};
      return OpenNode({.loop = loop_}, std::move(options), node);
    });
    EXPECT_TRUE(opened) << opened.error().what;
    return opened ? *opened : nullptr;
  }

  void Create() {
    constexpr uint64_t kClusterSizes[] = {512, 1024, 4096, 16384, 65536};
    uint64_t cluster = kClusterSizes[Below(std::size(kClusterSizes))];
    sectors_ = 64 + Below(512);
    std::string options =
        "size=" + std::to_string(sectors_ * kSector) + ",cluster_size=" + std::to_string(cluster);
    version2_ = OneIn(6);
    if (version2_) options += ",compat=0.10";
    if (!version2_ && OneIn(4)) options += ",lazy_refcounts=on";
    if (!version2_ && OneIn(3)) options += ",refcount_bits=64";
    if (!version2_ && cluster >= 16384 && OneIn(2)) options += ",extended_l2=on";
    options_ = options;
    TempDir dir(TempDir::Place::kMemory);
    std::string path = dir.path() + "/a.qcow2";
    ASSERT_EQ(disk_.Create(path, options), "") << options;
    start_ = ReadFile(path);
    file_ = std::make_shared<MemoryNode>(loop_, start_, seed_ | 1);
    if (OneIn(2)) {
      std::string base;
      for (uint64_t i = 0; i < sectors_; i++) base += Filled(1'000'000 + i);
      base_ = std::make_shared<MemoryNode>(loop_, base);
    }
    changes_.resize(sectors_);
    for (uint64_t i = 0; i < sectors_; i++)
      changes_[i].push_back({0, 0, base_ ? 1'000'000 + i : 0, false});
    disk_.node = OpenOn(file_, false);
    ASSERT_TRUE(disk_.node);
  }

  static std::string Filled(uint64_t tag) {
    std::string text(kSector, '\0');
    for (size_t i = 0; i < kSector; i += 8) std::memcpy(&text[i], &tag, 8);
    return text;
  }

  struct One {
    PowerCutRun* run = nullptr;
    Request request;
    std::string data;
    iovec iov = {};
    uint64_t first = 0, count = 0;
    std::vector<size_t> places;  // of the changes
    uint64_t flush_begun = 0;
  };

  void Step() {
    if (!version2_ && OneIn(12)) return Snapshot();
    std::vector<One> all(1 + Below(8));
    left_ = static_cast<int>(all.size());
    uint64_t at = Below(sectors_);
    for (One& one : all) {
      one.run = this;
      one.first = at;
      one.count = std::min<uint64_t>(1 + Below(OneIn(3) ? 140 : 12), sectors_ - at);
      at += one.count;
      uint64_t kind = Below(10);
      one.request.kind = one.count == 0 || kind == 0 ? Request::Kind::kFlush
                         : kind < 7                  ? Request::Kind::kWrite
                         : kind < 9                  ? Request::Kind::kWriteZeroes
                                                     : Request::Kind::kDiscard;
    }
    for (One& one : all) Start(one);
    while (left_ > 0) loop_.RunOnce(-1);
  }

  void Start(One& one) {
    one.request.offset = one.first * kSector;
    one.request.length = one.count * kSector;
    one.request.unmap = OneIn(2);
    bool flush = one.request.kind == Request::Kind::kFlush;
    if (flush) {
      one.flush_begun = ++clock_;
      one.request.offset = one.request.length = 0;
    }
    for (uint64_t i = 0; !flush && i < one.count; i++) {
      Change change = {.begun = file_->now(), .tag = 0};
      change.weak = one.request.kind == Request::Kind::kDiscard;
      if (one.request.kind == Request::Kind::kWrite) {
        change.tag = ++last_tag_;
        one.data += Filled(change.tag);
      }
      one.places.push_back(changes_[one.first + i].size());
      changes_[one.first + i].push_back(change);
    }
    one.iov = {one.data.data(), one.data.size()};
    one.request.iov = &one.iov;
    one.request.iov_count = 1;
    one.request.owner = &one;
    one.request.done = [](Request* request, int result) {
      One& finished = *static_cast<One*>(request->owner);
      EXPECT_EQ(result, 0);
      finished.run->Finished(finished);
    };
    disk_.node->Start(&one.request);
  }

  void Finished(One& one) {
    left_--;
    for (size_t i = 0; i < one.places.size(); i++)
      changes_[one.first + i][one.places[i]].done = ++clock_;
    if (one.places.empty()) flushes_.push_back({one.flush_begun, file_->now()});
  }

  void Snapshot() {
    SnapshotStore* store = disk_.node->snapshots();
    if (store->List().empty() || OneIn(2)) {
      EXPECT_TRUE(disk_.InFiber([&] { return store->Create({.name = "s"}); }));
    } else {
      std::string id = store->List()[Below(store->List().size())].id;
      EXPECT_EQ(TestDisk::Text(disk_.InFiber([&] { return store->Delete(id); })), "");
    }
  }

  void CutAt(size_t moment) {
    std::string bytes = MemoryNode::Cut(start_, file_->log(), moment, random_);
    std::string where = options_ + (base_ ? " with backing" : "") + ", cut after event " +
                        std::to_string(moment) + " of " + std::to_string(file_->now());
    auto header = qcow2::ParseHeader(
        {reinterpret_cast<const uint8_t*>(bytes.data()), std::min<size_t>(bytes.size(), 65536)});
    ASSERT_TRUE(header) << header.error().what << "\n" << where;
    if (!(header->incompatible & qcow2::kDirty)) CheckSound(bytes, where);
    TestDisk after(loop_);
    after.node = OpenOn(std::make_shared<MemoryNode>(loop_, bytes), false);
    ASSERT_TRUE(after.node) << where;
    CheckResult result;
    std::string found = after.Check(Repair::kLeaks, &result);
    EXPECT_EQ(result.corruptions + result.check_errors + result.leaks, 0u) << found << where;
    Compare(after, moment, where);
  }

  // Before anything is repaired.
  void CheckSound(const std::string& bytes, const std::string& where) {
    TestDisk before(loop_);
    before.node = OpenOn(std::make_shared<MemoryNode>(loop_, bytes), true);
    ASSERT_TRUE(before.node) << where;
    CheckResult result;
    std::string found = before.Check(Repair::kNone, &result);
    EXPECT_EQ(result.corruptions + result.check_errors, 0u) << found.substr(0, 2000) << where;
    if (!HavePeer() || !OneIn(40)) return;
    TempDir dir(TempDir::Place::kMemory);
    WriteFile(dir.path() + "/cut.qcow2", bytes);
    CommandResult peer = RunCommand("qemu-img check " + dir.path() + "/cut.qcow2");
    EXPECT_TRUE(peer.status == 0 || peer.status == 3) << peer.output << where;
  }

  void Compare(TestDisk& disk, size_t moment, const std::string& where) {
    uint64_t flushed = 0;  // what was done before this has to be there
    for (auto [begun, done] : flushes_) {
      if (done <= moment) flushed = std::max(flushed, begun);
    }
    std::string data = disk.Read(0, sectors_ * kSector);
    for (uint64_t i = 0; i < sectors_; i++) {
      uint64_t tag = 0;
      std::memcpy(&tag, &data[i * kSector], 8);
      std::string sector = data.substr(i * kSector, kSector);
      ASSERT_EQ(sector, Filled(tag)) << "sector " << i << " is torn; " << where;
      const std::vector<Change>& changes = changes_[i];
      size_t base = 0;
      for (size_t n = 0; n < changes.size(); n++) {
        if (!changes[n].weak && changes[n].done < flushed) base = n;
      }
      bool allowed = false;
      std::string expected;
      std::string history;
      for (const Change& change : changes) {
        history += " " + std::to_string(change.tag) + (change.weak ? "w" : "") + "[" +
                   std::to_string(change.begun) + "," + std::to_string(change.done) + ")";
      }
      for (size_t n = base; n < changes.size() && changes[n].begun <= moment; n++) {
        allowed |= changes[n].tag == tag;
        expected += " " + std::to_string(changes[n].tag);
      }
      ASSERT_TRUE(allowed) << "sector " << i << " has " << tag << ", not one of" << expected
                           << "; history" << history << " flushed " << flushed << "; " << where;
    }
  }

  EventLoop& loop_;
  std::mt19937_64 random_;
  const uint64_t seed_;
  TestDisk disk_{loop_};
  std::shared_ptr<MemoryNode> file_;
  std::shared_ptr<MemoryNode> base_;
  std::string options_, start_;
  bool version2_ = false;
  uint64_t sectors_ = 0;
  uint64_t last_tag_ = 0;
  int left_ = 0;
  std::vector<std::vector<Change>> changes_;
  uint64_t clock_ = 0;
  std::vector<std::pair<uint64_t, size_t>> flushes_;  // begun by the clock, done by events
};

TEST(Qcow2PowerCut, NothingFlushedIsLostAndNothingIsCorrupt) {
  uint64_t seed = FromEnvironment("KVARTZ_BLOCK_SEED", 1);
  uint64_t runs = FromEnvironment("KVARTZ_BLOCK_CUTS", 1000) / kCutsOfARun;
  auto loop = MakeLoop();
  for (uint64_t i = 0; i < runs; i++) {
    PowerCutRun(*loop, seed + i).Run();
    if (testing::Test::HasFailure()) FAIL() << "seed " << seed + i;
  }
}

}  // namespace
}  // namespace kvartz::block
