// Long work over nodes: with progress, pause, cancel and a speed limit. A job's work runs in a
// fiber and calls Step between its pieces; whoever holds the job steers it from outside of it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "base/event_loop.h"
#include "base/fiber.h"
#include "base/result.h"
#include "block/error_policy.h"

namespace kvartz::block {

// QEMU's states; JobList says what is possible in which.
enum class JobStatus : uint8_t {
  kCreated,
  kRunning,
  kPaused,
  kReady,    // the target is in step; Complete ends it
  kStandby,  // ready, and paused
  kWaiting,  // the work is done
  kPending,  // Finalize is waited for
  kAborting,
  kConcluded,
  kNull,  // forgotten
};
enum class JobVerb : uint8_t {
  kCancel,
  kPause,
  kResume,
  kSetSpeed,
  kComplete,
  kFinalize,
  kDismiss
};
const char* NameOf(JobStatus status);
const char* NameOf(JobVerb verb);

// As query-jobs and query-block-jobs show it.
struct JobInfo {
  std::string id = {}, type = {};
  JobStatus status = JobStatus::kCreated;
  uint64_t current_progress = 0, total_progress = 0;  // bytes
  uint64_t speed = 0;
  std::string error = {};  // once it has failed
  bool cancelled = false;
  bool paused = false;  // by the user, or by an error
  bool busy = false;    // it has something to do
  bool ready = false;
  bool io_failed = false, io_no_space = false;  // io-status
  bool auto_finalize = true, auto_dismiss = true;
};

struct JobFailure {
  bool write = false;  // of the target
  ErrorAction action = ErrorAction::kReport;
};

// Loop-owned by loop().
class Job {
 public:
  using Status = JobStatus;

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
  JobInfo info() const;

  // Ends at its next step; what was done remains. A job that is ready ends in order, as completed
  // but without its last change of the graph, unless `force`.
  enum class Force : uint8_t { kNo, kYes };
  void Cancel(Force force = Force::kYes);
  bool cancelled() const { return cancelled_; }
  void Pause();
  void Resume();
  bool pause_wished() const { return paused_; }
  // Bytes a second; 0: no limit.
  void SetSpeed(uint64_t bytes_per_sec);
  // Of a job that is ready: ends it.
  void Complete();
  void Finalize();  // of one that is pending
  // Of a group: its work done, it waits for Release, and then also for Finalize, if `manual`.
  void set_grouped() { grouped_ = true; }
  void Release(bool manual);
  void set_auto_finalize(bool finalize) { auto_finalize_ = finalize; }
  void set_auto_dismiss(bool dismiss) { auto_dismiss_ = dismiss; }

  // Is called with each step.
  std::function<void(const Job& job)> on_progress = {};
  struct Event {
    enum class Kind : uint8_t { kStatus, kReady, kPending, kEnded, kFailure } kind = Kind::kStatus;
    JobInfo info = {};
    JobFailure failure = {};
  };
  std::function<void(const Event& event)> on_event = {};

 protected:
  // Fiber: the work.
  virtual Result<> DoRun() = 0;
  // Fiber: then, what can't be undone.
  virtual Result<> DoFinalize() { return {}; }
  // Fiber: at the end, whatever became of it.
  virtual void DoClean(const Result<>& /*result*/) {}

  // Fiber: waits while paused or ahead of the speed limit, and lets the loop turn. Errors:
  // cancelled.
  Result<> Step(uint64_t bytes);
  // The same without progress, which is told by Skip when the bytes are there.
  Result<> Pace(uint64_t bytes);
  void SetTotal(uint64_t bytes) { total_ = bytes; }
  // Work that turned out not to be needed: progress without the limit.
  void Skip(uint64_t bytes);
  // The work is in step from now on: Complete is possible.
  void BecomeReady();
  bool complete_wished() const { return complete_; }
  // Cancel came while it was ready and is to end in order.
  bool soft_cancelled() const { return soft_cancelled_; }
  // An I/O error, by policy. kStop: the job is paused as of now; Step waits.
  ErrorAction OnIoError(ErrorPolicy policy, bool write, int errno_value);
  // Fiber: at most until `deadline_ns`, or until something was asked of the job.
  void Idle(int64_t deadline_ns);
  void WakeIdle();
  Result<> CheckCancelled() const;

 private:
  void SetStatus(Status status);
  void Tell(Event::Kind kind, JobFailure failure = {});
  Result<> WaitWhilePaused();
  Result<> Conclude(Result<> result);

  EventLoop& loop_;
  const std::string id_;
  Status status_ = Status::kCreated;
  uint64_t done_ = 0, total_ = 0;
  bool paused_ = false, cancelled_ = false, soft_cancelled_ = false, ready_ = false;
  bool complete_ = false, finalize_ = false, finalizing_ = false;
  bool grouped_ = false, finalized_by_hand_ = false;
  bool auto_finalize_ = true, auto_dismiss_ = true;
  bool io_failed_ = false, io_no_space_ = false, idle_ = false;
  std::string error_;
  FiberQueue resumed_;  // and whatever else was asked of it
  uint64_t speed_ = 0;
  int64_t next_ns_ = 0;  // when the limit lets the next step begin
};

}  // namespace kvartz::block
