// The event loop on epoll; file operations run on a few threads.
#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "base/check.h"
#include "base/loop_core.h"

namespace kvartz {
namespace {

constexpr size_t kFileThreads = 4;
constexpr int kEventsPerTurn = 64;

struct OpQueue {
  FileOp* head = nullptr;
  FileOp* tail = nullptr;
  void Push(FileOp* op) {
    op->next = nullptr;
    (tail ? tail->next : head) = op;
    tail = op;
  }
  FileOp* Pop() {
    FileOp* op = head;
    if (op && !(head = op->next)) tail = nullptr;
    return op;
  }
};

int64_t Execute(const FileOp& op) {
  auto offset = static_cast<off_t>(op.offset);
  int64_t n = -1;
  do {
    switch (op.kind) {
      case FileOp::Kind::kReadv:
        n = preadv(op.fd, op.iov, static_cast<int>(op.iov_count), offset);
        break;
      case FileOp::Kind::kWritev:
        n = pwritev(op.fd, op.iov, static_cast<int>(op.iov_count), offset);
        break;
      case FileOp::Kind::kFsync:
        n = fsync(op.fd);
        break;
      case FileOp::Kind::kFdatasync:
        n = fdatasync(op.fd);
        break;
      case FileOp::Kind::kDiscard:
      case FileOp::Kind::kWriteZeroes:
        n = fallocate(op.fd, FallocateMode(op.kind), offset, static_cast<off_t>(op.length));
        break;
    }
  } while (n < 0 && errno == EINTR);
  return n < 0 ? -errno : n;
}

// Runs file operations on threads that are started when they are first needed. Guarded by its lock.
class FilePool {
 public:
  explicit FilePool(const EventFd& wake) : wake_(wake) {}
  ~FilePool() {
    {
      LockGuard guard(mutex_);
      stop_ = true;
    }
    work_.NotifyAll();
  }

  void Submit(FileOp* op) {
    LockGuard guard(mutex_);
    todo_.Push(op);
    pending_++;
    if (pending_ > threads_.size() && threads_.size() < kFileThreads) {
      threads_.emplace_back("file-io", [this] { Work(); });
    }
    work_.NotifyOne();
  }

  // Appends what is done to `queue`.
  void TakeDone(OpQueue& queue) {
    LockGuard guard(mutex_);
    while (FileOp* op = done_.Pop()) queue.Push(op);
  }

 private:
  void Work() {
    for (;;) {
      FileOp* op = nullptr;
      {
        LockGuard guard(mutex_);
        work_.Wait(guard,
                   [this]() KVARTZ_TSA(no_thread_safety_analysis) { return todo_.head || stop_; });
        op = todo_.Pop();
        if (!op) return;
      }
      int64_t result = Execute(*op);
      bool first = false;
      {
        LockGuard guard(mutex_);
        op->result = result;
        first = !done_.head;
        done_.Push(op);
        pending_--;
      }
      if (first) wake_.Signal();
    }
  }

  const EventFd& wake_;
  Mutex mutex_;
  CondVar work_;
  OpQueue todo_ GUARDED_BY(mutex_);
  OpQueue done_ GUARDED_BY(mutex_);
  size_t pending_ GUARDED_BY(mutex_) = 0;
  bool stop_ GUARDED_BY(mutex_) = false;
  std::vector<Thread> threads_ GUARDED_BY(mutex_);
};

class EpollLoop final : public LoopCore {
 public:
  EpollLoop(const Clock& clock, EventFd wake, UniqueFd epoll, EventFd file_wake)
      : LoopCore(clock, std::move(wake)),
        epoll_(std::move(epoll)),
        file_wake_(std::move(file_wake)),
        pool_(file_wake_) {
    WatchWakeups();
    Watch(file_wake_.fd(), FdEvents::kRead, [this](FdEvents) { FinishFileOps(); });
  }

  ~EpollLoop() override {
    DropWatchers();
    DrainFileOps();  // what is under way still writes to its owners' buffers
  }

  void Submit(FileOp* op) override {
    file_ops_++;
    pool_.Submit(op);
  }
  void Flush() override {}
  void DrainFileOps() override {
    for (FinishFileOps(); file_ops_ > 0; FinishFileOps()) {
      pollfd wake = {.fd = file_wake_.fd(), .events = POLLIN, .revents = 0};
      poll(&wake, 1, -1);
    }
  }
  const char* backend_name() const override { return "epoll"; }

 private:
  void UpdatePoll(Watcher& watcher) override {
    bool want = watcher.events != FdEvents::kNone;
    if (watcher.always_ready) {
      always_ready_ += want ? 0 : -1;
      watcher.always_ready = want;
      return;
    }
    epoll_event event = {
        .events = PollMask(watcher.events),
        .data = {.u64 = uint64_t{watcher.generation} << 32 | static_cast<uint32_t>(watcher.fd)}};
    if (!want) {
      if (watcher.polled) epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, watcher.fd, nullptr);
    } else if (epoll_ctl(epoll_.get(), watcher.polled ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, watcher.fd,
                         &event) < 0) {
      VERIFY(errno == EPERM);  // a file or /dev/null, always ready
      watcher.always_ready = true;
      always_ready_++;
      want = false;
    }
    watcher.polled = want;
  }

  void Wait(int64_t timeout_ns) override {
    if (always_ready_ > 0) timeout_ns = 0;
    epoll_event events[kEventsPerTurn];
    timespec timeout = {.tv_sec = timeout_ns / 1'000'000'000,
                        .tv_nsec = timeout_ns % 1'000'000'000};
    int count = epoll_pwait2(epoll_.get(), events, kEventsPerTurn,
                             timeout_ns < 0 ? nullptr : &timeout, nullptr);
    if (count < 0 && errno == ENOSYS) {  // before Linux 5.11: milliseconds, rounded up
      int64_t ms =
          timeout_ns < 0 ? -1 : std::min<int64_t>((timeout_ns + 999'999) / 1'000'000, INT32_MAX);
      count = epoll_wait(epoll_.get(), events, kEventsPerTurn, static_cast<int>(ms));
    }
    for (int i = 0; i < count; i++) {
      uint64_t data = events[i].data.u64;
      Dispatch(static_cast<int>(data & UINT32_MAX), static_cast<uint32_t>(data >> 32),
               events[i].events);
    }
    if (always_ready_ > 0) DispatchAlwaysReady();
  }

  void DispatchAlwaysReady() {
    std::vector<std::pair<int, uint32_t>> ready;
    ForEachWatcher([&](const Watcher& watcher) {
      if (watcher.always_ready) ready.emplace_back(watcher.fd, watcher.generation);
    });
    for (auto [fd, generation] : ready) Dispatch(fd, generation, EPOLLIN | EPOLLOUT);
  }

  void FinishFileOps() {
    file_wake_.Consume();
    pool_.TakeDone(finished_);
    // A `done` may come back here (DrainFileOps): what is left is shared.
    while (FileOp* op = finished_.Pop()) {
      file_ops_--;
      op->done(op, op->result);
    }
  }

  UniqueFd epoll_;
  EventFd file_wake_;
  FilePool pool_;
  OpQueue finished_;
  size_t file_ops_ = 0;
  int always_ready_ = 0;
};

}  // namespace

Result<std::unique_ptr<EventLoop>> CreateEpollLoop(const Clock& clock) {
  EventFd wake = TRY(EventFd::Create());
  EventFd file_wake = TRY(EventFd::Create());
  UniqueFd epoll(epoll_create1(EPOLL_CLOEXEC));
  if (!epoll) return Fail(ErrnoError(errno, "cannot create an epoll descriptor"));
  return std::make_unique<EpollLoop>(clock, std::move(wake), std::move(epoll),
                                     std::move(file_wake));
}

}  // namespace kvartz
