#include "machine/vcpu_threads.h"

#include <string>

#include "machine/board.h"

namespace kvartz::machine {

struct VcpuThreads::Slot {
  cpu::Vcpu* vcpu = nullptr;
  bool parked = true;  // guarded by mutex_
  uint64_t seen_run = 0;
  std::atomic<int> thread_id{0};
  Thread thread;
};

VcpuThreads::VcpuThreads(Board& board) : board_(board) {
  for (unsigned i = 0; i < board.vcpu_count(); i++) {
    slots_.push_back(std::make_unique<Slot>());
    Slot& slot = *slots_.back();
    slot.vcpu = &board.vcpu(i);
    slot.thread = Thread("vcpu" + std::to_string(i), [this, &slot] { Body(slot); });
  }
  LockGuard guard(mutex_);
  changed_.Wait(guard, [this] {
    for (const auto& slot : slots_) {
      if (!slot->thread_id) return false;
    }
    return true;
  });
}

VcpuThreads::~VcpuThreads() {
  PauseAll();
  {
    LockGuard guard(mutex_);
    quit_ = true;
  }
  changed_.NotifyAll();
  for (auto& slot : slots_) slot->thread.Join();
}

void VcpuThreads::Body(Slot& slot) {
  LockGuard guard(mutex_);
  slot.thread_id = CurrentThreadId();
  changed_.NotifyAll();
  while (true) {
    changed_.Wait(
        guard, [&]() REQUIRES(mutex_) { return quit_ || (run_ && slot.seen_run != run_count_); });
    if (quit_) return;
    slot.seen_run = run_count_;
    slot.parked = false;
    mutex_.Unlock();
    // Only the engine's own events end this loop: a kick that wasn't meant for parking goes on.
    bool stuck = false;
    while (!stuck && running_now_.load(std::memory_order_acquire))
      stuck = slot.vcpu->Run() != cpu::Vcpu::Exit::kKicked;
    mutex_.Lock();
    slot.parked = true;
    changed_.NotifyAll();
  }
}

void VcpuThreads::ResumeAll() {
  if (running_) return;
  running_ = true;
  board_.StartTime();
  {
    LockGuard guard(mutex_);
    run_ = true;
    run_count_++;
    running_now_ = true;
  }
  changed_.NotifyAll();
}

void VcpuThreads::PauseAll() {
  if (!running_) return;
  running_ = false;
  {
    LockGuard guard(mutex_);
    run_ = false;
    running_now_ = false;
  }
  for (auto& slot : slots_) slot->vcpu->Kick();
  {
    LockGuard guard(mutex_);
    changed_.Wait(guard, [this] {
      for (const auto& slot : slots_) {
        if (!slot->parked) return false;
      }
      return true;
    });
  }
  board_.StopTime();
}

Result<> VcpuThreads::Reset() {
  bool resume = running_;
  PauseAll();
  TRY(board_.Reset());
  if (resume) ResumeAll();
  return {};
}

int VcpuThreads::thread_id(unsigned index) const { return slots_[index]->thread_id; }

}  // namespace kvartz::machine
