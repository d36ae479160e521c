// Locks, guarded values and threads. The only place where std::mutex and std::thread are named.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

namespace kvartz {

#if defined(__clang__)
#define KVARTZ_TSA(x) __attribute__((x))
#else
#define KVARTZ_TSA(x)
#endif
#define CAPABILITY(x) KVARTZ_TSA(capability(x))
#define GUARDED_BY(x) KVARTZ_TSA(guarded_by(x))
#define REQUIRES(...) KVARTZ_TSA(requires_capability(__VA_ARGS__))
#define EXCLUDES(...) KVARTZ_TSA(locks_excluded(__VA_ARGS__))

class CAPABILITY("mutex") Mutex {
 public:
  void Lock() KVARTZ_TSA(acquire_capability()) { mutex_.lock(); }
  void Unlock() KVARTZ_TSA(release_capability()) { mutex_.unlock(); }
  bool TryLock() KVARTZ_TSA(try_acquire_capability(true)) { return mutex_.try_lock(); }

 private:
  friend class CondVar;
  std::mutex mutex_;
};

class KVARTZ_TSA(scoped_lockable) LockGuard {
 public:
  explicit LockGuard(Mutex& mutex) KVARTZ_TSA(acquire_capability(mutex)) : mutex_(mutex) {
    mutex_.Lock();
  }
  ~LockGuard() KVARTZ_TSA(release_capability()) { mutex_.Unlock(); }
  LockGuard(const LockGuard&) = delete;
  LockGuard& operator=(const LockGuard&) = delete;

 private:
  friend class CondVar;
  Mutex& mutex_;
};

class CondVar {
 public:
  template <typename Predicate>
  void Wait(LockGuard& guard, Predicate done) {
    std::unique_lock<std::mutex> lock(guard.mutex_.mutex_, std::adopt_lock);
    cond_.wait(lock, done);
    lock.release();
  }
  // False if `timeout_ns` passed first.
  template <typename Predicate>
  bool WaitFor(LockGuard& guard, int64_t timeout_ns, Predicate done) {
    std::unique_lock<std::mutex> lock(guard.mutex_.mutex_, std::adopt_lock);
    bool ok = cond_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), done);
    lock.release();
    return ok;
  }
  void NotifyAll() { cond_.notify_all(); }
  void NotifyOne() { cond_.notify_one(); }

 private:
  std::condition_variable cond_;
};

// Data that is reachable only under its lock: `auto state = guarded.Lock(); state->x = 1;`
template <typename T>
class Guarded {
 public:
  class Access {
   public:
    explicit Access(Guarded& owner) : guard_(owner.mutex_), value_(owner.value_) {}
    T* operator->() { return &value_; }
    T& operator*() { return value_; }
    LockGuard& guard() { return guard_; }

   private:
    LockGuard guard_;
    T& value_;
  };
  template <typename... Args>
  explicit Guarded(Args&&... args) : value_(std::forward<Args>(args)...) {}
  Access Lock() { return Access(*this); }

 private:
  Mutex mutex_;
  T value_;
};

// A named thread; joined when destroyed. All signals that the process handles are blocked in it but
// those in `Start`'s body.
class Thread {
 public:
  Thread() = default;
  // `name`: at most 15 characters are visible to the host.
  Thread(const std::string& name, std::function<void()> body);
  Thread(Thread&&) = default;
  Thread& operator=(Thread&& other) noexcept;
  ~Thread() { Join(); }
  void Join();
  bool joinable() const { return thread_.joinable(); }
  std::thread::native_handle_type native_handle() { return thread_.native_handle(); }

 private:
  std::thread thread_;
};

// The host's id of the calling thread (gettid), as shown by query-cpus-fast.
int CurrentThreadId();

}  // namespace kvartz
