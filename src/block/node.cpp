#include "block/node.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/check.h"
#include "base/fiber.h"
#include "block/dirty_bitmap.h"
#include "block/jobs/zero_scan.h"

namespace kvartz::block {

// Requests that ended before they began. Shared with the task that finishes them, which may outlive
// the node.
struct Node::LateList {
  Request* head = nullptr;
  Request* tail = nullptr;
  bool posted = false;

  void FinishAll() {
    while (Request* request = head) {
      head = request->next;
      if (!head) tail = nullptr;
      request->done(request, request->result);
    }
  }
};

// A request that a bitmap is told of when it is done.
struct Node::Tracked {
  Request inner;
  Request* outer;
  Node* node;
};

Node::Node(EventLoop& loop, std::string name)
    : loop_(&loop), name_(std::move(name)), late_(std::make_shared<LateList>()) {}

Node::~Node() = default;

void Node::FinishLater(Request* request, int result) {
  request->result = result;
  request->next = nullptr;
  (late_->tail ? late_->tail->next : late_->head) = request;
  late_->tail = request;
  if (std::exchange(late_->posted, true)) return;
  loop_->Post([late = late_] {
    late->posted = false;
    late->FinishAll();
  });
}

bool Node::FinishLateOnes() {
  if (!late_->head) return false;
  late_->FinishAll();
  return true;
}

void Node::SubmitInFiber(Request* request, std::function<int(Request& request)> work) {
  in_fibers_++;
  request->submitting = true;
  Fiber::Start([request, work = std::move(work)] { request->result = work(*request); },
               [this, request] {
                 in_fibers_--;
                 // What didn't wait for anything ends here before Submit returns.
                 if (request->submitting) return FinishLater(request, request->result);
                 request->done(request, request->result);
               });
  request->submitting = false;
}

void Node::Start(Request* request) {
  if (int error = Check(*request)) return FinishLater(request, error);
  if (request->kind == Request::Kind::kWrite || request->kind == Request::Kind::kWriteZeroes)
    highest_write_ = std::max(highest_write_, request->offset + request->length);
  if (tracked_) return SubmitTracked(request);
  Submit(request);
}

void Node::set_opened_with(const NodeOptions& options) {
  opened_with_ = options;
  ignores_discard_ = !options.discard_unmap;
  UpdateTracked();
}

void Node::UpdateTracked() {
  tracked_ =
      !attached_.empty() || threshold_ || ignores_discard_ || detect_zeroes() != DetectZeroes::kOff;
}

void Node::SetWriteThreshold(uint64_t bytes, Exceeded exceeded) {
  threshold_ = bytes == 0 ? nullptr : std::make_unique<Threshold>(bytes, std::move(exceeded));
  UpdateTracked();
}

void Node::CheckThreshold(uint64_t end) {
  if (end <= threshold_->bytes) return;
  Threshold passed = std::move(*threshold_);
  SetWriteThreshold(0, nullptr);
  passed.exceeded(end - passed.bytes);
}

void Node::DetectZero(Request* request) const {
  if (request->kind != Request::Kind::kWrite || request->compressed || request->length == 0) return;
  for (unsigned i = 0; i < request->iov_count; i++) {
    const iovec& part = request->iov[i];
    if (!IsZero({static_cast<const uint8_t*>(part.iov_base), part.iov_len})) return;
  }
  request->kind = Request::Kind::kWriteZeroes;
  request->unmap = detect_zeroes() == DetectZeroes::kUnmap;
}

void Node::SubmitTracked(Request* request) {
  if (request->kind == Request::Kind::kRead || request->kind == Request::Kind::kFlush)
    return Submit(request);
  if (threshold_) CheckThreshold(request->offset + request->length);
  if (ignores_discard_) {
    if (request->kind == Request::Kind::kDiscard) return FinishLater(request, 0);
    request->unmap = false;
  }
  if (detect_zeroes() != DetectZeroes::kOff) DetectZero(request);
  if (attached_.empty()) return Submit(request);
  auto* tracked = new Tracked{*request, request, this};
  tracked->inner.owner = tracked;
  // The range as it was asked for: the nodes may change their copy.
  tracked->inner.done = [](Request* inner, int result) {
    std::unique_ptr<Tracked> done(static_cast<Tracked*>(inner->owner));
    for (const auto& bitmap : done->node->attached_) {
      if (bitmap->enabled()) bitmap->Set(done->outer->offset, done->outer->length);
    }
    done->outer->done(done->outer, result);
  };
  Submit(&tracked->inner);
}

void Node::Attach(std::shared_ptr<DirtyBitmap> bitmap) {
  attached_.push_back(std::move(bitmap));
  UpdateTracked();
}

void Node::Detach(const DirtyBitmap& bitmap) {
  std::erase_if(attached_, [&](const auto& other) { return other.get() == &bitmap; });
  UpdateTracked();
}

int Node::Check(const Request& request) const {
  if (request.kind == Request::Kind::kFlush) return 0;
  uint64_t limit = grows_ ? uint64_t{INT64_MAX} : size_bytes_;
  if (request.offset > limit || request.length > limit - request.offset) return -EINVAL;
  if (request.kind != Request::Kind::kRead && read_only_) return -EROFS;
  if (request.kind == Request::Kind::kDiscard) return 0;
  if ((request.offset | request.length) % limits_.request_alignment != 0) return -EINVAL;
  if (request.kind == Request::Kind::kWriteZeroes) return 0;
  uint64_t held = 0;
  for (unsigned i = 0; i < request.iov_count; i++) {
    if (__builtin_add_overflow(held, request.iov[i].iov_len, &held)) return -EINVAL;
  }
  return held == request.length ? 0 : -EINVAL;
}

std::unexpected<Error> Node::Unsupported(const char* what) const {
  return Fail(ErrorCode::kUnsupported,
              fmt::format("'{}': format {} doesn't support {}", name_, driver(), what));
}

// By value: who overrides them keeps what it gets.
// NOLINTNEXTLINE(performance-unnecessary-value-param)
Result<> Node::SetBacking(NodePtr) { return Unsupported("a backing file"); }
// NOLINTNEXTLINE(performance-unnecessary-value-param)
Result<> Node::SetFile(NodePtr) { return Unsupported("another file"); }
Result<> Node::Resize(const ResizeOptions&) { return Unsupported("another size"); }
Result<> Node::SetReadOnly(bool) { return Unsupported("being reopened"); }

Result<> Node::MoveTo(EventLoop& loop) {
  EventLoop& before = *loop_;
  if (&loop == &before) return {};
  std::vector<Node*> moved;
  if (!file()) return Unsupported("being served by another thread");
  for (Node* child : {data_file(), file(), backing()}) {
    if (!child) continue;
    Result<> result = child->MoveTo(loop);
    if (result) {
      moved.push_back(child);
      continue;
    }
    for (Node* other : moved) VERIFY(other->MoveTo(before));
    return result;
  }
  SetLoop(loop);
  return {};
}

void Node::SetLoop(EventLoop& loop) {
  VERIFY(!late_->head);
  loop_ = &loop;
}

Result<Extent> Node::Status(uint64_t offset, uint64_t length) {
  return Extent{.length = std::min(length, size_bytes_ - offset), .allocated = true, .data = true};
}

Result<> Node::Close() {
  Result<> result;
  for (Node* child : {data_file(), file(), backing()}) {
    if (!child) continue;
    Result<> closed = child->Close();
    if (result) result = std::move(closed);
  }
  return result;
}

Result<ImageInfo> Node::Info() {
  return ImageInfo{.format = driver(), .virtual_size = size_bytes_};
}

Result<uint64_t> Node::AllocatedBytes() {
  uint64_t bytes = 0;
  for (Node* child : {data_file(), file()}) {
    if (child) bytes += TRY(child->AllocatedBytes());
  }
  return bytes;
}

Result<Preallocation> ParsePreallocation(const std::string& name) {
  for (Preallocation mode : {Preallocation::kOff, Preallocation::kMetadata, Preallocation::kFalloc,
                             Preallocation::kFull}) {
    if (name == NameOf(mode)) return mode;
  }
  return Fail(
      ErrorCode::kInvalid,
      fmt::format("unknown preallocation '{}': it is one of off, metadata, falloc, full", name));
}

Result<DetectZeroes> ParseDetectZeroes(const std::string& name) {
  for (DetectZeroes detect : {DetectZeroes::kOff, DetectZeroes::kOn, DetectZeroes::kUnmap}) {
    if (name == NameOf(detect)) return detect;
  }
  return Fail(ErrorCode::kInvalid,
              fmt::format("unknown detect-zeroes '{}': it is one of off, on, unmap", name));
}

Result<> CheckAio(const std::string& name) {
  if (name == "threads" || name == "native" || name == "io_uring") return {};
  return Fail(ErrorCode::kInvalid,
              fmt::format("unknown aio '{}': it is one of threads, native, io_uring", name));
}

const char* NameOf(DetectZeroes detect) {
  switch (detect) {
    case DetectZeroes::kOff:
      return "off";
    case DetectZeroes::kOn:
      return "on";
    case DetectZeroes::kUnmap:
      break;
  }
  return "unmap";
}

const char* NameOf(Preallocation preallocation) {
  switch (preallocation) {
    case Preallocation::kOff:
      return "off";
    case Preallocation::kMetadata:
      return "metadata";
    case Preallocation::kFalloc:
      return "falloc";
    case Preallocation::kFull:
      break;
  }
  return "full";
}

}  // namespace kvartz::block
