// The block graph: protocol nodes (files, host devices) below format nodes (raw...) below filters.
// Each is a `Node`; a disk holds the top one and starts requests on it.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <string>

#include "base/event_loop.h"
#include "base/result.h"

namespace kvartz::block {

// One request under way. The owner keeps it, the iovecs and the buffers alive until `done` is
// called: later (never from within Start), on the loop's thread, with 0 or -errno. Intrusive: embed
// it in what the request is for. The nodes may change its fields meanwhile.
struct Request {
  enum class Kind : uint8_t {
    kRead,
    kWrite,
    kFlush,        // what was completed before is on stable storage
    kDiscard,      // contents don't matter any more; reads what it likes to afterwards
    kWriteZeroes,  // reads as zeros afterwards
  };
  Kind kind = Kind::kRead;
  bool fua = false;     // kWrite, kWriteZeroes: on stable storage when done
  bool unmap = false;   // kWriteZeroes: the space may be given back
  uint64_t offset = 0;  // bytes
  uint64_t length = 0;  // bytes; kRead, kWrite: what the iovecs hold together
  const iovec* iov = nullptr;
  unsigned iov_count = 0;
  void (*done)(Request* request, int result) = nullptr;
  void* owner = nullptr;

  // The nodes' own, while it is under way.
  Request* next = nullptr;
  int result = 0;
};

// What requests should look like. Immutable while the node is in use.
struct Limits {
  // Of offset and length of reads, writes and write-zeroes, or they end with -EINVAL. 512 or 4096
  // with O_DIRECT (a disk offers no smaller sectors then), else 1. Buffers need no alignment.
  uint32_t request_alignment = 1;
  uint32_t discard_granularity = 0;  // 0: discard isn't supported (it succeeds and does nothing)
  bool write_cache = true;  // false: each write is on stable storage when done (writethrough)
};

// Loop-owned by loop(); opened on any thread before requests start, destroyed with none under way.
class Node {
 public:
  Node(EventLoop& loop, std::string name);
  virtual ~Node();
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  // Checks the request against size, limits and read-only (-EINVAL, -EROFS), then starts it.
  void Start(Request* request);
  // Returns when no request is under way: their `done` is called meanwhile, and nothing else of the
  // loop's turn runs.
  virtual void Drain() = 0;

  uint64_t size_bytes() const { return size_bytes_; }
  bool read_only() const { return read_only_; }
  const Limits& limits() const { return limits_; }
  const std::string& name() const { return name_; }  // as in messages: the path of a file
  virtual const char* driver() const = 0;            // "file", "host_device", "raw"
  EventLoop& loop() const { return loop_; }

 protected:
  // Of a request that passed the checks: calls its `done` later, or hands it to another node's
  // Start.
  virtual void Submit(Request* request) = 0;
  // Calls `done`, but not from within Submit.
  void FinishLater(Request* request, int result);
  // Does so now; true if there were any. For Drain.
  bool FinishLateOnes();

  uint64_t size_bytes_ = 0;
  bool read_only_ = false;
  Limits limits_;

 private:
  struct LateList;
  int Check(const Request& request) const;  // 0 or -errno
  EventLoop& loop_;
  std::string name_;
  std::shared_ptr<LateList> late_;
};

enum class CacheMode : uint8_t {
  kWriteback,     // the host's page cache; flushes reach the disk
  kNone,          // past the page cache (O_DIRECT); flushes reach the disk
  kWritethrough,  // the page cache, each write to the disk
  kDirectSync,    // past the page cache, each write to the disk
  kUnsafe,        // the page cache, flushes are ignored
};

struct ImageOptions {
  std::string path;
  std::string format = {};  // "raw"; empty: found out
  CacheMode cache = CacheMode::kWriteback;
  bool read_only = false;
  bool discard_unmap = true;  // false: discards are ignored
  // Byte-range locks as QEMU's: two machines can't write to one image.
  enum class Locking : uint8_t { kAuto, kOff };
  Locking locking = Locking::kAuto;
  bool share_write = false;  // others may write too (share-rw=on)
  // raw: the part of the file that is the disk.
  uint64_t raw_offset = 0;
  uint64_t raw_size = UINT64_MAX;  // UINT64_MAX: up to the end
};

// cache= of -drive. Errors: an unknown name.
Result<CacheMode> ParseCacheMode(const std::string& name);

// Opens a disk image for a machine. Errors in one line: absent, not readable, a directory, in use
// (by whom), empty, a format that isn't supported.
Result<std::shared_ptr<Node>> OpenImage(EventLoop& loop, const ImageOptions& options);

}  // namespace kvartz::block
