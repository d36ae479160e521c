// Refcounts, and which clusters are free.
// Spec: qcow2.txt, "Host cluster management".
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>

#include "base/check.h"
#include "block/fiber_io.h"
#include "block/formats/qcow2/metadata.h"

namespace kvartz::block::qcow2 {
namespace {

constexpr size_t kMaxFreeRuns = 65536;  // more are found again another time
constexpr int kLookedAt = 64;           // free runs, for one allocation
constexpr uint64_t kWorthwhile = 16;    // clusters: a shorter run serves small requests only

}  // namespace

int Metadata::RefcountSlice(uint64_t cluster, Slice** slice, uint64_t* index) {
  uint64_t block = cluster / geo_.refblock_entries;
  if (block >= reftable_.size() || reftable_[block] == 0) return kMissing;
  uint64_t offset = reftable_[block];
  if (geo_.InCluster(offset) != 0 || offset > kMaxImageBytes)
    return Broken(fmt::format("the refcount table's entry {:#x} makes no sense", offset));
  uint64_t in_block = cluster % geo_.refblock_entries;
  uint64_t per_slice = (geo_.slice_bytes * 8) >> geo_.refcount_order;
  *index = in_block % per_slice;
  return cache_.Load(offset + in_block / per_slice * geo_.slice_bytes, Slice::Kind::kRefblock,
                     slice);
}

int Metadata::Refcount(uint64_t cluster, uint64_t* refcount) {
  Slice* slice = nullptr;
  uint64_t index = 0;
  int rc = RefcountSlice(cluster, &slice, &index);
  *refcount = rc == 0 ? GetRefcount(slice->data, geo_.refcount_order, index) : 0;
  return rc == kMissing ? 0 : rc;
}

int Metadata::AddRefcounts(uint64_t offset, uint64_t clusters, int64_t delta) {
  uint64_t first = offset >> geo_.cluster_bits;
  for (uint64_t cluster = first; cluster < first + clusters; cluster++) {
    Slice* slice = nullptr;
    uint64_t index = 0;
    int rc = RefcountSlice(cluster, &slice, &index);
    if (rc == kMissing && delta > 0) {
      if ((rc = MakeRefblock(cluster / geo_.refblock_entries)) == 0)
        rc = RefcountSlice(cluster, &slice, &index);
    }
    if (rc == kMissing) return Broken(fmt::format("cluster {} has no refcount", cluster));
    if (rc != 0) return rc;
    uint64_t value = GetRefcount(slice->data, geo_.refcount_order, index);
    if (delta < 0 && value < static_cast<uint64_t>(-delta))
      return Broken(fmt::format("cluster {} is used, but its refcount is 0", cluster));
    uint64_t result = value + static_cast<uint64_t>(delta);
    if (delta > 0 && result > geo_.max_refcount) return -EINVAL;
    SetRefcount(slice->data, geo_.refcount_order, index, result);
    cache_.MarkDirty(slice);
  }
  return 0;
}

// ---- free runs ----

// Overlaps nothing that is there.
void Metadata::AddFree(uint64_t cluster, uint64_t count) {
  if (count == 0 || free_.size() >= kMaxFreeRuns) return;
  auto next = free_.lower_bound(cluster);
  if (next != free_.end() && next->first == cluster + count) {
    count += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == cluster) {
      before->second += count;
      return;
    }
  }
  free_.emplace(cluster, count);
}

Run Metadata::ReserveAtEnd(uint64_t want) {
  uint64_t room =
      (kMaxImageBytes >> geo_.cluster_bits) - std::min(end_, kMaxImageBytes >> geo_.cluster_bits);
  if (!file_.grows()) {
    uint64_t held = file_.size_bytes() >> geo_.cluster_bits;
    room = held > end_ ? held - end_ : 0;
  }
  Run run = {end_ << geo_.cluster_bits, std::min(want, room), end_ >= fresh_from_};
  end_ += run.clusters;
  return run;
}

Run Metadata::Reserve(uint64_t want) {
  auto best = free_.end();
  int looked_at = 0;
  for (auto it = free_.begin(); it != free_.end() && looked_at < kLookedAt; ++it, looked_at++) {
    if (best == free_.end() || it->second > best->second) best = it;
    if (it->second >= want) break;
  }
  if (best == free_.end() || best->second < std::min(want, kWorthwhile)) {
    Run run = ReserveAtEnd(want);
    if (run.clusters > 0 || best == free_.end()) return run;
  }
  auto [first, count] = *best;
  free_.erase(best);
  if (count > want) free_.emplace(first + want, count - want);
  return {first << geo_.cluster_bits, std::min(count, want), false};
}

// Looks at one more slice of refcounts of what was there when the image was opened.
int Metadata::ScanForFree() {
  uint64_t from = scanned_;
  Slice* slice = nullptr;
  uint64_t index = 0;
  scanning_ = true;
  int rc = RefcountSlice(from, &slice, &index);
  scanning_ = false;
  uint64_t per_slice = (geo_.slice_bytes * 8) >> geo_.refcount_order;
  if (rc == kMissing) {  // a whole block of free ones
    uint64_t end = std::min(scan_end_, (from / geo_.refblock_entries + 1) * geo_.refblock_entries);
    scanned_ = end;
    AddFree(from, end - from);
    return 0;
  }
  if (rc != 0) {
    scanned_ = scan_end_;  // what can't be read isn't free
    return rc;
  }
  uint64_t end = std::min(scan_end_, from - index + per_slice);
  scanned_ = end;
  uint64_t start = from;
  for (uint64_t cluster = from; cluster < end; cluster++) {
    if (GetRefcount(slice->data, geo_.refcount_order, index + cluster - from) == 0) continue;
    AddFree(start, cluster - start);
    start = cluster + 1;
  }
  AddFree(start, end - start);
  return 0;
}

int Metadata::FindEnd() {
  fresh_from_ = UINT64_MAX;
  if (file_.grows()) {
    end_ = geo_.Clusters(file_.size_bytes());
    fresh_from_ = end_;
  } else {
    uint64_t per_slice = (geo_.slice_bytes * 8) >> geo_.refcount_order;
    uint64_t blocks = reftable_.size();
    while (blocks > 0 && reftable_[blocks - 1] == 0) blocks--;
    end_ = blocks * geo_.refblock_entries;
    for (bool used = false; end_ > 0 && !used;) {
      Slice* slice = nullptr;
      uint64_t index = 0;
      if (int rc = RefcountSlice(end_ - 1, &slice, &index)) return rc < 0 ? rc : -EIO;
      for (uint64_t i = per_slice; i > 0 && !used; i--) {
        used = GetRefcount(slice->data, geo_.refcount_order, i - 1) != 0;
        if (!used) end_--;
      }
    }
  }
  scanned_ = 0;
  scan_end_ = end_;
  return 0;
}

int Metadata::TrimEnd() {
  while (scanned_ < scan_end_) {
    if (int rc = ScanForFree()) return rc;
  }
  if (!file_.grows() || free_.empty()) return 0;
  auto last = std::prev(free_.end());
  if (last->first + last->second != end_) return 0;
  end_ = last->first;
  free_.erase(last);
  scan_end_ = scanned_ = std::min(scan_end_, end_);
  fresh_from_ = end_;
  Result<> cut = file_.Resize({.size = end_ << geo_.cluster_bits});
  return cut ? 0 : -EIO;
}

// ---- allocating ----

// Sets the refcounts of what was reserved, and cuts it to what is really free.
int Metadata::Claim(Run* run, Refblocks refblocks) {
  uint64_t first = run->offset >> geo_.cluster_bits;
  uint64_t end = first + run->clusters;
  uint64_t claimed = 0;
  int rc = 0;
  for (uint64_t cluster = first; rc == 0 && cluster < end; cluster++) {
    Slice* slice = nullptr;
    uint64_t index = 0;
    rc = RefcountSlice(cluster, &slice, &index);
    if (rc == kMissing) {
      uint64_t block = cluster / geo_.refblock_entries;
      rc = refblocks == Refblocks::kLocked ? MakeRefblockLocked(block) : MakeRefblock(block);
      if (rc == 0) rc = RefcountSlice(cluster, &slice, &index);
    }
    if (rc != 0) break;
    // Tables whose refcounts are 0 are there on damaged images.
    if (GetRefcount(slice->data, geo_.refcount_order, index) != 0 ||
        IsMetadata(cluster << geo_.cluster_bits, 1)) {
      if (claimed > 0) {
        AddFree(cluster + 1, end - cluster - 1);
        break;
      }
      first = cluster + 1;
      continue;
    }
    SetRefcount(slice->data, geo_.refcount_order, index, 1);
    cache_.MarkDirty(slice);
    claimed++;
  }
  run->offset = first << geo_.cluster_bits;
  run->clusters = claimed;
  if (rc != 0 && claimed > 0) FreeLater(run->offset, claimed);
  return rc;
}

int Metadata::Allocate(uint64_t want, Run* run) {
  VERIFY(writable_);
  file_.Debug(DebugEvent::kClusterAlloc);
  for (;;) {
    if (free_.empty() && scanned_ < scan_end_ && !scanning_) ScanForFree();
    *run = Reserve(want);
    if (run->clusters == 0) {
      if (scanned_ < scan_end_ && !scanning_) continue;
      return -ENOSPC;
    }
    if (int rc = Claim(run, Refblocks::kUnlocked)) return rc;
    if (run->clusters > 0) return 0;
  }
}

int Metadata::AllocateAll(uint64_t clusters, Run* run) {
  if (clusters == 1) return Allocate(1, run);
  file_.Debug(DebugEvent::kClusterAlloc);
  for (;;) {
    *run = ReserveAtEnd(clusters);
    if (run->clusters < clusters) {
      AddFree(run->offset >> geo_.cluster_bits, run->clusters);
      return -ENOSPC;
    }
    if (int rc = Claim(run, Refblocks::kUnlocked)) return rc;
    if (run->clusters == clusters) return 0;
    FreeLater(run->offset, run->clusters);
  }
}

int Metadata::AllocateBytes(uint64_t bytes, uint64_t* offset) {
  FiberLock lock(bytes_mutex_);
  if (bytes_at_ < bytes_end_) {
    uint64_t cluster = bytes_at_ >> geo_.cluster_bits;
    bool fits = bytes <= bytes_end_ - bytes_at_;
    uint64_t refcount = 0;
    if (int rc = Refcount(cluster, &refcount)) return rc;
    bool next_is_free = end_ << geo_.cluster_bits == bytes_end_;
    if (refcount > 0 && refcount < geo_.max_refcount && (fits || next_is_free)) {
      if (!fits) {
        Run run = ReserveAtEnd(1);
        if (run.clusters == 0) return -ENOSPC;
        if (int rc = Claim(&run, Refblocks::kUnlocked)) return rc;
        if (run.clusters > 0 && run.offset == bytes_end_) {
          bytes_end_ += geo_.cluster_size;
          fits = true;
        } else if (run.clusters > 0) {
          FreeLater(run.offset, run.clusters);
        }
      }
      // Not if the cluster went away meanwhile.
      if (fits && bytes_at_ >> geo_.cluster_bits == cluster && bytes_at_ < bytes_end_) {
        if (int rc = AddRefcounts(bytes_at_ & ~(geo_.cluster_size - 1), 1, 1)) return rc;
        *offset = bytes_at_;
        bytes_at_ += bytes;
        return 0;
      }
    }
  }
  Run run;
  if (int rc = Allocate(1, &run)) return rc;
  *offset = run.offset;
  bytes_at_ = run.offset + bytes;
  bytes_end_ = run.offset + geo_.cluster_size;
  return 0;
}

void Metadata::FreeLater(uint64_t offset, uint64_t clusters, bool discard) {
  if (!freed_.empty()) {
    Freed& last = freed_.back();
    if (last.offset + (last.clusters << geo_.cluster_bits) == offset && last.discard == discard) {
      last.clusters += clusters;
      return;
    }
  }
  freed_.push_back({offset, clusters, discard});
}

void Metadata::SetRefcountOrder(uint32_t order) {
  header.refcount_order = order;
  geo_ = Geometry(header);
}

void Metadata::ForgetRefcounts() {
  std::vector<uint64_t> offsets;
  cache_.ForEachDirty([&](Slice& slice) {
    if (slice.kind == Slice::Kind::kRefblock) offsets.push_back(slice.offset);
  });
  for (uint64_t offset : offsets) cache_.Drop(offset, geo_.slice_bytes);
  cache_.DropAllClean();
  freed_.clear();
  ripening_.clear();
  nearly_.clear();
  ripe_.clear();
}

// ---- the tables themselves ----

int Metadata::MakeRefblock(uint64_t block_index) {
  FiberLock lock(refblock_mutex_);
  return MakeRefblockLocked(block_index);
}

int Metadata::MakeRefblockLocked(uint64_t block_index) {
  if (block_index >= reftable_.size()) {
    if (int rc = GrowReftable(block_index)) return rc;
  }
  if (reftable_[block_index] != 0) return 0;
  Run run;
  do {
    run = Reserve(1);
    if (run.clusters == 0) return -ENOSPC;
  } while (IsMetadata(run.offset, 1));
  if (int rc = ZeroRun(run)) return rc;
  uint64_t cluster = run.offset >> geo_.cluster_bits;
  uint64_t own_block = cluster / geo_.refblock_entries;
  uint64_t per_slice = (geo_.slice_bytes * 8) >> geo_.refcount_order;
  Slice* slice = nullptr;
  uint64_t index = 0;
  if (own_block == block_index) {  // it counts itself
    uint64_t in_block = cluster % geo_.refblock_entries;
    index = in_block % per_slice;
    slice = cache_.Insert(run.offset + in_block / per_slice * geo_.slice_bytes,
                          Slice::Kind::kRefblock, true);
  } else {
    int rc = RefcountSlice(cluster, &slice, &index);
    if (rc == kMissing) {
      if ((rc = MakeRefblockLocked(own_block)) == 0) rc = RefcountSlice(cluster, &slice, &index);
    }
    if (rc != 0) return rc;
    // The one that was there counts something here: not free after all.
    if (GetRefcount(slice->data, geo_.refcount_order, index) != 0)
      return MakeRefblockLocked(block_index);
    slice->fresh = true;  // its count is on disk before the table points to it
  }
  SetRefcount(slice->data, geo_.refcount_order, index, 1);
  cache_.MarkDirty(slice);
  reftable_[block_index] = run.offset;
  guard_new_.insert(cluster);
  reftable_dirty_.insert(block_index);
  return 0;
}

// A larger table in another place. Its switch-over is written at once.
int Metadata::GrowReftable(uint64_t block_index) {
  uint64_t per_cluster = geo_.cluster_size / 8;
  // Enough for itself, and then half as much again.
  uint64_t entries = std::max(block_index + 1, end_ / geo_.refblock_entries + 2);
  entries += entries / 2 + 1;
  uint64_t clusters = (entries + per_cluster - 1) / per_cluster;
  if (clusters << geo_.cluster_bits > kMaxReftableBytes) {
    clusters = kMaxReftableBytes >> geo_.cluster_bits;
    if (clusters * per_cluster <= block_index) return -EFBIG;
  }
  FiberLock lock(commit_mutex_);
  uint64_t old_entries = reftable_.size();
  reftable_.resize(clusters * per_cluster);
  Run run = ReserveAtEnd(clusters);
  int rc = run.clusters == clusters ? Claim(&run, Refblocks::kLocked) : -ENOSPC;
  if (rc == 0 && run.clusters < clusters) rc = -ENOSPC;  // not on sound images
  if (rc == 0) {
    std::vector<Copy> copies;
    cache_.ForEachDirty([&](Slice& slice) {
      if (slice.kind != Slice::Kind::kRefblock) return;
      copies.push_back({slice.offset, {slice.data, slice.data + geo_.slice_bytes}});
    });
    rc = WriteCopies(copies);
  }
  if (rc == 0) rc = FlushAll();
  if (rc == 0) {
    std::vector<uint8_t> table(clusters << geo_.cluster_bits);
    for (size_t i = 0; i < reftable_.size(); i++) StoreBe64(&table[i * 8], reftable_[i]);
    rc = WriteAt(file_, run.offset, table);
  }
  if (rc == 0) rc = FlushAll();
  if (rc != 0) {
    // New entries beyond the old table can't be kept.
    reftable_.resize(old_entries);
    while (!reftable_dirty_.empty() && *reftable_dirty_.rbegin() >= old_entries)
      reftable_dirty_.erase(std::prev(reftable_dirty_.end()));
    return rc;
  }
  uint64_t old_offset = header.reftable_offset;
  uint32_t old_clusters = header.reftable_clusters;
  header.reftable_offset = run.offset;
  header.reftable_clusters = static_cast<uint32_t>(clusters);
  if ((rc = WriteHeader()) != 0) {
    header.reftable_offset = old_offset;
    header.reftable_clusters = old_clusters;
    reftable_.resize(old_entries);
    return rc;
  }
  reftable_dirty_.clear();
  FreeLater(old_offset, old_clusters);
  return 0;
}

}  // namespace kvartz::block::qcow2
