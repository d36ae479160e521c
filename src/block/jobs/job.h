// Long work over nodes: with progress, pause, cancel and a speed limit. A job's work runs in a
// fiber and calls Step between its pieces; whoever holds the job steers it from outside of it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "base/event_loop.h"
#include "base/fiber.h"
#include "base/result.h"

namespace kvartz::block {

// Loop-owned by loop().
class Job {
 public:
  enum class Status : uint8_t { kCreated, kRunning, kPaused, kConcluded };

  Job(EventLoop& loop, std::string id) : loop_(loop), id_(std::move(id)) {}
  virtual ~Job() = default;
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  // "convert", "commit"...
  virtual const char* type() const = 0;
  // Fiber: does it all. Once. Cancelled: kState, "cancelled".
  Result<> Run();

  EventLoop& loop() const { return loop_; }
  const std::string& id() const { return id_; }
  Status status() const { return status_; }
  // Bytes of work; the total may grow while it runs.
  uint64_t progress_done() const { return done_; }
  uint64_t progress_total() const { return total_; }
  int64_t started_ns() const { return started_ns_; }

  // Ends at its next step; what was done remains.
  void Cancel();
  bool cancelled() const { return cancelled_; }
  void Pause() { paused_ = true; }
  void Resume();
  // Bytes a second; 0: no limit.
  void SetSpeed(uint64_t bytes_per_sec);

  // Is called with each step.
  std::function<void(const Job& job)> on_progress = {};

 protected:
  virtual Result<> DoRun() = 0;
  // Fiber: waits while paused or ahead of the speed limit. Errors: cancelled.
  Result<> Step(uint64_t bytes);
  void SetTotal(uint64_t bytes) { total_ = bytes; }
  // Work that turned out not to be needed: progress without the limit.
  void Skip(uint64_t bytes);

 private:
  Result<> CheckCancelled() const;
  EventLoop& loop_;
  const std::string id_;
  Status status_ = Status::kCreated;
  uint64_t done_ = 0, total_ = 0;
  int64_t started_ns_ = 0;
  bool paused_ = false, cancelled_ = false;
  FiberQueue resumed_;
  uint64_t speed_ = 0;
  int64_t next_ns_ = 0;  // when the limit lets the next step begin
};

}  // namespace kvartz::block
