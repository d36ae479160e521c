// What the tests of the event loop share: each runs on every backend, with a clock that stands
// still.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <memory>
#include <string>

#include "base/event_loop.h"
#include "base/fd.h"

namespace kvartz {

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

inline UniqueFd TempFile() {
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

#define FOR_EACH_LOOP_BACKEND(suite)                                                              \
  INSTANTIATE_TEST_SUITE_P(                                                                       \
      Backends, suite, testing::Values(EventLoop::Backend::kEpoll, EventLoop::Backend::kIoUring), \
      [](const auto& backend) {                                                                   \
        return backend.param == EventLoop::Backend::kEpoll ? "Epoll" : "IoUring";                 \
      })

}  // namespace kvartz
