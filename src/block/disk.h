// What a device of a machine holds of a disk: its top node, which jobs and snapshots replace below
// it, with limits, statistics and what is done upon errors.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/fiber.h"
#include "block/error_policy.h"
#include "block/node_user.h"
#include "block/throttle.h"

namespace kvartz::block {

class Disk;

// A request of a device; embedded in what it is for. The device fills in the first part, and keeps
// it, the iovecs and the buffers alive until `done` is called: later, on the loop's thread, outside
// of fibers, with 0 or -errno.
struct DiskRequest {
  Request::Kind kind = Request::Kind::kRead;
  bool fua = false;
  bool unmap = false;
  uint64_t offset = 0;
  uint64_t length = 0;
  const iovec* iov = nullptr;
  unsigned iov_count = 0;
  void (*done)(DiskRequest* request, int result) = nullptr;
  void* owner = nullptr;

  // The disk's own.
  Request io;
  Disk* disk = nullptr;
  int64_t start_ns = 0;
  DiskRequest* next = nullptr;
};

// As query-blockstats shows them.
struct DiskStatistics {
  struct Operation {
    uint64_t bytes = 0, operations = 0, failed = 0, invalid = 0;
    int64_t total_time_ns = 0;
  };
  Operation read, write, flush, unmap;  // write: zeroes, too; unmap: discards
  uint64_t write_highest_offset = 0;
  int64_t idle_time_ns = -1;  // since the last one ended; -1: there was none
};

// Of a request that failed (BLOCK_IO_ERROR).
struct DiskFailure {
  Request::Kind kind = Request::Kind::kRead;
  ErrorAction action = ErrorAction::kReport;
  int errno_value = 0;
  std::string node_name = {};
};

class DiskOwner {
 public:
  // On the disk's loop. kStop: the machine is to be paused; the request is kept.
  virtual void DiskFailed(Disk& disk, const DiskFailure& failure) = 0;
  virtual void DiskResized(Disk& disk) = 0;

 protected:
  ~DiskOwner() = default;
};

// Loop-owned by loop(), which is its node's: what others call comes over by CallOn.
class Disk final : public NodeUser {
 public:
  // `name`: the device's, for messages. `owner` may be null. Its node is given by
  // Registry::Attach, or ReplaceNode where there is no registry.
  Disk(EventLoop& loop, std::string name, DiskOwner* owner = nullptr);
  ~Disk() override;

  const std::string& name() const { return name_; }
  EventLoop& loop() const { return *loop_; }
  // Of the node; 0 and true while there is none.
  uint64_t size_bytes() const { return node_ ? node_->size_bytes() : 0; }
  bool read_only() const { return !node_ || node_->read_only(); }
  const Limits& limits() const { return node_ ? node_->limits() : no_limits_; }

  // Not in a fiber. Without a node: -ENOMEDIUM.
  void Start(DiskRequest* request);
  // Returns when no request is under way; those that wait for limits go on now. Not in a fiber.
  // Those that are kept remain so.
  void Drain();

  // Failed requests that wait for the machine to go on (kStop), and those that came while the node
  // was quiesced. A machine that is stopped calls Hold and then Drain, so that none is started any
  // more, saves them with the device if it saves, and calls Release when it goes on.
  void Hold();
  void Release();
  bool held() const { return hold_; }
  const DiskRequest* kept() const { return kept_head_; }  // linked by `next`
  // A device that is reset doesn't want them any more: they end with -ECANCELED.
  void DropKept();

  void SetErrorPolicies(ErrorPolicy on_read, ErrorPolicy on_write);
  ErrorPolicy on_read_error() const { return on_read_error_; }
  ErrorPolicy on_write_error() const { return on_write_error_; }
  bool io_failed() const { return io_failed_; }  // io-status: since the last Release
  bool io_no_space() const { return io_no_space_; }

  // Null: no limits. Not in a fiber.
  void SetThrottle(std::shared_ptr<ThrottleGroup> group);
  const std::shared_ptr<ThrottleGroup>& throttle() const { return throttle_group_; }

  DiskStatistics statistics() const;
  void CountInvalid(Request::Kind kind);  // refused by the device

  // NodeUser.
  std::string UserName() const override;
  const NodePtr& node() const override { return node_; }
  bool writes() const override { return writes_; }
  void set_writes(bool writes) { writes_ = writes; }  // before it is attached; default: true
  void Quiesce() override;
  void Unquiesce() override;
  void ReplaceNode(NodePtr node) override;
  void NodeResized() override;

 private:
  static void Done(Request* io, int result);
  void StartSlowly(DiskRequest* request);
  void Launch(DiskRequest* request);
  bool Failed(DiskRequest* request, int result, int* report);
  void StartKept();
  void StartThrottled();
  void MakeThrottle();
  void UpdateSlow();
  DiskStatistics::Operation& OperationOf(Request::Kind kind);

  EventLoop* loop_;
  const std::string name_;
  DiskOwner* const owner_;
  NodePtr node_;
  const Limits no_limits_ = {};
  bool writes_ = true;
  bool slow_ = false;  // held, quiesced, throttled, without a node: Start looks closer
  bool hold_ = false;
  unsigned quiesced_ = 0;
  uint64_t in_flight_ = 0;
  FiberQueue quiet_;
  DiskRequest *kept_head_ = nullptr, *kept_tail_ = nullptr;
  DiskRequest *throttled_head_[2] = {}, *throttled_tail_[2] = {};  // read, write
  std::shared_ptr<ThrottleGroup> throttle_group_;
  std::unique_ptr<ThrottleGroup::Member> throttle_;
  ErrorPolicy on_read_error_ = ErrorPolicy::kReport, on_write_error_ = ErrorPolicy::kEnospc;
  bool io_failed_ = false, io_no_space_ = false;
  DiskStatistics statistics_;
  int64_t last_done_ns_ = -1;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);  // for posted tasks
};

}  // namespace kvartz::block
