#include "block/formats/qcow2/table_cache.h"

#include <cerrno>
#include <cstring>

#include "base/check.h"
#include "block/fiber_io.h"

namespace kvartz::block::qcow2 {

TableCache::TableCache(Node& file, uint64_t slice_bytes, uint64_t limit_bytes)
    : file_(file), slice_bytes_(slice_bytes) {
  statistics_.limit_bytes = limit_bytes;
}

TableCache::~TableCache() = default;

void TableCache::Unlink(Slice* slice) {
  (slice->newer ? slice->newer->older : newest_) = slice->older;
  (slice->older ? slice->older->newer : oldest_) = slice->newer;
  slice->newer = slice->older = nullptr;
}

void TableCache::LinkNewest(Slice* slice) {
  slice->older = newest_;
  (newest_ ? newest_->newer : oldest_) = slice;
  newest_ = slice;
}

void TableCache::Touch(Slice* slice) {
  if (newest_ == slice) return;
  Unlink(slice);
  LinkNewest(slice);
}

void TableCache::Remove(Slice* slice) {
  VERIFY(!slice->loading && slice->pins == 0);
  MarkClean(slice);
  statistics_.used_bytes -= slice_bytes_;
  Unlink(slice);
  slices_.erase(slice->offset);
}

void TableCache::MakeRoom() {
  Slice* slice = oldest_;
  while (slice && statistics_.used_bytes + slice_bytes_ > statistics_.limit_bytes) {
    Slice* next = slice->newer;
    if (!slice->dirty && !slice->writing && !slice->loading && slice->pins == 0) {
      statistics_.evictions++;
      Remove(slice);
    }
    slice = next;
  }
}

Slice* TableCache::Add(uint64_t offset, Slice::Kind kind) {
  MakeRoom();
  auto slice = std::make_unique<Slice>();
  slice->offset = offset;
  slice->kind = kind;
  slice->data = std::make_unique_for_overwrite<uint8_t[]>(slice_bytes_);
  Slice* raw = slice.get();
  slices_[offset] = std::move(slice);
  statistics_.used_bytes += slice_bytes_;
  LinkNewest(raw);
  return raw;
}

int TableCache::Load(uint64_t offset, Slice::Kind kind, Slice** result) {
  for (;;) {
    auto it = slices_.find(offset);
    if (it == slices_.end()) break;
    Slice* slice = it->second.get();
    if (!slice->loading) {
      Touch(slice);
      statistics_.hits++;
      *result = slice;
      return 0;
    }
    slice->waiting.Wait();  // and look again: it may be gone
  }
  statistics_.misses++;
  Slice* slice = Add(offset, kind);
  slice->loading = true;
  file_.Debug(kind == Slice::Kind::kL2 ? DebugEvent::kL2Load : DebugEvent::kRefblockLoad);
  int rc = ReadAt(file_, offset, {slice->data.get(), slice_bytes_});
  slice->loading = false;
  slice->waiting.WakeAll();  // they run later
  if (rc != 0) {
    Remove(slice);
    return rc;
  }
  *result = slice;
  return 0;
}

Slice* TableCache::Insert(uint64_t offset, Slice::Kind kind, bool fresh) {
  auto it = slices_.find(offset);
  Slice* slice = it == slices_.end() ? Add(offset, kind) : it->second.get();
  VERIFY(!slice->loading);
  std::memset(slice->data.get(), 0, slice_bytes_);
  slice->kind = kind;
  slice->fresh = fresh;
  Touch(slice);
  return slice;
}

void TableCache::MarkDirty(Slice* slice) {
  if (slice->dirty) return;
  slice->dirty = true;
  statistics_.dirty_bytes += slice_bytes_;
  slice->previous_dirty = nullptr;
  slice->next_dirty = dirty_;
  if (dirty_) dirty_->previous_dirty = slice;
  dirty_ = slice;
}

void TableCache::MarkClean(Slice* slice) {
  if (!slice->dirty) return;
  slice->dirty = false;
  statistics_.dirty_bytes -= slice_bytes_;
  (slice->previous_dirty ? slice->previous_dirty->next_dirty : dirty_) = slice->next_dirty;
  if (slice->next_dirty) slice->next_dirty->previous_dirty = slice->previous_dirty;
}

void TableCache::Drop(uint64_t offset, uint64_t length) {
  for (uint64_t at = offset; at < offset + length; at += slice_bytes_) {
    auto it = slices_.find(at);
    if (it == slices_.end()) continue;
    Slice* slice = it->second.get();
    MarkClean(slice);
    // One that is being loaded or written is forgotten when that is done (it is clean).
    if (!slice->loading && !slice->writing && slice->pins == 0) Remove(slice);
  }
}

void TableCache::DropAllClean() {
  for (Slice* slice = oldest_; slice;) {
    Slice* next = slice->newer;
    if (!slice->dirty && !slice->writing && !slice->loading && slice->pins == 0) Remove(slice);
    slice = next;
  }
}

void TableCache::ForEachDirty(const std::function<void(Slice&)>& visit) {
  for (Slice* slice = dirty_; slice; slice = slice->next_dirty) visit(*slice);
}

}  // namespace kvartz::block::qcow2
