#include "block/filters/copy_before_write.h"

#include "block/fiber_io.h"

namespace kvartz::block {

void CopyBeforeWriteNode::Submit(Request* request) {
  bool dirty = arms_.todo && request->kind != Request::Kind::kRead &&
               arms_.todo->NextDirty(request->offset, request->offset + request->length);
  if (!dirty && (!arms_.target_reads || request->kind == Request::Kind::kFlush))
    return Pass(request);
  Handle(request);
}

// The target looks up what it has and starts to read the rest here in one go, so a read that began
// before the copy is there has its lock before the write that comes after the copy.
int CopyBeforeWriteNode::Process(Request& request) {
  if (arms_.copy && request.kind != Request::Kind::kRead)
    arms_.copy(request.offset, request.length);
  if (!arms_.target_reads) return FilterNode::Process(request);
  RangeLocks::Guard lock(locks_, request.offset, request.length);
  return FilterNode::Process(request);
}

// A target that stands on us drains us in turn.
void CopyBeforeWriteNode::Drain() {
  if (draining_) return file_->Drain();
  draining_ = true;
  FilterNode::Drain();
  draining_ = false;
}

}  // namespace kvartz::block
