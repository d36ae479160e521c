#include "base/clock.h"

#include <gtest/gtest.h>

#include <vector>

namespace kvartz {
namespace {

TEST(VmClock, RunsOnlyWhileStarted) {
  ManualClock base;
  base.Set(1000);
  VmClock clock(base);
  EXPECT_EQ(clock.NowNs(), 0);
  EXPECT_FALSE(clock.running());
  base.Advance(500);
  EXPECT_EQ(clock.NowNs(), 0);
  clock.Start();
  base.Advance(30);
  EXPECT_EQ(clock.NowNs(), 30);
  EXPECT_EQ(clock.ToBaseNs(100), 1600);
  EXPECT_EQ(clock.ToBaseNs(INT64_MAX), INT64_MAX);
  clock.Stop();
  base.Advance(70);
  EXPECT_EQ(clock.NowNs(), 30);
  EXPECT_EQ(clock.ToBaseNs(100), INT64_MAX);
  clock.SetNowNs(5000);
  clock.Start();
  clock.Start();
  base.Advance(1);
  EXPECT_EQ(clock.NowNs(), 5001);
}

TEST(VmClock, ObserversAreToldOfEachStart) {
  ManualClock base;
  VmClock clock(base);
  struct Counter final : VmClock::Observer {
    void ClockStarted() override { starts++; }
    int starts = 0;
  } counter;
  clock.AddObserver(&counter);
  clock.Start();
  clock.Start();  // runs already
  clock.Stop();
  clock.Start();
  EXPECT_EQ(counter.starts, 2);
  clock.RemoveObserver(&counter);
  clock.Stop();
  clock.Start();
  EXPECT_EQ(counter.starts, 2);
}

// Readers see whole changes: with the base clock standing, guest time never moves whatever Start
// and Stop do.
TEST(VmClock, ReadersNeverSeeHalfAChange) {
  ManualClock base;
  base.Set(1'000'000);
  VmClock clock(base);
  clock.SetNowNs(42);
  std::atomic<bool> stop{false};
  {
    std::vector<Thread> readers;
    for (int i = 0; i < 2; i++) {
      readers.emplace_back("reader", [&] {
        while (!stop) ASSERT_EQ(clock.NowNs(), 42);
      });
    }
    for (int i = 0; i < 20'000; i++) {
      clock.Start();
      clock.Stop();
    }
    stop = true;
  }
}

TEST(HostRealtime, IsSince1970) {
  EXPECT_GT(HostRealtimeNs(), 1'700'000'000ll * 1'000'000'000);
  int64_t first = MonotonicClock::Instance().NowNs();
  EXPECT_GE(MonotonicClock::Instance().NowNs(), first);
}

}  // namespace
}  // namespace kvartz
