// Another size of the disk, and clusters that are allocated in advance.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>

#include "block/fiber_io.h"
#include "block/formats/qcow2/bitmaps.h"
#include "block/formats/qcow2/create.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/snapshots.h"

namespace kvartz::block::qcow2 {
namespace {

Error TablesError(const Node& node, int rc) {
  return ErrnoError(-rc, fmt::format("cannot write the tables of '{}'", node.name()));
}

}  // namespace

// In another place; the header's switch to it is one write.
int Qcow2Node::GrowL1(uint64_t entries) {
  std::vector<uint64_t>& l1 = meta_->l1();
  if (entries <= l1.size()) return 0;
  if (entries * 8 > kMaxL1Bytes) return -EFBIG;
  if (int rc = meta_->Commit()) return rc;
  const Geometry& geo = meta_->geometry();
  Run run;
  if (int rc = meta_->AllocateAll(geo.Clusters(entries * 8), &run)) return rc;
  std::vector<uint8_t> table(run.clusters << geo.cluster_bits);
  for (size_t i = 0; i < l1.size(); i++) StoreBe64(&table[i * 8], l1[i]);
  int rc = WriteAt(*file_, run.offset, table);
  if (rc == 0) rc = meta_->Commit();
  if (rc != 0) {
    meta_->FreeLater(run.offset, run.clusters);
    return rc;
  }
  uint64_t old_offset = meta_->header.l1_offset;
  uint32_t old_entries = meta_->header.l1_entries;
  meta_->header.l1_offset = run.offset;
  meta_->header.l1_entries = static_cast<uint32_t>(entries);
  rc = meta_->WriteHeader();
  if (rc != 0) {
    meta_->header.l1_offset = old_offset;
    meta_->header.l1_entries = old_entries;
    return rc;
  }
  l1.resize(entries);
  if (old_entries > 0) meta_->FreeLater(old_offset, geo.Clusters(uint64_t{old_entries} * 8));
  return 0;
}

// Clusters [first, end), which have no contents yet, get their place in the file. Where that would
// be decrypted to noise, the tables say that they are zeros. `shows_backing`: they still have none
// afterwards (subclusters can say so).
int Qcow2Node::PreallocateClusters(uint64_t first, uint64_t end, bool shows_backing) {
  const Geometry& geo = meta_->geometry();
  uint64_t bits = geo.subclusters > 1 && !shows_backing ? UINT32_MAX : 0;
  uint64_t flags = kCopied;
  if (encryption_ && geo.subclusters > 1) bits <<= 32;
  if (encryption_ && geo.subclusters == 1) flags |= kZeroFlag;
  while (first < end) {
    if (meta_->cache().crowded()) {
      if (int rc = meta_->Commit()) return rc;
    }
    uint64_t guest = first << geo.cluster_bits;
    uint64_t stop = std::min(end, (guest / meta_->slice_covers() + 1) * meta_->slice_entries());
    Slice* slice = nullptr;
    if (int rc = meta_->WritableSlice(guest, &slice)) return rc;
    Run run = {guest, stop - first, true};
    if (!data_file_) {
      if (int rc = meta_->Allocate(stop - first, &run)) return rc;
      if (int rc = encryption_ || shows_backing ? 0 : meta_->ZeroRun(run)) return rc;
      if (int rc = meta_->WritableSlice(guest, &slice)) return rc;
    }
    for (uint64_t i = 0; i < run.clusters; i++) {
      uint64_t index = meta_->IndexInSlice((first + i) << geo.cluster_bits);
      meta_->ReleaseEntry(meta_->Entry(*slice, index), false);
      meta_->SetEntry(slice, index, (run.offset + (i << geo.cluster_bits)) | flags, bits);
    }
    first += run.clusters;
  }
  return 0;
}

Result<> Qcow2Node::Preallocate(uint64_t old_size, const ResizeOptions& options) {
  const Preallocation how = options.preallocation;
  const Geometry& geo = meta_->geometry();
  uint64_t first = geo.Clusters(old_size), end = geo.Clusters(size_bytes_);
  if (how == Preallocation::kOff || first >= end) return {};
  if (encryption_ && meta_->header.version < 3)
    return Unsupported("preallocation where it is encrypted (compat 1.1 does)");
  Node& node = data_file_ ? *data_file_ : *file_;
  uint64_t data = (end - first) << geo.cluster_bits;
  const bool shows_backing =
      !options.zero_added && !meta_->header.backing_file.empty() && geo.subclusters > 1;
  if (how != Preallocation::kMetadata) {
    uint64_t l2 = (geo.L1Entries(size_bytes_) + 1) << geo.cluster_bits;
    uint64_t size = data_file_ ? size_bytes_ : meta_->end_of_clusters() + data + l2;
    TRY(node.Resize({.size = size, .preallocation = how}));
  }
  if (int rc = PreallocateClusters(first, end, shows_backing)) return Fail(TablesError(*this, rc));
  if (int rc = meta_->Commit()) return Fail(TablesError(*this, rc));
  uint64_t size = data_file_ ? size_bytes_ : meta_->end_of_clusters();
  if (node.grows()) TRY(node.Resize({.size = size}));
  return {};
}

Result<> Qcow2Node::Resize(const ResizeOptions& options) {
  uint64_t old_size = size_bytes_;
  uint64_t size = options.size;
  if (size % 512 != 0)
    return Fail(ErrorCode::kInvalid,
                fmt::format("a size of {}: it must be a multiple of 512", size));
  if (read_only_) return Fail(ErrnoError(EROFS, fmt::format("cannot resize '{}'", name())));
  if (size > uint64_t{INT64_MAX} || meta_->geometry().L1Entries(size) * 8 > kMaxL1Bytes) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("a size of {} bytes is too large for clusters of {} bytes", size,
                            meta_->geometry().cluster_size));
  }
  if (size != old_size && meta_->header.version < 3 && !snapshots_->entries().empty())
    return Unsupported("another size while there are snapshots (compat 1.1 does)");
  if (size == 0 && size < old_size && !bitmaps_->List().empty())
    return Unsupported("an empty disk with bitmaps (bitmap --remove)");
  if (size < old_size) return Shrink(size);
  if (int rc = GrowL1(meta_->geometry().L1Entries(size))) return Fail(TablesError(*this, rc));
  if (data_file_ && data_file_->size_bytes() < size) TRY(data_file_->Resize({.size = size}));
  // Before the new size is known to anybody: what is below mustn't show through.
  uint64_t shown = options.zero_added && backing_ ? std::min(size, backing_->size_bytes()) : 0;
  set_size(size);
  if (shown > old_size) {
    if (int rc = ZeroRange(old_size, shown - old_size, true, false)) {
      set_size(old_size);
      return Fail(TablesError(*this, rc));
    }
  }
  Result<> preallocated = Preallocate(old_size, options);
  if (!preallocated) {
    set_size(old_size);
    return preallocated;
  }
  int rc = meta_->Commit();
  if (rc == 0 && size != old_size) rc = meta_->WriteHeader();
  if (rc == 0) return {};
  set_size(old_size);
  return Fail(TablesError(*this, rc));
}

Result<> Qcow2Node::Shrink(uint64_t size) {
  const Geometry& geo = meta_->geometry();
  // The rest of the last cluster would show again if the disk grew.
  uint64_t last_end = std::min(geo.RoundUp(size), size_bytes_);
  int rc = last_end > size ? ZeroPart(size, last_end - size, false) : 0;
  uint64_t first = geo.Clusters(size), end = geo.Clusters(size_bytes_);
  if (rc == 0 && first < end) rc = DropClusters(first, end);
  if (rc == 0) rc = meta_->Commit();
  if (rc != 0) return Fail(TablesError(*this, rc));
  uint64_t old_size = size_bytes_;
  set_size(size);
  rc = meta_->WriteHeader();
  if (rc != 0) {
    set_size(old_size);
    return Fail(TablesError(*this, rc));
  }
  std::vector<uint64_t>& l1 = meta_->l1();
  for (uint64_t index = geo.L1Entries(size); index < geo.L1Entries(old_size); index++) {
    uint64_t table = l1[index] & kOffsetMask;
    if (table == 0) continue;
    meta_->FreeLater(table, 1);
    l1[index] = 0;
    meta_->MarkL1Dirty(index);
  }
  if (data_file_) {
    // What decrypts to zeros stays: the host's zeros, should it grow again, don't.
    uint64_t kept = encryption_ ? std::min(geo.RoundUp(size), data_file_->size_bytes()) : size;
    TRY(data_file_->Resize({.size = kept}));
  }
  rc = meta_->CommitAll(false);
  if (rc == 0) rc = meta_->TrimEnd();
  if (rc != 0) return Fail(TablesError(*this, rc));
  return {};
}

// Entries of [first, end) become empty: what is below shows through.
int Qcow2Node::DropClusters(uint64_t first, uint64_t end) {
  const Geometry& geo = meta_->geometry();
  while (first < end) {
    uint64_t stop = 0;
    Slice* slice = nullptr;
    if (int rc = NextSlice(&first, end, &stop, &slice)) return rc;
    if (slice == nullptr) continue;
    for (; first < stop; first++) {
      uint64_t index = meta_->IndexInSlice(first << geo.cluster_bits);
      uint64_t old = meta_->Entry(*slice, index);
      if (old == 0 && meta_->SubBits(*slice, index) == 0) continue;
      meta_->ReleaseEntry(old, true);
      meta_->SetEntry(slice, index, 0);
    }
  }
  return 0;
}

}  // namespace kvartz::block::qcow2
