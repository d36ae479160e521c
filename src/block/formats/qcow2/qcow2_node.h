// Format qcow2 as a node: I/O on top of its metadata.
#pragma once

#include <list>
#include <memory>
#include <string>
#include <vector>

#include "base/workers.h"
#include "block/crypto/crypt_node.h"
#include "block/driver.h"
#include "block/formats/qcow2/encryption.h"
#include "block/formats/qcow2/metadata.h"
#include "block/io_batch.h"
#include "block/node.h"

namespace kvartz::block::qcow2 {

class Snapshots;
class Bitmaps;
class Editor;

constexpr uint64_t kDefaultCacheBytes = 32 << 20;  // at most; taken as it is used

// Loop-owned. A request whose mapping is cached, whole and in one piece goes straight down; others
// run in a fiber each.
class Qcow2Node final : public Node {
 public:
  Qcow2Node(NodePtr file, NodePtr data_file, Header header, const NodeOptions& options,
            uint64_t cache_bytes);
  ~Qcow2Node() override;
  // Before Load, of an image whose header says so; after it, of one that is being made.
  void SetEncryption(std::unique_ptr<Encryption> encryption);
  Encryption* encryption() { return encryption_.get(); }
  Result<> Load();

  const char* driver() const override { return "qcow2"; }
  Node* file() const override { return file_.get(); }
  Node* data_file() const override { return data_file_.get(); }
  Node* backing() const override { return backing_.get(); }
  bool names_backing() const override { return !meta_->header.backing_file.empty(); }
  bool HasItself(uint64_t offset, uint64_t length) override;
  void Drain() override;
  Result<> SetBacking(NodePtr backing) override;
  std::optional<BackingWish> TakeBackingWish() override;
  Result<Extent> Status(uint64_t offset, uint64_t length) override;
  Result<> Close() override;
  Result<> Resize(const ResizeOptions& options) override;
  Result<> SetReadOnly(bool read_only) override;
  Result<> MoveTo(EventLoop& loop) override;
  Result<ImageInfo> Info() override;
  SnapshotStore* snapshots() override;
  BitmapStore* bitmaps() override;
  ImageEditor* editor() override;

  Metadata& metadata() { return *meta_; }
  void set_backing_wish(BackingWish wish) { wish_ = std::move(wish); }
  const NodeOptions& options() const { return options_; }

  // Fiber: 0 or -errno; anywhere that the L1 table covers, so VM state, too.
  int ReadRange(uint64_t offset, uint64_t length, IovCursor to);
  int WriteRange(uint64_t offset, uint64_t length, IovCursor from);
  int ZeroRange(uint64_t offset, uint64_t length, bool unmap, bool no_fallback);
  int DiscardRange(uint64_t offset, uint64_t length);
  // Clusters [first, end) become unallocated.
  int DropClusters(uint64_t first, uint64_t end);
  int ExpandZeroClusters(uint64_t offset, uint64_t length);
  // A larger L1 table, for at least `entries`.
  int GrowL1(uint64_t entries);
  uint64_t vm_state_offset() const {
    const Geometry& geo = meta_->geometry();
    return geo.L1Entries(size_bytes_) * geo.l2_covers;
  }
  void set_size(uint64_t size);  // of the disk; header and bitmaps, too

 private:
  friend class Snapshots;
  // A write that goes straight down.
  struct Op {
    Request inner;
    Request* outer = nullptr;
    Qcow2Node* node = nullptr;
    unsigned parity = 0;
    Op* next_free = nullptr;
  };
  // Clusters that are being allocated or given up: others wait.
  struct Busy {
    uint64_t first = 0, end = 0;  // clusters
    FiberQueue waiting;
  };
  class BusyGuard;
  struct FromBelow {
    uint64_t offset = 0, length = 0;
    IovCursor to;
  };
  struct AllocatedRun;

  void Submit(Request* request) override;
  bool TryRead(Request* request);
  bool TryWrite(Request* request);
  void Handle(Request* request);
  int Process(Request& request);
  int WriteCompressed(uint64_t offset, uint64_t length, IovCursor from);
  int WriteCompressedCluster(uint64_t offset, std::span<const uint8_t> cluster, bool* stored);
  int ReadCompressed(const Mapping& mapping, uint64_t offset, uint64_t length, IovCursor to);
  int ReadOldEncryption(uint64_t host, uint64_t offset, uint64_t length, IovCursor to);
  int ReadWhatCame(FromBelow& piece);
  bool old_encryption() const { return encryption_ && encryption_->method == Crypt::kAes; }

  bool InBacking(uint64_t offset) const;
  // What it hasn't itself shows something else, now or another time.
  bool StandsOnAnother() const { return backing_ || names_backing(); }
  bool ReadsZero(const Mapping& mapping, uint64_t offset) const;
  // `marked`: the tables say so, rather than nothing; may be null.
  int AllZero(uint64_t from, uint64_t end, bool* zero, bool* marked = nullptr);
  // True: waited, look again.
  bool WaitForBusy(uint64_t first, uint64_t end);
  int FreeSlice(uint64_t first, uint64_t end, Slice** slice);
  int NextSlice(uint64_t* first, uint64_t end, uint64_t* stop, Slice** slice);
  int AllocateAndWrite(uint64_t offset, uint64_t length, IovCursor& from, uint64_t* done);
  int FindEdges(AllocatedRun& run);
  void PlanRun(const Slice& slice, uint64_t offset, uint64_t length, AllocatedRun& run);
  int WriteRun(AllocatedRun& run, IovCursor& from);
  int LinkRun(const AllocatedRun& run);
  int ZeroClusters(uint64_t first, uint64_t end, bool unmap, bool no_fallback);
  int ZeroPart(uint64_t offset, uint64_t length, bool no_fallback);
  bool ZeroEntry(Slice* slice, uint64_t guest, bool unmap);
  int MarkPart(uint64_t offset, uint64_t length, uint64_t* head, uint64_t* tail);
  int WriteZerosOut(uint64_t offset, uint64_t length);
  int DiscardClusters(uint64_t first, uint64_t end);
  Result<> Shrink(uint64_t size);
  Result<> Preallocate(uint64_t old_size, const ResizeOptions& options);
  int PreallocateClusters(uint64_t first, uint64_t end, bool shows_backing);

  const NodePtr file_, data_file_;
  NodePtr backing_;
  NodeOptions options_;
  std::unique_ptr<Encryption> encryption_;
  std::unique_ptr<CryptNode> crypt_;  // over data file or file
  std::unique_ptr<Metadata> meta_;
  std::optional<BackingWish> wish_;
  uint64_t in_flight_ = 0;
  std::vector<std::unique_ptr<Op>> ops_;
  Op* free_op_ = nullptr;
  std::list<Busy*> busy_;
  Workers workers_;  // pack and unpack
  std::unique_ptr<Snapshots> snapshots_;
  std::unique_ptr<Bitmaps> bitmaps_;
  std::unique_ptr<Editor> editor_;
};

// Clusters [first, end) are this fiber's until it is destroyed.
class Qcow2Node::BusyGuard {
 public:
  BusyGuard(Qcow2Node& node, uint64_t first, uint64_t end) : node_(node) {
    busy_.first = first;
    busy_.end = end;
    place_ = node.busy_.insert(node.busy_.end(), &busy_);
  }
  ~BusyGuard() {
    node_.busy_.erase(place_);
    busy_.waiting.WakeAll();
  }
  BusyGuard(const BusyGuard&) = delete;
  BusyGuard& operator=(const BusyGuard&) = delete;
  void Shorten(uint64_t end) { busy_.end = end; }

 private:
  Qcow2Node& node_;
  Busy busy_;
  std::list<Busy*>::iterator place_;
};

// `format` of a cluster's data, of `cluster_size` when unpacked. compress.cpp.
// False: it doesn't get smaller.
bool Compress(Compression format, std::span<const uint8_t> cluster, std::vector<uint8_t>& packed);
bool Decompress(Compression format, std::span<const uint8_t> packed, std::span<uint8_t> cluster);

}  // namespace kvartz::block::qcow2
