#include "base/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <boost/context/detail/fcontext.hpp>
#include <memory>
#include <utility>
#include <vector>

#include "base/check.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KVARTZ_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define KVARTZ_TSAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define KVARTZ_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#define KVARTZ_TSAN 1
#endif
#ifdef KVARTZ_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef KVARTZ_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace kvartz {

namespace context = boost::context::detail;

// A fiber that has ended stays with its stack for the next one.
struct FiberImpl final : Fiber {
  FiberImpl();
  ~FiberImpl();
  FiberImpl(const FiberImpl&) = delete;
  FiberImpl& operator=(const FiberImpl&) = delete;

  uint8_t* stack = nullptr;  // the guard page is below
  context::fcontext_t self = nullptr;
  std::function<void()> body;
  std::function<void()> after;
  bool waits = false;  // in Suspend
  bool woken = false;  // before it waited
  bool ended = true;
  FiberImpl* next_ready = nullptr;
#ifdef KVARTZ_ASAN
  void* fake_stack = nullptr;
#endif
#ifdef KVARTZ_TSAN
  void* tsan = nullptr;
#endif
};

struct FiberThread {
  static constexpr size_t kKept = 64;  // ended fibers whose stacks are kept

  FiberImpl* current = nullptr;
  context::fcontext_t main = nullptr;
  FiberImpl* ready_head = nullptr;  // while a fiber runs: who goes on next
  FiberImpl* ready_tail = nullptr;
  std::vector<std::unique_ptr<FiberImpl>> ended;
#ifdef KVARTZ_ASAN
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
#endif
#ifdef KVARTZ_TSAN
  void* tsan = nullptr;
#endif

  // Never inlined: a fiber's code must not keep the address over a wait.
  [[gnu::noinline]] static FiberThread& Get() {
    thread_local FiberThread state;
    return state;
  }

  void Schedule(FiberImpl* fiber);
  void RunReady();
  void SwitchTo(FiberImpl* fiber);
  void SwitchBack();
  void Retire(FiberImpl* fiber);
};

namespace {

size_t PageSize() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

void Entry(context::transfer_t from) {
  FiberThread* thread = &FiberThread::Get();
  FiberImpl* fiber = thread->current;
#ifdef KVARTZ_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &thread->stack, &thread->stack_size);
#endif
  thread->main = from.fctx;
  for (;;) {
    fiber->body();
    fiber->body = nullptr;
    fiber->ended = true;
    FiberThread::Get().SwitchBack();
  }
}

}  // namespace

FiberImpl::FiberImpl() {
  size_t guard = PageSize();
  void* memory = mmap(nullptr, guard + kFiberStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  VERIFY(memory != MAP_FAILED);
  VERIFY(mprotect(memory, guard, PROT_NONE) == 0);
  stack = static_cast<uint8_t*>(memory) + guard;
  self = context::make_fcontext(stack + kFiberStackBytes, kFiberStackBytes, &Entry);
#ifdef KVARTZ_TSAN
  tsan = __tsan_create_fiber(0);
#endif
}

FiberImpl::~FiberImpl() {
#ifdef KVARTZ_TSAN
  __tsan_destroy_fiber(tsan);
#endif
  munmap(stack - PageSize(), PageSize() + kFiberStackBytes);
}

void FiberThread::SwitchTo(FiberImpl* fiber) {
  current = fiber;
#ifdef KVARTZ_ASAN
  __sanitizer_start_switch_fiber(&fake_stack, fiber->stack, kFiberStackBytes);
#endif
#ifdef KVARTZ_TSAN
  tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber->tsan, 0);
#endif
  context::transfer_t back = context::jump_fcontext(fiber->self, nullptr);
#ifdef KVARTZ_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  fiber->self = back.fctx;
  current = nullptr;
}

void FiberThread::SwitchBack() {
  [[maybe_unused]] FiberImpl* fiber = current;
#ifdef KVARTZ_ASAN
  __sanitizer_start_switch_fiber(&fiber->fake_stack, stack, stack_size);
#endif
#ifdef KVARTZ_TSAN
  __tsan_switch_to_fiber(tsan, 0);
#endif
  context::transfer_t back = context::jump_fcontext(main, nullptr);
  FiberThread& thread = Get();
#ifdef KVARTZ_ASAN
  __sanitizer_finish_switch_fiber(fiber->fake_stack, &thread.stack, &thread.stack_size);
#endif
  thread.main = back.fctx;
}

void FiberThread::Schedule(FiberImpl* fiber) {
  fiber->next_ready = nullptr;
  (ready_tail ? ready_tail->next_ready : ready_head) = fiber;
  ready_tail = fiber;
}

void FiberThread::Retire(FiberImpl* fiber) {
  if (ended.size() < kKept) {
    ended.emplace_back(fiber);
  } else {
    delete fiber;
  }
}

// An `after` may start or wake fibers, which then run at once, before those that are ready here.
void FiberThread::RunReady() {
  while (FiberImpl* fiber = ready_head) {
    ready_head = fiber->next_ready;
    if (!ready_head) ready_tail = nullptr;
    SwitchTo(fiber);
    if (!fiber->ended) continue;
    std::function<void()> after = std::move(fiber->after);
    fiber->after = nullptr;
    Retire(fiber);
    if (after) after();
  }
}

void Fiber::Start(std::function<void()> body, std::function<void()> after) {
  FiberThread& thread = FiberThread::Get();
  FiberImpl* fiber = nullptr;
  if (thread.ended.empty()) {
    fiber = new FiberImpl;
  } else {
    fiber = thread.ended.back().release();
    thread.ended.pop_back();
  }
  fiber->body = std::move(body);
  fiber->after = std::move(after);
  fiber->ended = fiber->waits = fiber->woken = false;
  thread.Schedule(fiber);
  if (!thread.current) thread.RunReady();
}

Fiber* Fiber::Current() { return FiberThread::Get().current; }

void Fiber::Suspend() {
  FiberThread& thread = FiberThread::Get();
  FiberImpl* fiber = thread.current;
  VERIFY(fiber);
  if (fiber->woken) {
    fiber->woken = false;
    return;
  }
  fiber->waits = true;
  thread.SwitchBack();
}

void Fiber::Wake() {
  auto* fiber = static_cast<FiberImpl*>(this);
  if (!fiber->waits) {
    fiber->woken = true;
    return;
  }
  fiber->waits = false;
  FiberThread& thread = FiberThread::Get();
  thread.Schedule(fiber);
  if (!thread.current) thread.RunReady();
}

void FiberQueue::Wait() {
  Waiter waiter = {Fiber::Current(), nullptr};
  VERIFY(waiter.fiber);
  (tail_ ? tail_->next : head_) = &waiter;
  tail_ = &waiter;
  Fiber::Suspend();
}

bool FiberQueue::WakeOne() {
  Waiter* waiter = head_;
  if (!waiter) return false;
  head_ = waiter->next;
  if (!head_) tail_ = nullptr;
  waiter->fiber->Wake();
  return true;
}

void FiberQueue::WakeAll() {
  Waiter* waiter = head_;
  head_ = tail_ = nullptr;
  while (waiter) {
    Waiter* next = waiter->next;  // gone once its fiber runs
    waiter->fiber->Wake();
    waiter = next;
  }
}

void FiberMutex::Lock() {
  if (!locked_) {
    locked_ = true;
    return;
  }
  waiters_.Wait();  // whoever unlocks hands it over locked
}

bool FiberMutex::TryLock() { return !std::exchange(locked_, true); }

void FiberMutex::Unlock() {
  VERIFY(locked_);
  if (!waiters_.WakeOne()) locked_ = false;
}

void RunOutsideFibers(const std::function<void()>& task) {
  Fiber* fiber = Fiber::Current();
  if (!fiber) return task();
  Fiber::Start([] {},
               [&] {
                 task();
                 fiber->Wake();
               });
  Fiber::Suspend();
}

void FiberSleepUntil(EventLoop& loop, int64_t deadline_ns) {
  Fiber* fiber = Fiber::Current();
  VERIFY(fiber);
  Timer timer(loop, [fiber] { fiber->Wake(); });
  timer.Arm(deadline_ns);
  Fiber::Suspend();
}

}  // namespace kvartz
