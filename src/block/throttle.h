// I/O limits: leaky buckets, shared by the disks and filters of a group (throttling.* of -drive,
// block_set_io_throttle, -object throttle-group).
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>

#include "base/event_loop.h"
#include "base/result.h"
#include "base/sync.h"

namespace kvartz::block {

class Options;

// One bucket. 0: no limit.
struct ThrottleBucket {
  uint64_t average = 0;     // units a second
  uint64_t max = 0;         // units a second while bursting; 0: a tenth of a second's worth at once
  uint64_t max_length = 1;  // seconds that a burst at `max` may last

  bool operator==(const ThrottleBucket&) const = default;
};

struct ThrottleLimits {
  enum Index : uint8_t { kBpsTotal, kBpsRead, kBpsWrite, kIopsTotal, kIopsRead, kIopsWrite };
  static constexpr size_t kBuckets = 6;
  ThrottleBucket buckets[kBuckets];
  uint64_t iops_size = 0;  // a request counts once for each so many bytes; 0: once

  bool any() const;
  // Errors: total together with read or write of one kind, bursts without an average, a maximum
  // below it, values beyond 1e15, a length of 0 or without a maximum.
  Result<> Check() const;
  // The names of a limit in -drive and -object ("bps-total", "iops-read-max-length", "iops-size")
  // are taken from `options` below `prefix` ("throttling."). Checked.
  static Result<ThrottleLimits> Take(Options& options, const std::string& prefix);
  static const char* NameOf(Index index);  // "bps-total"
};

// Guarded. Members of several loops take turns: the one that waits longest goes first.
class ThrottleGroup {
 public:
  ThrottleGroup(std::string name, const Clock& clock) : name_(std::move(name)), clock_(clock) {}
  const std::string& name() const { return name_; }
  ThrottleLimits limits() const;
  void SetLimits(const ThrottleLimits& limits);  // checked ones; those who wait look again

  enum class Direction : uint8_t { kRead, kWrite };
  // One that asks, on its loop. Calls `ready` there when it should ask again.
  class Member {
   public:
    Member(std::shared_ptr<ThrottleGroup> group, EventLoop& loop, std::function<void()> ready);
    ~Member();
    Member(const Member&) = delete;
    Member& operator=(const Member&) = delete;
    // True: go on, it is counted. False: `ready` will be called.
    bool Admit(Direction direction, uint64_t bytes);
    // Counts a request that goes on in any case (while draining).
    void Count(Direction direction, uint64_t bytes);
    // Nothing of it waits any more: others needn't wait for it to ask.
    void Withdraw();
    ThrottleGroup& group() { return *group_; }

   private:
    friend class ThrottleGroup;
    struct Shared;
    const std::shared_ptr<ThrottleGroup> group_;
    const std::shared_ptr<Shared> shared_;
    Timer timer_;
  };

 private:
  struct Level {
    double level = 0, burst_level = 0;
  };
  using Waiter = std::shared_ptr<Member::Shared>;
  int64_t WaitNs(Direction direction) REQUIRES(mutex_);
  void Leak() REQUIRES(mutex_);
  void Account(Direction direction, uint64_t bytes) REQUIRES(mutex_);
  void WakeFirst(Direction direction) REQUIRES(mutex_);
  void LetAllGo() REQUIRES(mutex_);

  const std::string name_;
  const Clock& clock_;
  std::atomic<bool> limited_ = false;  // requests needn't look further
  mutable Mutex mutex_;
  ThrottleLimits limits_ GUARDED_BY(mutex_);
  Level levels_[ThrottleLimits::kBuckets] GUARDED_BY(mutex_);
  int64_t leaked_ns_ GUARDED_BY(mutex_) = 0;
  std::deque<Waiter> waiting_[2] GUARDED_BY(mutex_);  // by direction, in order
};

}  // namespace kvartz::block
