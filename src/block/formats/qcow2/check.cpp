// Check and repair: counts every reference to each cluster, and compares with the refcounts.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <unordered_set>

#include "block/fiber_io.h"
#include "block/formats/qcow2/bitmaps.h"
#include "block/formats/qcow2/editor.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/reference_counts.h"
#include "block/formats/qcow2/snapshots.h"
#include "block/graph.h"

namespace kvartz::block::qcow2 {

// One check. Fiber: all.
class Checker {
 public:
  Checker(Qcow2Node& node, Repair repair, const ReportFn& report)
      : node_(node),
        meta_(node.metadata()),
        geo_(meta_.geometry()),
        repair_(repair),
        report_(report) {}

  Result<CheckResult> Run();
  // To other refcounts, in a sound image.
  Result<> ChangeOrder(uint32_t order);

 private:
  bool Fixes() const { return repair_ == Repair::kAll; }
  Snapshots& snapshots() { return static_cast<Snapshots&>(*node_.snapshots()); }
  template <typename... Values>
  void Corruption(fmt::format_string<Values...> format, Values&&... values) {
    result_.corruptions++;
    report_("ERROR " + fmt::format(format, std::forward<Values>(values)...));
  }
  void Count(uint64_t offset, uint64_t bytes, const char* what);
  int CountTables(std::vector<uint64_t>& l1, uint64_t l1_offset, bool active, const char* what);
  int CountL2(uint64_t table, bool active);
  void CountEntry(Slice** slice, uint64_t index, bool active);
  int CountSnapshots();
  int CountBitmaps();
  int CountRefcounts();
  int ReadTable(uint64_t offset, uint64_t entries, std::vector<uint64_t>& table);
  int Compare();
  int CompareCluster(uint64_t cluster);
  int PutRefcount(uint64_t cluster, uint64_t value);
  int Rebuild();
  int WriteRebuilt();
  int CheckCopied();
  int CheckCopiedL2(uint64_t table);
  int CopiedMismatch(uint64_t entry, bool* mismatch);

  Qcow2Node& node_;
  Metadata& meta_;
  const Geometry& geo_;
  const Repair repair_;
  const ReportFn report_;
  CheckResult result_;
  ReferenceCounts counts_;
  uint64_t file_clusters_ = 0;
  uint64_t expected_next_ = 0;  // of the disk's data, were they contiguous
  bool rebuild_ = false;        // the refcount structures themselves are broken
};

void Checker::Count(uint64_t offset, uint64_t bytes, const char* what) {
  if (bytes == 0) return;
  uint64_t first = offset >> geo_.cluster_bits;
  uint64_t last = (offset + bytes - 1) >> geo_.cluster_bits;
  if (last >= file_clusters_ + 1 || offset > kMaxImageBytes) {
    Corruption("{} at {:#x} is beyond the end of the file", what, offset);
    return;
  }
  for (uint64_t cluster = first; cluster <= last; cluster++) counts_.Add(cluster);
}

int Checker::ReadTable(uint64_t offset, uint64_t entries, std::vector<uint64_t>& table) {
  std::vector<uint8_t> bytes(entries * 8);
  if (int rc = meta_.ReadBytes(offset, bytes)) return rc;
  table.resize(entries);
  for (size_t i = 0; i < entries; i++) table[i] = LoadBe64(&bytes[i * 8]);
  return 0;
}

int Checker::CountTables(std::vector<uint64_t>& l1, uint64_t l1_offset, bool active,
                         const char* what) {
  if (geo_.InCluster(l1_offset) != 0) {
    Corruption("{} at {:#x} isn't aligned to a cluster", what, l1_offset);
    return 0;
  }
  Count(l1_offset, l1.size() * 8, what);
  uint64_t tables = 0;
  for (uint64_t index = 0; index < l1.size(); index++) {
    uint64_t table = l1[index] & kOffsetMask;
    if (table == 0) continue;
    if (geo_.InCluster(table) != 0 || (l1[index] & kL1Reserved) != 0) {
      Corruption("L1 entry {} of the {} is {:#x}, which makes no sense", index, what, l1[index]);
      if (Fixes() && active) {
        l1[index] = 0;
        meta_.MarkL1Dirty(index);
        result_.corruptions--;
        result_.corruptions_fixed++;
      }
      continue;
    }
    Count(table, geo_.cluster_size, "L2 table");
    if (++tables > file_clusters_ + 1) {  // they can't all be different
      Corruption("the {} has more L2 tables than the file has clusters", what);
      return 0;
    }
    if (table >> geo_.cluster_bits > file_clusters_) continue;
    if (int rc = CountL2(table, active)) {
      result_.check_errors++;
      report_(fmt::format("ERROR cannot read the L2 table at {:#x}: {}", table, -rc));
    }
  }
  return 0;
}

int Checker::CountL2(uint64_t table, bool active) {
  for (uint64_t at = 0; at < geo_.cluster_size; at += geo_.slice_bytes) {
    Slice* slice = nullptr;
    if (int rc = meta_.cache().Load(table + at, Slice::Kind::kL2, &slice)) return rc;
    for (uint64_t index = 0; index < meta_.slice_entries(); index++)
      CountEntry(&slice, index, active);
    if (meta_.cache().crowded()) {
      if (int rc = meta_.Commit()) return rc;
    }
  }
  return 0;
}

void Checker::CountEntry(Slice** slice, uint64_t index, bool active) {
  uint64_t entry = meta_.Entry(**slice, index);
  if (entry == 0) return;
  if (entry & kPacked) {
    uint64_t mask = (uint64_t{1} << geo_.csize_shift) - 1;
    uint64_t sectors = ((entry & ~(kCopied | kPacked)) >> geo_.csize_shift) + 1;
    uint64_t first = entry & mask & ~uint64_t{511};
    if (entry & kCopied) Corruption("a compressed cluster is marked as copied: entry {:#x}", entry);
    if (meta_.has_data_file())
      Corruption("a compressed cluster in an image with a data file: entry {:#x}", entry);
    Count(first, sectors * 512, "compressed data");
    if (active) {
      result_.allocated_clusters++;
      result_.compressed_clusters++;
      result_.fragmented_clusters++;  // by their nature
    }
    return;
  }
  uint64_t offset = entry & kOffsetMask;
  bool zero = geo_.subclusters == 1 && (entry & kZeroFlag) != 0;
  if (meta_.has_data_file()) {
    if (active && ((entry & kCopied) || offset != 0) && !zero) result_.allocated_clusters++;
    return;
  }
  if (offset == 0) return;
  if (geo_.InCluster(offset) != 0) {
    Corruption("the cluster at {:#x} isn't aligned: entry {:#x}", offset, entry);
    if (Fixes() && active) {
      // What it held can't be told: zeros, as one that was never written.
      meta_.SetEntry(*slice, index,
                     meta_.header.version >= 3 && geo_.subclusters == 1 ? kZeroFlag : 0,
                     geo_.subclusters > 1 ? uint64_t{UINT32_MAX} << 32 : 0);
      result_.corruptions--;
      result_.corruptions_fixed++;
    }
    return;
  }
  Count(offset, geo_.cluster_size, "data");
  if (!active || zero) return;
  result_.allocated_clusters++;
  if (expected_next_ != 0 && offset != expected_next_) result_.fragmented_clusters++;
  expected_next_ = offset + geo_.cluster_size;
}

int Checker::CountSnapshots() {
  if (meta_.header.snapshot_count == 0) return 0;
  Count(meta_.header.snapshots_offset, snapshots().table_bytes(), "snapshot table");
  for (const SnapshotEntry& entry : snapshots().entries()) {
    if (uint64_t{entry.l1_entries} * 8 > kMaxL1Bytes ||
        !meta_.InFile(entry.l1_offset, uint64_t{entry.l1_entries} * 8)) {
      Corruption("snapshot {} has an L1 table of {} entries at {:#x}", entry.info.id,
                 entry.l1_entries, entry.l1_offset);
      continue;
    }
    std::vector<uint64_t> l1;
    if (int rc = ReadTable(entry.l1_offset, entry.l1_entries, l1)) return rc;
    if (int rc = CountTables(l1, entry.l1_offset, false, "L1 table of a snapshot")) return rc;
  }
  return 0;
}

int Checker::CountBitmaps() {
  const Header& header = meta_.header;
  if (header.bitmap_count == 0) return 0;
  if (geo_.InCluster(header.bitmaps_offset) != 0) {
    Corruption("the bitmap directory at {:#x} isn't aligned", header.bitmaps_offset);
    return 0;
  }
  Count(header.bitmaps_offset, header.bitmaps_size, "bitmap directory");
  uint64_t held = uint64_t{file_clusters_} << geo_.cluster_bits;
  if (header.bitmaps_offset > held || header.bitmaps_size > held - header.bitmaps_offset) return 0;
  std::vector<uint8_t> directory(header.bitmaps_size);
  if (int rc = meta_.ReadBytes(header.bitmaps_offset, directory)) return rc;
  auto entries = ParseBitmaps(directory, header.bitmap_count);
  if (!entries) {
    Corruption("{}", entries.error().what);
    return 0;
  }
  for (const BitmapEntry& entry : *entries) {
    uint64_t bytes = uint64_t{entry.table_entries} * 8;
    const uint64_t contents = uint64_t{entry.table_entries} << geo_.cluster_bits;
    if (contents >= kMaxBitmapBytes + geo_.cluster_size ||
        geo_.InCluster(entry.table_offset) != 0 || entry.table_offset > held ||
        bytes > held - entry.table_offset) {
      Corruption("bitmap '{}' has a broken table", entry.info.name);
      continue;
    }
    Count(entry.table_offset, bytes, "bitmap table");
    std::vector<uint64_t> table;
    if (int rc = ReadTable(entry.table_offset, entry.table_entries, table)) return rc;
    for (uint64_t value : table) {
      if ((value & kOffsetMask) != 0) Count(value & kOffsetMask, geo_.cluster_size, "bitmap data");
    }
  }
  return 0;
}

int Checker::CountRefcounts() {
  const Header& header = meta_.header;
  Count(header.reftable_offset, uint64_t{header.reftable_clusters} << geo_.cluster_bits,
        "refcount table");
  std::vector<uint64_t> table = meta_.reftable();
  if (table.empty()) {
    uint64_t entries = uint64_t{header.reftable_clusters} * (geo_.cluster_size / 8);
    if (int rc = ReadTable(header.reftable_offset, entries, table)) return rc;
  }
  std::unordered_set<uint64_t> seen;
  for (uint64_t index = 0; index < table.size(); index++) {
    uint64_t block = table[index] & kReftableMask;
    if (block == 0) continue;
    if (geo_.InCluster(block) != 0 || block >> geo_.cluster_bits > file_clusters_) {
      Corruption("refcount block {} at {:#x} makes no sense", index, block);
      rebuild_ = true;
      continue;
    }
    if (!seen.insert(block).second || counts_.Get(block >> geo_.cluster_bits) > 0) {
      Corruption("refcount block {} at {:#x} is used for something else, too", index, block);
      rebuild_ = true;
    }
    Count(block, geo_.cluster_size, "refcount block");
  }
  return 0;
}

Result<CheckResult> Checker::Run() {
  Node& file = *node_.file();
  if (repair_ != Repair::kNone && node_.read_only())
    return Fail(ErrnoError(EROFS, fmt::format("cannot repair '{}'", node_.name())));
  if (int rc = node_.read_only() ? 0 : meta_.CommitAll(false))
    return Fail(ErrnoError(-rc, fmt::format("cannot write the tables of '{}'", node_.name())));
  file_clusters_ = geo_.Clusters(file.size_bytes());
  result_.total_clusters = geo_.Clusters(node_.size_bytes());
  counts_.Add(0);
  int rc = CountTables(meta_.l1(), meta_.header.l1_offset, true, "active L1 table");
  if (rc == 0) rc = CountSnapshots();
  if (rc == 0) rc = CountBitmaps();
  if (meta_.header.crypto_offset != 0)
    Count(meta_.header.crypto_offset, meta_.header.crypto_bytes, "LUKS header");
  if (rc == 0) rc = CountRefcounts();
  if (rc == 0 && rebuild_ && Fixes()) {
    rc = Rebuild();
  } else if (rc == 0 && !rebuild_) {
    rc = Compare();
  }
  if (rc == 0) rc = CheckCopied();
  if (rc == 0 && repair_ != Repair::kNone) {
    rc = meta_.CommitAll(Fixes() && result_.corruptions + result_.check_errors == 0);
    if (rc == 0 && Fixes() && result_.corruptions == 0 && (meta_.header.incompatible & kCorrupt)) {
      meta_.header.incompatible &= ~kCorrupt;
      rc = meta_.WriteHeader();
    }
  }
  if (rc != 0) return Fail(ErrnoError(-rc, fmt::format("cannot check '{}'", node_.name())));
  result_.image_end_offset = counts_.end() << geo_.cluster_bits;
  return result_;
}

// ---- comparing ----

int Checker::Compare() {
  uint64_t end = std::max(counts_.end(), file_clusters_);
  // Blocks that count clusters beyond the file's end, too; where there is no block, nothing counts.
  if (meta_.reftable().empty()) {
    if (int rc = meta_.ReloadRefcounts()) return rc;
  }
  const std::vector<uint64_t>& table = meta_.reftable();
  for (uint64_t index = table.size(); index > 0; index--) {
    if (table[index - 1] == 0) continue;
    end = std::max(end, index * geo_.refblock_entries);
    break;
  }
  uint64_t block = 0;  // the next that is there
  for (uint64_t cluster = 0; cluster < end;) {
    block = std::max(block, cluster / geo_.refblock_entries);
    while (block < table.size() && table[block] == 0) block++;
    if (block >= table.size() || cluster < block * geo_.refblock_entries) {
      uint64_t next = block < table.size() ? block * geo_.refblock_entries : end;
      next = std::min(next, counts_.Next(cluster));
      if (next > cluster) {
        cluster = next;
        continue;
      }
    }
    if (int rc = CompareCluster(cluster)) return rc;
    if (++cluster % 4096 == 0 && meta_.cache().crowded()) {
      if (int rc = meta_.Commit()) return rc;
    }
  }
  return 0;
}

int Checker::PutRefcount(uint64_t cluster, uint64_t value) {
  Slice* slice = nullptr;
  uint64_t index = 0;
  int rc = meta_.RefcountSlice(cluster, &slice, &index);
  if (rc == Metadata::kMissing) {
    rc = meta_.MakeRefblock(cluster / geo_.refblock_entries);
    if (rc == 0) rc = meta_.RefcountSlice(cluster, &slice, &index);
  }
  if (rc != 0) return rc < 0 ? rc : -EIO;
  SetRefcount(slice->data, geo_.refcount_order, index, value);
  meta_.cache().MarkDirty(slice);
  return 0;
}

int Checker::CompareCluster(uint64_t cluster) {
  uint64_t stored = 0;
  uint64_t counted = counts_.Get(cluster);
  int rc = meta_.Refcount(cluster, &stored);
  if (rc != 0) {
    result_.check_errors++;
    report_(fmt::format("ERROR cannot read the refcount of cluster {}", cluster));
    return 0;
  }
  if (stored == counted) return 0;
  bool leak = stored > counted;
  bool fix = leak ? repair_ != Repair::kNone : Fixes();
  report_(fmt::format("{} cluster {} refcount={} reference={}",
                      fix ? "Repairing" : (leak ? "Leaked" : "ERROR"), cluster, stored, counted));
  if (fix && counted <= geo_.max_refcount) {
    rc = PutRefcount(cluster, counted);
    if (rc == 0) (leak ? result_.leaks_fixed : result_.corruptions_fixed)++;
    if (rc == 0) return 0;
    result_.check_errors++;
  }
  (leak ? result_.leaks : result_.corruptions)++;
  return 0;
}

// ---- new refcount structures ----

// Behind everything else: a block for every range that has references, and a table for the blocks.
int Checker::Rebuild() {
  report_("Rebuilding refcount structure");
  // The old ones don't count any more.
  ReferenceCounts counts;
  uint64_t fixed = result_.corruptions;
  result_.corruptions = 0;
  std::swap(counts_, counts);
  counts_.Add(0);
  result_.allocated_clusters = result_.compressed_clusters = result_.fragmented_clusters = 0;
  expected_next_ = 0;
  int rc = CountTables(meta_.l1(), meta_.header.l1_offset, true, "active L1 table");
  if (rc == 0) rc = CountSnapshots();
  if (rc == 0) rc = CountBitmaps();
  if (rc == 0) rc = meta_.Commit();
  if (rc == 0) rc = WriteRebuilt();
  if (rc == 0) result_.corruptions_fixed += fixed - std::min(fixed, result_.corruptions);
  return rc;
}

int Checker::WriteRebuilt() {
  std::vector<uint64_t> blocks;  // which ranges of clusters need one
  uint64_t table_clusters = 0, first = 0;
  for (int round = 0; round < 16; round++) {
    first = std::max(counts_.end(), file_clusters_);
    uint64_t own = blocks.size() + table_clusters;
    std::vector<uint64_t> needed;
    for (uint64_t at = counts_.Next(0); at < first;) {
      needed.push_back(at / geo_.refblock_entries);
      at = counts_.Next((needed.back() + 1) * geo_.refblock_entries);
    }
    uint64_t block = first / geo_.refblock_entries;
    for (; block * geo_.refblock_entries < first + own; block++) {
      if (needed.empty() || needed.back() < block) needed.push_back(block);
    }
    uint64_t clusters = geo_.Clusters((needed.back() + 1) * 8);
    if (needed.size() == blocks.size() && clusters == table_clusters) break;
    blocks = needed;
    table_clusters = clusters;
  }
  if (table_clusters << geo_.cluster_bits > kMaxReftableBytes) return -EFBIG;
  uint64_t own = blocks.size() + table_clusters;
  for (uint64_t cluster = first; cluster < first + own; cluster++) counts_.Add(cluster);
  std::vector<uint8_t> table(table_clusters << geo_.cluster_bits);
  std::vector<uint8_t> bytes(geo_.cluster_size);
  for (size_t i = 0; i < blocks.size(); i++) {
    std::fill(bytes.begin(), bytes.end(), 0);
    uint64_t from = blocks[i] * geo_.refblock_entries;
    for (uint64_t n = 0; n < geo_.refblock_entries; n++) {
      SetRefcount(bytes.data(), geo_.refcount_order, n,
                  std::min<uint64_t>(counts_.Get(from + n), geo_.max_refcount));
    }
    uint64_t offset = (first + i) << geo_.cluster_bits;
    StoreBe64(&table[blocks[i] * 8], offset);
    if (int rc = WriteAt(*node_.file(), offset, bytes)) return rc;
  }
  uint64_t offset = (first + blocks.size()) << geo_.cluster_bits;
  if (int rc = WriteAt(*node_.file(), offset, table)) return rc;
  if (int rc = FlushNode(*node_.file())) return rc;
  meta_.header.reftable_offset = offset;
  meta_.header.reftable_clusters = static_cast<uint32_t>(table_clusters);
  if (int rc = meta_.WriteHeader()) return rc;
  meta_.ForgetRefcounts();
  return meta_.ReloadRefcounts();
}

Result<> Checker::ChangeOrder(uint32_t order) {
  auto failed = [&](int rc) {
    return Fail(ErrnoError(-rc, fmt::format("cannot rewrite the refcounts of '{}'", node_.name())));
  };
  if (int rc = meta_.CommitAll(false)) return failed(rc);
  file_clusters_ = geo_.Clusters(node_.file()->size_bytes());
  counts_.Add(0);
  int rc = CountTables(meta_.l1(), meta_.header.l1_offset, true, "active L1 table");
  if (rc == 0) rc = CountSnapshots();
  if (rc == 0) rc = CountBitmaps();
  if (rc != 0) return failed(rc);
  if (result_.corruptions + result_.check_errors > 0)
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}' is damaged: run kvartz img check", node_.name()));
  uint32_t old = meta_.header.refcount_order;
  meta_.SetRefcountOrder(order);
  if (counts_.max() > geo_.max_refcount) {
    meta_.SetRefcountOrder(old);
    return Fail(ErrorCode::kInvalid, fmt::format("refcount_bits={}: a cluster has {} references",
                                                 1u << order, counts_.max()));
  }
  if ((rc = WriteRebuilt()) != 0) {
    meta_.SetRefcountOrder(old);
    return failed(rc);
  }
  return {};
}

Result<> Editor::ChangeRefcountOrder(uint32_t order) {
  return Checker(node_, Repair::kNone, [](const std::string&) {}).ChangeOrder(order);
}

// ---- the flag that a cluster has one reference ----

int Checker::CopiedMismatch(uint64_t entry, bool* mismatch) {
  uint64_t refcount = 0;
  uint64_t cluster = (entry & kOffsetMask) >> geo_.cluster_bits;
  if (int rc = meta_.Refcount(cluster, &refcount)) return rc;
  *mismatch = (refcount == 1) != ((entry & kCopied) != 0);
  return 0;
}

int Checker::CheckCopied() {
  if (meta_.reftable().empty()) {
    if (int rc = meta_.ReloadRefcounts()) return rc;
  }
  std::vector<uint64_t>& l1 = meta_.l1();
  uint64_t tables = 0;
  for (uint64_t index = 0; index < l1.size(); index++) {
    uint64_t table = l1[index] & kOffsetMask;
    if (table == 0 || geo_.InCluster(table) != 0 || table >> geo_.cluster_bits > file_clusters_)
      continue;
    if (++tables > file_clusters_ + 1) return 0;
    bool mismatch = false;
    if (CopiedMismatch(l1[index], &mismatch) != 0) continue;
    if (mismatch) {
      report_(fmt::format("{} OFLAG_COPIED L2 cluster: l1_index={} l1_entry={:x}",
                          Fixes() ? "Repairing" : "ERROR", index, l1[index]));
      (Fixes() ? result_.corruptions_fixed : result_.corruptions)++;
      if (Fixes()) {
        l1[index] ^= kCopied;
        meta_.MarkL1Dirty(index);
      }
    }
    if (int rc = CheckCopiedL2(table)) return rc;
  }
  return 0;
}

int Checker::CheckCopiedL2(uint64_t table) {
  for (uint64_t at = 0; at < geo_.cluster_size; at += geo_.slice_bytes) {
    for (uint64_t index = 0; index < meta_.slice_entries(); index++) {
      Slice* slice = nullptr;  // anew: refcounts may have taken its place
      if (meta_.cache().Load(table + at, Slice::Kind::kL2, &slice) != 0) return 0;
      uint64_t entry = meta_.Entry(*slice, index);
      if ((entry & kPacked) || (entry & kOffsetMask) == 0 || meta_.has_data_file() ||
          geo_.InCluster(entry & kOffsetMask) != 0) {
        continue;
      }
      bool mismatch = false;
      if (CopiedMismatch(entry, &mismatch) != 0 || !mismatch) continue;
      report_(fmt::format("{} OFLAG_COPIED data cluster: l2_entry={:x}",
                          Fixes() ? "Repairing" : "ERROR", entry));
      (Fixes() ? result_.corruptions_fixed : result_.corruptions)++;
      if (!Fixes()) continue;
      if (int rc = meta_.cache().Load(table + at, Slice::Kind::kL2, &slice)) return rc;
      meta_.SetEntry(slice, index, entry ^ kCopied, meta_.SubBits(*slice, index));
    }
    if (meta_.cache().crowded()) {
      if (int rc = meta_.Commit()) return rc;
    }
  }
  return 0;
}

Result<CheckResult> Editor::Check(Repair repair, const ReportFn& report) {
  return Checker(node_, repair, report).Run();
}

}  // namespace kvartz::block::qcow2
