// Which clusters of the file are metadata, so that no damaged table makes us write data there.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>

#include "base/log.h"
#include "block/formats/qcow2/metadata.h"

namespace kvartz::block::qcow2 {

// What is known without reading: not the tables of snapshots, nor bitmaps.
void Metadata::RebuildGuard() {
  bool first = guard_.empty();
  guard_.clear();
  guard_new_.clear();
  guard_stale_ = false;
  auto add = [&](uint64_t offset, uint64_t bytes) {
    uint64_t end = geo_.Clusters(offset + bytes);
    for (uint64_t cluster = offset >> geo_.cluster_bits; cluster < end; cluster++)
      guard_.push_back(cluster);
  };
  std::vector<uint64_t> l2;
  for (uint64_t entry : l1_) {
    if ((entry & kOffsetMask) != 0 && CheckL2Pointer(entry))
      l2.push_back((entry & kOffsetMask) >> geo_.cluster_bits);
  }
  // Two entries for one table are check's affair.
  std::sort(l2.begin(), l2.end());
  l2.erase(std::unique(l2.begin(), l2.end()), l2.end());
  add(0, 1);
  add(header.l1_offset, uint64_t{header.l1_entries} * 8);
  add(header.reftable_offset, uint64_t{header.reftable_clusters} << geo_.cluster_bits);
  for (uint64_t block : reftable_) {
    if (block != 0) add(block, geo_.cluster_size);
  }
  if (header.snapshot_count > 0) add(header.snapshots_offset, 1);
  if (header.bitmap_count > 0) add(header.bitmaps_offset, header.bitmaps_size);
  guard_.insert(guard_.end(), l2.begin(), l2.end());
  std::sort(guard_.begin(), guard_.end());
  auto twice = std::adjacent_find(guard_.begin(), guard_.end());
  if (first && twice != guard_.end()) guard_conflict_ = *twice << geo_.cluster_bits;
}

bool Metadata::IsMetadata(uint64_t offset, uint64_t bytes) {
  if (data_file_ || !writable_) return false;
  if (guard_stale_) RebuildGuard();
  auto hit = [&] {
    uint64_t end = geo_.Clusters(offset + bytes);
    uint64_t begin = offset >> geo_.cluster_bits;
    auto next = std::lower_bound(guard_.begin(), guard_.end(), begin);
    if (next != guard_.end() && *next < end) return true;
    for (uint64_t cluster = begin; cluster < end && !guard_new_.empty(); cluster++) {
      if (guard_new_.contains(cluster)) return true;
    }
    return false;
  };
  if (!hit()) return false;
  // It may have been freed since.
  RebuildGuard();
  return hit();
}

bool Metadata::MayWrite(uint64_t offset, uint64_t bytes) {
  return !IsMetadata(offset, bytes) && guard_conflict_ == UINT64_MAX && !corrupt_;
}

int Metadata::RefuseMetadata(uint64_t offset, uint64_t bytes) {
  if (MayWrite(offset, bytes)) return 0;
  if (corrupt_) return -EIO;
  corrupt_ = true;
  KLOG(kError,
       "'{}' is damaged: data and tables overlap at {:#x}; it is marked as corrupt and not written "
       "to any more; run kvartz img check",
       file_.name(), guard_conflict_ != UINT64_MAX ? guard_conflict_ : offset);
  if (header.version >= 3) {
    header.incompatible |= kCorrupt;
    WriteHeader();  // the log has said it, if it can't be written
  }
  return -EIO;
}

}  // namespace kvartz::block::qcow2
