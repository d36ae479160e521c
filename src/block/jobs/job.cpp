#include "block/jobs/job.h"

#include <algorithm>

namespace kvartz::block {
namespace {
// A limited job looks at least this often whether it is cancelled.
constexpr int64_t kSliceNs = 100'000'000;
}  // namespace

Result<> Job::Run() {
  status_ = Status::kRunning;
  started_ns_ = loop_.clock().NowNs();
  Result<> result = CheckCancelled();
  if (result) result = DoRun();
  status_ = Status::kConcluded;
  return result;
}

Result<> Job::CheckCancelled() const {
  if (cancelled_) return Fail(ErrorCode::kState, "cancelled");
  return {};
}

void Job::Cancel() {
  cancelled_ = true;
  resumed_.WakeAll();
}

void Job::Resume() {
  paused_ = false;
  resumed_.WakeAll();
}

void Job::SetSpeed(uint64_t bytes_per_sec) {
  speed_ = bytes_per_sec;
  next_ns_ = 0;
}

void Job::Skip(uint64_t bytes) {
  done_ += bytes;
  if (on_progress) on_progress(*this);
}

Result<> Job::Step(uint64_t bytes) {
  Skip(bytes);
  while (paused_ && !cancelled_) {
    status_ = Status::kPaused;
    resumed_.Wait();
    status_ = Status::kRunning;
  }
  TRY(CheckCancelled());
  if (speed_ == 0 || bytes == 0) return {};
  int64_t now = loop_.clock().NowNs();
  int64_t until = next_ns_ =
      std::max(now, next_ns_) +
      static_cast<int64_t>(static_cast<double>(bytes) * 1e9 / static_cast<double>(speed_));
  while (now < until && speed_ != 0) {
    FiberSleepUntil(loop_, std::min(until, now + kSliceNs));
    TRY(CheckCancelled());
    now = loop_.clock().NowNs();
  }
  return {};
}

}  // namespace kvartz::block
