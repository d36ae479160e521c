// The event loop on io_uring: polls, file operations and the wait itself go to the host in one call
// a turn.
#include <liburing.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "base/check.h"
#include "base/loop_core.h"

namespace kvartz {
namespace {

constexpr unsigned kEntries = 256;
constexpr unsigned kReapedAtOnce = 128;

// user_data: a FileOp's address (aligned, so even), or an odd tag.
constexpr uint64_t kIgnored = 1;
constexpr uint64_t kPollTag = 3;

uint64_t PollData(int fd, uint32_t generation) {
  return uint64_t{generation} << 32 | static_cast<uint64_t>(fd) << 2 | kPollTag;
}

struct PollKey {
  int fd;
  uint32_t generation;
};

struct Completion {
  uint64_t data = 0;
  int32_t result = 0;
};

// Owns the ring. Errors of Create leave nothing behind.
class Ring {
 public:
  Ring() = default;
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring() {
    if (ready_) io_uring_queue_exit(&ring_);
  }

  Result<> Init() {
    io_uring_params params = {};
    // Completions wait for our next call instead of interrupting us (Linux 5.19).
    params.flags = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
    int error = io_uring_queue_init_params(kEntries, &ring_, &params);
    if (error == -EINVAL) {
      params = {};
      error = io_uring_queue_init_params(kEntries, &ring_, &params);
    }
    if (error < 0) return Fail(ErrnoError(-error, "cannot set up io_uring"));
    ready_ = true;
    io_uring_ring_dontfork(&ring_);
    constexpr unsigned kNeeded = IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG | IORING_FEAT_FAST_POLL;
    if ((params.features & kNeeded) != kNeeded) {
      return Fail(ErrorCode::kUnsupported, "the host's io_uring is too old (Linux 5.11 is needed)");
    }
    return {};
  }

  io_uring* get() { return &ring_; }

 private:
  io_uring ring_ = {};
  bool ready_ = false;
};

class UringLoop final : public LoopCore {
 public:
  UringLoop(const Clock& clock, EventFd wake) : LoopCore(clock, std::move(wake)) {}
  Result<> Init() {
    TRY(ring_.Init());
    WatchWakeups();
    return {};
  }

  ~UringLoop() override {
    DropWatchers();
    DrainFileOps();  // what is under way still writes to its owners' buffers
  }

  void Submit(FileOp* op) override {
    io_uring_sqe* sqe = NextEntry();
    auto length = static_cast<off_t>(op->length);
    auto offset = op->offset;
    switch (op->kind) {
      case FileOp::Kind::kReadv:
        if (op->iov_count == 1 && op->iov->iov_len <= INT32_MAX) {
          auto size = static_cast<unsigned>(op->iov->iov_len);
          io_uring_prep_read(sqe, op->fd, op->iov->iov_base, size, offset);
        } else {
          io_uring_prep_readv(sqe, op->fd, op->iov, op->iov_count, offset);
        }
        break;
      case FileOp::Kind::kWritev:
        if (op->iov_count == 1 && op->iov->iov_len <= INT32_MAX) {
          auto size = static_cast<unsigned>(op->iov->iov_len);
          io_uring_prep_write(sqe, op->fd, op->iov->iov_base, size, offset);
        } else {
          io_uring_prep_writev(sqe, op->fd, op->iov, op->iov_count, offset);
        }
        break;
      case FileOp::Kind::kFsync:
        io_uring_prep_fsync(sqe, op->fd, 0);
        break;
      case FileOp::Kind::kFdatasync:
        io_uring_prep_fsync(sqe, op->fd, IORING_FSYNC_DATASYNC);
        break;
      case FileOp::Kind::kDiscard:
      case FileOp::Kind::kWriteZeroes:
        io_uring_prep_fallocate(sqe, op->fd, FallocateMode(op->kind), static_cast<off_t>(offset),
                                length);
        break;
    }
    io_uring_sqe_set_data64(sqe, reinterpret_cast<uint64_t>(op));
    file_ops_++;
  }

  void Flush() override { io_uring_submit(ring_.get()); }
  void DrainFileOps() override {
    for (CompleteReaped(Polls::kKeep); file_ops_ > 0; CompleteReaped(Polls::kKeep)) {
      io_uring_submit_and_wait(ring_.get(), 1);
      Reap();
    }
  }
  const char* backend_name() const override { return "io_uring"; }

 private:
  // The host takes no more while its completions find no room: make some.
  io_uring_sqe* NextEntry() {
    for (;;) {
      if (io_uring_sqe* sqe = io_uring_get_sqe(ring_.get())) return sqe;
      if (io_uring_submit(ring_.get()) < 0) Reap();
    }
  }

  // Polls are one-shot and set again after each event, which is what makes them level-triggered.
  // They are handed over by the thread that waits: the host ends the requests of a thread that goes
  // away.
  void UpdatePoll(Watcher& watcher) override {
    if (watcher.polled) {
      io_uring_sqe* sqe = NextEntry();
      io_uring_prep_poll_remove(sqe, PollData(watcher.fd, watcher.generation));
      io_uring_sqe_set_data64(sqe, kIgnored);
      watcher.polled = false;
      watcher.generation = NewGeneration();
      // Now: until then the poll keeps the file open, though its owner may close it.
      if (watcher.events == FdEvents::kNone) io_uring_submit(ring_.get());
    }
    if (watcher.events != FdEvents::kNone) to_poll_.push_back({watcher.fd, watcher.generation});
  }

  void Poll(const PollKey& key) {
    Watcher* watcher = FindWatcher(key.fd, key.generation);
    if (!watcher || watcher->polled || watcher->events == FdEvents::kNone) return;
    io_uring_sqe* sqe = NextEntry();
    io_uring_prep_poll_add(sqe, key.fd, PollMask(watcher->events));
    io_uring_sqe_set_data64(sqe, PollData(key.fd, key.generation));
    watcher->polled = true;
  }

  void Wait(int64_t timeout_ns) override {
    for (const PollKey& key : to_poll_) Poll(key);
    to_poll_.clear();
    if (!completions_.empty()) timeout_ns = 0;
    const bool polls = timeout_ns != 0 && polling_max_ns() > 0;
    const Clock& time = MonotonicClock::Instance();
    const int64_t began_ns = polls ? time.NowNs() : 0;
    if (polls && polling_pays_ && LookOut(began_ns, timeout_ns)) timeout_ns = 0;
    if (timeout_ns < 0) {
      io_uring_submit_and_wait(ring_.get(), 1);
    } else if (timeout_ns == 0) {
      io_uring_submit(ring_.get());
    } else {
      __kernel_timespec timeout = {.tv_sec = timeout_ns / 1'000'000'000,
                                   .tv_nsec = timeout_ns % 1'000'000'000};
      io_uring_cqe* first = nullptr;
      io_uring_submit_and_wait_timeout(ring_.get(), &first, 1, &timeout, nullptr);
    }
    if (polls) polling_pays_ = time.NowNs() - began_ns <= polling_max_ns();
    Reap();
    CompleteReaped(Polls::kDispatch);
  }

  // True: something came.
  bool LookOut(int64_t began_ns, int64_t timeout_ns) {
    int64_t longest_ns = polling_max_ns();
    if (timeout_ns > 0) longest_ns = std::min(longest_ns, timeout_ns);
    io_uring* ring = ring_.get();
    io_uring_submit(ring);
    do {
      // Completed, or about to be once we ask.
      if (io_uring_cq_ready(ring) > 0 ||
          (__atomic_load_n(ring->sq.kflags, __ATOMIC_RELAXED) & IORING_SQ_TASKRUN) != 0) {
        return true;
      }
      __builtin_ia32_pause();
    } while (MonotonicClock::Instance().NowNs() - began_ns < longest_ns);
    return false;
  }

  // Copies what is complete out of the ring, behind what callbacks have still to be called for.
  void Reap() {
    io_uring_cqe* cqes[kReapedAtOnce];
    unsigned count = io_uring_peek_batch_cqe(ring_.get(), cqes, kReapedAtOnce);
    for (unsigned i = 0; i < count; i++) {
      completions_.push_back({cqes[i]->user_data, cqes[i]->res});
    }
    io_uring_cq_advance(ring_.get(), count);
  }

  enum class Polls { kDispatch, kKeep };  // kKeep: they are asked for again in the next turn
  // A callback may come back here (DrainFileOps), and then goes on with what is left.
  void CompleteReaped(Polls polls) {
    while (next_completion_ < completions_.size()) {
      Completion completion = completions_[next_completion_++];
      if (completion.data == kIgnored) continue;
      if ((completion.data & 3) == kPollTag) {
        CompletePoll(completion, polls);
      } else {
        auto* op = reinterpret_cast<FileOp*>(completion.data);
        file_ops_--;
        op->done(op, completion.result);
      }
    }
    completions_.clear();
    next_completion_ = 0;
  }

  void CompletePoll(const Completion& completion, Polls polls) {
    PollKey key = {static_cast<int>((completion.data & UINT32_MAX) >> 2),
                   static_cast<uint32_t>(completion.data >> 32)};
    Watcher* watcher = FindWatcher(key.fd, key.generation);
    if (!watcher) return;
    watcher->polled = false;
    to_poll_.push_back(key);
    // Cancelled: the thread that asked has ended; asked again by the next.
    if (polls == Polls::kKeep || completion.result == -ECANCELED) return;
    auto mask =
        completion.result < 0 ? uint32_t{POLLERR} : static_cast<uint32_t>(completion.result);
    Dispatch(key.fd, key.generation, mask);
  }

  Ring ring_;
  std::vector<PollKey> to_poll_;
  std::vector<Completion> completions_;
  size_t next_completion_ = 0;
  size_t file_ops_ = 0;
  bool polling_pays_ = false;  // what was waited for last came soon enough
};

}  // namespace

Result<std::unique_ptr<EventLoop>> CreateUringLoop(const Clock& clock) {
  auto loop = std::make_unique<UringLoop>(clock, TRY(EventFd::Create()));
  TRY(loop->Init());
  return loop;
}

}  // namespace kvartz
