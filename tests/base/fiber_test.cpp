#include "base/fiber.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/loop_fixture.h"

namespace kvartz {
namespace {

TEST(Fiber, RunsUpToItsFirstWaitAndGoesOnWhenWoken) {
  std::string trace;
  Fiber* fiber = nullptr;
  Fiber::Start(
      [&] {
        fiber = Fiber::Current();
        trace += "a";
        Fiber::Suspend();
        trace += "c";
      },
      [&] { trace += Fiber::Inside() ? "?" : "d"; });
  EXPECT_FALSE(Fiber::Inside());
  trace += "b";
  fiber->Wake();
  EXPECT_EQ(trace, "abcd");
}

TEST(Fiber, AWakeThatComesFirstIsRemembered) {
  bool ended = false;
  Fiber::Start([&] {
    Fiber::Current()->Wake();
    Fiber::Suspend();
    ended = true;
  });
  EXPECT_TRUE(ended);
}

TEST(Fiber, OneStartedWithinAnotherRunsWhenThatWaits) {
  std::string trace;
  Fiber* first = nullptr;
  Fiber::Start([&] {
    first = Fiber::Current();
    Fiber::Start([&] { trace += "2"; });
    trace += "1";
    Fiber::Suspend();
    trace += "4";
  });
  trace += "3";
  first->Wake();
  EXPECT_EQ(trace, "1234");
}

TEST(Fiber, MutexIsHandedOverInOrder) {
  FiberMutex mutex;
  std::vector<Fiber*> holders;
  std::string trace;
  for (char name = 'a'; name < 'e'; name++) {
    Fiber::Start([&, name] {
      FiberLock lock(mutex);
      holders.push_back(Fiber::Current());
      Fiber::Suspend();
      trace += name;
    });
  }
  for (size_t i = 0; i < 4; i++) {
    ASSERT_EQ(holders.size(), i + 1);
    EXPECT_TRUE(mutex.locked());
    holders[i]->Wake();
  }
  EXPECT_EQ(trace, "abcd");
  EXPECT_FALSE(mutex.locked());
}

TEST(Fiber, ManyAtOnceAndAgain) {
  FiberQueue queue;
  int done = 0;
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < 200; i++) {
      Fiber::Start([&] {
        std::string local(100, 'x');
        queue.Wait();
        done += local == std::string(100, 'x');
      });
    }
    EXPECT_TRUE(queue.WakeOne());
    queue.WakeAll();
    EXPECT_FALSE(queue.WakeOne());
  }
  EXPECT_EQ(done, 600);
}

class FiberTest : public EventLoopTest {};

TEST_P(FiberTest, SleepsByTheLoopsClock) {
  bool done = false;
  Fiber::Start([&] { FiberSleepUntil(*loop_, clock_.NowNs() + 5 * kMs); }, [&] { done = true; });
  loop_->RunOnce(0);
  EXPECT_FALSE(done);
  clock_.Advance(5 * kMs);
  RunUntil([&] { return done; });
}

FOR_EACH_LOOP_BACKEND(FiberTest);

}  // namespace
}  // namespace kvartz
