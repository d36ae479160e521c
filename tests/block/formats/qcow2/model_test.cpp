// Random operations on random images, against a disk in memory.
//
//   KVARTZ_BLOCK_CASES   how many images (each with some 100 operations)
//   KVARTZ_BLOCK_SEED    the first one's seed
#include "block/model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "block/dirty_bitmap.h"
#include "block/jobs/rebase.h"

namespace kvartz::block {
namespace {

struct Shape {
  std::string options;
  uint64_t cluster_size = 65536;
  uint64_t size = 0;
  bool version2 = false, data_file = false, snapshots = true, encrypted = false;
};

class Qcow2Run final : public ModelRun {
 public:
  using ModelRun::ModelRun;

 private:
  void Setup() override {
    constexpr uint64_t kClusterSizes[] = {512, 512, 1024, 4096, 16384, 65536, 65536, 2 << 20};
    unit_bytes_ = shape_.cluster_size = kClusterSizes[Below(std::size(kClusterSizes))];
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

  void Step() override {
    switch (Below(27)) {
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
        return FlushIt();
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
      case 20:
      case 21:
        return Bitmap();
      case 22:
        return Commit();
      default:
        return Together();
    }
  }

  void Compressed() {
    if (shape_.data_file || shape_.encrypted || model_.empty()) return;
    uint64_t at = Below(model_.size()) / shape_.cluster_size * shape_.cluster_size;
    uint64_t length = std::min((1 + Below(3)) * shape_.cluster_size, model_.size() - at);
    std::string data = Noise(length);
    trace += "compressed " + std::to_string(at) + " " + std::to_string(length) + "\n";
    ASSERT_EQ(disk_.WriteCompressed(at, data), 0);
    model_.replace(at, length, data);
    Touched({at, length});
  }

  void Resize() {
    if (shape_.version2 && !snapshots_.empty()) return;
    uint64_t size = Below(2 * shape_.size / 512 + 2) * 512;
    if (size == 0 && !bitmaps_.empty()) {
      EXPECT_NE(disk_.Resize(0), "");
      return;
    }
    constexpr Preallocation kModes[] = {Preallocation::kOff, Preallocation::kOff,
                                        Preallocation::kMetadata, Preallocation::kFalloc,
                                        Preallocation::kFull};
    Preallocation mode = kModes[Below(std::size(kModes))];
    if (disk_.node->backing() || (shape_.encrypted && shape_.version2)) mode = Preallocation::kOff;
    trace += "resize " + std::to_string(size) + " " + NameOf(mode) + "\n";
    ASSERT_EQ(disk_.Resize(size, mode), "");
    model_.resize(size, '\0');
    ASSERT_EQ(disk_.node->size_bytes(), size);
    for (auto& [name, bitmap] : bitmaps_)
      std::erase_if(bitmap.dirty, [&](uint64_t bit) { return bit * bitmap.granularity >= size; });
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
        RereadBitmaps();
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

  void CheckByPeer() override {
    std::string key, options = " driver=qcow2,file.filename=" + path_;
    if (shape_.encrypted) {
      key = " --object secret,id=key,data=passphrase";
      options += ",encrypt.key-secret=key";
    }
    CommandResult check = RunCommand("qemu-img check --image-opts" + key + options);
    EXPECT_EQ(check.status, 0) << check.output;
    CompareByPeer(key, options);
  }

  void Reopen() override {
    if (model_.empty()) bitmaps_.clear();  // of a snapshot's disk: they aren't kept
    ModelRun::Reopen();
    if (!testing::Test::HasFailure()) CompareBitmaps();
  }

  // ---- dirty bitmaps ----

  struct ModelBitmap {
    uint32_t granularity = 65536;
    bool enabled = true;
    std::set<uint64_t> dirty = {};  // by number of the bit
  };

  void Touched(Range range) override {
    if (range.length == 0) return;
    for (auto& [name, bitmap] : bitmaps_) {
      if (!bitmap.enabled) continue;
      uint64_t end = (range.offset + range.length - 1) / bitmap.granularity;
      for (uint64_t bit = range.offset / bitmap.granularity; bit <= end; bit++)
        bitmap.dirty.insert(bit);
    }
  }

  void CompareBitmaps() {
    for (auto& [name, expected] : bitmaps_) {
      auto bitmap = disk_.node->bitmaps()->Find(name);
      ASSERT_TRUE(bitmap) << name;
      for (uint64_t at = 0; at < model_.size(); at += expected.granularity) {
        ASSERT_EQ(bitmap->Test(at), expected.dirty.contains(at / expected.granularity))
            << name << " at " << at;
      }
    }
  }

  void Bitmap() {
    if (shape_.version2 || model_.empty()) return;
    BitmapStore* store = disk_.node->bitmaps();
    auto any = [&] {
      return std::next(bitmaps_.begin(), static_cast<ptrdiff_t>(Below(bitmaps_.size())));
    };
    auto done = [&](const std::string& what, Result<> result) {
      trace += "bitmap " + what + "\n";
      ASSERT_EQ(TestDisk::Text(result), "");
    };
    uint64_t what = bitmaps_.empty() ? 0 : Below(6);
    if (what == 0 && bitmaps_.size() < 3) {
      BitmapInfo info = {.name = "b" + std::to_string(next_bitmap_++),
                         .granularity = uint32_t{512} << Below(9),
                         .enabled = !OneIn(3)};
      done("add " + info.name, disk_.InFiber([&] { return store->Add(info); }));
      bitmaps_[info.name] = {.granularity = info.granularity, .enabled = info.enabled};
    } else if (what == 1) {
      auto it = any();
      done("remove " + it->first, disk_.InFiber([&] { return store->Remove(it->first); }));
      bitmaps_.erase(it);
    } else if (what == 2) {
      auto it = any();
      done("clear " + it->first, disk_.InFiber([&] { return store->Clear(it->first); }));
      it->second.dirty.clear();
    } else if (what == 3) {
      auto it = any();
      it->second.enabled = !it->second.enabled;
      done("enable " + it->first,
           disk_.InFiber([&] { return store->Enable(it->first, it->second.enabled); }));
    } else if (what == 4) {
      auto to = any(), from = any();
      if (to == from) return;
      auto source = store->Find(from->first);
      done("merge " + from->first, disk_.InFiber([&] { return store->Merge(to->first, *source); }));
      uint64_t step = from->second.granularity;
      for (uint64_t bit : from->second.dirty) {
        for (uint64_t at = bit * step; at < std::min((bit + 1) * step, model_.size());
             at = (at / to->second.granularity + 1) * to->second.granularity)
          to->second.dirty.insert(at / to->second.granularity);
      }
    }
    CompareBitmaps();
  }

  // What shows changes otherwise than by writes: what the bitmaps say of it is their affair.
  void RereadBitmaps() {
    for (auto& [name, expected] : bitmaps_) {
      auto bitmap = disk_.node->bitmaps()->Find(name);
      ASSERT_TRUE(bitmap) << name;
      expected.dirty.clear();
      for (uint64_t at = 0; at < model_.size(); at += expected.granularity) {
        if (bitmap->Test(at)) expected.dirty.insert(at / expected.granularity);
      }
    }
  }

  // Snapshots see the layer below change, so there must be none.
  void Commit() {
    Node* base = BackingOf(disk_.node.get());
    if (!base || !snapshots_.empty()) return;
    trace += "commit\n";
    using After = CommitJob::After;
    CommitJob job("commit", disk_.node, base, OneIn(3) ? After::kKeepTop : After::kEmptyTop);
    ASSERT_EQ(TestDisk::Text(disk_.InFiber([&] { return job.Run(); })), "");
    CompareWhole();
  }

  Shape shape_;
  std::map<std::string, std::string> snapshots_;
  std::map<std::string, ModelBitmap> bitmaps_;
  unsigned next_bitmap_ = 0;
};

TEST(Qcow2Model, RandomOperationsLeaveWhatTheyShould) { RunModels<Qcow2Run>(25); }

}  // namespace
}  // namespace kvartz::block
