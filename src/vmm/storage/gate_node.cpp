#include "vmm/storage/gate_node.h"

#include <utility>

#include "base/check.h"
#include "block/graph.h"

namespace kvartz::vmm {

using block::Request;

GateNode::GateNode(EventLoop& loop, std::string user_name, bool writes)
    : Node(loop, user_name), user_name_(std::move(user_name)), writes_(writes) {}

GateNode::~GateNode() { VERIFY(in_flight_ == 0 && waiting_.empty()); }

void GateNode::Submit(Request* request) {
  if (quiesced_ > 0) {
    waiting_.push_back(request);
  } else {
    Launch(request);
  }
}

void GateNode::Launch(Request* request) {
  std::unique_ptr<Passing> passing;
  if (free_.empty()) {
    passing = std::make_unique<Passing>();
  } else {
    passing = std::move(free_.back());
    free_.pop_back();
  }
  passing->inner = *request;
  passing->outer = request;
  passing->gate = this;
  passing->inner.done = Done;
  passing->inner.owner = passing.get();
  ++in_flight_;
  node_->Start(&passing.release()->inner);
}

void GateNode::Done(Request* inner, int result) {
  std::unique_ptr<Passing> passing(static_cast<Passing*>(inner->owner));
  GateNode& gate = *passing->gate;
  Request* outer = passing->outer;
  gate.free_.push_back(std::move(passing));
  outer->done(outer, result);
  gate.OneLess();
}

void GateNode::OneLess() {
  if (--in_flight_ == 0) quiet_.WakeAll();
}

void GateNode::Drain() {
  do {
    while (in_flight_ > 0) node_->Drain();
  } while (FinishLateOnes());
}

Result<block::Extent> GateNode::Status(uint64_t offset, uint64_t length) {
  while (quiesced_ > 0) open_.Wait();
  ++in_flight_;
  Result<block::ChainExtent> found = block::StatusAbove(*node_, nullptr, offset, length);
  OneLess();
  if (!found) return Fail(std::move(found).error());
  block::Extent extent = found->extent;
  bool hole = !extent.allocated;
  return block::Extent{.length = extent.length,
                       .allocated = true,
                       .zero = extent.zero || hole,
                       .data = extent.data && !hole};
}

void GateNode::Quiesce() {
  ++quiesced_;
  while (in_flight_ > 0) quiet_.Wait();
}

void GateNode::Unquiesce() {
  VERIFY(quiesced_ > 0);
  if (--quiesced_ > 0) return;
  for (Request* request : std::exchange(waiting_, {})) Submit(request);
  open_.WakeAll();
}

void GateNode::ReplaceNode(block::NodePtr node) {
  node_ = std::move(node);
  if (!node_) return;
  size_bytes_ = node_->size_bytes();
  limits_ = node_->limits();
  read_only_ = !writes_;
}

void GateNode::NodeResized() { size_bytes_ = node_->size_bytes(); }

}  // namespace kvartz::vmm
