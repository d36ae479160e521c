// Loading the tables of an image, and writing them in the order that metadata.h states.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.h"
#include "base/log.h"
#include "block/fiber_io.h"
#include "block/formats/qcow2/metadata.h"
#include "block/io_batch.h"

namespace kvartz::block::qcow2 {
namespace {

constexpr uint64_t kZeroChunk = 64 << 10;
alignas(4096) const uint8_t kZeros[kZeroChunk] = {};
constexpr uint64_t kL1WriteBytes = 512;

}  // namespace

// What is written by one commit, as it was when it began.
struct Metadata::Snapshot {
  std::vector<Copy> first;   // refcount blocks that the table on disk doesn't know
  std::vector<Copy> second;  // other refcounts, the refcount table, new L2 tables
  std::vector<Copy> third;   // L2 and L1 entries
  std::vector<Freed> freed;
  std::set<uint64_t> l1, reftable;
};

Metadata::Metadata(Node& file, Node* data_file, Header image_header, uint64_t cache_bytes)
    : header(std::move(image_header)),
      file_(file),
      data_file_(data_file),
      data_node_(data_file ? data_file : &file),
      geo_(header),
      cache_(file, geo_.cluster_size, geo_.slice_bytes, cache_bytes),
      slice_entries_(geo_.slice_bytes / geo_.l2_entry_bytes) {
  dirty_on_disk_ = (header.incompatible & kDirty) != 0;
}

// A table that is there as a whole: what it takes in memory is on disk already.
bool Metadata::InFile(uint64_t offset, uint64_t bytes) const {
  uint64_t held = geo_.RoundUp(file_.size_bytes());
  return offset <= held && bytes <= held - offset;
}

Result<> Metadata::Load(bool writable) {
  if (!InFile(header.l1_offset, uint64_t{header.l1_entries} * 8) ||
      !InFile(header.reftable_offset, uint64_t{header.reftable_clusters} << geo_.cluster_bits)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}': a table is beyond the end of the file", file_.name()));
  }
  std::vector<uint8_t> table(uint64_t{header.l1_entries} * 8);
  if (int rc = ReadBytes(header.l1_offset, table))
    return Fail(IoError(file_, "read", header.l1_offset, rc));
  l1_.resize(header.l1_entries);
  for (size_t i = 0; i < l1_.size(); i++) l1_[i] = LoadBe64(&table[i * 8]);
  writable_ = writable;
  if (!writable) return {};
  if (int rc = ReloadRefcounts()) return Fail(IoError(file_, "read", header.reftable_offset, rc));
  return {};
}

int Metadata::ReloadRefcounts() {
  std::vector<uint8_t> table(uint64_t{header.reftable_clusters} << geo_.cluster_bits);
  if (int rc = ReadBytes(header.reftable_offset, table)) return rc;
  reftable_.resize(table.size() / 8);
  for (size_t i = 0; i < reftable_.size(); i++)
    reftable_[i] = LoadBe64(&table[i * 8]) & kReftableMask;
  reftable_dirty_.clear();
  free_.clear();
  bytes_at_ = bytes_end_ = 0;
  return FindEnd();
}

int Metadata::Broken(const std::string& what) {
  static log::RateLimit limit;
  if (limit.Pass()) KLOG(kWarn, "'{}' is damaged: {}; run kvartz img check", file_.name(), what);
  return -EIO;
}

// ---- unaligned access ----

int Metadata::ReadBytes(uint64_t offset, std::span<uint8_t> bytes) {
  uint64_t unit = file_.limits().request_alignment;
  if (bytes.empty()) return 0;
  if ((offset | bytes.size()) % unit == 0) return ReadAt(file_, offset, bytes);
  uint64_t from = offset / unit * unit;
  std::vector<uint8_t> whole((offset + bytes.size() - from + unit - 1) / unit * unit);
  if (int rc = ReadAt(file_, from, whole)) return rc;
  std::memcpy(bytes.data(), &whole[offset - from], bytes.size());
  return 0;
}

int Metadata::WriteBytes(uint64_t offset, std::span<const uint8_t> bytes) {
  uint64_t unit = file_.limits().request_alignment;
  if (bytes.empty()) return 0;
  if ((offset | bytes.size()) % unit == 0) return WriteAt(file_, offset, bytes);
  FiberLock lock(unaligned_mutex_);  // neighbours share a unit
  uint64_t from = offset / unit * unit;
  std::vector<uint8_t> whole((offset + bytes.size() - from + unit - 1) / unit * unit);
  if (int rc = ReadAt(file_, from, whole)) return rc;
  std::memcpy(&whole[offset - from], bytes.data(), bytes.size());
  return WriteAt(file_, from, whole);
}

int Metadata::ZeroRun(const Run& run) {
  if (run.zeroed) return 0;
  uint64_t length = run.clusters << geo_.cluster_bits;
  int rc = WriteZeroesAt(file_, run.offset, length, false, true);
  if (rc != -ENOTSUP) return rc;
  for (uint64_t at = 0; at < length; at += kZeroChunk) {
    std::span<const uint8_t> zeros(kZeros, std::min(kZeroChunk, length - at));
    if ((rc = WriteAt(file_, run.offset + at, zeros)) != 0) return rc;
  }
  return 0;
}

// ---- the header ----

int Metadata::WriteHeader() {
  guard_stale_ = true;  // a table may be elsewhere now
  auto bytes = SerializeHeader(header);
  if (!bytes) return -ENOSPC;
  // Nothing of a longer one before may stay behind it.
  bytes->resize(std::min(geo_.cluster_size, (bytes->size() + 511) / 512 * 512 + 512));
  if (int rc = WriteBytes(0, *bytes)) return rc;
  return FlushNode(file_);
}

int Metadata::SetDirtyBit() {
  if (dirty_on_disk_ || header.version < 3) return 0;
  header.incompatible |= kDirty;
  if (int rc = WriteHeader()) {
    header.incompatible &= ~kDirty;
    return rc;
  }
  dirty_on_disk_ = true;
  return 0;
}

// ---- commit ----

void Metadata::TakeSnapshot(Snapshot& snapshot) {
  bool lazy = (header.compatible & kLazyRefcounts) != 0;
  cache_.ForEachDirty([&](Slice& slice) {
    bool refcounts = slice.kind == Slice::Kind::kRefblock;
    if (refcounts && lazy) return;
    file_.Debug(refcounts ? DebugEvent::kRefblockUpdate : DebugEvent::kL2Update);
    Copy copy = {slice.offset, {slice.data, slice.data + geo_.slice_bytes}, &slice};
    auto& copies = refcounts ? (slice.fresh ? snapshot.first : snapshot.second)
                             : (slice.fresh ? snapshot.second : snapshot.third);
    copies.push_back(std::move(copy));
  });
  for (auto* copies : {&snapshot.first, &snapshot.second, &snapshot.third}) {
    for (Copy& copy : *copies) {
      copy.slice->writing = true;
      cache_.MarkClean(copy.slice);
    }
  }
  for (Copy& copy : snapshot.first) copy.slice->fresh = false;
  for (Copy& copy : snapshot.second) copy.slice->fresh = false;
  auto take = [&](const std::vector<uint64_t>& table, uint64_t offset, std::set<uint64_t>& dirty,
                  std::vector<Copy>& copies) {
    uint64_t unit = std::max<uint64_t>(kL1WriteBytes, file_.limits().request_alignment);
    uint64_t per_unit = unit / 8;
    uint64_t last = UINT64_MAX;
    for (uint64_t index : dirty) {
      if (index / per_unit == last) continue;
      last = index / per_unit;
      // The table's cluster belongs to it up to its end.
      Copy copy = {offset + last * unit, std::vector<uint8_t>(unit), nullptr};
      for (uint64_t i = 0; i < per_unit && last * per_unit + i < table.size(); i++)
        StoreBe64(&copy.bytes[i * 8], table[last * per_unit + i]);
      copies.push_back(std::move(copy));
    }
  };
  if (!lazy) {
    if (!reftable_dirty_.empty()) file_.Debug(DebugEvent::kReftableUpdate);
    take(reftable_, header.reftable_offset, reftable_dirty_, snapshot.second);
    snapshot.reftable.swap(reftable_dirty_);
  }
  if (!l1_dirty_.empty()) file_.Debug(DebugEvent::kL1Update);
  take(l1_, header.l1_offset, l1_dirty_, snapshot.third);
  snapshot.l1.swap(l1_dirty_);
  snapshot.freed.swap(freed_);
}

// It failed: all of it is as dirty as before.
void Metadata::PutBack(Snapshot& snapshot) {
  auto mark = [&](std::vector<Copy>& copies, bool fresh) {
    for (Copy& copy : copies) {
      if (!copy.slice) continue;
      cache_.MarkDirty(copy.slice);
      copy.slice->fresh |= fresh;
    }
  };
  mark(snapshot.first, true);
  for (Copy& copy : snapshot.second) {
    if (!copy.slice) continue;
    cache_.MarkDirty(copy.slice);
    copy.slice->fresh |= copy.slice->kind == Slice::Kind::kL2;
  }
  mark(snapshot.third, false);
  l1_dirty_.merge(snapshot.l1);
  reftable_dirty_.merge(snapshot.reftable);
  freed_.insert(freed_.end(), snapshot.freed.begin(), snapshot.freed.end());
}

int Metadata::WriteCopies(std::vector<Copy>& copies) {
  std::sort(copies.begin(), copies.end(),
            [](const Copy& a, const Copy& b) { return a.offset < b.offset; });
  IoBatch batch;
  for (size_t i = 0; i < copies.size();) {
    IoBatch::Item& item = batch.Add();
    item.request.kind = Request::Kind::kWrite;
    item.request.offset = copies[i].offset;
    uint64_t end = copies[i].offset;
    for (; i < copies.size() && copies[i].offset == end; i++) {
      item.iov.push_back({copies[i].bytes.data(), copies[i].bytes.size()});
      end += copies[i].bytes.size();
    }
    item.request.length = end - item.request.offset;
    batch.Start(file_, item);
  }
  return batch.Wait();
}

int Metadata::FlushAll() {
  file_.Debug(DebugEvent::kFlushToDisk);
  if (data_file_) {
    if (int rc = FlushNode(*data_file_)) return rc;
  }
  return FlushNode(file_);
}

int Metadata::WriteSnapshot(Snapshot& snapshot) {
  if (!snapshot.first.empty()) {
    if (int rc = WriteCopies(snapshot.first)) return rc;
    if (int rc = FlushNode(file_)) return rc;
  }
  if (int rc = WriteCopies(snapshot.second)) return rc;
  if (!snapshot.third.empty()) {
    if (header.compatible & kLazyRefcounts) {
      if (int rc = SetDirtyBit()) return rc;
    }
    if (int rc = FlushAll()) return rc;
    if (int rc = WriteCopies(snapshot.third)) return rc;
  }
  return FlushAll();
}

int Metadata::Commit() {
  uint64_t ticket = ++tickets_;
  FiberLock lock(commit_mutex_);
  if (corrupt_) return -EIO;
  if (covered_ >= ticket) return last_commit_;  // one that began after us has done it
  covered_ = tickets_;
  Snapshot snapshot;
  TakeSnapshot(snapshot);
  int rc = WriteSnapshot(snapshot);
  for (auto* copies : {&snapshot.first, &snapshot.second, &snapshot.third}) {
    for (Copy& copy : *copies) {
      if (copy.slice) copy.slice->writing = false;
    }
  }
  if (rc != 0) {
    PutBack(snapshot);
  } else {
    ripening_.insert(ripening_.end(), snapshot.freed.begin(), snapshot.freed.end());
    Ripen();
    rc = ApplyFrees();
  }
  last_commit_ = rc;
  return rc;
}

int Metadata::CommitAll(bool clean) {
  VERIFY(!busy());
  // What is freed by one commit is written by the next.
  for (int round = 0; round < 8 && dirty(); round++) {
    if (round > 0 && (header.compatible & kLazyRefcounts) && freed_.empty() && ripening_.empty() &&
        l1_dirty_.empty() && ripe_.empty() && nearly_.empty()) {
      break;
    }
    if (int rc = Commit()) return rc;
  }
  // With lazy refcounts the counts come now, while the dirty bit still stands.
  std::vector<Copy> copies;
  cache_.ForEachDirty([&](Slice& slice) {
    copies.push_back({slice.offset, {slice.data, slice.data + geo_.slice_bytes}, &slice});
  });
  if (!copies.empty()) {
    if (int rc = WriteCopies(copies)) return rc;
    for (Copy& copy : copies) {
      cache_.MarkClean(copy.slice);
      copy.slice->fresh = false;
    }
  }
  if (!reftable_dirty_.empty()) {
    std::vector<uint8_t> table(reftable_.size() * 8);
    for (size_t i = 0; i < reftable_.size(); i++) StoreBe64(&table[i * 8], reftable_[i]);
    if (int rc = WriteBytes(header.reftable_offset, table)) return rc;
    reftable_dirty_.clear();
  }
  if (int rc = FlushAll()) return rc;
  if (!clean || !dirty_on_disk_) return 0;
  header.incompatible &= ~kDirty;
  if (int rc = WriteHeader()) return rc;
  dirty_on_disk_ = false;
  return 0;
}

// ---- freed clusters ----

// A request that began before a cluster was freed may still write to it: it is given to others only
// when all requests of its time are done. New ones count under the other parity meanwhile.
void Metadata::Ripen() {
  while (busy_[1 - parity_] == 0) {
    ripe_.insert(ripe_.end(), nearly_.begin(), nearly_.end());
    nearly_.clear();
    if (ripening_.empty()) return;
    nearly_.swap(ripening_);
    parity_ = 1 - parity_;
  }
}

int Metadata::ApplyFrees() {
  std::vector<Freed> ripe;
  ripe.swap(ripe_);
  std::vector<Run> unused;
  int rc = 0;
  for (const Freed& freed : ripe) {
    int result = DecrementFreed(freed, unused);
    if (rc == 0) rc = result;
  }
  for (const Run& run : unused) {
    file_.Debug(DebugEvent::kClusterFree);
    cache_.Drop(run.offset, run.clusters << geo_.cluster_bits);
    uint64_t length = run.clusters << geo_.cluster_bits;
    if (bytes_at_ >= run.offset && bytes_at_ < run.offset + length) bytes_at_ = bytes_end_ = 0;
    if (run.zeroed && file_.limits().discard_granularity != 0)
      DiscardAt(file_, run.offset, length);  // a hint: it may fail
    // What the scan has still to look at it finds by itself.
    uint64_t first = run.offset >> geo_.cluster_bits;
    for (uint64_t cluster = first; cluster < first + run.clusters;) {
      bool known = cluster < scanned_ || cluster >= scan_end_;
      uint64_t end = first + run.clusters;
      if (cluster < scanned_) end = std::min(end, scanned_);
      if (!known) end = std::min(end, scan_end_);
      if (known) AddFree(cluster, end - cluster);
      cluster = end;
    }
  }
  return rc;
}

// `unused`: what has no reference any more; its `zeroed` says that it is to be discarded.
int Metadata::DecrementFreed(const Freed& freed, std::vector<Run>& unused) {
  uint64_t first = freed.offset >> geo_.cluster_bits;
  for (uint64_t cluster = first; cluster < first + freed.clusters; cluster++) {
    if (int rc = AddRefcounts(cluster << geo_.cluster_bits, 1, -1)) return rc;
    uint64_t refcount = 0;
    if (int rc = Refcount(cluster, &refcount)) return rc;
    if (refcount != 0) continue;
    uint64_t offset = cluster << geo_.cluster_bits;
    if (!unused.empty() && unused.back().zeroed == freed.discard &&
        unused.back().offset + (unused.back().clusters << geo_.cluster_bits) == offset) {
      unused.back().clusters++;
    } else {
      unused.push_back({offset, 1, freed.discard});
    }
  }
  return 0;
}

}  // namespace kvartz::block::qcow2
