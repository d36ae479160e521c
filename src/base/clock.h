// Time is injected. Nanoseconds everywhere; the zero point is the clock's own.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "base/sync.h"

namespace kvartz {

// Any thread may read a clock.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual int64_t NowNs() const = 0;
};

// The host's CLOCK_MONOTONIC.
class MonotonicClock final : public Clock {
 public:
  int64_t NowNs() const override;
  static MonotonicClock& Instance();
};

// Wall-clock time of the host, nanoseconds since 1970 UTC.
int64_t HostRealtimeNs();

// For tests: stands still until it is advanced.
class ManualClock final : public Clock {
 public:
  int64_t NowNs() const override { return now_ns_.load(); }
  void Set(int64_t now_ns) { now_ns_ = now_ns; }
  void Advance(int64_t delta_ns) { now_ns_ += delta_ns; }

 private:
  std::atomic<int64_t> now_ns_{0};
};

// The guest's time: runs with `base` while the machine runs, stands still while it is stopped.
// Guarded by its lock; NowNs takes no lock.
class VmClock final : public Clock {
 public:
  explicit VmClock(const Clock& base) : base_(base) {}
  int64_t NowNs() const override;
  // What NowNs() would be at `now` of the base clock is now - offset while running.
  void Start();
  void Stop();
  bool running() const;
  // Sets the present guest time (restore of a saved machine). Only while stopped.
  void SetNowNs(int64_t now_ns);
  // The base clock's time at which this clock will show `vm_ns`; INT64_MAX while stopped.
  int64_t ToBaseNs(int64_t vm_ns) const;

  // Told, on the thread that called Start, that the clock runs again: what waits for a guest time
  // looks anew. Timers of event loops do this themselves.
  class Observer {
   public:
    virtual void ClockStarted() = 0;

   protected:
    ~Observer() = default;
  };
  void AddObserver(Observer* observer) const;
  void RemoveObserver(Observer* observer) const;

 private:
  struct Snapshot {
    bool running;
    int64_t offset_ns;
  };
  Snapshot Load() const;
  void Store(Snapshot snapshot) REQUIRES(mutex_);

  const Clock& base_;
  // Sequence lock: odd while a change is under way.
  std::atomic<uint32_t> sequence_{0};
  std::atomic<bool> running_{false};
  std::atomic<int64_t> offset_ns_{0};  // running: base - vm; stopped: the vm time
  Mutex mutex_;                        // orders Start, Stop and SetNowNs
  mutable Mutex observers_mutex_;
  mutable std::vector<Observer*> observers_ GUARDED_BY(observers_mutex_);
};

}  // namespace kvartz
