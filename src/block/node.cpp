#include "block/node.h"

#include <cerrno>
#include <utility>

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

Node::Node(EventLoop& loop, std::string name)
    : loop_(loop), name_(std::move(name)), late_(std::make_shared<LateList>()) {}

Node::~Node() = default;

void Node::FinishLater(Request* request, int result) {
  request->result = result;
  request->next = nullptr;
  (late_->tail ? late_->tail->next : late_->head) = request;
  late_->tail = request;
  if (std::exchange(late_->posted, true)) return;
  loop_.Post([late = late_] {
    late->posted = false;
    late->FinishAll();
  });
}

bool Node::FinishLateOnes() {
  if (!late_->head) return false;
  late_->FinishAll();
  return true;
}

void Node::Start(Request* request) {
  if (int error = Check(*request)) return FinishLater(request, error);
  Submit(request);
}

int Node::Check(const Request& request) const {
  if (request.kind == Request::Kind::kFlush) return 0;
  if (request.offset > size_bytes_ || request.length > size_bytes_ - request.offset) return -EINVAL;
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

}  // namespace kvartz::block
