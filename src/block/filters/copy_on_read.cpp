#include "block/filters/copy_on_read.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include "block/driver.h"
#include "block/fiber_io.h"
#include "block/graph.h"

namespace kvartz::block {
namespace {
constexpr uint64_t kPieceBytes = 1 << 20;
constexpr uint64_t kLeastUnit = 4096;
}  // namespace

CopyOnReadNode::CopyOnReadNode(NodePtr file, Copies copies)
    : FilterNode(std::move(file), "copy-on-read"), copies_(copies), unit_(kLeastUnit) {
  limits_.request_alignment = file_->limits().request_alignment;
}

void CopyOnReadNode::Submit(Request* request) {
  bool reads = request->kind == Request::Kind::kRead;
  if (request->kind == Request::Kind::kFlush || request->length == 0 ||
      (reads && (copies_ == Copies::kNothing || read_only()))) {
    return Pass(request);
  }
  // Nothing is copied to where the image has something, but for a copy that began when it hadn't.
  bool in_place = reads || (request->kind == Request::Kind::kWrite &&
                            !locks_.Busy(request->offset, request->length));
  if (in_place && file_->HasItself(request->offset, request->length)) return Pass(request);
  Handle(request);
}

int CopyOnReadNode::Process(Request& request) {
  if (request.kind != Request::Kind::kRead) {
    // A copy that has been read must not be written over this.
    RangeLocks::Guard lock(locks_, request.offset, request.length);
    return FilterNode::Process(request);
  }
  // It fails only if reading does; a full disk is no reader's trouble.
  bool reading = false;
  int rc = Populate(request.offset, request.length, &reading);
  return rc != 0 && reading ? rc : FilterNode::Process(request);
}

int CopyOnReadNode::Populate(uint64_t offset, uint64_t length, bool* reading) {
  uint64_t at = offset / unit_ * unit_;
  const uint64_t end = std::min(size_bytes(), (offset + length + unit_ - 1) / unit_ * unit_);
  while (at < end) {
    uint64_t piece = std::min(end - at, kPieceBytes - at % kPieceBytes);
    RangeLocks::Guard lock(locks_, at, piece);
    for (uint64_t done = 0; done < piece;) {
      *reading = true;
      Result<ChainExtent> found = StatusAbove(*file_, base_.get(), at + done, piece - done);
      if (!found || found->extent.length == 0) return -EIO;
      uint64_t like = std::min(found->extent.length, piece - done);
      if (found->extent.allocated && found->depth > 0) {
        *reading = false;
        int rc = found->extent.zero ? WriteZeroesAt(*file_, at + done, like)
                                    : CopyPiece(at + done, like, reading);
        if (rc != 0) return rc;
      }
      done += like;
    }
    at += piece;
  }
  return 0;
}

int CopyOnReadNode::CopyPiece(uint64_t offset, uint64_t length, bool* reading) {
  auto buffer = std::make_unique_for_overwrite<uint8_t[]>(length);
  *reading = true;
  if (int rc = ReadAt(*file_, offset, {buffer.get(), length})) return rc;
  *reading = false;
  return WriteAt(*file_, offset, {buffer.get(), length});
}

namespace {

Result<NodePtr> OpenCopyOnRead(const OpenEnv& env, const NodeOptions& node, Options& options) {
  std::optional<std::string> bottom = options.Take("bottom");
  NodePtr file = TRY(OpenChild(env, options, "file", node));
  if (!file) return Fail(ErrorCode::kInvalid, "copy-on-read needs 'file'");
  TRY(options.RefuseRest("copy-on-read", {"file", "bottom"}));
  auto filter = std::make_shared<CopyOnReadNode>(file, CopyOnReadNode::Copies::kReads);
  if (!bottom) return filter;
  // The lowest layer that is copied.
  NodePtr lowest = env.find_node ? env.find_node(*bottom) : nullptr;
  Node* layer = SkipFilters(file.get());
  while (layer && layer != lowest.get()) layer = BackingOf(layer);
  if (!lowest || !layer)
    return Fail(ErrorCode::kInvalid, fmt::format("bottom={}: no such layer is below", *bottom));
  if (Node* base = BackingOf(layer)) filter->set_base(base->shared_from_this());
  return filter;
}

}  // namespace

extern const Driver kCopyOnReadDriver;
const Driver kCopyOnReadDriver = {
    .name = "copy-on-read", .kind = Driver::Kind::kFilter, .open = OpenCopyOnRead};

}  // namespace kvartz::block
