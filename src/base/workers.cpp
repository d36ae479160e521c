#include "base/workers.h"

#include <deque>

#include "base/check.h"

namespace kvartz {

struct Workers::Shared {
  Mutex mutex;
  CondVar work, finished;
  std::deque<Job*> todo GUARDED_BY(mutex);
  std::deque<Job*> done GUARDED_BY(mutex);
  bool stop GUARDED_BY(mutex) = false;
  bool posted GUARDED_BY(mutex) = false;

  Job* TakeDone() {
    LockGuard guard(mutex);
    if (done.empty()) return nullptr;
    Job* job = done.front();
    done.pop_front();
    return job;
  }
};

Workers::Workers(EventLoop& loop, unsigned threads)
    : loop_(&loop), limit_(threads), shared_(std::make_shared<Shared>()) {}

Workers::~Workers() {
  VERIFY(under_way_ == 0);
  {
    LockGuard guard(shared_->mutex);
    shared_->stop = true;
  }
  shared_->work.NotifyAll();
}

void Workers::Run(const std::function<void()>& job) {
  Job mine = {&job, Fiber::Current()};
  VERIFY(mine.fiber);
  under_way_++;
  {
    LockGuard guard(shared_->mutex);
    shared_->todo.push_back(&mine);
  }
  shared_->work.NotifyOne();
  if (under_way_ > threads_.size() && threads_.size() < limit_)
    threads_.emplace_back("worker", [this] { Work(); });
  Fiber::Suspend();
  under_way_--;
}

void Workers::Work() {
  Shared& shared = *shared_;
  for (;;) {
    Job* job = nullptr;
    {
      LockGuard guard(shared.mutex);
      shared.work.Wait(guard, [&shared]() KVARTZ_TSA(no_thread_safety_analysis) {
        return !shared.todo.empty() || shared.stop;
      });
      if (shared.todo.empty()) return;
      job = shared.todo.front();
      shared.todo.pop_front();
    }
    (*job->body)();
    bool post = false;
    {
      LockGuard guard(shared.mutex);
      shared.done.push_back(job);
      post = !std::exchange(shared.posted, true);
    }
    shared.finished.NotifyOne();
    if (!post) continue;
    loop_->Post([state = shared_] {
      {
        LockGuard guard(state->mutex);
        state->posted = false;
      }
      while (Job* done = state->TakeDone()) done->fiber->Wake();
    });
  }
}

bool Workers::FinishOne() {
  if (under_way_ == 0) return false;
  Shared& shared = *shared_;
  {
    LockGuard guard(shared.mutex);
    shared.finished.Wait(
        guard, [&shared]() KVARTZ_TSA(no_thread_safety_analysis) { return !shared.done.empty(); });
  }
  if (Job* job = shared.TakeDone()) job->fiber->Wake();
  return true;
}

}  // namespace kvartz
