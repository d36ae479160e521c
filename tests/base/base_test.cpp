// Results, checks, descriptors, byte orders, threads.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <memory>

#include "base/check.h"
#include "base/endian.h"
#include "base/fd.h"
#include "base/result.h"
#include "base/sync.h"

namespace kvartz {
namespace {

using testing::HasSubstr;

Result<int> Half(int value) {
  if (value % 2 != 0) return Fail(ErrorCode::kInvalid, "odd");
  return value / 2;
}

Result<> CheckQuarter(int value, int* quarter) {
  int half = TRY(Half(value));
  *quarter = TRY(Half(half));
  return {};
}

Result<std::unique_ptr<int>> Boxed(int value) {
  int quarter = 0;
  TRY(CheckQuarter(value, &quarter));
  return std::make_unique<int>(quarter);
}

TEST(Result, TryPassesValuesAndErrorsOn) {
  auto good = Boxed(12);
  ASSERT_TRUE(good);
  EXPECT_EQ(**good, 3);
  auto bad = Boxed(6);
  ASSERT_FALSE(bad);
  EXPECT_EQ(bad.error().what, "odd");
  EXPECT_EQ(std::move(bad).error().In("box").what, "box: odd");
}

TEST(Result, ErrnoErrorsHaveACodeAndTheHostsWords) {
  Error error = ErrnoError(ENOENT, "cannot open 'a'");
  EXPECT_EQ(error.code, ErrorCode::kNotFound);
  EXPECT_EQ(error.what, "cannot open 'a': No such file or directory");
  EXPECT_EQ(ErrnoError(EACCES, "x").code, ErrorCode::kPermission);
  EXPECT_EQ(ErrnoError(ENOSPC, "x").code, ErrorCode::kNoSpace);
  EXPECT_EQ(ErrnoError(99999, "x").what, "x: error 99999");
}

TEST(VerifyDeathTest, PrintsTheConditionAndThePlace) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  int apples = 3;
  VERIFY(apples == 3);
  EXPECT_DEATH(VERIFY(apples == 4),
               "internal error: apples == 4 is false at .*base_test.cpp:[0-9]+");
}

TEST(UniqueFd, ClosesOnce) {
  int number = -1;
  {
    UniqueFd fd(open("/dev/null", O_RDONLY | O_CLOEXEC));
    ASSERT_TRUE(fd);
    number = fd.get();
    UniqueFd moved = std::move(fd);
    EXPECT_FALSE(fd);  // NOLINT: that is the point
    EXPECT_EQ(moved.get(), number);
  }
  EXPECT_EQ(fcntl(number, F_GETFD), -1);
  UniqueFd fd(open("/dev/null", O_RDONLY | O_CLOEXEC));
  int released = fd.Release();
  EXPECT_FALSE(fd);
  EXPECT_EQ(close(released), 0);
}

TEST(EventFd, CountsSignalsTogether) {
  auto event = EventFd::Create();
  ASSERT_TRUE(event);
  EXPECT_FALSE(event->Consume());
  event->Signal();
  event->Signal();
  EXPECT_TRUE(event->Consume());
  EXPECT_FALSE(event->Consume());
}

TEST(CreateMemFd, HasItsSizeForGood) {
  auto fd = CreateMemFd("test", 8192);
  ASSERT_TRUE(fd);
  struct stat st;
  ASSERT_EQ(fstat(fd->get(), &st), 0);
  EXPECT_EQ(st.st_size, 8192);
  EXPECT_EQ(ftruncate(fd->get(), 4096), -1);
  EXPECT_EQ(fcntl(fd->get(), F_GETFD), FD_CLOEXEC);
}

TEST(Endian, BytesLieAsStated) {
  struct Header {
    Be32 magic;
    Le16 version;
    Be64 size;
  } header = {0x514649fb, 0x1234, 0x0102030405060708};
  static_assert(sizeof(Header) == 14);
  uint8_t bytes[sizeof(Header)];
  std::memcpy(bytes, &header, sizeof(bytes));
  EXPECT_THAT(bytes,
              testing::ElementsAre(0x51, 0x46, 0x49, 0xfb, 0x34, 0x12, 1, 2, 3, 4, 5, 6, 7, 8));
  EXPECT_EQ(header.size, 0x0102030405060708u);
}

TEST(Thread, HasItsNameAndTakesNoSignals) {
  std::string name(16, '\0');
  bool blocked = false, faults_blocked = true;
  int id = 0;
  Thread thread("a-rather-long-name", [&] {
    pthread_getname_np(pthread_self(), name.data(), name.size());
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    blocked = sigismember(&mask, SIGTERM) == 1 && sigismember(&mask, SIGUSR1) == 1;
    faults_blocked = sigismember(&mask, SIGSEGV) == 1;
    id = CurrentThreadId();
  });
  thread.Join();
  EXPECT_STREQ(name.c_str(), "a-rather-long-n");
  EXPECT_TRUE(blocked);
  EXPECT_FALSE(faults_blocked);
  EXPECT_NE(id, CurrentThreadId());
  EXPECT_EQ(CurrentThreadId(), getpid());
  sigset_t mask;
  pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  EXPECT_EQ(sigismember(&mask, SIGTERM), 0);
}

TEST(Guarded, IsReachedOnlyUnderItsLock) {
  Guarded<int> counter(0);
  {
    std::vector<Thread> threads;
    for (int t = 0; t < 3; t++) {
      threads.emplace_back("adder", [&] {
        for (int i = 0; i < 10'000; i++) ++*counter.Lock();
      });
    }
  }
  EXPECT_EQ(*counter.Lock(), 30'000);
}

TEST(CondVar, WaitsForThePredicateOrTheTime) {
  Mutex mutex;
  CondVar changed;
  bool ready = false;
  Thread setter("setter", [&] {
    LockGuard guard(mutex);
    ready = true;
    changed.NotifyAll();
  });
  {
    LockGuard guard(mutex);
    changed.Wait(guard, [&] { return ready; });
    EXPECT_TRUE(ready);
    EXPECT_FALSE(changed.WaitFor(guard, 1000, [] { return false; }));
    EXPECT_TRUE(changed.WaitFor(guard, 1000, [] { return true; }));
  }
}

}  // namespace
}  // namespace kvartz
