// Threads that compute for an event loop: what takes long and waits for nothing (compression).
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "base/event_loop.h"
#include "base/fiber.h"
#include "base/sync.h"

namespace kvartz {

// Owned by a loop's object; starts its threads when they are first needed. Destroyed with nothing
// under way.
class Workers {
 public:
  Workers(EventLoop& loop, unsigned threads);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Fiber: runs `job` on a thread, and goes on when it is done.
  void Run(const std::function<void()>& job);
  // For Drain, outside of fibers: waits for a job and lets its fiber go on; false if there is none.
  bool FinishOne();
  // With nothing under way: serves another loop from now on.
  void MoveTo(EventLoop& loop) { loop_ = &loop; }

 private:
  struct Job {
    const std::function<void()>* body;
    Fiber* fiber;
  };
  struct Shared;  // what a posted task may still look at
  void Work();

  EventLoop* loop_;
  const unsigned limit_;
  size_t under_way_ = 0;
  std::shared_ptr<Shared> shared_;
  std::vector<Thread> threads_;
};

}  // namespace kvartz
