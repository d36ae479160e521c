// Random operations on random images, against a disk in memory.
//
//   KVARTZ_BLOCK_CASES   how many images (each with some 100 operations)
//   KVARTZ_BLOCK_SEED    the first one's seed
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

#include "block/dirty_bitmap.h"
#include "block/test_disk.h"

namespace kvartz::block {
namespace {

struct Shape {
  std::string options;
  uint64_t cluster_size = 65536;
  uint64_t size = 0;
  bool version2 = false, data_file = false, snapshots = true, encrypted = false;
};

class ModelRun {
 public:
  ModelRun(EventLoop& loop, uint64_t seed) : random_(seed), disk_(loop) {}

  void Run() {
    Setup();
    if (testing::Test::HasFatalFailure()) return;
    for (int i = 0; i < 100 && !testing::Test::HasFailure(); i++) Step();
    if (testing::Test::HasFailure()) return;
    CheckAll();
    EXPECT_EQ(disk_.Close(), "");
    if (HavePeer() && !testing::Test::HasFailure()) CheckByPeer();
  }
  std::string trace;

 private:
  uint64_t Below(uint64_t limit) { return limit == 0 ? 0 : random_() % limit; }
  bool OneIn(uint64_t n) { return Below(n) == 0; }
  std::string Noise(uint64_t length) {
    std::string text(length, '\0');
    if (OneIn(2)) {
      std::fill(text.begin(), text.end(), static_cast<char>(random_()));
      return text;
    }
    for (size_t i = 0; i < length; i++) text[i] = static_cast<char>(random_() >> 24);
    return text;
  }

  void Setup() {
    constexpr uint64_t kClusterSizes[] = {512, 512, 1024, 4096, 16384, 65536, 65536, 2 << 20};
    shape_.cluster_size = kClusterSizes[Below(std::size(kClusterSizes))];
    uint64_t most = shape_.cluster_size >= 65536 ? 4 * kMiB : 512 * shape_.cluster_size;
    shape_.size = Below(most / 512) * 512;
    auto add = [&](const std::string& option) { shape_.options += "," + option; };
    shape_.options = "size=" + std::to_string(shape_.size);
    add("cluster_size=" + std::to_string(shape_.cluster_size));
    shape_.version2 = OneIn(5);
    if (shape_.version2) {
      add("compat=0.10");
    } else {
      uint64_t bits = uint64_t{1} << Below(7);
      if (OneIn(2)) add("refcount_bits=" + std::to_string(bits)), shape_.snapshots = bits > 1;
      if (OneIn(4)) add("lazy_refcounts=on");
      if (OneIn(3)) add("compression_type=zstd");
      if (shape_.cluster_size >= 16384 && OneIn(3)) add("extended_l2=on");
      if (OneIn(8)) {
        add("data_file=" + dir_.path() + "/data.raw");
        shape_.data_file = true;
        shape_.snapshots = false;
      }
    }
    shape_.encrypted = OneIn(5);
    if (shape_.encrypted) add("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1");
    disk_.env().secret = [](const std::string&) { return std::string("passphrase"); };
    model_.assign(shape_.size, '\0');
    if (OneIn(2)) {
      SetupBacking();
    } else if (OneIn(4) && !(shape_.encrypted && shape_.version2)) {
      add("preallocation=metadata");
    }
    path_ = dir_.path() + "/a.qcow2";
    trace = shape_.options + "\n";
    ASSERT_EQ(disk_.Create(path_, shape_.options), "") << shape_.options;
    if (shape_.encrypted) disk_.more_options = "encrypt.key-secret=key";
    ASSERT_EQ(disk_.Open(path_), "");
  }

  void SetupBacking() {
    uint64_t size = (1 + Below(2 * shape_.size / 512 + 1)) * 512;
    std::string base = Noise(size);
    std::string name = "base.raw";
    WriteFile(dir_.path() + "/base.raw", base);
    if (OneIn(2)) {  // in two layers
      name = "mid.qcow2";
      std::string mid = dir_.path() + "/mid.qcow2";
      ASSERT_EQ(disk_.Create(mid, "backing_file=base.raw,backing_fmt=raw,cluster_size=4096"), "");
      ASSERT_EQ(disk_.Open(mid), "");
      std::string patch = Noise(std::min<uint64_t>(size, 5000));
      ASSERT_EQ(disk_.Write(0, patch), 0);
      ASSERT_EQ(disk_.Close(), "");
      base.replace(0, patch.size(), patch);
    }
    shape_.options +=
        ",backing_file=" + name + ",backing_fmt=" + (name == "base.raw" ? "raw" : "qcow2");
    std::copy_n(base.begin(), std::min(base.size(), model_.size()), model_.begin());
  }

  struct Range {
    uint64_t offset = 0, length = 0;
  };
  Range AnyRange() {
    uint64_t unit =
        OneIn(3) ? 1 : (OneIn(2) ? 512 : std::min<uint64_t>(shape_.cluster_size, 65536));
    if (model_.empty()) return {};
    uint64_t offset = Below(model_.size()) / unit * unit;
    uint64_t most = std::min<uint64_t>(model_.size() - offset, 5 * shape_.cluster_size + 777);
    uint64_t length = std::min<uint64_t>(Below(most + 1), 600000);
    if (unit > 1) length = std::min(model_.size() - offset, (length / unit + 1) * unit);
    return {offset, length};
  }

  void Step() {
    switch (Below(24)) {
      case 0:
      case 1:
      case 2:
      case 3:
      case 4:
      case 5:
        return Write();
      case 6:
      case 7:
      case 8:
        return ReadSome();
      case 9:
      case 10:
        return Zeroes();
      case 11:
      case 12:
        return Discard();
      case 13:
        trace += "flush\n";
        EXPECT_EQ(disk_.Flush(), 0);
        return;
      case 14:
        return Compressed();
      case 15:
        return Resize();
      case 16:
      case 17:
        return Snapshot();
      case 18:
        return Reopen();
      case 19:
        return CheckAll();
      default:
        return Together();
    }
  }

  void Write() {
    Range range = AnyRange();
    std::string data = Noise(range.length);
    trace += "write " + std::to_string(range.offset) + " " + std::to_string(range.length) + "\n";
    ASSERT_EQ(disk_.Write(range.offset, data), 0);
    model_.replace(range.offset, range.length, data);
  }

  void ReadSome() {
    Range range = AnyRange();
    trace += "read " + std::to_string(range.offset) + " " + std::to_string(range.length) + "\n";
    Compare(range.offset, disk_.Read(range.offset, range.length));
  }

  void Compare(uint64_t offset, const std::string& data) {
    auto [ours, theirs] =
        std::mismatch(data.begin(), data.end(), model_.begin() + static_cast<ptrdiff_t>(offset));
    if (ours == data.end()) return;
    uint64_t at = offset + static_cast<uint64_t>(ours - data.begin());
    ADD_FAILURE() << "differs at " << at << ": " << int(uint8_t(*ours)) << " for "
                  << int(uint8_t(*theirs));
  }

  void Zeroes() {
    Range range = AnyRange();
    bool unmap = OneIn(2);
    trace += "zero " + std::to_string(range.offset) + " " + std::to_string(range.length) +
             (unmap ? " unmap\n" : "\n");
    ASSERT_EQ(disk_.WriteZeroes(range.offset, range.length, unmap), 0);
    std::fill_n(model_.begin() + static_cast<ptrdiff_t>(range.offset), range.length, '\0');
  }

  // Each cluster is as before or zeros; what isn't a whole cluster is as before.
  void Discard() {
    Range range = AnyRange();
    trace += "discard " + std::to_string(range.offset) + " " + std::to_string(range.length) + "\n";
    ASSERT_EQ(disk_.Discard(range.offset, range.length), 0);
    uint64_t unit = shape_.cluster_size;
    uint64_t end = range.offset + range.length;
    for (uint64_t at = (range.offset + unit - 1) / unit * unit; at < end; at += unit) {
      uint64_t length = std::min(unit, model_.size() - at);
      if (at + length > end) break;
      std::string now = disk_.Read(at, length);
      if (now == std::string(length, '\0')) model_.replace(at, length, now);
    }
    CompareWhole();
  }

  void Compressed() {
    if (shape_.data_file || shape_.encrypted || model_.empty()) return;
    uint64_t at = Below(model_.size()) / shape_.cluster_size * shape_.cluster_size;
    uint64_t length = std::min((1 + Below(3)) * shape_.cluster_size, model_.size() - at);
    std::string data = Noise(length);
    trace += "compressed " + std::to_string(at) + " " + std::to_string(length) + "\n";
    ASSERT_EQ(disk_.WriteCompressed(at, data), 0);
    model_.replace(at, length, data);
  }

  void Resize() {
    if (shape_.version2 && !snapshots_.empty()) return;
    uint64_t size = Below(2 * shape_.size / 512 + 2) * 512;
    constexpr Preallocation kModes[] = {Preallocation::kOff, Preallocation::kOff,
                                        Preallocation::kMetadata, Preallocation::kFalloc,
                                        Preallocation::kFull};
    Preallocation mode = kModes[Below(std::size(kModes))];
    if (disk_.node->backing() || (shape_.encrypted && shape_.version2)) mode = Preallocation::kOff;
    trace += "resize " + std::to_string(size) + " " + NameOf(mode) + "\n";
    ASSERT_EQ(disk_.Resize(size, mode), "");
    model_.resize(size, '\0');
    ASSERT_EQ(disk_.node->size_bytes(), size);
    CompareWhole();
  }

  void Snapshot() {
    if (!shape_.snapshots) return;
    SnapshotStore* store = disk_.node->snapshots();
    switch (Below(3)) {
      case 0: {
        if (snapshots_.size() > 2) return;
        auto made = disk_.InFiber([&] { return store->Create({.name = "snap"}); });
        trace += "snapshot " + (made ? made->id : made.error().what) + "\n";
        if (!made && made.error().code == ErrorCode::kNoSpace) return;  // narrow refcounts
        ASSERT_TRUE(made) << made.error().what;
        snapshots_[made->id] = model_;
        return;
      }
      case 1: {
        if (snapshots_.empty()) return;
        auto it = std::next(snapshots_.begin(), static_cast<ptrdiff_t>(Below(snapshots_.size())));
        if (shape_.version2 && it->second.size() != model_.size()) return;
        trace += "apply " + it->first + "\n";
        Result<> applied = disk_.InFiber([&] { return store->Apply(it->first); });
        // Narrow refcounts: nothing has changed.
        if (!applied && applied.error().code == ErrorCode::kNoSpace) return CheckAll();
        ASSERT_EQ(TestDisk::Text(applied), "");
        model_ = it->second;
        ASSERT_EQ(disk_.node->size_bytes(), model_.size());
        return CompareWhole();
      }
      default: {
        if (snapshots_.empty()) return;
        auto it = std::next(snapshots_.begin(), static_cast<ptrdiff_t>(Below(snapshots_.size())));
        trace += "delete " + it->first + "\n";
        ASSERT_EQ(TestDisk::Text(disk_.InFiber([&] { return store->Delete(it->first); })), "");
        snapshots_.erase(it);
      }
    }
  }

  void Reopen() {
    trace += "reopen\n";
    ASSERT_EQ(disk_.Close(), "");
    if (HavePeer() && OneIn(4)) CheckByPeer();
    ASSERT_EQ(disk_.Open(path_), "");
    CompareWhole();
  }

  void CompareWhole() { Compare(0, disk_.Read(0, model_.size())); }

  void CheckAll() {
    trace += "check\n";
    CompareWhole();
    EXPECT_EQ(disk_.Check(), "");
  }

  void CheckByPeer() {
    std::string key, options = " driver=qcow2,file.filename=" + path_;
    if (shape_.encrypted) {
      key = " --object secret,id=key,data=passphrase";
      options += ",encrypt.key-secret=key";
    }
    CommandResult check = RunCommand("qemu-img check --image-opts" + key + options);
    EXPECT_EQ(check.status, 0) << check.output;
    if (model_.empty()) return;
    std::string raw = dir_.path() + "/model.raw";
    WriteFile(raw, model_);
    CommandResult compare = RunCommand("qemu-img compare --image-opts" + key + options +
                                       " driver=raw,file.filename=" + raw);
    EXPECT_EQ(compare.status, 0) << compare.output;
  }

  // Several at once, which touch the same clusters but not the same bytes.
  void Together() {
    if (model_.size() < 8192) return;
    struct One {
      Request request;
      std::string data;
      iovec iov;
      int* left;
      int result = -1;
    };
    uint64_t unit = 512 << Below(4);
    uint64_t base = Below(model_.size() - std::min<uint64_t>(model_.size() / 2, 16 * unit) + 1);
    std::vector<uint64_t> places;
    for (uint64_t at = base; at + unit <= model_.size() && places.size() < 16; at += unit)
      places.push_back(at);
    std::shuffle(places.begin(), places.end(), random_);
    std::vector<One> all(places.size());
    int left = static_cast<int>(all.size());
    trace += "together " + std::to_string(base) + " " + std::to_string(unit) + "\n";
    for (size_t i = 0; i < all.size(); i++) {
      One& one = all[i];
      one.left = &left;
      one.data = Noise(unit);
      one.iov = {one.data.data(), one.data.size()};
      uint64_t kind = Below(8);
      one.request.kind = kind < 5   ? Request::Kind::kWrite
                         : kind < 6 ? Request::Kind::kWriteZeroes
                                    : Request::Kind::kRead;
      one.request.unmap = OneIn(2);
      one.request.offset = places[i];
      one.request.length = unit;
      one.request.iov = &one.iov;
      one.request.iov_count = 1;
      one.request.owner = &one;
      one.request.done = [](Request* request, int result) {
        One& finished = *static_cast<One*>(request->owner);
        finished.result = result;
        --*finished.left;
      };
    }
    std::vector<Request> asked;
    for (One& one : all) asked.push_back(one.request);
    for (One& one : all) disk_.node->Start(&one.request);
    if (OneIn(4)) disk_.node->Drain();
    while (left > 0) disk_.loop().RunOnce(-1);
    for (size_t i = 0; i < all.size(); i++) {
      ASSERT_EQ(all[i].result, 0);
      if (asked[i].kind == Request::Kind::kRead) {
        Compare(places[i], all[i].data);
      } else if (asked[i].kind == Request::Kind::kWrite) {
        model_.replace(places[i], unit, all[i].data);
      } else {
        model_.replace(places[i], unit, std::string(unit, '\0'));
      }
    }
  }

  std::mt19937_64 random_;
  TempDir dir_{TempDir::Place::kMemory};
  TestDisk disk_;
  Shape shape_;
  std::string path_;
  std::string model_;
  std::map<std::string, std::string> snapshots_;
};

TEST(Qcow2Model, RandomOperationsLeaveWhatTheyShould) {
  uint64_t seed = FromEnvironment("KVARTZ_BLOCK_SEED", 1);
  uint64_t cases = FromEnvironment("KVARTZ_BLOCK_CASES", 25);
  auto loop = MakeLoop();
  for (uint64_t i = 0; i < cases; i++) {
    ModelRun run(*loop, seed + i);
    run.Run();
    if (testing::Test::HasFailure())
      FAIL() << "seed " << seed + i << "\n" << run.trace.substr(0, 20000);
  }
}

}  // namespace
}  // namespace kvartz::block
