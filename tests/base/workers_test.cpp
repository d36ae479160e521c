#include "base/workers.h"

#include <gtest/gtest.h>

#include <atomic>

#include "base/loop_fixture.h"

namespace kvartz {
namespace {

class WorkersTest : public EventLoopTest {};

TEST_P(WorkersTest, FibersGoOnWhenTheirJobsAreDone) {
  Workers workers(*loop_, 2);
  std::atomic<int> computed = 0;
  int done = 0;
  for (int i = 0; i < 20; i++) {
    Fiber::Start([&] {
      workers.Run([&] { computed++; });
      EXPECT_TRUE(loop_->InLoopThread());
      done++;
    });
  }
  RunUntil([&] { return done == 20; });
  EXPECT_EQ(computed, 20);
  EXPECT_FALSE(workers.FinishOne());
}

TEST_P(WorkersTest, CanBeDrainedWithoutATurnOfTheLoop) {
  Workers workers(*loop_, 2);
  int done = 0;
  for (int i = 0; i < 5; i++) {
    Fiber::Start([&] {
      workers.Run([] {});
      workers.Run([] {});
      done++;
    });
  }
  while (workers.FinishOne()) {
  }
  EXPECT_EQ(done, 5);
  loop_->RunOnce(0);
}

FOR_EACH_LOOP_BACKEND(WorkersTest);

}  // namespace
}  // namespace kvartz
