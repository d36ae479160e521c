// Write-zeroes and discard: what the tables can say is said there.
#include <algorithm>
#include <cerrno>

#include "base/check.h"
#include "block/fiber_io.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace kvartz::block::qcow2 {
namespace {

constexpr uint64_t kZeroChunk = 64 << 10;
constexpr uint64_t kAllZero = uint64_t{UINT32_MAX} << 32;  // of an extended entry
alignas(4096) uint8_t g_zeros[kZeroChunk];                 // never written to

}  // namespace

int Qcow2Node::ZeroRange(uint64_t offset, uint64_t length, bool unmap, bool no_fallback) {
  const Geometry& geo = meta_->geometry();
  uint64_t end = offset + length;
  // The disk's last cluster counts as whole.
  uint64_t whole_end = end == size_bytes_ ? geo.RoundUp(end) : end & ~(geo.cluster_size - 1);
  uint64_t whole_from = geo.RoundUp(offset);
  if (whole_from >= end) return ZeroPart(offset, length, no_fallback);
  if (offset < whole_from) {
    if (int rc = ZeroPart(offset, whole_from - offset, no_fallback)) return rc;
  }
  if (int rc = ZeroClusters(whole_from >> geo.cluster_bits, whole_end >> geo.cluster_bits, unmap,
                            no_fallback)) {
    return rc;
  }
  whole_end = std::max(whole_end, whole_from);
  return whole_end < end ? ZeroPart(whole_end, end - whole_end, no_fallback) : 0;
}

// Less than a cluster, within one.
int Qcow2Node::ZeroPart(uint64_t offset, uint64_t length, bool no_fallback) {
  bool zero = false, marked = false;
  if (int rc = AllZero(offset, offset + length, &zero, &marked)) return rc;
  const bool can_mark = meta_->header.version >= 3 && !data_file_;
  if (zero && (marked || (!can_mark && !StandsOnAnother()))) return 0;
  uint64_t head = length, tail = 0;
  if (can_mark) {
    if (int rc = MarkPart(offset, length, &head, &tail)) return rc;
  }
  if (head + tail > 0 && no_fallback) return -ENOTSUP;
  if (int rc = WriteZerosOut(offset, head)) return rc;
  return WriteZerosOut(offset + length - tail, tail);
}

int Qcow2Node::WriteZerosOut(uint64_t offset, uint64_t length) {
  while (length > 0) {
    uint64_t bytes = std::min(length, 16 * kZeroChunk);
    std::vector<iovec> iov;
    for (uint64_t left = bytes; left > 0; left -= std::min(left, kZeroChunk))
      iov.push_back({g_zeros, std::min(left, kZeroChunk)});
    IovCursor from(iov.data(), static_cast<unsigned>(iov.size()));
    if (int rc = WriteRange(offset, bytes, from)) return rc;
    offset += bytes;
    length -= bytes;
  }
  return 0;
}

// Within one cluster: marks what the tables can, (sub)clusters that are covered or read as zeros
// anyway. `head`, `tail`: bytes at both ends that are left.
int Qcow2Node::MarkPart(uint64_t offset, uint64_t length, uint64_t* head, uint64_t* tail) {
  const Geometry& geo = meta_->geometry();
  const uint64_t unit = geo.subcluster_size, end = offset + length;
  uint64_t cluster = offset >> geo.cluster_bits;
  Slice* slice = nullptr;
  while (slice == nullptr) {
    if (int rc = FreeSlice(cluster, cluster + 1, &slice)) return rc;
  }
  uint64_t index = meta_->IndexInSlice(offset);
  uint64_t entry = meta_->Entry(*slice, index);
  uint64_t bits = meta_->SubBits(*slice, index);
  *head = length;
  *tail = 0;
  if (entry & kPacked) return 0;
  *head = 0;
  for (uint64_t at = offset / unit * unit; at < end; at += unit) {
    uint64_t sub = geo.InCluster(at) / unit;
    bool has_host = false;
    Mapping::Kind kind = meta_->Classify(entry, bits, sub, &has_host);
    bool covered = offset <= at && at + unit <= end;
    if (!covered && kind != Mapping::Kind::kZero &&
        (kind != Mapping::Kind::kUnallocated || InBacking(at))) {
      (at < offset ? *head : *tail) = std::min(end, at + unit) - std::max(offset, at);
    } else if (geo.subclusters > 1) {
      bits = (bits & ~(uint64_t{1} << sub)) | uint64_t{1} << (32 + sub);
    } else {
      entry |= kZeroFlag;
    }
  }
  if (entry != meta_->Entry(*slice, index) || bits != meta_->SubBits(*slice, index))
    meta_->SetEntry(slice, index, entry, bits);
  return 0;
}

// False: it can't be said in the tables. Version 3 says it even where nothing is below: an image
// may be put on another later.
bool Qcow2Node::ZeroEntry(Slice* slice, uint64_t guest, bool unmap) {
  const Geometry& geo = meta_->geometry();
  uint64_t index = meta_->IndexInSlice(guest);
  uint64_t old = meta_->Entry(*slice, index);
  uint64_t bits = meta_->SubBits(*slice, index);
  bool old_version = meta_->header.version < 3;
  bool nothing = !(old & kPacked) && (old & (kOffsetMask | kCopied)) == 0;
  if (old_version) {
    if (StandsOnAnother()) return false;
    if (nothing) return true;
    if (!unmap && !(old & kPacked) && (old & kCopied)) return false;  // keep the cluster
    meta_->ReleaseEntry(old, unmap);
    meta_->SetEntry(slice, index, 0);
    return true;
  }
  uint64_t flag = geo.subclusters > 1 ? 0 : kZeroFlag;
  bool keep = !(old & kPacked) && (old & kCopied) && (!unmap || data_file_);
  uint64_t entry = keep ? (old & (kOffsetMask | kCopied)) | flag : flag;
  uint64_t new_bits = geo.subclusters > 1 ? kAllZero : 0;
  if (entry == old && new_bits == bits) return true;
  if (!keep) meta_->ReleaseEntry(old, unmap);
  meta_->SetEntry(slice, index, entry, new_bits);
  return true;
}

int Qcow2Node::ZeroClusters(uint64_t first, uint64_t end, bool unmap, bool no_fallback) {
  const Geometry& geo = meta_->geometry();
  while (first < end) {
    uint64_t guest = first << geo.cluster_bits;
    uint64_t stop = std::min(end, (guest / meta_->slice_covers() + 1) * meta_->slice_entries());
    // A table that isn't there reads as zeros, unless something is behind it.
    if (meta_->header.version < 3 && !StandsOnAnother() &&
        (meta_->l1()[guest / geo.l2_covers] & kOffsetMask) == 0) {
      first = std::min(end, (guest / geo.l2_covers + 1) * geo.l2_entries);
      continue;
    }
    Slice* slice = nullptr;
    if (int rc = FreeSlice(first, stop, &slice)) return rc;
    if (slice == nullptr) continue;
    if (data_file_) {
      BusyGuard guard(*this, first, stop);
      uint64_t length = std::min(stop << geo.cluster_bits, size_bytes_) - guest;
      int rc = WriteZeroesAt(*data_file_, guest, length, unmap, no_fallback);
      if (rc != 0) return rc;
      if ((rc = meta_->WritableSlice(guest, &slice)) != 0) return rc;
      for (; first < stop; first++) ZeroEntry(slice, first << geo.cluster_bits, unmap);
      continue;
    }
    while (first < stop && ZeroEntry(slice, first << geo.cluster_bits, unmap)) first++;
    if (first == stop) continue;
    if (no_fallback) return -ENOTSUP;
    uint64_t at = first << geo.cluster_bits;
    if (int rc = WriteZerosOut(at, std::min(geo.cluster_size, size_bytes_ - at))) return rc;
    first++;
  }
  return 0;
}

int Qcow2Node::DiscardRange(uint64_t offset, uint64_t length) {
  const Geometry& geo = meta_->geometry();
  uint64_t end = offset + length;
  uint64_t first = geo.RoundUp(offset) >> geo.cluster_bits;
  uint64_t stop = (end == size_bytes_ ? geo.RoundUp(end) : end) >> geo.cluster_bits;
  if (first >= stop) return 0;
  if (data_file_) return ZeroClusters(first, stop, true, false);
  // Old data mustn't show again from below; version 2 can't say so.
  if (!StandsOnAnother()) return DiscardClusters(first, stop);
  return meta_->header.version < 3 ? 0 : ZeroClusters(first, stop, true, false);
}

// The slice of L2 entries that has cluster `*first`, and where it ends. Null: look again, perhaps
// further on, where there was no table.
int Qcow2Node::NextSlice(uint64_t* first, uint64_t end, uint64_t* stop, Slice** slice) {
  const Geometry& geo = meta_->geometry();
  const uint64_t guest = *first << geo.cluster_bits;
  if ((meta_->l1()[guest / geo.l2_covers] & kOffsetMask) == 0) {
    *first = std::min(end, (guest / geo.l2_covers + 1) * geo.l2_entries);
    return 0;
  }
  *stop = std::min(end, (guest / meta_->slice_covers() + 1) * meta_->slice_entries());
  return FreeSlice(*first, *stop, slice);
}

int Qcow2Node::DiscardClusters(uint64_t first, uint64_t end) {
  const Geometry& geo = meta_->geometry();
  const uint64_t zero = meta_->header.version < 3 || geo.subclusters > 1 ? 0 : kZeroFlag;
  while (first < end) {
    uint64_t stop = 0;
    Slice* slice = nullptr;
    if (int rc = NextSlice(&first, end, &stop, &slice)) return rc;
    if (slice == nullptr) continue;
    for (; first < stop; first++) {
      uint64_t guest = first << geo.cluster_bits;
      uint64_t old = meta_->Entry(*slice, meta_->IndexInSlice(guest));
      if (!(old & kPacked) && (old & kOffsetMask) == 0) continue;
      meta_->ReleaseEntry(old, true);
      meta_->SetEntry(slice, meta_->IndexInSlice(guest), zero, geo.subclusters > 1 ? kAllZero : 0);
    }
  }
  return 0;
}

}  // namespace kvartz::block::qcow2
