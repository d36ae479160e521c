// The block graph: protocol nodes (files, host devices) below format nodes (raw, qcow2...) below
// filters. Each is a `Node`; a disk holds the top one and starts requests on it.
//
// Two ways to use a node, both on its loop's thread:
//   Start(Request*)   asynchronous, intrusive, scatter/gather: the guests' path
//   fiber functions   straight-line code that waits (marked "Fiber:"), called within a Fiber only;
//                     fiber_io.h reads and writes that way, sync_io.h is for tools without a loop
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/event_loop.h"
#include "base/result.h"
#include "block/debug_event.h"
#include "block/image_info.h"
#include "block/node_options.h"

namespace kvartz::block {

class DirtyBitmap;
class Node;
class Options;
struct OpenEnv;
using NodePtr = std::shared_ptr<Node>;

// One request under way. The owner keeps it, the iovecs and the buffers alive until `done` is
// called: later (never from within Start), on the loop's thread, outside of fibers, with 0 or
// -errno. Intrusive: embed it in what the request is for. The nodes may change its fields
// meanwhile.
struct Request {
  enum class Kind : uint8_t {
    kRead,
    kWrite,
    kFlush,        // what was completed before is on stable storage
    kDiscard,      // contents don't matter any more; reads what it likes to afterwards
    kWriteZeroes,  // reads as zeros afterwards
  };
  Kind kind = Kind::kRead;
  bool fua = false;          // kWrite, kWriteZeroes: on stable storage when done
  bool unmap = false;        // kWriteZeroes: the space may be given back
  bool no_fallback = false;  // kWriteZeroes: -ENOTSUP rather than writing the zeros out
  bool compressed = false;   // kWrite: whole clusters, to be stored compressed
  uint64_t offset = 0;       // bytes
  uint64_t length = 0;       // bytes; kRead, kWrite: what the iovecs hold together
  const iovec* iov = nullptr;
  unsigned iov_count = 0;
  void (*done)(Request* request, int result) = nullptr;
  void* owner = nullptr;

  // The nodes' own, while it is under way.
  Request* next = nullptr;
  int result = 0;
  bool submitting = false;
};

// What requests should look like. Immutable while the node is in use.
struct Limits {
  // Of offset and length of reads, writes and write-zeroes, or they end with -EINVAL. 512 or 4096
  // with O_DIRECT (a disk offers no smaller sectors then), else 1. Buffers need no alignment.
  uint32_t request_alignment = 1;
  uint32_t discard_granularity = 0;  // 0: discard isn't supported (it succeeds and does nothing)
  bool write_cache = true;  // false: each write is on stable storage when done (writethrough)
};

// What a range of a node is made of, by this node alone.
struct Extent {
  uint64_t length = 0;      // bytes from the offset asked for that are alike; 0: at the end
  bool allocated = false;   // this node says what they read as; false: its backing node does
  bool zero = false;        // they read as zeros
  bool data = false;        // they are stored (which may be zeros)
  bool compressed = false;  // stored compressed
  // Stored in `file` (owned by the graph) at `offset` as they are.
  bool has_offset = false;
  uint64_t offset = 0;
  Node* file = nullptr;
};

enum class Preallocation : uint8_t { kOff, kMetadata, kFalloc, kFull };
Result<Preallocation> ParsePreallocation(const std::string& name);
const char* NameOf(Preallocation preallocation);

// A backing node that an image asks for when it is opened.
struct BackingWish {
  std::shared_ptr<Options> options;  // as for OpenNode
  std::string what;                  // for errors: "backing file 'base.qcow2' of 'a.qcow2'"
};

struct ResizeOptions {
  uint64_t size = 0;
  Preallocation preallocation = Preallocation::kOff;  // of what is added
  bool exact = true;        // false: a node that can't be so small may stay larger
  bool zero_added = false;  // what is added reads as zeros, whatever the backing node has there
};

// Loop-owned by loop(); opened before requests start, destroyed with none under way and, if it is
// writable, after Close.
class Node : public std::enable_shared_from_this<Node> {
 public:
  Node(EventLoop& loop, std::string name);
  virtual ~Node();
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  // Checks the request against size, limits and read-only (-EINVAL, -EROFS), then starts it.
  void Start(Request* request);
  // Returns when no request is under way: their `done` is called meanwhile, and nothing else of the
  // loop's turn runs. Not in a fiber.
  virtual void Drain() = 0;

  uint64_t size_bytes() const { return size_bytes_; }
  bool read_only() const { return read_only_; }
  const Limits& limits() const { return limits_; }
  const std::string& name() const { return name_; }  // as in messages: the path of a file
  virtual const char* driver() const = 0;            // "file", "host_device", "raw", "qcow2"
  EventLoop& loop() const { return *loop_; }
  // As query-named-block-nodes says it; the registry gives names to those that have none.
  const std::string& node_name() const { return node_name_; }
  void set_node_name(std::string name) { node_name_ = std::move(name); }
  // What it was opened with; set by whoever opened it, and when it is reopened. Without
  // discard_unmap it ignores discards and frees nothing for zeros.
  const NodeOptions& opened_with() const { return opened_with_; }
  void set_opened_with(const NodeOptions& options);
  DetectZeroes detect_zeroes() const { return opened_with_.detect_zeroes; }
  // Its driver's own options, and its children's, as they were given; may be null. Likewise.
  const std::shared_ptr<const Options>& own_options() const { return own_options_; }
  void set_own_options(std::shared_ptr<const Options> options) {
    own_options_ = std::move(options);
  }
  // What changes in backing() is copied here first, for this node goes on showing what was there
  // (fleecing): what came from below counts only if it still isn't here afterwards.
  bool fleecing() const { return fleecing_; }
  void set_fleecing(bool fleecing) { fleecing_ = fleecing; }
  // Writes beyond the end make it larger (and reads there give zeros): files below formats.
  bool grows() const { return grows_; }
  // A node that was opened by itself is put below a format: lets it grow if it can.
  virtual void LetGrow() {}

  // Where it stands in the graph. Null where there is none.
  virtual Node* file() const { return nullptr; }     // what its bytes and metadata are in
  virtual Node* backing() const { return nullptr; }  // what it shows where it has nothing itself
  // The image says that it stands on another, whether or not that was opened: what it hasn't itself
  // may show something else another time.
  virtual bool names_backing() const { return false; }
  virtual Node* data_file() const { return nullptr; }  // where its guest's data are, if not in file
  virtual bool is_filter() const { return false; }     // shows file()'s contents as they are
  // Replaces backing() in memory alone; null: none any more.
  virtual Result<> SetBacking(NodePtr backing);
  // Of a filter: replaces file() by one of the same size.
  virtual Result<> SetFile(NodePtr file);
  // Of a filter, and raw: file() has another size.
  virtual void FileResized() {}
  // With no request under way: it and what is below is served by `loop` from now on. Errors: it
  // can't move, as a protocol can't unless it says so.
  virtual Result<> MoveTo(EventLoop& loop);

  // Once, after it was opened: what OpenNode (graph.h) still has to open and SetBacking.
  virtual std::optional<BackingWish> TakeBackingWish() { return std::nullopt; }

  // Without waiting: this node is known to have all of the range itself, and not its backing node.
  virtual bool HasItself(uint64_t /*offset*/, uint64_t /*length*/) { return !backing(); }
  // Fiber: what [offset, offset + length) is made of; the answer covers at least one byte and may
  // be shorter than the range. `length` > 0, within size_bytes().
  virtual Result<Extent> Status(uint64_t offset, uint64_t length);
  // Fiber: flushes, writes metadata that is only in memory, and marks the image as clean. No
  // request is under way and none follows. The children's too.
  virtual Result<> Close();
  // Fiber: another virtual size (of growing files: their length).
  virtual Result<> Resize(const ResizeOptions& options);
  // Fiber: from read-only to writable and back.
  virtual Result<> SetReadOnly(bool read_only);
  // Takes of its own options what this kind of node can change while it is in use, and answers
  // what does so, on its loop, with no request under way. Null: nothing changes.
  virtual Result<std::function<void()>> TakeChanges(const OpenEnv& /*env*/, Options& /*options*/) {
    return nullptr;
  }
  // Fiber: rereads nothing; what the image says of itself.
  virtual Result<ImageInfo> Info();
  // Fiber: bytes that it takes on the host.
  virtual Result<uint64_t> AllocatedBytes();

  // What this kind of node counts besides (BlockStatsSpecific of QEMU); empty: nothing.
  virtual InfoValue::Object Counts() const { return {}; }

  // What only some formats have; null: this one doesn't.
  virtual SnapshotStore* snapshots() { return nullptr; }
  virtual BitmapStore* bitmaps() { return nullptr; }
  virtual ImageEditor* editor() { return nullptr; }

  // Is told of what changes, when a write to it is done. While attached. See dirty_bitmap.h.
  void Attach(std::shared_ptr<DirtyBitmap> bitmap);
  void Detach(const DirtyBitmap& bitmap);
  const std::vector<std::shared_ptr<DirtyBitmap>>& attached_bitmaps() const { return attached_; }

  // The end of what was ever written to here; 0: nothing was.
  uint64_t highest_write() const { return highest_write_; }
  // The first write that reaches beyond `bytes` is told of, on the node's loop, with how far it
  // does, and then there is no threshold any more. 0: none from now on.
  using Exceeded = std::function<void(uint64_t exceeded_bytes)>;
  void SetWriteThreshold(uint64_t bytes, Exceeded exceeded);
  uint64_t write_threshold() const { return threshold_ ? threshold_->bytes : 0; }
  // What a format says of what it does to its file: the filter blkdebug listens.
  void Debug(DebugEvent event) {
    if (debugged_) OnDebug(event);
  }
  bool debugged() const { return debugged_; }
  // "'a.img': format qcow2 doesn't support ..."
  std::unexpected<Error> Unsupported(const char* what) const;

 protected:
  virtual void OnDebug(DebugEvent /*event*/) {}
  // Of a request that passed the checks: calls its `done` later, or hands it to another node's
  // Start.
  virtual void Submit(Request* request) = 0;
  // Calls `done`, but not from within Submit.
  void FinishLater(Request* request, int result);
  // Does so now; true if there were any. For Drain.
  bool FinishLateOnes();
  // For Submit: `work` in a fiber of its own, which ends the request with what it returns.
  void SubmitInFiber(Request* request, std::function<int(Request& request)> work);
  unsigned in_fibers() const { return in_fibers_; }  // requests
  // For MoveTo of a node whose own state doesn't depend on its loop.
  void SetLoop(EventLoop& loop);
  uint64_t size_bytes_ = 0;
  bool read_only_ = false;
  bool grows_ = false;
  bool debugged_ = false;
  Limits limits_;

 private:
  struct Threshold {
    uint64_t bytes = 0;
    Exceeded exceeded = {};
  };
  void CheckThreshold(uint64_t end);
  struct LateList;
  struct Tracked;
  int Check(const Request& request) const;  // 0 or -errno
  void SubmitTracked(Request* request);
  void DetectZero(Request* request) const;
  EventLoop* loop_;
  std::string name_, node_name_;
  NodeOptions opened_with_;
  std::shared_ptr<const Options> own_options_;
  void UpdateTracked();
  bool fleecing_ = false;
  // What is written needs a look: bitmaps, a threshold, detect-zeroes, discard=ignore.
  bool tracked_ = false;
  bool ignores_discard_ = false;
  unsigned in_fibers_ = 0;
  uint64_t highest_write_ = 0;
  std::unique_ptr<Threshold> threshold_;
  std::shared_ptr<LateList> late_;
  std::vector<std::shared_ptr<DirtyBitmap>> attached_;
};

enum class CacheMode : uint8_t {
  kWriteback,     // the host's page cache; flushes reach the disk
  kNone,          // past the page cache (O_DIRECT); flushes reach the disk
  kWritethrough,  // the page cache, each write to the disk
  kDirectSync,    // past the page cache, each write to the disk
  kUnsafe,        // the page cache, flushes are ignored
};

struct ImageOptions {
  std::string path = {};
  std::string format = {};  // "raw", "qcow2"...; empty: found out
  CacheMode cache = CacheMode::kWriteback;
  bool read_only = false;
  bool discard_unmap = true;  // false: discards are ignored
  // Byte-range locks as QEMU's: two machines can't write to one image.
  enum class Locking : uint8_t { kAuto, kOff };
  Locking locking = Locking::kAuto;
  bool share_write = false;     // others may write too (share-rw=on)
  bool force_share = false;     // reads whatever others do (force-share=on; with read_only)
  bool grows = false;           // a file below a format
  bool auto_read_only = false;  // read-only where writing isn't permitted
  bool no_flush = false;        // flushes are ignored (as with kUnsafe)
  // raw: the part of the file that is the disk.
  uint64_t raw_offset = 0;
  uint64_t raw_size = UINT64_MAX;  // UINT64_MAX: up to the end
};

// cache= of -drive. Errors: an unknown name.
Result<CacheMode> ParseCacheMode(const std::string& name);

// Opens a disk image for a machine, before the loop runs: OpenNode (graph.h) in a fiber. Errors in
// one line: absent, not readable, a directory, in use (by whom), empty, a format that isn't
// supported.
Result<NodePtr> OpenImage(EventLoop& loop, const ImageOptions& options);

// Closes what OpenImage opened, when the loop doesn't run any more.
Result<> CloseImage(const NodePtr& node);

}  // namespace kvartz::block
