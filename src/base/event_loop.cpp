#include "base/event_loop.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <poll.h>

#include <algorithm>

#include "base/check.h"
#include "base/loop_core.h"

namespace kvartz {

Result<std::unique_ptr<EventLoop>> EventLoop::Create(Backend backend, const Clock& clock) {
  if (backend == Backend::kEpoll) return CreateEpollLoop(clock);
  auto loop = CreateUringLoop(clock);
  // Containers and hardened hosts forbid io_uring: everything works without it.
  if (!loop && backend == Backend::kAuto) return CreateEpollLoop(clock);
  return loop;
}

int FallocateMode(FileOp::Kind kind) {
  return FALLOC_FL_KEEP_SIZE |
         (kind == FileOp::Kind::kDiscard ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
}

// Watches.

uint32_t LoopCore::PollMask(FdEvents events) {
  auto bits = static_cast<uint32_t>(events);
  uint32_t mask = 0;
  if (bits & static_cast<uint32_t>(FdEvents::kRead)) mask |= POLLIN;
  if (bits & static_cast<uint32_t>(FdEvents::kWrite)) mask |= POLLOUT;
  return mask;
}

void LoopCore::Watch(int fd, FdEvents events, FdCallback callback) {
  VERIFY(fd >= 0);
  auto [it, added] = watchers_.try_emplace(fd);
  VERIFY(added);
  it->second = std::make_shared<Watcher>(Watcher{fd, NewGeneration(), events, std::move(callback)});
  UpdatePoll(*it->second);
}

void LoopCore::Rearm(int fd, FdEvents events) {
  auto it = watchers_.find(fd);
  VERIFY(it != watchers_.end());
  Watcher& watcher = *it->second;
  if (watcher.events == events) return;
  watcher.events = events;
  UpdatePoll(watcher);
}

void LoopCore::Unwatch(int fd) {
  auto it = watchers_.find(fd);
  if (it == watchers_.end()) return;
  it->second->events = FdEvents::kNone;
  UpdatePoll(*it->second);
  watchers_.erase(it);
}

LoopCore::Watcher* LoopCore::FindWatcher(int fd, uint32_t generation) {
  auto it = watchers_.find(fd);
  return it != watchers_.end() && it->second->generation == generation ? it->second.get() : nullptr;
}

void LoopCore::Dispatch(int fd, uint32_t generation, uint32_t poll_mask) {
  auto it = watchers_.find(fd);
  if (it == watchers_.end() || it->second->generation != generation) return;
  uint32_t ready = 0;
  if (poll_mask & (POLLIN | POLLHUP | POLLERR | POLLNVAL)) {
    ready |= static_cast<uint32_t>(FdEvents::kRead);
  }
  if (poll_mask & (POLLOUT | POLLHUP | POLLERR | POLLNVAL)) {
    ready |= static_cast<uint32_t>(FdEvents::kWrite);
  }
  ready &= static_cast<uint32_t>(it->second->events);
  if (ready == 0) return;
  std::shared_ptr<Watcher> hold = it->second;  // the callback may unwatch itself
  hold->callback(static_cast<FdEvents>(ready));
}

void LoopCore::WatchWakeups() {
  Watch(wake_.fd(), FdEvents::kRead, [this](FdEvents) { wake_.Consume(); });
}

// The turn.

void LoopCore::Run() {
  while (!stop_.exchange(false, std::memory_order_acq_rel)) RunOnce(-1);
}

void LoopCore::RunOnce(int64_t timeout_ns) {
  VERIFY(!std::exchange(in_turn_, true));  // loops don't nest
  thread_id_.store(CurrentThreadId(), std::memory_order_relaxed);
  Wait(PrepareWait(timeout_ns));
  {
    LockGuard guard(mutex_);
    sleeps_until_ns_ = INT64_MIN;
  }
  RunTimers();
  RunTasks();
  in_turn_ = false;
}

void LoopCore::Stop() {
  stop_.store(true, std::memory_order_release);
  Wake();
}

bool LoopCore::InLoopThread() const {
  int id = thread_id_.load(std::memory_order_relaxed);
  return id == 0 || id == CurrentThreadId();
}

int64_t LoopCore::PrepareWait(int64_t timeout_ns) {
  LockGuard guard(mutex_);
  if (!tasks_.empty() || timeout_ns == 0) return 0;
  int64_t now_ns = clock_.NowNs();
  int64_t until_ns = INT64_MAX;
  if (timeout_ns > 0 && __builtin_add_overflow(now_ns, timeout_ns, &until_ns)) until_ns = INT64_MAX;
  if (!timers_.empty()) until_ns = std::min(until_ns, timers_.top().wake_ns);
  if (until_ns <= now_ns) return 0;
  sleeps_until_ns_ = until_ns;
  return until_ns == INT64_MAX ? -1 : until_ns - now_ns;
}

// Within its turn the loop doesn't sleep, and looks at timers and tasks before it does.
bool LoopCore::InOwnTurn() const {
  return thread_id_.load(std::memory_order_relaxed) == CurrentThreadId() && in_turn_;
}

void LoopCore::Post(std::function<void()> task) {
  bool wake = false;
  {
    LockGuard guard(mutex_);
    tasks_.push_back(std::move(task));
    wake = std::exchange(sleeps_until_ns_, INT64_MIN) != INT64_MIN;
  }
  if (wake && !InOwnTurn()) Wake();
}

void LoopCore::RunTasks() {
  std::vector<std::function<void()>> tasks;
  {
    LockGuard guard(mutex_);
    tasks.swap(tasks_);
  }
  for (auto& task : tasks) {
    task();
    task = nullptr;  // what it holds is released before the next one runs
  }
}

// Timers.

bool LoopCore::Queue(TimerState& timer) {
  timers_.Remove(timer);
  timer.wake_ns = timer.vm_clock ? timer.vm_clock->ToBaseNs(timer.deadline_ns) : timer.deadline_ns;
  if (timer.wake_ns != INT64_MAX) timers_.Insert(timer);
  if (timer.wake_ns >= sleeps_until_ns_) return false;
  sleeps_until_ns_ = INT64_MIN;
  return true;
}

void LoopCore::ArmTimer(TimerState& timer, int64_t deadline_ns) {
  bool wake = false;
  {
    LockGuard guard(mutex_);
    timer.armed = true;
    timer.deadline_ns = deadline_ns;
    wake = Queue(timer);
  }
  if (wake && !InOwnTurn()) Wake();
}

void LoopCore::CancelTimer(TimerState& timer) {
  LockGuard guard(mutex_);
  timer.armed = false;
  timers_.Remove(timer);
}

void LoopCore::ResyncTimer(TimerState& timer) {
  bool wake = false;
  {
    LockGuard guard(mutex_);
    wake = timer.armed && Queue(timer);
  }
  if (wake && !InOwnTurn()) Wake();
}

bool LoopCore::ReadTimer(const TimerState& timer, int64_t* deadline_ns) const {
  LockGuard guard(mutex_);
  *deadline_ns = timer.deadline_ns;
  return timer.armed;
}

std::shared_ptr<TimerState> LoopCore::TakeExpired(int64_t now_ns) {
  while (!timers_.empty() && timers_.top().wake_ns <= now_ns) {
    TimerState& timer = timers_.top();
    // The guest's clock may have been stopped since the timer was queued.
    if (timer.vm_clock) Queue(timer);
    if (timer.heap_index == TimerState::kNotQueued || timer.wake_ns > now_ns) continue;
    timers_.Remove(timer);
    timer.armed = false;
    return timer.shared_from_this();
  }
  return nullptr;
}

void LoopCore::RunTimers() {
  int64_t now_ns = clock_.NowNs();
  size_t limit = SIZE_MAX;  // a timer that arms itself for now waits for the next turn
  for (size_t i = 0; i < limit; i++) {
    std::shared_ptr<TimerState> timer;
    {
      LockGuard guard(mutex_);
      if (limit == SIZE_MAX) limit = timers_.size();
      timer = TakeExpired(now_ns);
    }
    if (!timer) return;
    timer->callback();
  }
}

void TimerHeap::Place(size_t index, TimerState* timer) {
  heap_[index] = timer;
  timer->heap_index = index;
}

void TimerHeap::SiftUp(size_t index) {
  TimerState* timer = heap_[index];
  for (; index > 0; index = (index - 1) / 2) {
    TimerState* parent = heap_[(index - 1) / 2];
    if (parent->wake_ns <= timer->wake_ns) break;
    Place(index, parent);
  }
  Place(index, timer);
}

void TimerHeap::SiftDown(size_t index) {
  TimerState* timer = heap_[index];
  for (size_t child; (child = 2 * index + 1) < heap_.size(); index = child) {
    if (child + 1 < heap_.size() && heap_[child + 1]->wake_ns < heap_[child]->wake_ns) child++;
    if (timer->wake_ns <= heap_[child]->wake_ns) break;
    Place(index, heap_[child]);
  }
  Place(index, timer);
}

void TimerHeap::Insert(TimerState& timer) {
  heap_.push_back(&timer);
  timer.heap_index = heap_.size() - 1;
  SiftUp(timer.heap_index);
}

void TimerHeap::Remove(TimerState& timer) {
  size_t index = std::exchange(timer.heap_index, TimerState::kNotQueued);
  if (index == TimerState::kNotQueued) return;
  TimerState* last = heap_.back();
  heap_.pop_back();
  if (index == heap_.size()) return;
  Place(index, last);
  SiftUp(index);
  SiftDown(last->heap_index);
}

Timer::Timer(EventLoop& loop, std::function<void()> callback)
    : loop_(loop), state_(std::make_shared<TimerState>(loop, nullptr, std::move(callback))) {}

Timer::Timer(EventLoop& loop, const VmClock& clock, std::function<void()> callback)
    : loop_(loop), state_(std::make_shared<TimerState>(loop, &clock, std::move(callback))) {
  clock.AddObserver(state_.get());
}

Timer::~Timer() {
  if (state_->vm_clock) state_->vm_clock->RemoveObserver(state_.get());
  Cancel();
}

void Timer::Arm(int64_t deadline_ns) { loop_.ArmTimer(*state_, deadline_ns); }

void Timer::Cancel() { loop_.CancelTimer(*state_); }

bool Timer::armed() const {
  int64_t deadline_ns = 0;
  return loop_.ReadTimer(*state_, &deadline_ns);
}

int64_t Timer::deadline_ns() const {
  int64_t deadline_ns = 0;
  loop_.ReadTimer(*state_, &deadline_ns);
  return deadline_ns;
}

}  // namespace kvartz
