#include "base/clock.h"

#include <time.h>

#include "base/check.h"

namespace kvartz {
namespace {

int64_t ReadNs(clockid_t clock) {
  timespec ts;
  clock_gettime(clock, &ts);
  return ts.tv_sec * 1'000'000'000 + ts.tv_nsec;
}

}  // namespace

int64_t MonotonicClock::NowNs() const { return ReadNs(CLOCK_MONOTONIC); }

MonotonicClock& MonotonicClock::Instance() {
  static MonotonicClock clock;
  return clock;
}

int64_t HostRealtimeNs() { return ReadNs(CLOCK_REALTIME); }

VmClock::Snapshot VmClock::Load() const {
  // The acquire loads keep the second look at the sequence behind them (no fence: ThreadSanitizer
  // doesn't know fences).
  for (;;) {
    uint32_t before = sequence_.load(std::memory_order_acquire);
    Snapshot s{running_.load(std::memory_order_acquire),
               offset_ns_.load(std::memory_order_acquire)};
    if (before % 2 == 0 && sequence_.load(std::memory_order_relaxed) == before) return s;
  }
}

void VmClock::Store(Snapshot s) {
  uint32_t sequence = sequence_.load(std::memory_order_relaxed);
  sequence_.store(sequence + 1, std::memory_order_relaxed);
  running_.store(s.running, std::memory_order_release);
  offset_ns_.store(s.offset_ns, std::memory_order_release);
  sequence_.store(sequence + 2, std::memory_order_release);
}

int64_t VmClock::NowNs() const {
  Snapshot s = Load();
  return s.running ? base_.NowNs() - s.offset_ns : s.offset_ns;
}

void VmClock::Start() {
  {
    LockGuard guard(mutex_);
    Snapshot s = Load();
    if (s.running) return;
    Store({true, base_.NowNs() - s.offset_ns});
  }
  LockGuard guard(observers_mutex_);
  for (Observer* observer : observers_) observer->ClockStarted();
}

void VmClock::Stop() {
  LockGuard guard(mutex_);
  Snapshot s = Load();
  if (s.running) Store({false, base_.NowNs() - s.offset_ns});
}

bool VmClock::running() const { return running_.load(std::memory_order_acquire); }

void VmClock::SetNowNs(int64_t now_ns) {
  LockGuard guard(mutex_);
  VERIFY(!running_.load(std::memory_order_relaxed));
  Store({false, now_ns});
}

int64_t VmClock::ToBaseNs(int64_t vm_ns) const {
  Snapshot s = Load();
  int64_t base_ns = 0;
  if (!s.running || __builtin_add_overflow(vm_ns, s.offset_ns, &base_ns)) return INT64_MAX;
  return base_ns;
}

void VmClock::AddObserver(Observer* observer) const {
  LockGuard guard(observers_mutex_);
  observers_.push_back(observer);
}

void VmClock::RemoveObserver(Observer* observer) const {
  LockGuard guard(observers_mutex_);
  std::erase(observers_, observer);
}

}  // namespace kvartz
