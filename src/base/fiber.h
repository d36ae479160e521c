// Fibers: straight-line code that waits without blocking its thread, each on a stack of its own.
// For slow paths and long work on an event loop (metadata of disk images, jobs); what must be fast
// is intrusive callbacks. See docs/decisions/0008.
//
// A fiber belongs to the thread that started it and runs only there, one at a time, until it waits
// or ends; so code between two waits needs no lock. Stacks have kFiberStackBytes and a guard page:
// no large arrays on them. Fibers aren't cancelled: what they wait for must come.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "base/event_loop.h"

namespace kvartz {

constexpr size_t kFiberStackBytes = 256 << 10;

class Fiber {
 public:
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs `body` in a new fiber: at once up to its first wait, or, when called within a fiber, when
  // that one waits or ends. `after` then runs outside of any fiber, on the thread's own stack: the
  // place for callbacks to code that knows nothing of fibers.
  static void Start(std::function<void()> body, std::function<void()> after = nullptr);

  static bool Inside() { return Current() != nullptr; }
  static Fiber* Current();  // null outside

  // The current fiber waits until Wake, which may come first and is then remembered.
  static void Suspend();
  // Makes it go on: at once if the caller isn't in a fiber itself, else when that one waits or
  // ends. On the fiber's thread.
  void Wake();

 protected:
  Fiber() = default;
  ~Fiber() = default;
};

// Fibers that wait for the same thing, in order. Loop-owned.
class FiberQueue {
 public:
  void Wait();  // the current fiber
  // True if one was waiting.
  bool WakeOne();
  void WakeAll();
  bool empty() const { return head_ == nullptr; }

 private:
  struct Waiter {
    Fiber* fiber;
    Waiter* next;
  };
  Waiter* head_ = nullptr;
  Waiter* tail_ = nullptr;
};

// Held across waits; given to those who wait in order. Loop-owned.
class FiberMutex {
 public:
  void Lock();
  bool TryLock();  // outside of fibers, too
  void Unlock();
  bool locked() const { return locked_; }

 private:
  bool locked_ = false;
  FiberQueue waiters_;
};

class FiberLock {
 public:
  explicit FiberLock(FiberMutex& mutex) : mutex_(mutex) { mutex_.Lock(); }
  ~FiberLock() { mutex_.Unlock(); }
  FiberLock(const FiberLock&) = delete;
  FiberLock& operator=(const FiberLock&) = delete;

 private:
  FiberMutex& mutex_;
};

// Runs `task` on the thread's own stack and returns when it is done: for what must not be called
// within a fiber.
void RunOutsideFibers(const std::function<void()>& task);

// The current fiber waits until the loop's clock says `deadline_ns`.
void FiberSleepUntil(EventLoop& loop, int64_t deadline_ns);

}  // namespace kvartz
