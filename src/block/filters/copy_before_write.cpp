#include "block/filters/copy_before_write.h"

namespace kvartz::block {

void CopyBeforeWriteNode::Submit(Request* request) {
  if (!arms_.todo || request->kind == Request::Kind::kRead ||
      request->kind == Request::Kind::kFlush ||
      !arms_.todo->NextDirty(request->offset, request->offset + request->length)) {
    return Pass(request);
  }
  Handle(request);
}

int CopyBeforeWriteNode::Process(Request& request) {
  arms_.copy(request.offset, request.length);
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
