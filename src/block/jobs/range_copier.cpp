#include "block/jobs/range_copier.h"

#include <algorithm>
#include <cerrno>
#include <memory>
#include <vector>

#include "block/fiber_io.h"
#include "block/graph.h"

namespace kvartz::block {
namespace {
constexpr uint64_t kPieceBytes = 1 << 20;
}

int RangeCopier::Copy(uint64_t offset, uint64_t length, bool* reading) const {
  while (length > 0) {
    *reading = true;
    Result<ChainExtent> found = StatusAbove(*source, base, offset, length);
    if (!found || found->extent.length == 0) return -EIO;
    uint64_t like = std::min(found->extent.length, length);
    bool skip = base && !found->extent.allocated;
    bool zero = found->reads_as_zeros();
    if (compressed_unit > 0) {
      // A cluster is all zeros or written whole.
      uint64_t whole = like / compressed_unit * compressed_unit;
      if (like == length) whole = like;
      if (whole == 0) {
        zero = skip = false;
        like = std::min(length, compressed_unit);
      } else {
        like = whole;
      }
    }
    if (!skip) {
      if (int rc = CopyLike(offset, like, zero, reading)) return rc;
    }
    offset += like;
    length -= like;
  }
  return 0;
}

int RangeCopier::CopyLike(uint64_t offset, uint64_t length, bool zero, bool* reading) const {
  if (zero) {
    *reading = false;
    return CopyZeros(offset, length);
  }
  while (length > 0) {
    uint64_t piece = std::min(length, kPieceBytes);
    if (int rc = CopyData(offset, piece, reading)) return rc;
    offset += piece;
    length -= piece;
  }
  return 0;
}

int RangeCopier::CopyData(uint64_t offset, uint64_t length, bool* reading) const {
  auto buffer = std::make_unique_for_overwrite<uint8_t[]>(length);
  *reading = true;
  if (int rc = ReadAt(*source, offset, {buffer.get(), length})) return rc;
  *reading = false;
  iovec iov = {buffer.get(), length};
  Request request = {.kind = Request::Kind::kWrite,
                     .compressed = compressed_unit > 0,
                     .offset = offset,
                     .length = length,
                     .iov = &iov,
                     .iov_count = 1};
  return Await(*target, request);
}

// What reads as zeros there already stays as it is; what does so by a layer below, or because none
// is open, may not for long.
int RangeCopier::CopyZeros(uint64_t offset, uint64_t length) const {
  const bool alone = !partial && !BackingOf(target) && !SkipFilters(target)->names_backing();
  while (length > 0) {
    Result<ChainExtent> found = StatusAbove(*target, nullptr, offset, length);
    if (!found || found->extent.length == 0) return -EIO;
    uint64_t like = std::min(found->extent.length, length);
    bool is_zero = found->extent.allocated ? found->extent.zero && found->depth == 0 : alone;
    if (!is_zero) {
      int rc = WriteZeroesAt(*target, offset, like, unmap);
      if (rc == -ENOTSUP) {
        like = std::min(like, kPieceBytes);
        std::vector<uint8_t> zeros(like);
        rc = WriteAt(*target, offset, zeros);
      }
      if (rc != 0) return rc;
    }
    offset += like;
    length -= like;
  }
  return 0;
}

}  // namespace kvartz::block
