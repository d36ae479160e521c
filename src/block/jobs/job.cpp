#include "block/jobs/job.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>

#include "base/call_on.h"

namespace kvartz::block {
namespace {
// A limited job looks at least this often whether it is cancelled.
constexpr int64_t kSliceNs = 100'000'000;

constexpr const char* kStatusNames[] = {"created", "running", "paused",   "ready",     "standby",
                                        "waiting", "pending", "aborting", "concluded", "null"};
constexpr const char* kVerbNames[] = {"cancel",   "pause",    "resume", "set-speed",
                                      "complete", "finalize", "dismiss"};
constexpr const char* kPolicyNames[] = {"report", "ignore", "enospc", "stop"};
}  // namespace

const char* NameOf(JobStatus status) { return kStatusNames[static_cast<size_t>(status)]; }
const char* NameOf(JobVerb verb) { return kVerbNames[static_cast<size_t>(verb)]; }
const char* NameOf(ErrorPolicy policy) { return kPolicyNames[static_cast<size_t>(policy)]; }

const char* NameOf(ErrorAction action) {
  return action == ErrorAction::kReport ? "report"
                                        : (action == ErrorAction::kIgnore ? "ignore" : "stop");
}

Result<ErrorPolicy> ParseErrorPolicy(const std::string& name) {
  for (ErrorPolicy policy :
       {ErrorPolicy::kReport, ErrorPolicy::kIgnore, ErrorPolicy::kEnospc, ErrorPolicy::kStop}) {
    if (name == NameOf(policy)) return policy;
  }
  return Fail(
      ErrorCode::kInvalid,
      fmt::format("unknown error policy '{}': it is one of report, ignore, enospc, stop", name));
}

ErrorAction ActionOf(ErrorPolicy policy, int errno_value) {
  switch (policy) {
    case ErrorPolicy::kReport:
      return ErrorAction::kReport;
    case ErrorPolicy::kIgnore:
      return ErrorAction::kIgnore;
    case ErrorPolicy::kEnospc:
      return errno_value == ENOSPC ? ErrorAction::kStop : ErrorAction::kReport;
    case ErrorPolicy::kStop:
      break;
  }
  return ErrorAction::kStop;
}

JobInfo Job::info() const {
  return {.id = id_,
          .type = type(),
          .status = status_,
          .current_progress = done_,
          .total_progress = std::max(total_, done_),
          .speed = speed_,
          .error = error_,
          .cancelled = cancelled_ && !soft_cancelled_,
          .paused = paused_,
          .busy = status_ == Status::kRunning || (status_ == Status::kReady && !idle_),
          .ready = ready_,
          .io_failed = io_failed_,
          .io_no_space = io_no_space_,
          .auto_finalize = auto_finalize_,
          .auto_dismiss = auto_dismiss_};
}

void Job::Tell(Event::Kind kind, JobFailure failure) {
  if (on_event) on_event({.kind = kind, .info = info(), .failure = failure});
}

void Job::SetStatus(Status status) {
  if (status_ == status) return;
  status_ = status;
  Tell(Event::Kind::kStatus);
}

Result<> Job::Run() {
  SetStatus(Status::kRunning);
  Result<> result = CheckCancelled();
  if (result) result = DoRun();
  if (result) {
    ready_ = false;
    SetStatus(Status::kWaiting);
    while (grouped_ && !cancelled_) resumed_.Wait();
    result = CheckCancelled();
  }
  if (result) {
    SetStatus(Status::kPending);
    if (!auto_finalize_) Tell(Event::Kind::kPending);
    while ((!auto_finalize_ || finalized_by_hand_) && !finalize_ && !cancelled_) resumed_.Wait();
    result = CheckCancelled();
    finalizing_ = true;
    if (result) result = DoFinalize();
  }
  return Conclude(std::move(result));
}

Result<> Job::Conclude(Result<> result) {
  if (!result) SetStatus(Status::kAborting);
  DoClean(result);
  if (!result && !(cancelled_ && !soft_cancelled_)) error_ = result.error().what;
  Tell(Event::Kind::kEnded);
  SetStatus(Status::kConcluded);
  return result;
}

Result<> Job::CheckCancelled() const {
  if (cancelled_ && !soft_cancelled_) return Fail(ErrorCode::kState, "cancelled");
  return {};
}

void Job::Cancel(Force force) {
  if (finalizing_ || status_ == Status::kAborting || status_ == Status::kConcluded)
    return;  // it has as good as ended
  if (force == Force::kNo && soft_cancelled_) return;
  soft_cancelled_ = !cancelled_ && force == Force::kNo && ready_;
  cancelled_ = true;
  resumed_.WakeAll();
}

void Job::Pause() {
  paused_ = true;
  resumed_.WakeAll();
}

void Job::Resume() {
  paused_ = false;
  io_failed_ = io_no_space_ = false;
  resumed_.WakeAll();
}

void Job::SetSpeed(uint64_t bytes_per_sec) {
  speed_ = bytes_per_sec;
  next_ns_ = 0;
  resumed_.WakeAll();
}

void Job::Complete() {
  complete_ = true;
  resumed_.WakeAll();
}

void Job::Finalize() {
  finalize_ = true;
  resumed_.WakeAll();
}

void Job::Release(bool manual) {
  grouped_ = false;
  finalized_by_hand_ = manual;
  resumed_.WakeAll();
}

void Job::BecomeReady() {
  ready_ = true;
  SetStatus(Status::kReady);
  Tell(Event::Kind::kReady);
}

ErrorAction Job::OnIoError(ErrorPolicy policy, bool write, int errno_value) {
  ErrorAction action = ActionOf(policy, errno_value);
  Tell(Event::Kind::kFailure, {.write = write, .action = action});
  if (action == ErrorAction::kStop) {
    paused_ = true;
    io_failed_ = true;
    io_no_space_ = errno_value == ENOSPC;
  }
  return action;
}

void Job::Skip(uint64_t bytes) {
  done_ += bytes;
  if (on_progress) on_progress(*this);
}

Result<> Job::WaitWhilePaused() {
  while (paused_ && !cancelled_) {
    SetStatus(ready_ ? Status::kStandby : Status::kPaused);
    resumed_.Wait();
  }
  if (status_ == Status::kPaused || status_ == Status::kStandby)
    SetStatus(ready_ ? Status::kReady : Status::kRunning);
  return CheckCancelled();
}

void Job::Idle(int64_t deadline_ns) {
  Timer timer(loop_, [this] { resumed_.WakeAll(); });
  timer.Arm(deadline_ns);
  idle_ = true;
  resumed_.Wait();
  idle_ = false;
}

void Job::WakeIdle() {
  if (idle_) resumed_.WakeAll();
}

Result<> Job::Step(uint64_t bytes) {
  Skip(bytes);
  return Pace(bytes);
}

Result<> Job::Pace(uint64_t bytes) {
  // Drain must be able to end between two pieces.
  FiberYield(loop_);
  TRY(WaitWhilePaused());
  if (speed_ == 0 || bytes == 0) return {};
  int64_t now = loop_.clock().NowNs();
  int64_t until = next_ns_ =
      std::max(now, next_ns_) +
      static_cast<int64_t>(static_cast<double>(bytes) * 1e9 / static_cast<double>(speed_));
  while (now < until && speed_ != 0) {
    FiberSleepUntil(loop_, std::min(until, now + kSliceNs));
    TRY(WaitWhilePaused());
    now = loop_.clock().NowNs();
  }
  return {};
}

}  // namespace kvartz::block
