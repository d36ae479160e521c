#include "base/event_loop.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/sync.h"

namespace kvartz {
namespace {

constexpr int64_t kMs = 1'000'000;
constexpr int64_t kLongNs = 20'000 * kMs;  // only reached when something is wrong

struct Pipe {
  UniqueFd read_end, write_end;
  Pipe() {
    int fds[2];
    EXPECT_EQ(pipe2(fds, O_CLOEXEC | O_NONBLOCK), 0);
    read_end.Reset(fds[0]);
    write_end.Reset(fds[1]);
  }
  void Write(const std::string& text) {
    EXPECT_EQ(write(write_end.get(), text.data(), text.size()), static_cast<ssize_t>(text.size()));
  }
  std::string Read(size_t size) {
    std::string text(size, '\0');
    ssize_t n = read(read_end.get(), text.data(), size);
    text.resize(n < 0 ? 0 : static_cast<size_t>(n));
    return text;
  }
};

UniqueFd TempFile() {
  UniqueFd fd(open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  EXPECT_TRUE(fd);
  return fd;
}

class EventLoopTest : public testing::TestWithParam<EventLoop::Backend> {
 protected:
  void SetUp() override {
    auto loop = EventLoop::Create(GetParam(), clock_);
    if (!loop && GetParam() == EventLoop::Backend::kIoUring) {
      GTEST_SKIP() << "the host forbids io_uring: " << loop.error().what;
    }
    ASSERT_TRUE(loop) << loop.error().what;
    loop_ = std::move(*loop);
  }
  template <typename Done>
  void RunUntil(Done done) {
    int64_t start = MonotonicClock::Instance().NowNs();
    while (!done()) {
      loop_->RunOnce(100 * kMs);
      ASSERT_LT(MonotonicClock::Instance().NowNs() - start, kLongNs);
    }
  }
  int64_t Do(FileOp op) {
    struct Outcome {
      bool done = false;
      int64_t result = 0;
    } outcome;
    op.owner = &outcome;
    op.done = [](FileOp* finished, int64_t result) {
      *static_cast<Outcome*>(finished->owner) = {true, result};
    };
    loop_->Submit(&op);
    EXPECT_FALSE(outcome.done);
    RunUntil([&] { return outcome.done; });
    return outcome.result;
  }

  ManualClock clock_;
  std::unique_ptr<EventLoop> loop_;
};

TEST_P(EventLoopTest, HasTheBackendThatWasAskedFor) {
  EXPECT_STREQ(loop_->backend_name(),
               GetParam() == EventLoop::Backend::kEpoll ? "epoll" : "io_uring");
}

TEST_P(EventLoopTest, ReportsReadinessUntilItIsConsumed) {
  Pipe pipe;
  int calls = 0;
  loop_->Watch(pipe.read_end.get(), FdEvents::kRead, [&](FdEvents ready) {
    EXPECT_EQ(ready, FdEvents::kRead);
    calls++;
  });
  loop_->RunOnce(0);
  EXPECT_EQ(calls, 0);
  pipe.Write("ab");
  RunUntil([&] { return calls == 3; });  // level-triggered: nobody reads
  EXPECT_EQ(pipe.Read(2), "ab");
  loop_->RunOnce(0);
  loop_->RunOnce(0);
  int settled = calls;
  loop_->RunOnce(0);
  EXPECT_EQ(calls, settled);
  pipe.Write("c");
  RunUntil([&] { return calls > settled; });
}

TEST_P(EventLoopTest, RearmChangesWhatIsWatched) {
  int fds[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
  UniqueFd here(fds[0]), there(fds[1]);
  std::vector<FdEvents> seen;
  loop_->Watch(here.get(), FdEvents::kRead, [&](FdEvents ready) { seen.push_back(ready); });
  loop_->RunOnce(0);
  EXPECT_TRUE(seen.empty());
  loop_->Rearm(here.get(), FdEvents::kReadWrite);
  RunUntil([&] { return !seen.empty(); });
  EXPECT_EQ(seen.back(), FdEvents::kWrite);
  ASSERT_EQ(write(there.get(), "x", 1), 1);
  RunUntil([&] { return seen.back() == FdEvents::kReadWrite; });
  loop_->Rearm(here.get(), FdEvents::kNone);
  seen.clear();
  loop_->RunOnce(0);
  loop_->RunOnce(0);
  EXPECT_TRUE(seen.empty());
  loop_->Rearm(here.get(), FdEvents::kRead);
  RunUntil([&] { return !seen.empty(); });
  EXPECT_EQ(seen.back(), FdEvents::kRead);
}

TEST_P(EventLoopTest, HangUpIsReportedAsWhatIsWatchedAndNotAtAllWhilePaused) {
  Pipe pipe;
  int calls = 0;
  loop_->Watch(pipe.read_end.get(), FdEvents::kNone, [&](FdEvents) { calls++; });
  pipe.write_end.Reset();
  loop_->RunOnce(0);
  loop_->RunOnce(0);
  EXPECT_EQ(calls, 0);
  loop_->Rearm(pipe.read_end.get(), FdEvents::kRead);
  RunUntil([&] { return calls > 0; });
}

TEST_P(EventLoopTest, CallbackMayUnwatchItselfAndOthers) {
  Pipe first, second;
  first.Write("x");
  second.Write("x");
  int calls = 0;
  auto unwatch_all = [&](FdEvents) {
    calls++;
    loop_->Unwatch(first.read_end.get());
    loop_->Unwatch(second.read_end.get());
  };
  loop_->Watch(first.read_end.get(), FdEvents::kRead, unwatch_all);
  loop_->Watch(second.read_end.get(), FdEvents::kRead, unwatch_all);
  RunUntil([&] { return calls > 0; });
  loop_->RunOnce(0);
  loop_->RunOnce(0);
  EXPECT_EQ(calls, 1);
}

TEST_P(EventLoopTest, NewWatchOnTheSameNumberGetsNoOldEvents) {
  Pipe ready, quiet;
  ready.Write("x");
  int old_calls = 0, new_calls = 0;
  int number = fcntl(ready.read_end.get(), F_DUPFD_CLOEXEC, 0);
  loop_->Watch(number, FdEvents::kRead, [&](FdEvents) { old_calls++; });
  RunUntil([&] { return old_calls > 0; });
  loop_->Unwatch(number);
  ASSERT_EQ(dup3(quiet.read_end.get(), number, O_CLOEXEC), number);
  old_calls = 0;
  loop_->Watch(number, FdEvents::kRead, [&](FdEvents) { new_calls++; });
  for (int i = 0; i < 5; i++) loop_->RunOnce(0);
  EXPECT_EQ(old_calls, 0);
  EXPECT_EQ(new_calls, 0);
  quiet.Write("y");
  RunUntil([&] { return new_calls > 0; });
  loop_->Unwatch(number);
  close(number);
}

TEST_P(EventLoopTest, PeerSeesTheEndOnceUnwatchedAndClosed) {
  int fds[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  UniqueFd here(fds[0]), there(fds[1]);
  loop_->Watch(here.get(), FdEvents::kRead, [](FdEvents) {});
  loop_->RunOnce(0);
  loop_->Unwatch(here.get());
  here.Reset();
  char byte;
  EXPECT_EQ(read(there.get(), &byte, 1), 0);
}

TEST_P(EventLoopTest, FilesAndDevNullAreAlwaysReady) {
  UniqueFd null(open("/dev/null", O_RDONLY | O_CLOEXEC));
  UniqueFd file = TempFile();
  int null_calls = 0, file_calls = 0;
  loop_->Watch(null.get(), FdEvents::kRead, [&](FdEvents) { null_calls++; });
  loop_->Watch(file.get(), FdEvents::kRead, [&](FdEvents) { file_calls++; });
  RunUntil([&] { return null_calls > 1 && file_calls > 1; });
  loop_->Rearm(null.get(), FdEvents::kNone);
  loop_->RunOnce(0);
  null_calls = 0;
  loop_->RunOnce(0);
  EXPECT_EQ(null_calls, 0);
  loop_->Rearm(null.get(), FdEvents::kRead);
  RunUntil([&] { return null_calls > 0; });
  loop_->Unwatch(null.get());
  loop_->Unwatch(file.get());
  loop_->RunOnce(0);
}

TEST_P(EventLoopTest, PostedTasksRunInOrderOnTheLoopsThread) {
  constexpr int kThreads = 3, kTasks = 500;
  std::array<std::vector<int>, kThreads> seen;
  int total = 0;
  Thread runner("loop", [&] { loop_->Run(); });
  {
    std::vector<Thread> posters;
    for (int t = 0; t < kThreads; t++) {
      posters.emplace_back("poster", [&, t] {
        for (int i = 0; i < kTasks; i++) {
          loop_->Post([&, t, i] {
            EXPECT_TRUE(loop_->InLoopThread());
            seen[static_cast<size_t>(t)].push_back(i);
            if (++total == kThreads * kTasks) loop_->Stop();
          });
        }
      });
    }
  }
  runner.Join();
  EXPECT_FALSE(loop_->InLoopThread());
  for (const auto& order : seen) {
    ASSERT_EQ(order.size(), size_t{kTasks});
    EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
  }
}

TEST_P(EventLoopTest, TaskPostedByATaskRunsInTheNextTurn) {
  int ran = 0;
  loop_->Post([&] {
    ran = 1;
    loop_->Post([&] { ran = 2; });
  });
  loop_->RunOnce(-1);
  EXPECT_EQ(ran, 1);
  loop_->RunOnce(-1);
  EXPECT_EQ(ran, 2);
}

TEST_P(EventLoopTest, StopBeforeRunReturnsAtOnce) {
  loop_->Stop();
  loop_->Run();
  bool ran = false;
  loop_->Post([&] {
    ran = true;
    loop_->Stop();
  });
  loop_->Run();
  EXPECT_TRUE(ran);
}

TEST_P(EventLoopTest, TimersFireInOrderOfTheirDeadlines) {
  std::string order;
  Timer a(*loop_, [&] { order += 'a'; });
  Timer b(*loop_, [&] { order += 'b'; });
  Timer c(*loop_, [&] { order += 'c'; });
  a.Arm(300);
  b.Arm(100);
  c.Arm(200);
  EXPECT_TRUE(a.armed());
  EXPECT_EQ(a.deadline_ns(), 300);
  loop_->RunOnce(0);
  EXPECT_EQ(order, "");
  clock_.Set(100);
  loop_->RunOnce(0);
  EXPECT_EQ(order, "b");
  EXPECT_FALSE(b.armed());
  clock_.Set(1000);
  loop_->RunOnce(0);
  EXPECT_EQ(order, "bca");
}

TEST_P(EventLoopTest, TimersCanBeMovedAndCancelled) {
  int fired = 0;
  Timer timer(*loop_, [&] { fired++; });
  timer.Arm(100);
  timer.Arm(500);
  clock_.Set(400);
  loop_->RunOnce(0);
  EXPECT_EQ(fired, 0);
  timer.Arm(350);
  loop_->RunOnce(0);
  EXPECT_EQ(fired, 1);
  timer.Arm(450);
  timer.Cancel();
  EXPECT_FALSE(timer.armed());
  clock_.Set(1000);
  loop_->RunOnce(0);
  EXPECT_EQ(fired, 1);
}

TEST_P(EventLoopTest, ManyTimersKeepTheirOrderThroughChanges) {
  constexpr size_t kCount = 200;
  std::vector<size_t> order;
  std::vector<std::unique_ptr<Timer>> timers;
  for (size_t i = 0; i < kCount; i++) {
    timers.push_back(std::make_unique<Timer>(*loop_, [&order, i] { order.push_back(i); }));
    timers.back()->Arm(static_cast<int64_t>(i * 7919 % kCount) + 1);
  }
  for (size_t i = 0; i < kCount; i += 3) timers[i]->Cancel();
  for (size_t i = 1; i < kCount; i += 3) timers[i]->Arm(static_cast<int64_t>(kCount + 1 + i));
  timers.pop_back();
  clock_.Set(1000);
  loop_->RunOnce(0);
  std::vector<std::pair<int64_t, size_t>> expected;
  for (size_t i = 0; i + 1 < kCount; i++) {
    if (i % 3 == 1) expected.emplace_back(kCount + 1 + i, i);
    if (i % 3 == 2) expected.emplace_back(i * 7919 % kCount + 1, i);
  }
  std::sort(expected.begin(), expected.end());
  ASSERT_EQ(order.size(), expected.size());
  for (size_t i = 0; i < order.size(); i++) EXPECT_EQ(order[i], expected[i].second);
}

TEST_P(EventLoopTest, TimerThatArmsItselfForNowDoesNotStarveTheLoop) {
  int fired = 0;
  Timer timer(*loop_, [&] {
    fired++;
    timer.Arm(0);
  });
  timer.Arm(0);
  loop_->RunOnce(0);
  EXPECT_EQ(fired, 1);
  loop_->RunOnce(-1);
  EXPECT_EQ(fired, 2);
}

TEST_P(EventLoopTest, TimerMayDestroyItselfAndOthersInItsCallback) {
  std::unique_ptr<Timer> first, second;
  int fired = 0;
  auto destroy = [&] {
    fired++;
    first.reset();
    second.reset();
  };
  first = std::make_unique<Timer>(*loop_, destroy);
  second = std::make_unique<Timer>(*loop_, destroy);
  first->Arm(0);
  second->Arm(0);
  loop_->RunOnce(0);
  EXPECT_EQ(fired, 1);
}

TEST_P(EventLoopTest, GuestTimersWaitWhileTheGuestsClockStands) {
  VmClock guest(clock_);
  int fired = 0;
  Timer timer(*loop_, guest, [&] { fired++; });
  timer.Arm(100);
  clock_.Set(1000);
  loop_->RunOnce(0);
  EXPECT_EQ(fired, 0);
  guest.Start();  // guest time 0
  clock_.Advance(60);
  loop_->RunOnce(0);
  EXPECT_EQ(fired, 0);
  guest.Stop();  // at 60, with the timer queued for 40 more
  clock_.Advance(1000);
  loop_->RunOnce(0);
  EXPECT_EQ(fired, 0);
  EXPECT_TRUE(timer.armed());
  guest.Start();
  clock_.Advance(39);
  loop_->RunOnce(0);
  EXPECT_EQ(fired, 0);
  clock_.Advance(1);
  loop_->RunOnce(0);
  EXPECT_EQ(fired, 1);
  EXPECT_EQ(guest.NowNs(), 100);
}

TEST_P(EventLoopTest, FileOperationsReadAndWrite) {
  UniqueFd file = TempFile();
  std::string hello = "hello, ", world = "world";
  iovec out[] = {{hello.data(), hello.size()}, {world.data(), world.size()}};
  EXPECT_EQ(Do({.kind = FileOp::Kind::kWritev,
                .fd = file.get(),
                .iov = out,
                .iov_count = 2,
                .offset = 4096}),
            12);
  EXPECT_EQ(Do({.kind = FileOp::Kind::kFdatasync, .fd = file.get()}), 0);
  EXPECT_EQ(Do({.kind = FileOp::Kind::kFsync, .fd = file.get()}), 0);
  std::string text(12, '?');
  iovec in[] = {{text.data(), 3}, {text.data() + 3, 9}};
  EXPECT_EQ(Do({.kind = FileOp::Kind::kReadv,
                .fd = file.get(),
                .iov = in,
                .iov_count = 2,
                .offset = 4096}),
            12);
  EXPECT_EQ(text, "hello, world");
  iovec one = {text.data(), 5};
  EXPECT_EQ(Do({.kind = FileOp::Kind::kReadv,
                .fd = file.get(),
                .iov = &one,
                .iov_count = 1,
                .offset = 4103}),
            5);
  EXPECT_EQ(text.substr(0, 5), "world");
  EXPECT_EQ(Do({.kind = FileOp::Kind::kReadv,
                .fd = file.get(),
                .iov = &one,
                .iov_count = 1,
                .offset = 1 << 20}),
            0);
}

TEST_P(EventLoopTest, DiscardAndWriteZeroesClearWithoutGrowing) {
  UniqueFd file = TempFile();
  std::string data(64 << 10, 'x');
  ASSERT_EQ(pwrite(file.get(), data.data(), data.size(), 0), static_cast<ssize_t>(data.size()));
  int64_t discard =
      Do({.kind = FileOp::Kind::kDiscard, .fd = file.get(), .offset = 8192, .length = 16384});
  if (discard == -EOPNOTSUPP) GTEST_SKIP() << "the file system of /tmp doesn't punch holes";
  EXPECT_EQ(discard, 0);
  int64_t zero =
      Do({.kind = FileOp::Kind::kWriteZeroes, .fd = file.get(), .offset = 100, .length = 1000});
  EXPECT_TRUE(zero == 0 || zero == -EOPNOTSUPP) << zero;
  std::string back(data.size(), '?');
  ASSERT_EQ(pread(file.get(), back.data(), back.size(), 0), static_cast<ssize_t>(back.size()));
  for (size_t i = 0; i < back.size(); i++) {
    bool cleared = (i >= 8192 && i < 24576) || (zero == 0 && i >= 100 && i < 1100);
    ASSERT_EQ(back[i], cleared ? '\0' : 'x') << i;
  }
  struct stat st;
  ASSERT_EQ(fstat(file.get(), &st), 0);
  EXPECT_EQ(st.st_size, static_cast<off_t>(data.size()));
}

TEST_P(EventLoopTest, FailedFileOperationReportsTheErrno) {
  char byte;
  iovec iov = {&byte, 1};
  EXPECT_EQ(Do({.kind = FileOp::Kind::kReadv, .fd = -1, .iov = &iov, .iov_count = 1}), -EBADF);
  UniqueFd read_only(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  EXPECT_EQ(Do({.kind = FileOp::Kind::kWritev, .fd = read_only.get(), .iov = &iov, .iov_count = 1}),
            -EBADF);
}

TEST_P(EventLoopTest, MoreFileOperationsThanTheRingHasEntries) {
  constexpr size_t kCount = 1000;
  UniqueFd file = TempFile();
  std::vector<uint32_t> values(kCount);
  std::vector<iovec> iovs(kCount);
  std::vector<FileOp> ops(kCount);
  size_t done = 0;
  for (size_t i = 0; i < kCount; i++) {
    values[i] = static_cast<uint32_t>(i);
    iovs[i] = {&values[i], 4};
    ops[i] = {.kind = FileOp::Kind::kWritev,
              .fd = file.get(),
              .iov = &iovs[i],
              .iov_count = 1,
              .offset = i * 4};
    ops[i].owner = &done;
    ops[i].done = [](FileOp* op, int64_t result) {
      EXPECT_EQ(result, 4);
      ++*static_cast<size_t*>(op->owner);
    };
    loop_->Submit(&ops[i]);
  }
  RunUntil([&] { return done == kCount; });
  std::vector<uint32_t> back(kCount);
  ASSERT_EQ(pread(file.get(), back.data(), kCount * 4, 0), static_cast<ssize_t>(kCount * 4));
  EXPECT_EQ(back, values);
}

TEST_P(EventLoopTest, DestructionWaitsForFileOperations) {
  UniqueFd file = TempFile();
  char byte = 'x';
  iovec iov = {&byte, 1};
  bool done = false;
  FileOp op = {.kind = FileOp::Kind::kWritev, .fd = file.get(), .iov = &iov, .iov_count = 1};
  op.owner = &done;
  op.done = [](FileOp* finished, int64_t result) {
    EXPECT_EQ(result, 1);
    *static_cast<bool*>(finished->owner) = true;
  };
  loop_->Submit(&op);
  loop_.reset();
  EXPECT_TRUE(done);
}

TEST_P(EventLoopTest, DrainWithinACompletionFinishesTheOthersOfTheBatchButDispatchesNothing) {
  struct Context {
    EventLoop* loop;
    int done = 0;
    int done_after_drain = 0;
  } context{loop_.get()};
  UniqueFd file = TempFile();
  Pipe pipe;
  int dispatched = 0;
  char byte = 'x';
  iovec iov = {&byte, 1};
  FileOp ops[3];
  for (auto& op : ops) {
    op = {.kind = FileOp::Kind::kWritev, .fd = file.get(), .iov = &iov, .iov_count = 1};
    op.owner = &context;
    op.done = [](FileOp* finished, int64_t) {
      auto& c = *static_cast<Context*>(finished->owner);
      c.done++;
      c.loop->DrainFileOps();
      if (c.done_after_drain == 0) c.done_after_drain = c.done;
    };
    loop_->Submit(&op);
  }
  loop_->Watch(pipe.read_end.get(), FdEvents::kRead, [&](FdEvents) {
    dispatched++;
    loop_->Unwatch(pipe.read_end.get());
  });
  loop_->RunOnce(0);
  pipe.Write("x");
  loop_->DrainFileOps();
  EXPECT_EQ(context.done, 3);
  EXPECT_EQ(context.done_after_drain, 3);
  RunUntil([&] { return dispatched == 1; });
}

// With the host's clock: arming from another thread ends a wait that was longer.
TEST_P(EventLoopTest, ArmFromAnotherThreadWakesTheLoop) {
  auto& clock = MonotonicClock::Instance();
  auto created = EventLoop::Create(GetParam(), clock);
  ASSERT_TRUE(created);
  auto& loop = *created;
  int64_t fired_at = 0;
  int64_t deadline = 0;
  {
    Timer timer(*loop, [&] {
      fired_at = clock.NowNs();
      loop->Stop();
    });
    Thread runner("loop", [&] { loop->Run(); });
    deadline = clock.NowNs() + 5 * kMs;
    timer.Arm(deadline);
    runner.Join();
  }
  EXPECT_GE(fired_at, deadline);
  EXPECT_LT(fired_at, deadline + kLongNs);
}

INSTANTIATE_TEST_SUITE_P(Backends, EventLoopTest,
                         testing::Values(EventLoop::Backend::kEpoll, EventLoop::Backend::kIoUring),
                         [](const auto& backend) {
                           return backend.param == EventLoop::Backend::kEpoll ? "Epoll" : "IoUring";
                         });

}  // namespace
}  // namespace kvartz
