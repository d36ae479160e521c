#include "block/formats/qcow2/snapshots.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "block/dirty_bitmap.h"
#include "block/fiber_io.h"
#include "block/formats/qcow2/editor.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace kvartz::block::qcow2 {
namespace {

constexpr uint64_t kMaxTableBytes = 64 << 20;
constexpr uint32_t kMaxExtraBytes = 1024;
constexpr uint32_t kExtraBytes = 24;  // VM state size, disk size, icount
constexpr size_t kPendingFrees = 65536;

Error TablesError(const Node& node, int rc) {
  return ErrnoError(-rc, fmt::format("cannot update the tables of '{}'", node.name()));
}

}  // namespace

Result<std::vector<SnapshotEntry>> ParseSnapshots(std::span<const uint8_t> bytes, uint32_t count,
                                                  uint64_t disk_size, uint64_t* used) {
  std::vector<SnapshotEntry> entries;
  uint64_t at = 0;
  auto short_of = [&](uint64_t more) { return more > bytes.size() - at; };
  auto too_short = [] { return Fail(ErrorCode::kState, "the snapshot table goes on"); };
  for (uint32_t i = 0; i < count; i++) {
    if (short_of(sizeof(SnapshotDisk))) return too_short();
    SnapshotDisk disk;
    std::memcpy(reinterpret_cast<uint8_t*>(&disk), &bytes[at], sizeof(disk));
    at += sizeof(disk);
    uint32_t extra = disk.extra_data_size;
    if (extra > kMaxExtraBytes)
      return Fail(ErrorCode::kInvalid,
                  fmt::format("snapshot {} has {} bytes of extra data", i, extra));
    uint32_t id_size = disk.id_size, name_size = disk.name_size;
    if (short_of(uint64_t{extra} + id_size + name_size)) return too_short();
    SnapshotEntry entry;
    entry.l1_offset = disk.l1_table_offset;
    entry.l1_entries = disk.l1_size;
    entry.info.date_sec = disk.date_sec;
    entry.info.date_nsec = disk.date_nsec;
    entry.info.vm_clock_nsec = disk.vm_clock_nsec;
    entry.info.vm_state_size = extra >= 8 ? LoadBe64(&bytes[at]) : uint32_t{disk.vm_state_size};
    entry.info.disk_size = extra >= 16 ? LoadBe64(&bytes[at + 8]) : disk_size;
    entry.info.icount = extra >= 24 ? LoadBe64(&bytes[at + 16]) : UINT64_MAX;
    if (extra > kExtraBytes)
      entry.unknown_extra.assign(&bytes[at] + kExtraBytes, &bytes[at] + extra);
    at += extra;
    const auto* text = reinterpret_cast<const char*>(bytes.data());
    entry.info.id.assign(text + at, id_size);
    entry.info.name.assign(text + at + id_size, name_size);
    at += id_size + name_size;
    at = std::min<uint64_t>((at + 7) / 8 * 8, bytes.size());
    entries.push_back(std::move(entry));
  }
  *used = at;
  return entries;
}

std::vector<uint8_t> SerializeSnapshots(const std::vector<SnapshotEntry>& snapshots) {
  std::vector<uint8_t> out;
  for (const SnapshotEntry& entry : snapshots) {
    const SnapshotInfo& info = entry.info;
    SnapshotDisk disk;
    disk.l1_table_offset = entry.l1_offset;
    disk.l1_size = entry.l1_entries;
    disk.id_size = static_cast<uint16_t>(info.id.size());
    disk.name_size = static_cast<uint16_t>(info.name.size());
    disk.date_sec = static_cast<uint32_t>(info.date_sec);
    disk.date_nsec = info.date_nsec;
    disk.vm_clock_nsec = info.vm_clock_nsec;
    disk.vm_state_size =
        info.vm_state_size <= UINT32_MAX ? static_cast<uint32_t>(info.vm_state_size) : 0;
    disk.extra_data_size = kExtraBytes + static_cast<uint32_t>(entry.unknown_extra.size());
    const auto* bytes = reinterpret_cast<const uint8_t*>(&disk);
    out.insert(out.end(), bytes, bytes + sizeof(disk));
    size_t at = out.size();
    out.resize(at + kExtraBytes);
    StoreBe64(&out[at], info.vm_state_size);
    StoreBe64(&out[at + 8], info.disk_size);
    StoreBe64(&out[at + 16], info.icount);
    out.insert(out.end(), entry.unknown_extra.begin(), entry.unknown_extra.end());
    out.insert(out.end(), info.id.begin(), info.id.end());
    out.insert(out.end(), info.name.begin(), info.name.end());
    out.resize((out.size() + 7) / 8 * 8);
  }
  return out;
}

// ---- references ----

namespace {

class ReferenceWalk {
 public:
  ReferenceWalk(Metadata& metadata, int64_t delta, TableOwner owner)
      : meta_(metadata), geo_(metadata.geometry()), delta_(delta), owner_(owner) {}

  int Run(std::vector<uint64_t>& l1) {
    uint64_t tables = 0;
    for (uint64_t index = 0; index < l1.size(); index++) {
      uint64_t table = l1[index] & kOffsetMask;
      if (table == 0) continue;
      if (geo_.InCluster(table) != 0 || ++tables > meta_.end_of_clusters() >> geo_.cluster_bits)
        return meta_.Broken(fmt::format("an L1 entry {:#x} makes no sense", l1[index]));
      if (int rc = WalkTable(table)) return rc;
      if (int rc = Change(table, 1)) return rc;
      if (owner_ == TableOwner::kActive) {
        uint64_t refcount = 0;
        if (int rc = meta_.Refcount(table >> geo_.cluster_bits, &refcount)) return rc;
        uint64_t entry = table | (refcount == 1 ? kCopied : 0);
        if (entry != l1[index]) meta_.MarkL1Dirty(index);
        l1[index] = entry;
      }
      if (++since_commit_ >= kPendingFrees / 64 || meta_.cache().crowded()) {
        since_commit_ = 0;
        if (int rc = meta_.Commit()) return rc;
      }
    }
    return 0;
  }

 private:
  int Change(uint64_t offset, uint64_t clusters) {
    if (delta_ == 0) return 0;
    if (delta_ > 0) return meta_.AddRefcounts(offset, clusters, delta_);
    meta_.FreeLater(offset, clusters, true);
    return 0;
  }

  int WalkTable(uint64_t table) {
    for (uint64_t at = 0; at < geo_.cluster_size; at += geo_.slice_bytes) {
      for (uint64_t index = 0; index < meta_.slice_entries(); index++) {
        // Loaded anew each time: refcounts may take its place meanwhile.
        Slice* slice = nullptr;
        if (int rc = meta_.cache().Load(table + at, Slice::Kind::kL2, &slice)) return rc;
        uint64_t entry = meta_.Entry(*slice, index);
        if (entry == 0) continue;
        if (int rc = WalkEntry(table + at, index, entry)) return rc;
      }
    }
    return 0;
  }

  int WalkEntry(uint64_t slice_offset, uint64_t index, uint64_t entry) {
    if (entry & kPacked) {
      uint64_t mask = (uint64_t{1} << geo_.csize_shift) - 1;
      uint64_t sectors = ((entry & ~(kCopied | kPacked)) >> geo_.csize_shift) + 1;
      uint64_t first = (entry & mask) & ~(geo_.cluster_size - 1);
      uint64_t end = (entry & mask & ~uint64_t{511}) + sectors * 512;
      return Change(first, geo_.Clusters(end - first));
    }
    uint64_t cluster = entry & kOffsetMask;
    if (cluster == 0 || meta_.has_data_file()) return 0;
    if (geo_.InCluster(cluster) != 0)
      return meta_.Broken(fmt::format("an L2 entry {:#x} makes no sense", entry));
    if (int rc = Change(cluster, 1)) return rc;
    if (owner_ != TableOwner::kActive) return 0;
    uint64_t refcount = 0;
    if (int rc = meta_.Refcount(cluster >> geo_.cluster_bits, &refcount)) return rc;
    uint64_t marked = (entry & ~kCopied) | (refcount == 1 ? kCopied : 0);
    if (marked == entry) return 0;
    Slice* slice = nullptr;
    if (int rc = meta_.cache().Load(slice_offset, Slice::Kind::kL2, &slice)) return rc;
    meta_.SetEntry(slice, index, marked, meta_.SubBits(*slice, index));
    return 0;
  }

  Metadata& meta_;
  const Geometry& geo_;
  const int64_t delta_;
  const TableOwner owner_;
  size_t since_commit_ = 0;
};

}  // namespace

int AddReferences(Metadata& metadata, std::vector<uint64_t>& l1, int64_t delta, TableOwner owner) {
  return ReferenceWalk(metadata, delta, owner).Run(l1);
}

// ---- the store ----

void Snapshots::UpdateList() {
  list_.clear();
  for (const SnapshotEntry& entry : entries_) list_.push_back(entry.info);
}

Result<> Snapshots::Load() {
  const Header& header = node_.metadata().header;
  entries_.clear();
  list_.clear();
  table_bytes_ = 0;
  if (header.snapshot_count == 0) return {};
  Node& file = *node_.file();
  for (uint64_t bytes = 4096; bytes <= kMaxTableBytes; bytes *= 8) {
    uint64_t held = file.size_bytes() > header.snapshots_offset
                        ? file.size_bytes() - header.snapshots_offset
                        : 0;
    std::vector<uint8_t> table(std::min(bytes, held));
    if (int rc = node_.metadata().ReadBytes(header.snapshots_offset, table))
      return Fail(IoError(file, "read", header.snapshots_offset, rc));
    auto parsed = ParseSnapshots(table, header.snapshot_count, header.size, &table_bytes_);
    if (parsed) {
      entries_ = std::move(*parsed);
      UpdateList();
      return {};
    }
    if (parsed.error().code != ErrorCode::kState || bytes > held) {
      return Fail(ErrorCode::kInvalid, fmt::format("'{}': broken snapshot table: {}", node_.name(),
                                                   parsed.error().what));
    }
  }
  return Fail(ErrorCode::kInvalid,
              fmt::format("'{}': the snapshot table is too long", node_.name()));
}

Result<size_t> Snapshots::Find(const std::string& id_or_name) const {
  for (size_t i = 0; i < entries_.size(); i++) {
    if (entries_[i].info.id == id_or_name) return i;
  }
  for (size_t i = 0; i < entries_.size(); i++) {
    if (entries_[i].info.name == id_or_name) return i;
  }
  return Fail(ErrorCode::kNotFound,
              fmt::format("'{}' has no snapshot '{}'", node_.name(), id_or_name));
}

Result<std::vector<uint64_t>> Snapshots::ReadL1(const SnapshotEntry& entry) {
  const Geometry& geo = node_.metadata().geometry();
  uint64_t bytes = uint64_t{entry.l1_entries} * 8;
  if (bytes > kMaxL1Bytes || geo.InCluster(entry.l1_offset) != 0 ||
      !node_.metadata().InFile(entry.l1_offset, bytes) ||
      geo.L1Entries(entry.info.disk_size) > entry.l1_entries) {
    return Fail(ErrorCode::kInvalid, fmt::format("'{}': snapshot '{}' has a broken L1 table",
                                                 node_.name(), entry.info.name));
  }
  std::vector<uint8_t> table(bytes);
  if (int rc = node_.metadata().ReadBytes(entry.l1_offset, table))
    return Fail(IoError(*node_.file(), "read", entry.l1_offset, rc));
  std::vector<uint64_t> l1(entry.l1_entries);
  for (size_t i = 0; i < l1.size(); i++) l1[i] = LoadBe64(&table[i * 8]);
  return l1;
}

Result<> Snapshots::WriteTable() {
  Metadata& meta = node_.metadata();
  const Geometry& geo = meta.geometry();
  std::vector<uint8_t> table = SerializeSnapshots(entries_);
  if (table.size() > kMaxTableBytes)
    return Fail(ErrorCode::kNoSpace, "the snapshot table has no room for more");
  Run run;
  if (!table.empty()) {
    int rc = meta.AllocateAll(geo.Clusters(table.size()), &run);
    if (rc == 0) rc = meta.WriteBytes(run.offset, table);
    if (rc != 0) return Fail(TablesError(node_, rc));
  }
  if (int rc = meta.Commit()) return Fail(TablesError(node_, rc));
  Header old = meta.header;
  meta.header.snapshots_offset = run.offset;
  meta.header.snapshot_count = static_cast<uint32_t>(entries_.size());
  if (int rc = meta.WriteHeader()) {
    meta.header = old;
    meta.FreeLater(run.offset, run.clusters);
    return Fail(TablesError(node_, rc));
  }
  if (old.snapshot_count > 0) meta.FreeLater(old.snapshots_offset, geo.Clusters(table_bytes_));
  table_bytes_ = table.size();
  UpdateList();
  return {};
}

// Refcounts that were raised before something failed go back by counting all anew.
std::unexpected<Error> Snapshots::Undo(int rc) {
  (void)node_.editor()->Check(Repair::kAll, [](const std::string&) {});
  if (rc == -EINVAL) {
    return Fail(ErrorCode::kNoSpace,
                fmt::format("'{}': a refcount has no room for one more reference (refcount_bits)",
                            node_.name()));
  }
  return Fail(TablesError(node_, rc));
}

Result<SnapshotInfo> Snapshots::Create(SnapshotInfo snapshot) {
  Metadata& meta = node_.metadata();
  const Geometry& geo = meta.geometry();
  if (node_.read_only())
    return Fail(ErrnoError(EROFS, fmt::format("cannot write '{}'", node_.name())));
  if (node_.data_file()) {
    return Fail(ErrorCode::kUnsupported,
                "images with an external data file have no internal snapshots");
  }
  if (entries_.size() >= kMaxSnapshots) return Fail(ErrorCode::kNoSpace, "too many snapshots");
  if (snapshot.name.size() > UINT16_MAX) return Fail(ErrorCode::kInvalid, "the name is too long");
  if (geo.max_refcount == 1)
    return Fail(ErrorCode::kUnsupported, "refcount_bits=1 leaves no room for snapshots");
  unsigned long long id = 0;
  for (const SnapshotEntry& entry : entries_)
    id = std::max(id, strtoull(entry.info.id.c_str(), nullptr, 10));
  snapshot.id = std::to_string(id + 1);
  snapshot.disk_size = node_.size_bytes();

  int rc = meta.CommitAll(false);
  if (rc == 0) rc = meta.SetDirtyBit();
  Run run;
  std::vector<uint64_t>& l1 = meta.l1();
  uint64_t clusters = geo.Clusters(l1.size() * 8);
  if (rc == 0 && clusters > 0) rc = meta.AllocateAll(clusters, &run);
  if (rc != 0) return Fail(TablesError(node_, rc));
  std::vector<uint8_t> table(clusters << geo.cluster_bits);
  for (size_t i = 0; i < l1.size(); i++) StoreBe64(&table[i * 8], l1[i] & ~kCopied);
  if (clusters > 0) rc = WriteAt(*node_.file(), run.offset, table);
  if (rc == 0) rc = AddReferences(meta, l1, 1, TableOwner::kActive);
  if (rc == 0) rc = meta.Commit();
  if (rc != 0) return Undo(rc);
  entries_.push_back({snapshot, run.offset, static_cast<uint32_t>(l1.size())});
  if (Result<> written = WriteTable(); !written) {
    entries_.pop_back();
    (void)node_.editor()->Check(Repair::kAll, [](const std::string&) {});
    return Fail(std::move(written).error());
  }
  // The VM state belongs to the snapshot alone.
  uint64_t first = node_.vm_state_offset() >> geo.cluster_bits;
  if (uint64_t end = l1.size() * geo.l2_entries; first < end) rc = node_.DropClusters(first, end);
  if (rc == 0) rc = meta.CommitAll(true);
  if (rc != 0) return Fail(TablesError(node_, rc));
  return snapshot;
}

Result<> Snapshots::Apply(const std::string& id_or_name) {
  Metadata& meta = node_.metadata();
  const Geometry& geo = meta.geometry();
  const SnapshotEntry entry = entries_[TRY(Find(id_or_name))];
  std::vector<uint64_t> l1 = TRY(ReadL1(entry));
  if (node_.read_only())
    return Fail(ErrnoError(EROFS, fmt::format("cannot write '{}'", node_.name())));
  if (meta.header.version < 3 && entry.info.disk_size != node_.size_bytes())
    return Fail(ErrorCode::kUnsupported, "the snapshot is of a disk of another size");
  int rc = meta.CommitAll(false);
  if (rc == 0) rc = meta.SetDirtyBit();
  // The table may not be shorter than the present size needs, while that is the present size.
  l1.resize(std::max<uint64_t>(l1.size(), 1));
  Run run;
  if (rc == 0) rc = AddReferences(meta, l1, 1, TableOwner::kSnapshot);
  if (rc == 0) rc = meta.AllocateAll(geo.Clusters(l1.size() * 8), &run);
  std::vector<uint8_t> table(run.clusters << geo.cluster_bits);
  if (rc == 0) {
    for (size_t i = 0; i < l1.size(); i++) StoreBe64(&table[i * 8], l1[i] &= ~kCopied);
    rc = WriteAt(*node_.file(), run.offset, table);
  }
  if (rc == 0) rc = meta.Commit();
  if (rc != 0) return Undo(rc);
  Header old = meta.header;
  meta.header.l1_offset = run.offset;
  meta.header.l1_entries = static_cast<uint32_t>(l1.size());
  meta.header.size = entry.info.disk_size;
  if ((rc = meta.WriteHeader()) != 0) {
    meta.header = old;
    return Fail(TablesError(node_, rc));
  }
  std::swap(meta.l1(), l1);
  node_.set_size(entry.info.disk_size);
  for (const auto& bitmap : node_.attached_bitmaps()) bitmap->Set(0, node_.size_bytes());
  rc = AddReferences(meta, l1, -1, TableOwner::kSnapshot);
  if (old.l1_entries > 0) meta.FreeLater(old.l1_offset, geo.Clusters(uint64_t{old.l1_entries} * 8));
  if (rc == 0) rc = meta.CommitAll(false);
  if (rc == 0) rc = AddReferences(meta, meta.l1(), 0, TableOwner::kActive);
  if (rc == 0) rc = meta.CommitAll(true);
  if (rc != 0) return Fail(TablesError(node_, rc));
  return {};
}

Result<> Snapshots::Delete(const std::string& id_or_name) {
  Metadata& meta = node_.metadata();
  size_t index = TRY(Find(id_or_name));
  SnapshotEntry entry = entries_[index];
  std::vector<uint64_t> l1 = TRY(ReadL1(entry));
  if (node_.read_only())
    return Fail(ErrnoError(EROFS, fmt::format("cannot write '{}'", node_.name())));
  int rc = meta.CommitAll(false);
  if (rc == 0) rc = meta.SetDirtyBit();
  if (rc != 0) return Fail(TablesError(node_, rc));
  entries_.erase(entries_.begin() + static_cast<ptrdiff_t>(index));
  if (Result<> written = WriteTable(); !written) {
    entries_.insert(entries_.begin() + static_cast<ptrdiff_t>(index), entry);
    return written;
  }
  rc = AddReferences(meta, l1, -1, TableOwner::kSnapshot);
  uint64_t clusters = meta.geometry().Clusters(l1.size() * 8);
  if (clusters > 0) meta.FreeLater(entry.l1_offset, clusters, true);
  if (rc == 0) rc = meta.CommitAll(false);
  if (rc == 0) rc = AddReferences(meta, meta.l1(), 0, TableOwner::kActive);
  if (rc == 0) rc = meta.CommitAll(true);
  if (rc != 0) return Fail(TablesError(node_, rc));
  return {};
}

Result<> Snapshots::ShowReadOnly(const std::string& id_or_name) {
  const SnapshotEntry& entry = entries_[TRY(Find(id_or_name))];
  std::vector<uint64_t> l1 = TRY(ReadL1(entry));
  if (!node_.read_only())
    return Fail(ErrorCode::kState, "only a read-only image can show a snapshot");
  node_.metadata().l1() = std::move(l1);
  node_.set_size(entry.info.disk_size);
  return {};
}

Result<> Snapshots::WriteVmState(uint64_t offset, std::span<const uint8_t> bytes) {
  const Geometry& geo = node_.metadata().geometry();
  uint64_t at = 0, end = 0;
  if (__builtin_add_overflow(node_.vm_state_offset(), offset, &at) ||
      __builtin_add_overflow(at, bytes.size(), &end)) {
    return Fail(ErrnoError(EFBIG, fmt::format("cannot write VM state to '{}'", node_.name())));
  }
  int rc = node_.GrowL1(geo.L1Entries(end));
  iovec iov = {const_cast<uint8_t*>(bytes.data()), bytes.size()};
  if (rc == 0) rc = node_.WriteRange(at, bytes.size(), IovCursor(&iov, 1));
  if (rc != 0)
    return Fail(ErrnoError(-rc, fmt::format("cannot write VM state to '{}'", node_.name())));
  return {};
}

Result<> Snapshots::ReadVmState(uint64_t offset, std::span<uint8_t> bytes) {
  Metadata& meta = node_.metadata();
  uint64_t limit = meta.l1().size() * meta.geometry().l2_covers;
  uint64_t at = 0;
  if (__builtin_add_overflow(node_.vm_state_offset(), offset, &at)) at = limit;
  uint64_t held = at < limit ? std::min<uint64_t>(bytes.size(), limit - at) : 0;
  std::fill(bytes.begin() + static_cast<ptrdiff_t>(held), bytes.end(), 0);
  iovec iov = {bytes.data(), held};
  if (int rc = held > 0 ? node_.ReadRange(at, held, IovCursor(&iov, 1)) : 0)
    return Fail(ErrnoError(-rc, fmt::format("cannot read VM state of '{}'", node_.name())));
  return {};
}

}  // namespace kvartz::block::qcow2
