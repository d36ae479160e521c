#include "block/formats/qcow2/bitmaps.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "base/log.h"
#include "block/fiber_io.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace kvartz::block::qcow2 {
namespace {

constexpr uint32_t kMinGranularityBits = 9, kMaxGranularityBits = 31;
constexpr uint64_t kAllOnes = 1;  // table entry without a cluster
constexpr size_t kMaxNameBytes = 1023;

Error TablesError(const Node& node, int rc) {
  return ErrnoError(-rc, fmt::format("cannot update the bitmaps of '{}'", node.name()));
}

}  // namespace

Result<std::vector<BitmapEntry>> ParseBitmaps(std::span<const uint8_t> bytes, uint32_t count) {
  auto bad = [](std::string what) {
    return Fail(ErrorCode::kInvalid, "broken bitmap directory: " + std::move(what));
  };
  std::vector<BitmapEntry> entries;
  uint64_t at = 0;
  while (at < bytes.size()) {
    BitmapDisk disk;
    if (bytes.size() - at < sizeof(disk)) return bad("it is cut short");
    std::memcpy(reinterpret_cast<uint8_t*>(&disk), &bytes[at], sizeof(disk));
    at += sizeof(disk);
    uint64_t extra = disk.extra_data_size, name = disk.name_size;
    if (extra > bytes.size() - at || name > bytes.size() - at - extra)
      return bad("it is cut short");
    if (disk.type != 1) return bad(fmt::format("a bitmap of type {}", disk.type));
    if (disk.granularity_bits < kMinGranularityBits || disk.granularity_bits > kMaxGranularityBits)
      return bad(fmt::format("a granularity of 2^{}", disk.granularity_bits));
    if (name == 0 || name > kMaxNameBytes) return bad(fmt::format("a name of {} bytes", name));
    BitmapEntry entry;
    entry.stored = true;
    entry.table_offset = disk.table_offset;
    entry.table_entries = disk.table_entries;
    entry.flags = disk.flags;
    entry.extra.assign(&bytes[at], &bytes[at] + extra);
    entry.info.name.assign(reinterpret_cast<const char*>(&bytes[at + extra]), name);
    entry.info.granularity = 1u << disk.granularity_bits;
    entry.info.enabled = (entry.flags & kBitmapAuto) != 0;
    entry.info.in_use = (entry.flags & kBitmapInUse) != 0;
    at = std::min<uint64_t>((at + extra + name + 7) / 8 * 8, bytes.size());
    entries.push_back(std::move(entry));
  }
  if (entries.size() != count)
    return bad(fmt::format("it has {} entries, not {}", entries.size(), count));
  return entries;
}

std::vector<uint8_t> SerializeBitmaps(const std::vector<BitmapEntry>& bitmaps) {
  std::vector<uint8_t> out;
  for (const BitmapEntry& entry : bitmaps) {
    BitmapDisk disk;
    disk.table_offset = entry.table_offset;
    disk.table_entries = entry.table_entries;
    disk.flags = entry.flags;
    disk.type = 1;
    disk.granularity_bits = static_cast<uint8_t>(std::countr_zero(entry.info.granularity));
    disk.name_size = static_cast<uint16_t>(entry.info.name.size());
    disk.extra_data_size = static_cast<uint32_t>(entry.extra.size());
    const auto* bytes = reinterpret_cast<const uint8_t*>(&disk);
    out.insert(out.end(), bytes, bytes + sizeof(disk));
    out.insert(out.end(), entry.extra.begin(), entry.extra.end());
    out.insert(out.end(), entry.info.name.begin(), entry.info.name.end());
    out.resize((out.size() + 7) / 8 * 8);
  }
  return out;
}

Result<> Bitmaps::Load() {
  Metadata& meta = node_.metadata();
  const Header& header = meta.header;
  for (const auto& [name, bitmap] : contents_) node_.Detach(*bitmap);
  contents_.clear();
  entries_.clear();
  marked_ = false;
  // Written by somebody who doesn't keep bitmaps in step: they say nothing any more.
  if (header.bitmap_count == 0 || !(header.autoclear & kBitmapsValid)) return {};
  if (meta.geometry().InCluster(header.bitmaps_offset) != 0 ||
      header.bitmaps_offset > node_.file()->size_bytes() ||
      header.bitmaps_size > node_.file()->size_bytes() - header.bitmaps_offset) {
    return Fail(ErrorCode::kInvalid, fmt::format("'{}': broken bitmaps extension", node_.name()));
  }
  std::vector<uint8_t> directory(header.bitmaps_size);
  if (int rc = meta.ReadBytes(header.bitmaps_offset, directory))
    return Fail(IoError(*node_.file(), "read", header.bitmaps_offset, rc));
  Result<std::vector<BitmapEntry>> entries = ParseBitmaps(directory, header.bitmap_count);
  if (!entries) return Fail(std::move(entries).error().In(fmt::format("'{}'", node_.name())));
  entries_ = std::move(*entries);
  if (node_.options().for_check || node_.options().no_io) return {};
  for (BitmapEntry& entry : entries_) {
    bool unknown = (entry.flags & ~(kBitmapInUse | kBitmapAuto | kBitmapExtraCompatible)) != 0 ||
                   (!entry.extra.empty() && !(entry.flags & kBitmapExtraCompatible));
    if (entry.info.in_use || unknown) {
      entry.info.in_use = true;
      continue;
    }
    auto bitmap =
        std::make_shared<DirtyBitmap>(entry.info.name, node_.size_bytes(), entry.info.granularity);
    TRY(LoadContents(entry, *bitmap));
    bitmap->set_enabled(entry.info.enabled);
    contents_[entry.info.name] = bitmap;
    if (!node_.read_only()) node_.Attach(bitmap);
  }
  return node_.read_only() ? Result<>() : MarkInUse();
}

Result<> Bitmaps::MarkInUse() {
  if (contents_.empty()) return {};
  Metadata& meta = node_.metadata();
  for (BitmapEntry& entry : entries_) entry.flags |= kBitmapInUse;
  std::vector<uint8_t> directory = SerializeBitmaps(entries_);
  int rc = meta.WriteBytes(meta.header.bitmaps_offset, directory);
  if (rc == 0) rc = FlushNode(*node_.file());
  if (rc != 0) return Fail(TablesError(node_, rc));
  marked_ = true;
  return {};
}

Result<> Bitmaps::LoadContents(const BitmapEntry& entry, DirtyBitmap& bitmap) {
  Metadata& meta = node_.metadata();
  const Geometry& geo = meta.geometry();
  uint64_t bytes = bitmap.stored_bytes();
  if (entry.table_entries != geo.Clusters(bytes) || bytes > kMaxBitmapBytes ||
      geo.InCluster(entry.table_offset) != 0 || entry.table_offset > kMaxImageBytes) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}': bitmap '{}' has a broken table", node_.name(), entry.info.name));
  }
  std::vector<uint8_t> table(uint64_t{entry.table_entries} * 8);
  if (int rc = meta.ReadBytes(entry.table_offset, table)) return Fail(TablesError(node_, rc));
  std::vector<uint8_t> cluster(geo.cluster_size);
  for (uint32_t i = 0; i < entry.table_entries; i++) {
    uint64_t value = LoadBe64(&table[i * 8]);
    uint64_t length = std::min(geo.cluster_size, bytes - i * geo.cluster_size);
    if (value == 0) continue;
    uint64_t offset = value & kOffsetMask;
    if (value == kAllOnes) {
      std::fill(cluster.begin(), cluster.end(), 0xff);
    } else if (offset == 0 || (value & ~kOffsetMask) != 0 || geo.InCluster(offset) != 0) {
      return Fail(ErrorCode::kInvalid, fmt::format("'{}': bitmap '{}' has a broken table",
                                                   node_.name(), entry.info.name));
    } else if (int rc = meta.ReadBytes(offset, std::span<uint8_t>(cluster).first(length))) {
      return Fail(TablesError(node_, rc));
    }
    bitmap.Load(i * geo.cluster_size, std::span<const uint8_t>(cluster).first(length));
  }
  return {};
}

Result<> Bitmaps::StoreContents(BitmapEntry& entry, const DirtyBitmap& bitmap) {
  Metadata& meta = node_.metadata();
  const Geometry& geo = meta.geometry();
  uint64_t bytes = bitmap.stored_bytes();
  if (bytes > kMaxBitmapBytes)
    return Fail(ErrorCode::kNoSpace, fmt::format("bitmap '{}' is too large", entry.info.name));
  std::vector<uint8_t> table(geo.RoundUp(geo.Clusters(bytes) * 8));
  std::vector<uint8_t> cluster(geo.cluster_size);
  for (uint64_t i = 0; i < geo.Clusters(bytes); i++) {
    if (!bitmap.Save(i * geo.cluster_size, cluster)) continue;
    Run run;
    int rc = meta.AllocateAll(1, &run);
    if (rc == 0) rc = WriteAt(*node_.file(), run.offset, cluster);
    if (rc != 0) return Fail(TablesError(node_, rc));
    StoreBe64(&table[i * 8], run.offset);
  }
  entry.table_entries = static_cast<uint32_t>(geo.Clusters(bytes));
  entry.table_offset = 0;
  // There is no table of an empty disk: readers refuse an entry without one.
  entry.stored = !table.empty();
  if (table.empty()) return {};
  Run run;
  int rc = meta.AllocateAll(table.size() >> geo.cluster_bits, &run);
  if (rc == 0) rc = WriteAt(*node_.file(), run.offset, table);
  if (rc != 0) return Fail(TablesError(node_, rc));
  entry.table_offset = run.offset;
  return {};
}

// The clusters that the entry on disk has.
Result<> Bitmaps::CollectContents(const BitmapEntry& entry, std::vector<Run>& released) {
  Metadata& meta = node_.metadata();
  const Geometry& geo = meta.geometry();
  if (entry.table_offset == 0) return {};
  uint64_t bytes = uint64_t{entry.table_entries} * 8;
  if (bytes > kMaxBitmapBytes || geo.InCluster(entry.table_offset) != 0) return {};
  std::vector<uint8_t> table(bytes);
  if (int rc = meta.ReadBytes(entry.table_offset, table)) return Fail(TablesError(node_, rc));
  for (uint32_t i = 0; i < entry.table_entries; i++) {
    uint64_t offset = LoadBe64(&table[i * 8]) & kOffsetMask;
    if (offset != 0 && geo.InCluster(offset) == 0) released.push_back({offset, 1});
  }
  released.push_back({entry.table_offset, geo.Clusters(bytes)});
  return {};
}

Result<> Bitmaps::WriteDirectory(const std::vector<Run>& released) {
  Metadata& meta = node_.metadata();
  const Geometry& geo = meta.geometry();
  std::vector<BitmapEntry> stored;
  for (const BitmapEntry& entry : entries_) {
    if (entry.stored) stored.push_back(entry);
  }
  std::vector<uint8_t> directory = SerializeBitmaps(stored);
  Run run;
  int rc = 0;
  if (!directory.empty()) {
    rc = meta.AllocateAll(geo.Clusters(directory.size()), &run);
    if (rc == 0) rc = meta.WriteBytes(run.offset, directory);
  }
  if (rc == 0) rc = meta.Commit();
  if (rc != 0) return Fail(TablesError(node_, rc));
  Header old = meta.header;
  meta.header.bitmap_count = static_cast<uint32_t>(stored.size());
  meta.header.bitmaps_size = directory.size();
  meta.header.bitmaps_offset = run.offset;
  meta.header.autoclear &= ~kBitmapsValid;
  if (!stored.empty()) meta.header.autoclear |= kBitmapsValid;
  if ((rc = meta.WriteHeader()) != 0) {
    meta.header = old;
    return Fail(TablesError(node_, rc));
  }
  if (old.bitmap_count > 0) meta.FreeLater(old.bitmaps_offset, geo.Clusters(old.bitmaps_size));
  for (const Run& old_run : released) meta.FreeLater(old_run.offset, old_run.clusters);
  return {};
}

Result<> Bitmaps::StoreAll() {
  if (node_.read_only() || contents_.empty()) return {};
  std::vector<Run> released;
  for (BitmapEntry& entry : entries_) {
    auto contents = contents_.find(entry.info.name);
    if (contents == contents_.end()) continue;
    TRY(CollectContents(entry, released));
    TRY(StoreContents(entry, *contents->second));
    entry.info.enabled = contents->second->enabled();
    entry.flags = entry.info.enabled ? kBitmapAuto : 0;
    entry.extra.clear();
  }
  TRY(WriteDirectory(released));
  marked_ = false;
  return {};
}

Result<> Bitmaps::Store() {
  TRY(StoreAll());
  // On disk they would be taken for true after a crash, though writes go on.
  return node_.read_only() ? Result<>() : MarkInUse();
}

std::vector<BitmapInfo> Bitmaps::List() const {
  std::vector<BitmapInfo> list;
  for (const BitmapEntry& entry : entries_) {
    list.push_back(entry.info);
    auto contents = contents_.find(entry.info.name);
    if (contents != contents_.end()) list.back().enabled = contents->second->enabled();
  }
  return list;
}

std::shared_ptr<DirtyBitmap> Bitmaps::Find(const std::string& name) {
  auto it = contents_.find(name);
  return it == contents_.end() ? nullptr : it->second;
}

Result<BitmapEntry*> Bitmaps::Get(const std::string& name) {
  for (BitmapEntry& entry : entries_) {
    if (entry.info.name == name) return &entry;
  }
  return Fail(ErrorCode::kNotFound, fmt::format("'{}' has no bitmap '{}'", node_.name(), name));
}

Result<> Bitmaps::Add(const BitmapInfo& bitmap) {
  if (node_.read_only())
    return Fail(ErrnoError(EROFS, fmt::format("cannot write '{}'", node_.name())));
  if (node_.metadata().header.version < 3) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("'{}': bitmaps need compat=1.1", node_.name()));
  }
  if (node_.size_bytes() == 0) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("'{}' has no bytes, and qcow2 no bitmaps of an empty disk: resize it",
                            node_.name()));
  }
  if (Get(bitmap.name)) {
    return Fail(ErrorCode::kExists,
                fmt::format("'{}' has a bitmap '{}' already", node_.name(), bitmap.name));
  }
  if (bitmap.name.empty() || bitmap.name.size() > kMaxNameBytes)
    return Fail(ErrorCode::kInvalid, "a bitmap's name has 1 to 1023 bytes");
  if (entries_.size() >= kMaxBitmaps) return Fail(ErrorCode::kNoSpace, "too many bitmaps");
  if (!std::has_single_bit(bitmap.granularity) || bitmap.granularity < 1u << kMinGranularityBits) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("granularity {}: it is a power of two from 512", bitmap.granularity));
  }
  auto contents =
      std::make_shared<DirtyBitmap>(bitmap.name, node_.size_bytes(), bitmap.granularity);
  if (contents->stored_bytes() > kMaxBitmapBytes)
    return Fail(ErrorCode::kInvalid, "the granularity is too fine for a disk of this size");
  contents->set_enabled(bitmap.enabled);
  entries_.push_back({bitmap});
  entries_.back().info.in_use = false;
  contents_[bitmap.name] = contents;
  node_.Attach(contents);
  return {};
}

Result<> Bitmaps::Remove(const std::string& name) {
  BitmapEntry* entry = TRY(Get(name));
  if (node_.read_only())
    return Fail(ErrnoError(EROFS, fmt::format("cannot write '{}'", node_.name())));
  std::vector<Run> released;
  TRY(CollectContents(*entry, released));
  if (auto contents = contents_.find(name); contents != contents_.end()) {
    node_.Detach(*contents->second);
    contents_.erase(contents);
  }
  entries_.erase(entries_.begin() + (entry - entries_.data()));
  return WriteDirectory(released);
}

Result<> Bitmaps::Clear(const std::string& name) {
  TRY(Get(name));
  std::shared_ptr<DirtyBitmap> contents = Find(name);
  if (!contents) return Fail(ErrorCode::kState, fmt::format("bitmap '{}' is inconsistent", name));
  contents->ClearAll();
  return {};
}

Result<> Bitmaps::Enable(const std::string& name, bool enabled) {
  TRY(Get(name));
  std::shared_ptr<DirtyBitmap> contents = Find(name);
  if (!contents) return Fail(ErrorCode::kState, fmt::format("bitmap '{}' is inconsistent", name));
  contents->set_enabled(enabled);
  return {};
}

Result<> Bitmaps::Merge(const std::string& name, const DirtyBitmap& source) {
  TRY(Get(name));
  std::shared_ptr<DirtyBitmap> contents = Find(name);
  if (!contents) return Fail(ErrorCode::kState, fmt::format("bitmap '{}' is inconsistent", name));
  contents->Merge(source);
  return {};
}

}  // namespace kvartz::block::qcow2
