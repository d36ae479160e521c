#include "block/jobs/copy_job.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/call_on.h"
#include "base/check.h"
#include "block/graph.h"

namespace kvartz::block {
namespace {
constexpr uint64_t kPieceBytes = 1 << 20;
constexpr int64_t kRetryNs = 100'000'000;
constexpr int64_t kCountNs = 100'000'000;
constexpr unsigned kExtentsATurn = 64;
}  // namespace

CopyJob::CopyJob(Registry& registry, EventLoop& loop, const CommonSettings& common, Clear clear,
                 Policies policies)
    : Job(loop, common.job_id),
      registry_(registry),
      claims_(registry, who()),
      clear_(clear),
      policies_(policies) {
  SetSpeed(common.speed);
}

Result<> CopyJob::InsertFilter(const NodePtr& filter, const NodePtr& source,
                               const NodePtr& target) {
  TRY(claims_.Take({source, target}));
  Result<> inserted = registry_.InsertFilter(source, filter);
  if (!inserted) {
    claims_.Release();
    return inserted;
  }
  VERIFY(claims_.Take({filter}));
  return {};
}

Result<> CopyJob::CopyDirty() {
  Result<> result = Pump();
  while (under_way_ > 0) piece_done_.Wait();
  failure_ = {};
  counted_ns_ = INT64_MIN;
  UpdateTotal();
  return result;
}

Result<> CopyJob::Pump() {
  uint64_t at = 0;
  const uint64_t end = todo_->size_bytes();
  for (;;) {
    if (failure_.rc != 0) TRY(HandleFailure());
    TRY(CheckSound());
    UpdateTotal();
    auto dirty = todo_->NextDirty(at, end);
    if (!dirty) {
      // Another pass begins when nothing of this one is under way.
      if (under_way_ > 0) {
        piece_done_.Wait();
        continue;
      }
      if (failure_.rc != 0) continue;
      at = 0;
      if (!todo_->NextDirty(0, end) || MayStop()) return {};
      if (!at_once_) TRY(Pace(0));
      continue;
    }
    if (under_way_ >= parallel_) {
      piece_done_.Wait();
      continue;
    }
    uint64_t length = std::min(dirty->length, kPieceBytes - dirty->offset % kPieceBytes);
    at = dirty->offset + length;
    StartPiece(dirty->offset, length);
    if (!at_once_) TRY(Pace(length));
  }
}

Result<> CopyJob::HandleFailure() {
  Failure failure = std::exchange(failure_, {});
  Error error = ErrnoError(
      -failure.rc, fmt::format("cannot {} '{}' at {:#x}", failure.reading ? "read" : "write",
                               failure.reading ? SourceName() : TargetName(), failure.offset));
  if (at_once_) return Fail(std::move(error));
  ErrorPolicy policy = failure.reading ? policies_.on_source_error : policies_.on_target_error;
  switch (OnIoError(policy, !failure.reading, -failure.rc)) {
    case ErrorAction::kReport:
      return Fail(std::move(error));
    case ErrorAction::kStop:
      return Pace(0);
    case ErrorAction::kIgnore:
      break;
  }
  if (!skip_ignored_) {
    Idle(loop().clock().NowNs() + kRetryNs);
    return Pace(0);
  }
  todo_->Clear(failure.offset, failure.length);
  skipped_ = true;
  return {};
}

void CopyJob::StartPiece(uint64_t offset, uint64_t length) {
  under_way_++;
  bytes_under_way_ += length;
  Fiber::Start([this, offset, length] {
    CopyPiece(offset, length);
    under_way_--;
    bytes_under_way_ -= length;
    piece_done_.WakeAll();
  });
}

// Others may have copied some of it by now.
void CopyJob::CopyPiece(uint64_t offset, uint64_t length) {
  RangeLocks::Guard lock(locks_, offset, length);
  uint64_t at = offset;
  const uint64_t end = offset + length;
  while (auto dirty = todo_->NextDirty(at, end)) {
    if (clear_ == Clear::kBefore) todo_->Clear(dirty->offset, dirty->length);
    bool reading = false;
    if (int rc = CopyRange(dirty->offset, dirty->length, &reading)) {
      if (clear_ == Clear::kBefore) todo_->Set(dirty->offset, dirty->length);
      if (failure_.rc == 0) failure_ = {rc, reading, dirty->offset, dirty->length};
      return;
    }
    if (clear_ == Clear::kAfter) todo_->Clear(dirty->offset, dirty->length);
    Skip(dirty->length);
    at = dirty->offset + dirty->length;
  }
}

void CopyJob::UpdateTotal() {
  int64_t now = loop().clock().NowNs();
  if (counted_ns_ != INT64_MIN && now < counted_ns_ + kCountNs) return;
  counted_ns_ = now;
  uint64_t left = todo_->dirty_bytes();
  if (clear_ == Clear::kBefore) left += bytes_under_way_;
  SetTotal(progress_done() + left);
}

Result<> CopyJob::MarkAllocated(Node& top, Node* base, Layers layers) {
  unsigned looked = 0;
  for (uint64_t at = 0; at < top.size_bytes();) {
    ChainExtent found = TRY(StatusAbove(top, base, at, top.size_bytes() - at));
    if (found.extent.length == 0)
      return Fail(ErrorCode::kIo, fmt::format("'{}' ends too early", top.name()));
    if (found.extent.allocated && (layers == Layers::kAll || found.depth > 0))
      todo_->Set(at, found.extent.length);
    at += found.extent.length;
    if (++looked % kExtentsATurn == 0) TRY(Pace(0));
  }
  return {};
}

}  // namespace kvartz::block
