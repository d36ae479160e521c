#include "block/formats/mapped_node.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "block/fiber_io.h"
#include "block/graph.h"

namespace kvartz::block {
namespace {
constexpr uint32_t kSector = 512;
// That Status looks at: who asks for the rest of the disk may use little of the answer.
constexpr uint64_t kBlocksAtOnce = 4096;
}  // namespace

MappedNode::MappedNode(NodePtr file, bool read_only, uint64_t size_bytes, uint64_t block_bytes)
    : Node(file->loop(), file->name()), file_(std::move(file)), block_bytes_(block_bytes) {
  size_bytes_ = size_bytes;
  read_only_ = read_only || file_->read_only();
  limits_.request_alignment = file_->limits().request_alignment;
  limits_.write_cache = file_->limits().write_cache;
}

Result<NodePtr> MappedNode::OpenFile(const OpenEnv& env, const NodeOptions& node, Options& options,
                                     const char* format, Others others) {
  NodeOptions below = node;
  below.grows = true;
  NodePtr file = TRY(OpenChild(env, options, "file", below));
  if (!file) return Fail(ErrorCode::kInvalid, fmt::format("{} needs 'file'", format));
  if (others == Others::kRefuse) TRY(options.RefuseRest(format, {"file"}));
  if (file->limits().request_alignment <= kSector) return file;
  return Fail(ErrorCode::kUnsupported,
              fmt::format("'{}': not supported yet: format {} past the page cache on a disk of "
                          "larger sectors; use cache=writeback",
                          file->name(), format));
}

int MappedNode::MarkZero(uint64_t) { return -ENOTSUP; }
int MappedNode::ReadCompressed(const Place&, uint64_t, std::span<uint8_t>) { return -EIO; }
int MappedNode::WriteCompressed(uint64_t, std::span<const uint8_t>) { return -ENOTSUP; }

Result<> MappedNode::SetBacking(NodePtr backing) {
  if (!HasParents()) return Node::SetBacking(std::move(backing));
  backing_ = std::move(backing);
  if (backing_) {
    limits_.request_alignment =
        std::max(limits_.request_alignment, backing_->limits().request_alignment);
  }
  return {};
}

void MappedNode::Drain() {
  do {
    if (backing_) backing_->Drain();
    file_->Drain();
  } while (FinishLateOnes() || in_fibers() > 0);
}

void MappedNode::Submit(Request* request) {
  if (request->kind == Request::Kind::kFlush) return file_->Start(request);
  SubmitInFiber(request, [this](Request& own) { return Handle(own); });
}

int MappedNode::Handle(Request& request) {
  if (request.kind == Request::Kind::kDiscard) return 0;
  if (request.kind != Request::Kind::kRead && !wrote_) {
    FiberLock lock(allocation_);
    if (!wrote_) {
      if (int rc = BeginWriting()) return rc;
      wrote_ = true;
    }
  }
  IovCursor cursor(request.iov, request.iov_count);
  uint64_t offset = request.offset;
  const uint64_t end = request.offset + request.length;
  while (offset < end) {
    uint64_t length = std::min(end - offset, block_bytes_ - offset % block_bytes_);
    if (int rc = HandlePiece(request, offset, length, cursor)) return rc;
    offset += length;
  }
  return request.fua ? FlushNode(*file_) : 0;
}

int MappedNode::HandlePiece(Request& request, uint64_t offset, uint64_t length, IovCursor& cursor) {
  if (request.compressed) return CompressPiece(offset, length, cursor);
  Place place;
  if (int rc = Find(offset, place)) return rc;
  switch (request.kind) {
    case Request::Kind::kRead:
      return ReadPiece(place, offset, length, cursor);
    case Request::Kind::kWrite:
      return WritePiece(place, offset, length, cursor);
    default:
      return ZeroPiece(request, place, offset, length);
  }
}

int MappedNode::FileIo(Request::Kind kind, uint64_t offset, uint64_t length, IovCursor& cursor) {
  std::vector<iovec> iov;
  cursor.Take(length, iov);
  Request request = {.kind = kind, .offset = offset, .length = length};
  request.iov = iov.data();
  request.iov_count = static_cast<unsigned>(iov.size());
  return Await(*file_, request);
}

int MappedNode::ReadPiece(const Place& place, uint64_t offset, uint64_t length, IovCursor& cursor) {
  if (place.kind == Place::Kind::kStored)
    return FileIo(Request::Kind::kRead, place.offset, length, cursor);
  if (ShowsBacking(place, offset)) return ReadBacking(offset, length, cursor);
  if (place.kind != Place::Kind::kCompressed) {
    cursor.Fill(length, 0);
    return 0;
  }
  auto block = std::make_unique_for_overwrite<uint8_t[]>(block_bytes_);
  if (int rc = ReadCompressed(place, offset / block_bytes_, {block.get(), block_bytes_})) return rc;
  cursor.CopyIn({block.get() + offset % block_bytes_, length});
  return 0;
}

int MappedNode::ReadBacking(uint64_t offset, uint64_t length, IovCursor& cursor) {
  uint64_t held = std::min(length, backing_->size_bytes() - offset);
  std::vector<iovec> iov;
  cursor.Take(held, iov);
  Request request = {.kind = Request::Kind::kRead, .offset = offset, .length = held};
  request.iov = iov.data();
  request.iov_count = static_cast<unsigned>(iov.size());
  int rc = Await(*backing_, request);
  cursor.Fill(length - held, 0);
  return rc;
}

// With what the backing node has of the block around it.
int MappedNode::WriteNewBlock(uint64_t offset, uint64_t length, IovCursor& cursor,
                              const Place& place) {
  const uint64_t index = offset / block_bytes_, start = index * block_bytes_;
  uint64_t at = 0;
  if (!ShowsBacking(place, start)) {
    if (int rc = NewPlace(index, at)) return rc;
    if (int rc = FileIo(Request::Kind::kWrite, at + offset - start, length, cursor)) return rc;
    return Publish(index, at);
  }
  auto block = std::make_unique<uint8_t[]>(block_bytes_);
  iovec whole = {block.get(), std::min(block_bytes_, size_bytes_ - start)};
  if (length < whole.iov_len) {
    IovCursor to(&whole, 1);
    if (int rc = ReadBacking(start, whole.iov_len, to)) return rc;
  }
  cursor.CopyOut({block.get() + (offset - start), length});
  if (int rc = NewPlace(index, at)) return rc;
  if (int rc = WriteAt(*file_, at, {block.get(), whole.iov_len})) return rc;
  return Publish(index, at);
}

int MappedNode::WritePiece(Place place, uint64_t offset, uint64_t length, IovCursor& cursor) {
  if (place.kind == Place::Kind::kStored)
    return FileIo(Request::Kind::kWrite, place.offset, length, cursor);
  FiberLock lock(allocation_);
  // Somebody else may have been first.
  if (int rc = Find(offset, place)) return rc;
  if (place.kind == Place::Kind::kStored)
    return FileIo(Request::Kind::kWrite, place.offset, length, cursor);
  if (place.kind == Place::Kind::kCompressed) return -ENOTSUP;
  return WriteNewBlock(offset, length, cursor, place);
}

int MappedNode::ZeroPiece(const Request& request, Place place, uint64_t offset, uint64_t length) {
  // What it would show if all that it stands on were open.
  const bool shows_backing = ShowsBacking(place, offset) ||
                             (place.kind == Place::Kind::kNowhere && !backing_ && names_backing());
  if (place.kind == Place::Kind::kNowhere && !shows_backing) return 0;
  if (place.kind == Place::Kind::kZero) return 0;
  bool whole =
      offset % block_bytes_ == 0 && (length == block_bytes_ || offset + length == size_bytes_);
  if (whole && (request.unmap || shows_backing)) {
    FiberLock lock(allocation_);
    int rc = MarkZero(offset / block_bytes_);
    if (rc != -ENOTSUP) return rc;
  }
  if (shows_backing) {
    if (request.no_fallback) return -ENOTSUP;
    std::vector<uint8_t> zeros(length);
    iovec iov = {zeros.data(), zeros.size()};
    IovCursor from(&iov, 1);
    return WritePiece(place, offset, length, from);
  }
  if (place.kind == Place::Kind::kCompressed) return -ENOTSUP;
  return WriteZeroesAt(*file_, place.offset, length, false, request.no_fallback);
}

int MappedNode::CompressPiece(uint64_t offset, uint64_t length, IovCursor& cursor) {
  if (offset % block_bytes_ != 0 || (length != block_bytes_ && offset + length != size_bytes_))
    return -EINVAL;
  auto block = std::make_unique_for_overwrite<uint8_t[]>(block_bytes_);
  cursor.CopyOut({block.get(), length});
  std::memset(block.get() + length, 0, block_bytes_ - length);
  FiberLock lock(allocation_);
  return WriteCompressed(offset / block_bytes_, {block.get(), block_bytes_});
}

Result<Extent> MappedNode::Status(uint64_t offset, uint64_t length) {
  Extent extent = {.allocated = true};
  Place first;
  if (int rc = Find(offset, first)) return Fail(IoError(*this, "examine", offset, rc));
  uint64_t at = offset;
  const uint64_t end = offset + std::min(length, kBlocksAtOnce * block_bytes_);
  while (true) {
    at += std::min(end - at, block_bytes_ - at % block_bytes_);
    if (at >= end) break;
    Place next;
    if (int rc = Find(at, next)) return Fail(IoError(*this, "examine", at, rc));
    bool follows =
        first.kind != Place::Kind::kStored || next.offset == first.offset + (at - offset);
    if (next.kind != first.kind || !follows) break;
  }
  extent.length = at - offset;
  extent.data = first.kind == Place::Kind::kStored || first.kind == Place::Kind::kCompressed;
  extent.compressed = first.kind == Place::Kind::kCompressed;
  extent.allocated = first.kind != Place::Kind::kNowhere || !HasParents();
  extent.zero = !extent.data && (extent.allocated || !backing_);
  if (first.kind == Place::Kind::kStored) {
    extent.has_offset = true;
    extent.offset = first.offset;
    extent.file = file_.get();
  }
  return extent;
}

Result<> MappedNode::Close() {
  Result<> ended;
  if (wrote_ && !read_only_) ended = EndWriting();
  wrote_ = false;
  Result<> closed = Node::Close();
  return ended ? std::move(closed) : std::move(ended);
}

Result<> MappedNode::SetReadOnly(bool read_only) {
  if (read_only && wrote_ && !read_only_) TRY(EndWriting());
  if (read_only) wrote_ = false;
  TRY(file_->SetReadOnly(read_only));
  read_only_ = read_only;
  return {};
}

Result<ImageInfo> MappedNode::Info() {
  ImageInfo info = {.format = driver(), .virtual_size = size_bytes_};
  info.cluster_size = block_bytes_;
  return info;
}

}  // namespace kvartz::block
