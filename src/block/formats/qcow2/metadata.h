// The one owner of an open qcow2 image's metadata: header, L1 and L2 tables, refcounts, and which
// clusters are free. Everything else (I/O, snapshots, bitmaps, check) goes through it.
//
// What is on disk is always sound: a crash between any two writes leaves leaked clusters at worst.
// Changes are made in memory, and Commit writes them so that nothing on stable storage points to
// what isn't there yet:
//
//   1. refcount blocks that are new                          then a flush, if there were any
//   2. the refcount table's entries for them, refcounts that grew, L2 tables that are new
//   3. a flush of file and data file: what was copied and written to new clusters, too
//   4. entries of L2 tables and of the L1 table, which were complete when Commit began
//   5. a flush (what a guest's flush waits for)
//   6. only now refcounts shrink, and clusters that were freed may be used again: not before
//      requests that might still touch them are done either
//
// With lazy refcounts the dirty bit is set before 4, and refcounts are written when the image is
// closed. Steps of larger changes (snapshots, resizing, another refcount table) commit in between;
// those that aren't sound on the way set the dirty bit first (version 3).
//
// Hostile images: offsets and sizes are checked where they are read; an entry that makes no sense
// is -EIO for the request that met it, and nothing else.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_set>
#include <vector>

#include "base/fiber.h"
#include "block/formats/qcow2/layout.h"
#include "block/formats/qcow2/table_cache.h"
#include "block/node.h"

namespace kvartz::block::qcow2 {

// What a range of the disk is mapped to.
struct Mapping {
  enum class Kind : uint8_t { kUnallocated, kZero, kData, kCompressed };
  Kind kind = Kind::kUnallocated;
  bool has_host = false;    // kUnallocated, kZero: a cluster is there for it all the same
  bool copied = false;      // that cluster is nobody else's
  uint64_t length = 0;      // bytes from the offset asked for that are alike
  uint64_t host = 0;        // where the first of them is (kCompressed: the cluster's data)
  uint64_t host_bytes = 0;  // kCompressed: of the data, at most
};

// Neighbouring clusters of the file.
struct Run {
  uint64_t offset = 0;
  uint64_t clusters = 0;
  bool zeroed = false;  // they read as zeros already
};

// Loop-owned. Fiber: all that returns int (0 or -errno) or Result.
class Metadata {
 public:
  Metadata(Node& file, Node* data_file, Header header, uint64_t cache_bytes);

  // Of an open image; `writable`: with all that allocating takes.
  Result<> Load(bool writable);

  Header header;  // changed by its owner's friends, written by WriteHeader
  const Geometry& geometry() const { return geo_; }
  Node& file() const { return file_; }
  // Where clusters of the disk are read and written: what encrypts them, the data file, the file.
  Node& data_node() const { return *data_node_; }
  void set_data_node(Node& node) { data_node_ = &node; }
  bool has_data_file() const { return data_file_ != nullptr; }
  TableCache& cache() { return cache_; }
  std::vector<uint64_t>& l1() { return l1_; }
  void MarkL1Dirty(uint64_t index) { l1_dirty_.insert(index); }

  // ---- mapping (mapping.cpp) ----

  enum class Cached : uint8_t { kYes, kNo, kBroken };
  // Without waiting. Covers what one slice of an L2 table does, at most.
  Cached TryMap(uint64_t guest, uint64_t length, Mapping* mapping);
  int Map(uint64_t guest, uint64_t length, Mapping* mapping);
  // The slice with the entry for `guest`, in a table that is the active image's alone (made or
  // copied if need be).
  int WritableSlice(uint64_t guest, Slice** slice);
  // Null: its table isn't cached, shared or absent.
  Slice* TryWritableSlice(uint64_t guest);
  // Where in the slice the entry of `guest` is.
  uint64_t IndexInSlice(uint64_t guest) const {
    return (guest >> geo_.cluster_bits) % slice_entries_;
  }
  uint64_t slice_entries() const { return slice_entries_; }
  uint64_t slice_covers() const { return slice_entries_ << geo_.cluster_bits; }
  // Of subcluster `sub` (0 without extended entries).
  Mapping::Kind Classify(uint64_t entry, uint64_t sub_bits, uint64_t sub, bool* has_host) const;
  uint64_t Entry(const Slice& slice, uint64_t index) const {
    return LoadBe64(slice.data + index * geo_.l2_entry_bytes);
  }
  uint64_t SubBits(const Slice& slice, uint64_t index) const {
    return geo_.subclusters == 1 ? 0 : LoadBe64(slice.data + index * 16 + 8);
  }
  // Marks the slice as dirty. `sub_bits`: of extended entries.
  void SetEntry(Slice* slice, uint64_t index, uint64_t entry, uint64_t sub_bits = 0);
  // What `entry` held goes: its clusters lose a reference, once that is sound.
  void ReleaseEntry(uint64_t entry, bool discard);

  // ---- refcounts and free clusters (refcount.cpp) ----

  // 1 to `want` neighbouring clusters with refcount 1.
  int Allocate(uint64_t want, Run* run);
  // All of `clusters`, next to each other.
  int AllocateAll(uint64_t clusters, Run* run);
  // `bytes` (at most a cluster's) for compressed data; may share clusters with earlier ones.
  int AllocateBytes(uint64_t bytes, uint64_t* offset);
  // They lose a reference after the next commits. `discard`: the guest doesn't want them.
  void FreeLater(uint64_t offset, uint64_t clusters, bool discard = false);
  int Refcount(uint64_t cluster, uint64_t* refcount);
  // Adds `delta` to the refcounts of [offset, offset + clusters) now.
  int AddRefcounts(uint64_t offset, uint64_t clusters, int64_t delta);
  // What is known of free clusters is forgotten: the refcounts were changed otherwise.
  int ReloadRefcounts();
  void SetRefcountOrder(
      uint32_t order);     // before ForgetRefcounts; tables are rewritten by the caller
  void ForgetRefcounts();  // that are cached: they are written elsewhere now
  // Cuts free clusters off the end of the file. No request is under way.
  int TrimEnd();
  const std::vector<uint64_t>& reftable() const { return reftable_; }
  uint64_t end_of_clusters() const { return end_ << geo_.cluster_bits; }

  // ---- what no data may be written to (guard.cpp) ----

  // [offset, offset + bytes) of the file is header, table or refcounts, in part at least.
  bool IsMetadata(uint64_t offset, uint64_t bytes);
  // Data may be written there. No: it is metadata, or the tables overlap each other.
  bool MayWrite(uint64_t offset, uint64_t bytes);
  // If not: the image is marked as corrupt, and this and all later writes fail.
  int RefuseMetadata(uint64_t offset, uint64_t bytes);
  bool corrupt() const { return corrupt_; }

  // ---- writing out (commit.cpp) ----

  // All that was completed before is on stable storage afterwards, the data files, too.
  int Commit();
  bool dirty() const {
    return cache_.has_dirty() || !l1_dirty_.empty() || !reftable_dirty_.empty() ||
           !freed_.empty() || !ripening_.empty() || !nearly_.empty() || !ripe_.empty();
  }
  bool committing() const { return commit_mutex_.locked(); }
  // Everything, frees included; no request is under way. Clears the dirty bit (if `clean`).
  int CommitAll(bool clean);
  // The header as it is now, and a flush after it.
  int WriteHeader();
  // Before changes that aren't sound half done; v2 images have no such bit. CommitAll clears it.
  int SetDirtyBit();

  // Requests that touch clusters found in the tables before.
  unsigned Enter() {
    busy_[parity_]++;
    return parity_;
  }
  void Leave(unsigned parity) {
    if (--busy_[parity] == 0) Ripen();
  }
  bool busy() const { return busy_[0] + busy_[1] > 0; }

  // The file is long enough for it.
  bool InFile(uint64_t offset, uint64_t bytes) const;
  // Unaligned reads and writes of the file.
  int ReadBytes(uint64_t offset, std::span<uint8_t> bytes);
  int WriteBytes(uint64_t offset, std::span<const uint8_t> bytes);
  // Zeros where `run` isn't zeroed.
  int ZeroRun(const Run& run);

  // One line to the log, limited in number.
  int Broken(const std::string& what);

 private:
  friend class Checker;
  struct Freed {
    uint64_t offset = 0, clusters = 0;
    bool discard = false;
  };
  struct Copy {  // of a slice or a part of a table, to be written
    uint64_t offset = 0;
    std::vector<uint8_t> bytes;
    Slice* slice = nullptr;
  };
  struct Snapshot;  // of what is dirty

  bool CheckL2Pointer(uint64_t entry) const;
  Cached MapInSlice(const Slice& slice, uint64_t guest, uint64_t length, Mapping* mapping);
  int MakeL2Table(uint64_t guest);
  uint64_t SliceOffset(uint64_t l2_table, uint64_t guest) const;

  // kMissing: there is no block for it.
  static constexpr int kMissing = 1;
  int RefcountSlice(uint64_t cluster, Slice** slice, uint64_t* index);
  int MakeRefblock(uint64_t block_index);
  int MakeRefblockLocked(uint64_t block_index);
  int GrowReftable(uint64_t block_index);
  // Without refcounts yet; no clusters: there is no room.
  Run Reserve(uint64_t want);
  Run ReserveAtEnd(uint64_t want);
  enum class Refblocks : uint8_t { kUnlocked, kLocked };
  int Claim(Run* run, Refblocks refblocks);
  int DecrementFreed(const Freed& freed, std::vector<Run>& unused);
  void AddFree(uint64_t cluster, uint64_t count);
  int ScanForFree();
  int FindEnd();

  void RebuildGuard();

  void TakeSnapshot(Snapshot& snapshot);
  int WriteSnapshot(Snapshot& snapshot);
  int WriteCopies(std::vector<Copy>& copies);
  int FlushAll();
  void PutBack(Snapshot& snapshot);
  int ApplyFrees();
  void Ripen();

  Node& file_;
  Node* const data_file_;
  Node* data_node_;
  Geometry geo_;
  TableCache cache_;
  uint64_t slice_entries_;  // L2 entries in a slice

  std::vector<uint64_t> l1_;  // as on disk, host byte order
  std::set<uint64_t> l1_dirty_;
  FiberMutex l2_mutex_;  // who makes an L2 table

  bool writable_ = false;
  std::vector<uint64_t> reftable_;
  std::set<uint64_t> reftable_dirty_;
  FiberMutex refblock_mutex_;          // who makes a refcount block
  std::map<uint64_t, uint64_t> free_;  // first cluster, how many
  uint64_t end_ = 0;                   // cluster behind all that are used
  uint64_t fresh_from_ = 0;            // cluster behind all that may hold anything
  uint64_t scanned_ = 0;               // clusters before that were looked at for free ones
  uint64_t scan_end_ = 0;
  bool scanning_ = false;
  uint64_t bytes_at_ = 0, bytes_end_ = 0;  // room for compressed data
  FiberMutex bytes_mutex_;

  FiberMutex commit_mutex_;
  uint64_t tickets_ = 0, covered_ = 0;
  int last_commit_ = 0;
  bool dirty_on_disk_ = false;
  std::vector<Freed> freed_;     // not to be applied before the next commit is stable
  std::vector<Freed> ripening_;  // waits for requests of the present parity and those before
  std::vector<Freed> nearly_;    // waits for requests of the other parity
  std::vector<Freed> ripe_;
  uint64_t busy_[2] = {0, 0};
  unsigned parity_ = 0;
  FiberMutex unaligned_mutex_;

  // Clusters of tables, some of which may not be any more: when it was rebuilt (sorted), and since.
  std::vector<uint64_t> guard_;
  std::unordered_set<uint64_t> guard_new_;
  bool guard_stale_ = true;
  uint64_t guard_conflict_ = UINT64_MAX;  // where two tables overlap
  bool corrupt_ = false;
};

}  // namespace kvartz::block::qcow2
