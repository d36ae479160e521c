#include "base/event_loop.h"

#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <string>
#include <vector>

#include "base/loop_fixture.h"
#include "base/sync.h"

namespace kvartz {
namespace {

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

TEST_P(EventLoopTest, HandlesWhatComesWhileItPolls) {
  loop_->SetPolling(2 * kMs);
  constexpr int kRounds = 200;
  Pipe there, back;
  int rounds = 0, tasks = 0;
  bool expired = false;
  Timer timer(*loop_, [&] { expired = true; });
  timer.Arm(clock_.NowNs() + kMs);
  loop_->Watch(back.read_end.get(), FdEvents::kRead, [&](FdEvents) {
    back.Read(1);
    if (++rounds < kRounds) there.Write("a");
  });
  Thread other("echo", [&] {
    char byte;
    fcntl(there.read_end.get(), F_SETFL, 0);
    for (int i = 0; i < kRounds && read(there.read_end.get(), &byte, 1) == 1; i++) {
      loop_->Post([&] { tasks++; });
      back.Write("b");
    }
  });
  there.Write("a");
  RunUntil([&] { return rounds == kRounds && tasks == kRounds; });
  other.Join();
  EXPECT_FALSE(expired);
  clock_.Set(clock_.NowNs() + kMs);
  RunUntil([&] { return expired; });
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

// A host that forbids io_uring, as containers do: a system call filter, in a child since it can't
// be taken off.
TEST(EventLoop, FallsBackToEpollWhereIoUringIsForbidden) {
  for (int error : {EPERM, ENOSYS}) {
    pid_t child = fork();
    if (child == 0) {
      sock_filter code[] = {
          BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
          BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
          BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<uint32_t>(error)),
          BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
      };
      sock_fprog filter = {.len = std::size(code), .filter = code};
      if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
          prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) < 0) {
        _exit(77);
      }
      auto loop = EventLoop::Create();
      if (!loop || std::string((*loop)->backend_name()) != "epoll") _exit(1);
      _exit(EventLoop::Create(EventLoop::Backend::kIoUring) ? 2 : 0);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFEXITED(status));
    if (WEXITSTATUS(status) == 77) GTEST_SKIP() << "the host allows no system call filters";
    EXPECT_EQ(WEXITSTATUS(status), 0);
  }
}

FOR_EACH_LOOP_BACKEND(EventLoopTest);

}  // namespace
}  // namespace kvartz
