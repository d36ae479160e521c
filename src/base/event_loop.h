// The event loop: readiness of descriptors, timers, posted tasks and file I/O, on one thread. On
// io_uring; on epoll (and a small pool of threads for file I/O) where the host forbids io_uring.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/clock.h"
#include "base/result.h"

namespace kvartz {

enum class FdEvents : uint32_t { kNone = 0, kRead = 1, kWrite = 2, kReadWrite = 3 };

// One file operation under way. The owner keeps it (and the buffers) alive until `done` is called,
// on the loop's thread, with the byte count or -errno. Intrusive: no allocation on the I/O path.
struct FileOp {
  enum class Kind : uint8_t { kReadv, kWritev, kFsync, kFdatasync, kDiscard, kWriteZeroes };
  Kind kind = Kind::kReadv;
  int fd = -1;
  const iovec* iov = nullptr;  // kReadv, kWritev
  unsigned iov_count = 0;      // at most IOV_MAX (1024)
  uint64_t offset = 0;
  uint64_t length = 0;  // kDiscard, kWriteZeroes
  void (*done)(FileOp* op, int64_t result) = nullptr;
  void* owner = nullptr;

  // The loop's own, while the operation is under way.
  FileOp* next = nullptr;
  int64_t result = 0;
};

struct TimerState;

// Loop-owned: every method but Post, Stop and InLoopThread is called on the thread that runs the
// loop (or before it runs).
class EventLoop {
 public:
  enum class Backend { kAuto, kIoUring, kEpoll };
  // Not to be used on the other side of a fork: daemonize first.
  static Result<std::unique_ptr<EventLoop>> Create(Backend backend = Backend::kAuto,
                                                   const Clock& clock = MonotonicClock::Instance());
  virtual ~EventLoop() = default;

  // Watches `fd` (level-triggered) until Unwatch, which comes before close. One watch a descriptor.
  // The callback may unwatch any descriptor. A hang-up or an error is reported as what is watched
  // for; kNone: nothing is, until Rearm.
  using FdCallback = std::function<void(FdEvents ready)>;
  virtual void Watch(int fd, FdEvents events, FdCallback callback) = 0;
  virtual void Rearm(int fd, FdEvents events) = 0;
  virtual void Unwatch(int fd) = 0;

  // Runs `task` on the loop's thread, in order. Any thread.
  virtual void Post(std::function<void()> task) = 0;

  // Starts a file operation; `op->done` is never called from within Submit.
  virtual void Submit(FileOp* op) = 0;
  // Hands what was submitted to the host now (otherwise at the end of the loop's turn).
  virtual void Flush() = 0;
  // Returns when no file operation is under way: their `done` is called meanwhile (it may submit
  // more), and nothing else of a turn runs. Callable within a turn.
  virtual void DrainFileOps() = 0;

  // Before it sleeps the loop looks out for what comes, for up to this long, as long as that pays:
  // to be woken takes longer. 0, as at first: it sleeps at once. On io_uring.
  virtual void SetPolling(int64_t max_ns) = 0;

  // Runs until Stop.
  virtual void Run() = 0;
  // One turn: waits at most `timeout_ns` (-1: for ever) and handles what is ready.
  virtual void RunOnce(int64_t timeout_ns) = 0;
  // Makes Run return. Any thread, and signal handlers.
  virtual void Stop() = 0;
  virtual bool InLoopThread() const = 0;
  virtual const Clock& clock() const = 0;
  virtual const char* backend_name() const = 0;

 private:
  friend class Timer;
  friend struct TimerState;
  // Any thread.
  virtual void ArmTimer(TimerState& timer, int64_t deadline_ns) = 0;
  virtual void CancelTimer(TimerState& timer) = 0;
  virtual void ResyncTimer(TimerState& timer) = 0;
  virtual bool ReadTimer(const TimerState& timer, int64_t* deadline_ns) const = 0;
};

// A one-shot timer. Arm and Cancel from any thread; the callback runs on the loop's thread. After
// Cancel returned on the loop's thread, or after destruction there, the callback doesn't run any
// more.
class Timer {
 public:
  Timer(EventLoop& loop, std::function<void()> callback);
  // As above for guest time: deadlines are `clock`'s, and while that stands still the timer waits.
  // The loop's clock must be the base of `clock`.
  Timer(EventLoop& loop, const VmClock& clock, std::function<void()> callback);
  ~Timer();
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  void Arm(int64_t deadline_ns);  // replaces an earlier deadline
  void Cancel();
  bool armed() const;
  int64_t deadline_ns() const;  // the last one armed

 private:
  EventLoop& loop_;
  std::shared_ptr<TimerState> state_;
};

}  // namespace kvartz
