#include "block/disk.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>

#include "base/call_on.h"
#include "base/check.h"

namespace kvartz::block {
namespace {

bool Throttled(Request::Kind kind) {
  return kind == Request::Kind::kRead || kind == Request::Kind::kWrite ||
         kind == Request::Kind::kWriteZeroes;
}

ThrottleGroup::Direction DirectionOf(const DiskRequest& request) {
  return request.kind == Request::Kind::kRead ? ThrottleGroup::Direction::kRead
                                              : ThrottleGroup::Direction::kWrite;
}

void Append(DiskRequest*& head, DiskRequest*& tail, DiskRequest* request) {
  request->next = nullptr;
  (tail ? tail->next : head) = request;
  tail = request;
}

DiskRequest* TakeFirst(DiskRequest*& head, DiskRequest*& tail) {
  DiskRequest* request = head;
  head = request->next;
  if (!head) tail = nullptr;
  return request;
}

}  // namespace

Disk::Disk(EventLoop& loop, std::string name, DiskOwner* owner)
    : loop_(&loop), name_(std::move(name)), owner_(owner) {
  UpdateSlow();
}

Disk::~Disk() { VERIFY(in_flight_ == 0 && !throttled_head_[0] && !throttled_head_[1]); }

void Disk::UpdateSlow() { slow_ = !node_ || hold_ || quiesced_ > 0 || throttle_; }

void Disk::Start(DiskRequest* request) {
  request->disk = this;
  request->start_ns = loop_->clock().NowNs();
  if (!slow_) return Launch(request);
  StartSlowly(request);
}

void Disk::StartSlowly(DiskRequest* request) {
  if (hold_ || quiesced_ > 0) return Append(kept_head_, kept_tail_, request);
  if (!node_) {
    in_flight_++;
    request->io.owner = request;
    loop_->Post([request] { Done(&request->io, -ENOMEDIUM); });
    return;
  }
  if (!throttle_ || !Throttled(request->kind)) return Launch(request);
  ThrottleGroup::Direction direction = DirectionOf(*request);
  auto line = static_cast<size_t>(direction);
  if (!throttled_head_[line] && throttle_->Admit(direction, request->length))
    return Launch(request);
  Append(throttled_head_[line], throttled_tail_[line], request);
}

void Disk::Launch(DiskRequest* request) {
  in_flight_++;
  Request& io = request->io;
  io = {};
  io.kind = request->kind;
  io.fua = request->fua;
  io.unmap = request->unmap;
  io.offset = request->offset;
  io.length = request->length;
  io.iov = request->iov;
  io.iov_count = request->iov_count;
  io.done = Done;
  io.owner = request;
  node_->Start(&io);
}

DiskStatistics::Operation& Disk::OperationOf(Request::Kind kind) {
  switch (kind) {
    case Request::Kind::kRead:
      return statistics_.read;
    case Request::Kind::kFlush:
      return statistics_.flush;
    case Request::Kind::kDiscard:
      return statistics_.unmap;
    case Request::Kind::kWrite:
    case Request::Kind::kWriteZeroes:
      break;
  }
  return statistics_.write;
}

void Disk::Done(Request* io, int result) {
  auto* request = static_cast<DiskRequest*>(io->owner);
  Disk& disk = *request->disk;
  DiskStatistics::Operation& operation = disk.OperationOf(request->kind);
  int64_t now = disk.loop_->clock().NowNs();
  disk.last_done_ns_ = now;
  operation.total_time_ns += now - request->start_ns;
  if (result >= 0) {
    operation.bytes += request->length;
    operation.operations++;
    if (&operation == &disk.statistics_.write) {
      disk.statistics_.write_highest_offset =
          std::max(disk.statistics_.write_highest_offset, request->offset + request->length);
    }
  } else {
    operation.failed++;
    if (disk.Failed(request, result, &result)) request = nullptr;
  }
  // Quiesce waits for this, too: what `done` does isn't under way any more.
  if (request) request->done(request, result);
  if (--disk.in_flight_ == 0) disk.quiet_.WakeAll();
}

// True: it is kept, to be done again.
bool Disk::Failed(DiskRequest* request, int result, int* report) {
  if (result == -ENOTSUP || result == -ENOMEDIUM) return false;
  ErrorAction action =
      ActionOf(request->kind == Request::Kind::kRead ? on_read_error_ : on_write_error_, -result);
  if (action == ErrorAction::kStop && !owner_) action = ErrorAction::kReport;
  if (action == ErrorAction::kStop) {
    io_failed_ = true;
    io_no_space_ = result == -ENOSPC;
    Append(kept_head_, kept_tail_, request);
  } else if (action == ErrorAction::kIgnore) {
    *report = 0;
  }
  if (owner_) {
    owner_->DiskFailed(*this, {.kind = request->kind,
                               .action = action,
                               .errno_value = -result,
                               .node_name = node_ ? node_->node_name() : ""});
  }
  return action == ErrorAction::kStop;
}

// ---- waiting ----

void Disk::Drain() {
  for (size_t line = 0; line < 2; line++) {
    while (throttled_head_[line]) {
      DiskRequest* request = TakeFirst(throttled_head_[line], throttled_tail_[line]);
      if (hold_ || quiesced_ > 0) {
        Append(kept_head_, kept_tail_, request);
        continue;
      }
      throttle_->Count(DirectionOf(*request), request->length);
      Launch(request);
    }
  }
  if (throttle_) throttle_->Withdraw();
  while (in_flight_ > 0 && node_) node_->Drain();
}

void Disk::Hold() {
  hold_ = true;
  UpdateSlow();
}

void Disk::Release() {
  hold_ = false;
  io_failed_ = io_no_space_ = false;
  UpdateSlow();
  StartKept();
}

void Disk::StartKept() {
  if (hold_ || quiesced_ > 0) return;
  DiskRequest* request = kept_head_;
  kept_head_ = kept_tail_ = nullptr;
  while (request) {
    DiskRequest* next = request->next;
    slow_ ? StartSlowly(request) : Launch(request);
    request = next;
  }
  if (throttle_) StartThrottled();
}

void Disk::DropKept() {
  DiskRequest* request = kept_head_;
  kept_head_ = kept_tail_ = nullptr;
  while (request) {
    DiskRequest* next = request->next;
    request->done(request, -ECANCELED);
    request = next;
  }
}

void Disk::StartThrottled() {
  if (hold_ || quiesced_ > 0) return;
  for (size_t line = 0; line < 2; line++) {
    while (DiskRequest* first = throttled_head_[line]) {
      if (!throttle_->Admit(DirectionOf(*first), first->length)) break;
      Launch(TakeFirst(throttled_head_[line], throttled_tail_[line]));
    }
  }
}

void Disk::SetThrottle(std::shared_ptr<ThrottleGroup> group) {
  DiskRequest* heads[2] = {throttled_head_[0], throttled_head_[1]};
  for (size_t line = 0; line < 2; line++) throttled_head_[line] = throttled_tail_[line] = nullptr;
  throttle_.reset();
  throttle_group_ = std::move(group);
  MakeThrottle();
  for (DiskRequest* request : heads) {
    while (request) {
      DiskRequest* next = request->next;
      StartSlowly(request);
      request = next;
    }
  }
}

void Disk::MakeThrottle() {
  if (throttle_group_) {
    throttle_ = std::make_unique<ThrottleGroup::Member>(throttle_group_, *loop_,
                                                        [this] { StartThrottled(); });
  }
  UpdateSlow();
}

void Disk::Quiesce() {
  quiesced_++;
  UpdateSlow();
  while (in_flight_ > 0) quiet_.Wait();
  // Whoever finished the last one may still be at it.
  FiberYield(*loop_);
}

void Disk::Unquiesce() {
  VERIFY(quiesced_ > 0);
  quiesced_--;
  UpdateSlow();
  if (quiesced_ > 0) return;
  // From the loop, as requests are started outside of fibers. Where one has failed the machine is
  // about to stop, and its Release starts them all.
  loop_->Post([this, alive = std::weak_ptr<bool>(alive_)] {
    if (alive.expired()) return;
    if (!io_failed_) return StartKept();
    if (throttle_) StartThrottled();
  });
}

void Disk::ReplaceNode(NodePtr node) {
  VERIFY(in_flight_ == 0);
  node_ = std::move(node);
  if (node_ && &node_->loop() != loop_) {
    VERIFY(!throttled_head_[0] && !throttled_head_[1]);
    throttle_.reset();
    loop_ = &node_->loop();
    MakeThrottle();
  }
  UpdateSlow();
}

void Disk::NodeResized() {
  if (owner_) owner_->DiskResized(*this);
}

std::string Disk::UserName() const { return fmt::format("device '{}'", name_); }

void Disk::SetErrorPolicies(ErrorPolicy on_read, ErrorPolicy on_write) {
  on_read_error_ = on_read;
  on_write_error_ = on_write;
}

DiskStatistics Disk::statistics() const {
  DiskStatistics statistics = statistics_;
  if (last_done_ns_ >= 0) statistics.idle_time_ns = loop_->clock().NowNs() - last_done_ns_;
  return statistics;
}

void Disk::CountInvalid(Request::Kind kind) { OperationOf(kind).invalid++; }

}  // namespace kvartz::block
