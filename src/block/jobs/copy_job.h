// What jobs on disks in use have in common: what is still to be copied is a bitmap, ranges of it
// are copied some at a time, and errors are dealt with by policy.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "block/dirty_bitmap.h"
#include "block/jobs/job.h"
#include "block/jobs/live.h"
#include "block/range_locks.h"

namespace kvartz::block {

// Claims some nodes, all or none, until Release. Fiber, main loop.
class Claims {
 public:
  Claims(Registry& registry, std::string by) : registry_(registry), by_(std::move(by)) {}
  Result<> Take(std::vector<NodePtr> nodes) {
    for (const NodePtr& node : nodes) {
      Result<> claimed = registry_.Claim(*node, by_);
      if (!claimed) {
        Release();
        return claimed;
      }
      nodes_.push_back(node);
    }
    return {};
  }
  void Release() {
    for (const NodePtr& node : std::exchange(nodes_, {})) registry_.Unclaim(*node, by_);
  }

 private:
  Registry& registry_;
  const std::string by_;
  std::vector<NodePtr> nodes_;
};

// Loop-owned by the loop of its nodes; changes of the graph are called over to the registry's.
class CopyJob : public Job {
 public:
  struct Policies {
    ErrorPolicy on_source_error = ErrorPolicy::kReport, on_target_error = ErrorPolicy::kReport;
  };

 protected:
  // kBefore: a range isn't dirty any more when its copy begins, so that what is written meanwhile
  // makes it so again. kAfter: when its copy is there.
  enum class Clear : uint8_t { kBefore, kAfter };
  CopyJob(Registry& registry, EventLoop& loop, const CommonSettings& common, Clear clear,
          Policies policies);

  // Fiber: until nothing is dirty, or MayStop.
  Result<> CopyDirty();
  // Fiber: one range, which is locked. 0 or -errno; `reading`: of the source.
  virtual int CopyRange(uint64_t offset, uint64_t length, bool* reading) = 0;
  // After each pass over the disk: the rest is of no interest now.
  virtual bool MayStop() { return false; }
  // Between pieces: the job can't succeed any more.
  virtual Result<> CheckSound() { return {}; }
  virtual std::string SourceName() const = 0;
  virtual std::string TargetName() const = 0;

  // Fiber: dirty is what the layers from `top` down to `base` (exclusive; null: all) have; kBelow:
  // those below `top` alone.
  enum class Layers : uint8_t { kAll, kBelow };
  Result<> MarkAllocated(Node& top, Node* base, Layers layers);
  // Fiber, main loop: claims the nodes and puts `filter` above `source`, or does nothing of it.
  Result<> InsertFilter(const NodePtr& filter, const NodePtr& source, const NodePtr& target);
  // Fiber: runs `body` in one of the registry's loop.
  template <typename Body>
  auto OnMain(Body body) {
    return CallOn(loop(), registry_.loop(), std::move(body));
  }
  std::string who() const { return "job '" + id() + "'"; }

  Registry& registry_;
  Claims claims_;
  std::shared_ptr<DirtyBitmap> todo_;  // set before it runs
  RangeLocks locks_;
  unsigned parallel_ = 16;
  bool skip_ignored_ = false;  // ignored errors leave a range out; else it is tried again
  bool skipped_ = false;
  // The guest waits: no pause, no speed limit, and errors end it.
  bool at_once_ = false;

 private:
  struct Failure {
    int rc = 0;
    bool reading = false;
    uint64_t offset = 0, length = 0;
  };
  Result<> Pump();
  Result<> HandleFailure();
  void StartPiece(uint64_t offset, uint64_t length);
  void CopyPiece(uint64_t offset, uint64_t length);
  void UpdateTotal();

  const Clear clear_;
  const Policies policies_;
  unsigned under_way_ = 0;
  uint64_t bytes_under_way_ = 0;
  int64_t counted_ns_ = INT64_MIN;
  FiberQueue piece_done_;
  Failure failure_;
};

}  // namespace kvartz::block
