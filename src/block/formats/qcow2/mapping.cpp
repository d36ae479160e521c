// From offsets of the disk to clusters of the file: L1 and L2 tables.
// Spec: qcow2.txt, "Cluster mapping" and "Extended L2 Entries".
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "base/check.h"
#include "block/formats/qcow2/metadata.h"

namespace kvartz::block::qcow2 {
namespace {
constexpr uint64_t kTablesAtOnce = 1024;  // which aren't there
}

uint64_t Metadata::SliceOffset(uint64_t l2_table, uint64_t guest) const {
  uint64_t index = (guest >> geo_.cluster_bits) % geo_.l2_entries;
  return l2_table + index / slice_entries_ * geo_.slice_bytes;
}

bool Metadata::CheckL2Pointer(uint64_t entry) const {
  return (entry & kL1Reserved) == 0 && geo_.InCluster(entry & kOffsetMask) == 0;
}

Mapping::Kind Metadata::Classify(uint64_t entry, uint64_t sub_bits, uint64_t sub,
                                 bool* has_host) const {
  if (entry & kPacked) {
    *has_host = false;
    return Mapping::Kind::kCompressed;
  }
  *has_host = (entry & kOffsetMask) != 0 || (data_file_ && (entry & kCopied));
  if (geo_.subclusters > 1) {
    if (sub_bits >> (32 + sub) & 1) return Mapping::Kind::kZero;
    return *has_host && (sub_bits >> sub & 1) ? Mapping::Kind::kData : Mapping::Kind::kUnallocated;
  }
  if ((entry & kZeroFlag) && header.version >= 3) return Mapping::Kind::kZero;
  return *has_host ? Mapping::Kind::kData : Mapping::Kind::kUnallocated;
}

Metadata::Cached Metadata::MapInSlice(const Slice& slice, uint64_t guest, uint64_t length,
                                      Mapping* mapping) {
  uint64_t index = IndexInSlice(guest);
  uint64_t entry = Entry(slice, index);
  uint64_t bits = SubBits(slice, index);
  uint64_t sub = geo_.InCluster(guest) / geo_.subcluster_size;
  mapping->kind = Classify(entry, bits, sub, &mapping->has_host);
  mapping->copied = (entry & kCopied) != 0;
  if (mapping->kind == Mapping::Kind::kCompressed) {
    uint64_t mask = (uint64_t{1} << geo_.csize_shift) - 1;
    uint64_t sectors = ((entry & ~(kCopied | kPacked)) >> geo_.csize_shift) + 1;
    mapping->host = entry & mask;
    mapping->host_bytes = sectors * 512 - (mapping->host & 511);
    mapping->copied = false;
    mapping->length = std::min(length, geo_.cluster_size - geo_.InCluster(guest));
    return Cached::kYes;
  }
  uint64_t cluster = entry & kOffsetMask;
  if (geo_.InCluster(cluster) != 0 || (bits & bits >> 32 & UINT32_MAX) != 0) {
    Broken(fmt::format("the entry {:#x} for {:#x} of the disk makes no sense", entry, guest));
    return Cached::kBroken;
  }
  mapping->host = mapping->has_host ? cluster + geo_.InCluster(guest) : 0;
  // As far as it goes on like this.
  uint64_t end = std::min(guest + length, (guest / slice_covers() + 1) * slice_covers());
  uint64_t at = (guest / geo_.subcluster_size + 1) * geo_.subcluster_size;
  for (; at < end; at += geo_.subcluster_size) {
    uint64_t next = IndexInSlice(at);
    bool has_host = false;
    uint64_t next_entry = entry;
    if (next != index) {
      index = next;
      next_entry = Entry(slice, index);
      bits = SubBits(slice, index);
      if (next_entry & kPacked) break;
      if ((bits & bits >> 32 & UINT32_MAX) != 0) break;
      uint64_t expected = (entry & kOffsetMask) + (mapping->has_host ? geo_.cluster_size : 0);
      if ((next_entry & kOffsetMask) != expected || ((next_entry ^ entry) & kCopied) != 0) break;
      entry = next_entry;
    }
    sub = geo_.InCluster(at) / geo_.subcluster_size;
    if (Classify(entry, bits, sub, &has_host) != mapping->kind || has_host != mapping->has_host)
      break;
  }
  mapping->length = std::min(at, end) - guest;
  return Cached::kYes;
}

Metadata::Cached Metadata::TryMap(uint64_t guest, uint64_t length, Mapping* mapping) {
  uint64_t l1_index = guest / geo_.l2_covers;
  VERIFY(l1_index < l1_.size());
  uint64_t l2_entry = l1_[l1_index];
  uint64_t table = l2_entry & kOffsetMask;
  if (table == 0) {
    *mapping = {};
    const uint64_t last = std::min<uint64_t>(l1_.size(), l1_index + kTablesAtOnce);
    uint64_t end = l1_index + 1;
    while (end < last && (l1_[end] & kOffsetMask) == 0) end++;
    mapping->length = std::min(length, end * geo_.l2_covers - guest);
    return Cached::kYes;
  }
  if (!CheckL2Pointer(l2_entry)) {
    Broken(fmt::format("the L1 entry {:#x} makes no sense", l2_entry));
    return Cached::kBroken;
  }
  Slice* slice = cache_.Find(SliceOffset(table, guest));
  if (!slice) return Cached::kNo;
  return MapInSlice(*slice, guest, length, mapping);
}

int Metadata::Map(uint64_t guest, uint64_t length, Mapping* mapping) {
  for (;;) {
    Cached cached = TryMap(guest, length, mapping);
    if (cached == Cached::kYes) return 0;
    if (cached == Cached::kBroken) return -EIO;
    Slice* slice = nullptr;
    uint64_t table = l1_[guest / geo_.l2_covers] & kOffsetMask;
    if (int rc = cache_.Load(SliceOffset(table, guest), Slice::Kind::kL2, &slice)) return rc;
  }
}

Slice* Metadata::TryWritableSlice(uint64_t guest) {
  uint64_t l2_entry = l1_[guest / geo_.l2_covers];
  if (!(l2_entry & kCopied) || !CheckL2Pointer(l2_entry)) return nullptr;
  return cache_.Find(SliceOffset(l2_entry & kOffsetMask, guest));
}

int Metadata::WritableSlice(uint64_t guest, Slice** slice) {
  uint64_t l1_index = guest / geo_.l2_covers;
  if (!(l1_[l1_index] & kCopied)) {
    FiberLock lock(l2_mutex_);
    if (!(l1_[l1_index] & kCopied)) {
      if (int rc = MakeL2Table(guest)) return rc;
    }
  }
  uint64_t l2_entry = l1_[l1_index];
  if (!CheckL2Pointer(l2_entry) || (l2_entry & kOffsetMask) == 0)
    return Broken(fmt::format("the L1 entry {:#x} makes no sense", l2_entry));
  return cache_.Load(SliceOffset(l2_entry & kOffsetMask, guest), Slice::Kind::kL2, slice);
}

// Empty, or a copy of the one that a snapshot shares.
int Metadata::MakeL2Table(uint64_t guest) {
  uint64_t l1_index = guest / geo_.l2_covers;
  uint64_t old = l1_[l1_index] & kOffsetMask;
  if (!CheckL2Pointer(l1_[l1_index]))
    return Broken(fmt::format("the L1 entry {:#x} makes no sense", l1_[l1_index]));
  Run run;
  if (int rc = AllocateAll(1, &run)) return rc;
  std::vector<uint8_t> copy;
  int rc = 0;
  if (old == 0) {
    rc = ZeroRun(run);
  } else {
    for (uint64_t at = 0; rc == 0 && at < geo_.cluster_size; at += geo_.slice_bytes) {
      Slice* from = nullptr;
      rc = cache_.Load(old + at, Slice::Kind::kL2, &from);
      if (rc != 0) break;
      copy.assign(from->data, from->data + geo_.slice_bytes);
      Slice* to = cache_.Insert(run.offset + at, Slice::Kind::kL2, true);
      std::memcpy(to->data, copy.data(), copy.size());
      cache_.MarkDirty(to);
    }
  }
  if (rc != 0) {
    cache_.Drop(run.offset, geo_.cluster_size);
    FreeLater(run.offset, 1);
    return rc;
  }
  if (old == 0) {
    cache_.Insert(SliceOffset(run.offset, guest), Slice::Kind::kL2, false);  // zeros, as on disk
  } else {
    FreeLater(old, 1);
  }
  l1_[l1_index] = run.offset | kCopied;
  guard_new_.insert(run.offset >> geo_.cluster_bits);
  MarkL1Dirty(l1_index);
  return 0;
}

void Metadata::SetEntry(Slice* slice, uint64_t index, uint64_t entry, uint64_t sub_bits) {
  uint8_t* at = slice->data + index * geo_.l2_entry_bytes;
  StoreBe64(at, entry);
  if (geo_.subclusters > 1) StoreBe64(at + 8, sub_bits);
  cache_.MarkDirty(slice);
}

void Metadata::ReleaseEntry(uint64_t entry, bool discard) {
  if (data_file_ && !(entry & kPacked)) return;  // data files have no refcounts
  if (entry & kPacked) {
    uint64_t mask = (uint64_t{1} << geo_.csize_shift) - 1;
    uint64_t sectors = ((entry & ~(kCopied | kPacked)) >> geo_.csize_shift) + 1;
    uint64_t first = (entry & mask) & ~(geo_.cluster_size - 1);
    uint64_t end = (entry & mask & ~uint64_t{511}) + sectors * 512;
    FreeLater(first, geo_.Clusters(end - first), discard);
  } else if ((entry & kOffsetMask) != 0) {
    if (geo_.InCluster(entry & kOffsetMask) != 0) return;  // was refused before
    FreeLater(entry & kOffsetMask, 1, discard);
  }
}

}  // namespace kvartz::block::qcow2
