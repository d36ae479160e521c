#include "block/formats/qcow2/table_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.h"
#include "block/fiber_io.h"

namespace kvartz::block::qcow2 {

namespace {
constexpr uint64_t kReadAhead = 64 << 10;
constexpr size_t kMemoryAlignment = 4096;
}  // namespace

TableCache::TableCache(Node& file, uint64_t table_bytes, uint64_t slice_bytes, uint64_t limit_bytes)
    : file_(file), table_bytes_(table_bytes), slice_bytes_(slice_bytes) {
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
  unused_.push_back(slice->data);
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

uint8_t* TableCache::TakeMemory() {
  if (unused_.empty()) {
    auto* block = static_cast<uint8_t*>(aligned_alloc(kMemoryAlignment, kReadAhead));
    VERIFY(block != nullptr);
    memory_.emplace_back(block);
    // One by one, page faults cost as much as the reads. If it fails, they come one by one.
    (void)madvise(block, kReadAhead, MADV_POPULATE_WRITE);
    for (uint64_t at = kReadAhead; at > 0; at -= slice_bytes_)
      unused_.push_back(block + at - slice_bytes_);
  }
  uint8_t* memory = unused_.back();
  unused_.pop_back();
  return memory;
}

Slice* TableCache::Add(uint64_t offset, Slice::Kind kind) {
  MakeRoom();
  auto slice = std::make_unique<Slice>();
  slice->offset = offset;
  slice->kind = kind;
  slice->data = TakeMemory();
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
  std::vector<Slice*> run = AddAround(offset, kind);
  file_.Debug(kind == Slice::Kind::kL2 ? DebugEvent::kL2Load : DebugEvent::kRefblockLoad);
  if (Read(run) == 0) {
    *result = *std::ranges::find(run, offset, &Slice::offset);
    return 0;
  }
  run.clear();  // a bad sector of another slice isn't this one's
  run.push_back(AddLoading(offset, kind));
  *result = run.front();
  return Read(run);
}

Slice* TableCache::AddLoading(uint64_t offset, Slice::Kind kind) {
  Slice* slice = Add(offset, kind);
  slice->loading = true;
  return slice;
}

std::vector<Slice*> TableCache::AddAround(uint64_t offset, Slice::Kind kind) {
  auto missing = [this](uint64_t at) { return !slices_.contains(at); };
  uint64_t window = std::min(table_bytes_, kReadAhead);
  if (statistics_.limit_bytes / 16 < window) window = slice_bytes_;
  uint64_t begin = offset, end = offset + slice_bytes_;
  const uint64_t first = offset / window * window, last = first + window;
  while (begin > first && missing(begin - slice_bytes_)) begin -= slice_bytes_;
  while (end < last && missing(end)) end += slice_bytes_;
  std::vector<Slice*> run;
  for (uint64_t at = begin; at < end; at += slice_bytes_) run.push_back(AddLoading(at, kind));
  return run;
}

int TableCache::Read(const std::vector<Slice*>& run) {
  std::vector<iovec> iov;
  for (const Slice* slice : run) iov.push_back({slice->data, slice_bytes_});
  Request request = {.kind = Request::Kind::kRead,
                     .offset = run.front()->offset,
                     .length = run.size() * slice_bytes_,
                     .iov = iov.data(),
                     .iov_count = static_cast<unsigned>(iov.size())};
  int rc = Await(file_, request);
  for (Slice* slice : run) {
    slice->loading = false;
    slice->waiting.WakeAll();  // they run later
    if (rc != 0) Remove(slice);
  }
  return rc;
}

Slice* TableCache::Insert(uint64_t offset, Slice::Kind kind, bool fresh) {
  auto it = slices_.find(offset);
  Slice* slice = it == slices_.end() ? Add(offset, kind) : it->second.get();
  VERIFY(!slice->loading);
  std::memset(slice->data, 0, slice_bytes_);
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
