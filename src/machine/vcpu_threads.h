// The threads that run a board's vCPUs, and the way to park them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/sync.h"
#include "cpu/accel.h"

namespace kvartz::machine {

class Board;

// Loop-owned; the threads are its own. A vCPU that met a triple fault or an engine failure parks
// itself until the next ResumeAll (after a reset, say).
class VcpuThreads {
 public:
  // Starts the threads, parked. The board outlives this.
  explicit VcpuThreads(Board& board);
  ~VcpuThreads();

  // Guest time starts, devices resume, vCPUs run. Nothing if they run already.
  void ResumeAll();
  // vCPUs are parked, guest time stands still, devices are quiet, when this returns. Nothing if
  // they are parked already.
  void PauseAll();
  bool running() const { return running_; }

  // Parks, resets the board, and runs again if it ran. Errors: the board's.
  Result<> Reset();

  // The host's thread id of vCPU `index` (query-cpus-fast).
  int thread_id(unsigned index) const;

 private:
  struct Slot;
  void Body(Slot& slot);

  Board& board_;
  Mutex mutex_;
  CondVar changed_;
  bool run_ GUARDED_BY(mutex_) = false;
  uint64_t run_count_ GUARDED_BY(mutex_) =
      0;  // of ResumeAll: a vCPU that is stuck runs again in the next one only
  std::atomic<bool> running_now_{false};  // run_, for the vCPUs' loops
  bool quit_ GUARDED_BY(mutex_) = false;
  bool running_ = false;
  std::vector<std::unique_ptr<Slot>> slots_;
};

}  // namespace kvartz::machine
