#include "block/jobs/compare.h"

#include <algorithm>
#include <cstring>

#include "block/fiber_io.h"
#include "block/graph.h"
#include "block/io_batch.h"
#include "block/jobs/zero_scan.h"

namespace kvartz::block {
namespace {
constexpr uint64_t kPieceBytes = 2 << 20;
constexpr uint64_t kSector = 512;
}  // namespace

CompareJob::CompareJob(std::string id, NodePtr first, NodePtr second, Mode mode)
    : Job(first->loop(), std::move(id)),
      first_(std::move(first)),
      second_(std::move(second)),
      mode_(mode),
      a_(std::make_unique_for_overwrite<uint8_t[]>(kPieceBytes)),
      b_(std::make_unique_for_overwrite<uint8_t[]>(kPieceBytes)) {}

Result<> CompareJob::DoRun() {
  uint64_t common = std::min(first_->size_bytes(), second_->size_bytes());
  uint64_t all = std::max(first_->size_bytes(), second_->size_bytes());
  SetTotal(all);
  Node& longer = first_->size_bytes() == all ? *first_ : *second_;
  for (uint64_t offset = 0; offset < all;) {
    uint64_t done = TRY(offset < common ? ComparePiece(offset, common) : CheckRest(longer, offset));
    if (result_.differs_at || result_.status_differs_at) return {};
    offset += done;
    TRY(Step(done));
  }
  return {};
}

bool CompareJob::Differs(const uint8_t* a, const uint8_t* b, uint64_t length, uint64_t offset) {
  if (std::memcmp(a, b, length) == 0) return false;
  auto at = static_cast<uint64_t>(std::mismatch(a, a + length, b).first - a);
  result_.differs_at = (offset + at) / kSector * kSector;
  return true;
}

// Answers how many bytes were compared.
Result<uint64_t> CompareJob::ComparePiece(uint64_t offset, uint64_t common) {
  failed_to_examine_ = true;
  ChainExtent a = TRY(StatusAbove(*first_, nullptr, offset, common - offset));
  ChainExtent b = TRY(StatusAbove(*second_, nullptr, offset, common - offset));
  failed_to_examine_ = false;
  uint64_t length = std::min(a.extent.length, b.extent.length);
  if (length == 0) return Fail(ErrorCode::kIo, "an image ends too early");
  bool alike = a.extent.data == b.extent.data && a.extent.zero == b.extent.zero &&
               a.extent.allocated == b.extent.allocated;
  if (mode_ == Mode::kStrict && !alike) {
    result_.status_differs_at = offset;
    return length;
  }
  if (a.reads_as_zeros() && b.reads_as_zeros()) return length;
  length = std::min(length, kPieceBytes);
  IoBatch reads;
  if (!a.reads_as_zeros()) reads.Read(*first_, offset, {a_.get(), length});
  if (!b.reads_as_zeros()) reads.Read(*second_, offset, {b_.get(), length});
  if (int rc = reads.Wait()) return Fail(IoError(*first_, "read both images, or", offset, rc));
  if (a.reads_as_zeros()) std::memset(a_.get(), 0, length);
  if (b.reads_as_zeros()) std::memset(b_.get(), 0, length);
  Differs(a_.get(), b_.get(), length, offset);
  return length;
}

Result<uint64_t> CompareJob::CheckRest(Node& longer, uint64_t offset) {
  failed_to_examine_ = true;
  ChainExtent found = TRY(StatusAbove(longer, nullptr, offset, longer.size_bytes() - offset));
  failed_to_examine_ = false;
  if (found.reads_as_zeros()) return found.extent.length;
  uint64_t length = std::min(found.extent.length, kPieceBytes);
  TRY(ReadExactly(longer, offset, {a_.get(), length}));
  if (!IsZero({a_.get(), length})) {
    uint64_t at = 0;
    while (a_[at] == 0) at++;
    result_.differs_at = (offset + at) / kSector * kSector;
  }
  return length;
}

}  // namespace kvartz::block
