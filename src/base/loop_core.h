// What the event loop's backends have in common: watches, timers and posted tasks. Private to
// src/base.
#pragma once

#include <atomic>
#include <unordered_map>
#include <vector>

#include "base/event_loop.h"
#include "base/fd.h"
#include "base/sync.h"

namespace kvartz {

// What a Timer shares with the loop. Guarded by the loop's lock but for what is const.
struct TimerState final : VmClock::Observer, std::enable_shared_from_this<TimerState> {
  TimerState(EventLoop& owner, const VmClock* guest_clock, std::function<void()> task)
      : loop(owner), vm_clock(guest_clock), callback(std::move(task)) {}
  void ClockStarted() override { loop.ResyncTimer(*this); }

  EventLoop& loop;
  const VmClock* const vm_clock;  // null: deadlines are the loop's clock's
  const std::function<void()> callback;

  static constexpr size_t kNotQueued = ~size_t{0};
  bool armed = false;
  int64_t deadline_ns = 0;
  int64_t wake_ns = 0;             // the deadline by the loop's clock
  size_t heap_index = kNotQueued;  // armed, but not queued: its clock stands still
};

// A binary heap by wake_ns whose members know their place, so that any of them can be taken out.
class TimerHeap {
 public:
  bool empty() const { return heap_.empty(); }
  size_t size() const { return heap_.size(); }
  TimerState& top() const { return *heap_[0]; }
  void Insert(TimerState& timer);
  void Remove(TimerState& timer);  // no-op if it isn't queued

 private:
  void Place(size_t index, TimerState* timer);
  void SiftUp(size_t index);
  void SiftDown(size_t index);
  std::vector<TimerState*> heap_;
};

// Loop-owned like EventLoop; what other threads reach is guarded by mutex_.
class LoopCore : public EventLoop {
 public:
  LoopCore(const Clock& clock, EventFd wake) : clock_(clock), wake_(std::move(wake)) {}

  void Watch(int fd, FdEvents events, FdCallback callback) final;
  void Rearm(int fd, FdEvents events) final;
  void Unwatch(int fd) final;
  void Post(std::function<void()> task) final;
  void Run() final;
  void RunOnce(int64_t timeout_ns) final;
  void SetPolling(int64_t max_ns) final { polling_max_ns_ = max_ns; }
  void Stop() final;
  bool InLoopThread() const final;
  const Clock& clock() const final { return clock_; }
  void WatchWakeups();

 protected:
  // Generations tell a late event of an earlier watch on the same descriptor number apart.
  struct Watcher {
    int fd;
    uint32_t generation;
    FdEvents events;
    FdCallback callback;
    bool polled = false;        // the backend has told the host
    bool always_ready = false;  // a file, which the host doesn't poll (epoll backend)
  };
  // Makes the host's poll agree with watcher.events (kNone: none).
  virtual void UpdatePoll(Watcher& watcher) = 0;
  // Waits for events (-1: for ever, 0: not at all), then calls Dispatch and the FileOps' done for
  // each.
  virtual void Wait(int64_t timeout_ns) = 0;

  Watcher* FindWatcher(int fd, uint32_t generation);
  void Dispatch(int fd, uint32_t generation, uint32_t poll_mask);
  static uint32_t PollMask(FdEvents events);
  // Ends a Wait from another thread.
  void Wake() { wake_.Signal(); }
  void DropWatchers() { watchers_.clear(); }
  template <typename Visit>
  void ForEachWatcher(Visit visit) const {
    for (const auto& [fd, watcher] : watchers_) visit(*watcher);
  }
  uint32_t NewGeneration() { return next_generation_++; }
  int64_t polling_max_ns() const { return polling_max_ns_; }

 private:
  void ArmTimer(TimerState& timer, int64_t deadline_ns) final;
  void CancelTimer(TimerState& timer) final;
  void ResyncTimer(TimerState& timer) final;
  bool ReadTimer(const TimerState& timer, int64_t* deadline_ns) const final;

  // By what its clock says now. True: the loop sleeps too long for it.
  bool Queue(TimerState& timer) REQUIRES(mutex_);
  std::shared_ptr<TimerState> TakeExpired(int64_t now_ns) REQUIRES(mutex_);
  int64_t PrepareWait(int64_t timeout_ns) EXCLUDES(mutex_);
  void RunTimers() EXCLUDES(mutex_);
  void RunTasks() EXCLUDES(mutex_);
  bool InOwnTurn() const;

  const Clock& clock_;
  EventFd wake_;
  std::unordered_map<int, std::shared_ptr<Watcher>> watchers_;
  uint32_t next_generation_ = 1;
  std::atomic<int> thread_id_{0};  // 0: hasn't run yet
  std::atomic<bool> stop_{false};
  bool in_turn_ = false;
  int64_t polling_max_ns_ = 0;

  mutable Mutex mutex_;
  std::vector<std::function<void()>> tasks_ GUARDED_BY(mutex_);
  TimerHeap timers_ GUARDED_BY(mutex_);
  // While the loop waits, the time at which it wakes by itself; INT64_MIN while it needs no
  // wake-up.
  int64_t sleeps_until_ns_ GUARDED_BY(mutex_) = INT64_MIN;
};

Result<std::unique_ptr<EventLoop>> CreateEpollLoop(const Clock& clock);
Result<std::unique_ptr<EventLoop>> CreateUringLoop(const Clock& clock);

// fallocate's mode for kDiscard and kWriteZeroes.
int FallocateMode(FileOp::Kind kind);

}  // namespace kvartz
