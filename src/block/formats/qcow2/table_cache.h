// The cached slices of L2 tables and refcount blocks, bounded by bytes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/fiber.h"
#include "block/node.h"

namespace kvartz::block::qcow2 {

// One slice of a table. Loop-owned. Valid until the next wait, unless pinned.
struct Slice {
  enum class Kind : uint8_t { kL2, kRefblock };
  uint64_t offset = 0;  // in the file
  Kind kind = Kind::kL2;
  // The table isn't reachable on disk yet: it is written before what points to it.
  bool fresh = false;
  bool dirty = false;
  bool writing = false;  // a copy is on its way to the disk
  bool loading = false;
  uint32_t pins = 0;
  uint8_t* data = nullptr;  // the cache's
  Slice* newer = nullptr;   // by last use
  Slice* older = nullptr;
  Slice* next_dirty = nullptr;  // while it is dirty
  Slice* previous_dirty = nullptr;
  FiberQueue waiting;  // for it to be loaded
};

struct CacheStatistics {
  uint64_t limit_bytes = 0, used_bytes = 0, dirty_bytes = 0;
  uint64_t hits = 0, misses = 0, evictions = 0;
};

// Loop-owned.
class TableCache {
 public:
  // Bytes of a table, whose place is a multiple of it, of its slices, and of all that is held.
  TableCache(Node& file, uint64_t table_bytes, uint64_t slice_bytes, uint64_t limit_bytes);
  ~TableCache();

  // Null: not cached.
  Slice* Find(uint64_t offset) {
    auto it = slices_.find(offset);
    if (it == slices_.end() || it->second->loading) return nullptr;
    Touch(it->second.get());
    statistics_.hits++;
    return it->second.get();
  }
  // Fiber: 0 and the slice, from the file if need be (with those around it), or -errno.
  int Load(uint64_t offset, Slice::Kind kind, Slice** slice);
  // A slice that is all zeros and not on disk; replaces what is cached of that offset.
  Slice* Insert(uint64_t offset, Slice::Kind kind, bool fresh);
  void MarkDirty(Slice* slice);
  void MarkClean(Slice* slice);  // its contents are on their way
  // Forgets the slices in [offset, offset + length), dirty or not: the table is no more.
  void Drop(uint64_t offset, uint64_t length);
  void DropAllClean();
  void ForEachDirty(const std::function<void(Slice&)>& visit);

  // Dirty slices are held over the limit: write them out soon.
  bool crowded() const { return statistics_.dirty_bytes > statistics_.limit_bytes / 2; }
  bool has_dirty() const { return statistics_.dirty_bytes > 0; }
  const CacheStatistics& statistics() const { return statistics_; }

 private:
  void Touch(Slice* slice);
  void Unlink(Slice* slice);
  void LinkNewest(Slice* slice);
  void MakeRoom();
  uint8_t* TakeMemory();
  Slice* Add(uint64_t offset, Slice::Kind kind);
  Slice* AddLoading(uint64_t offset, Slice::Kind kind);
  // That slice and those of its table next to it that aren't held, in the file's order.
  std::vector<Slice*> AddAround(uint64_t offset, Slice::Kind kind);
  int Read(const std::vector<Slice*>& run);
  void Remove(Slice* slice);

  Node& file_;
  const uint64_t table_bytes_, slice_bytes_;
  std::unordered_map<uint64_t, std::unique_ptr<Slice>> slices_;
  struct FreeDeleter {
    void operator()(uint8_t* memory) const { free(memory); }
  };
  std::vector<std::unique_ptr<uint8_t[], FreeDeleter>> memory_;  // of slices, kReadAhead each
  std::vector<uint8_t*> unused_;                                 // slices of it
  Slice* newest_ = nullptr;
  Slice* oldest_ = nullptr;
  Slice* dirty_ = nullptr;
  CacheStatistics statistics_;
};

}  // namespace kvartz::block::qcow2
