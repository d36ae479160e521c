#include "block/filters/mirror_top.h"

#include <algorithm>

#include "block/fiber_io.h"

namespace kvartz::block {

void MirrorTopNode::Submit(Request* request) {
  if (!blocking_.target || request->kind == Request::Kind::kRead ||
      request->kind == Request::Kind::kFlush || request->length == 0) {
    return Pass(request);
  }
  Handle(request);
}

// Where the target fails it is out of step there, which the job mends or fails over: the guest has
// its write. What a write covers in part stays as dirty as it was.
int MirrorTopNode::Process(Request& request) {
  DirtyBitmap& todo = *blocking_.todo;
  const uint64_t unit = blocking_.unit;
  const uint64_t offset = request.offset / unit * unit;
  const uint64_t end = (request.offset + request.length + unit - 1) / unit * unit;
  const uint64_t length = std::min(end, size_bytes()) - offset;
  RangeLocks::Guard lock(*blocking_.locks, offset, length);
  Request to_source = request, to_target = request;
  if (int rc = Await(*file_, to_source)) {
    todo.Set(offset, length);
    return rc;
  }
  // What a discard leaves is known after it alone.
  to_target.fua = false;
  bool same = false;
  if (length > request.length) {
    same = blocking_.copy(offset, length) == 0;
  } else if (to_target.kind != Request::Kind::kDiscard) {
    same = Await(*blocking_.target, to_target) == 0;
  }
  same ? todo.Clear(offset, length) : todo.Set(offset, length);
  return 0;
}

}  // namespace kvartz::block
