#include "block/jobs/rebase.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "block/fiber_io.h"
#include "block/graph.h"
#include "block/jobs/convert.h"

namespace kvartz::block {
namespace {
constexpr uint64_t kPieceBytes = 2 << 20;
constexpr uint64_t kUnit = 4096;  // what differs is written in units of it
}  // namespace

CommitJob::CommitJob(std::string id, NodePtr top, Node* base, After after)
    : ConvertJob(top->loop(), std::move(id),
                 // The base is held by the chain, not by us.
                 {.sources = {top},
                  .target = NodePtr(NodePtr(), base),
                  .only_allocated = true,
                  .base = base}),
      top_(std::move(top)),
      base_(base),
      after_(after) {}

Result<> CommitJob::DoRun() {
  Node* below = BackingOf(top_.get());
  while (below && below != base_) below = BackingOf(below);
  if (!below)
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}' isn't below '{}'", base_->name(), top_->name()));
  bool was_read_only = base_->read_only();
  if (was_read_only) TRY(base_->SetReadOnly(false));
  Result<> copied = CopyDown();
  if (was_read_only) {
    Result<> back = base_->SetReadOnly(true);
    if (copied) copied = std::move(back);
  }
  TRY(std::move(copied));
  if (after_ == After::kKeepTop) return {};
  if (!top_->editor())
    return Fail(ErrorCode::kUnsupported, fmt::format("'{}' can't be emptied; everything is in '{}'",
                                                     top_->name(), base_->name()));
  return top_->editor()->MakeEmpty();
}

Result<> CommitJob::CopyDown() {
  if (top_->size_bytes() > base_->size_bytes())
    TRY(base_->Resize({.size = top_->size_bytes(), .zero_added = true}));
  TRY(ConvertJob::DoRun());
  return Flush(*base_);
}

RebaseJob::RebaseJob(std::string id, NodePtr overlay, NodePtr new_backing)
    : Job(overlay->loop(), std::move(id)),
      overlay_(std::move(overlay)),
      new_backing_(std::move(new_backing)),
      old_bytes_(std::make_unique_for_overwrite<uint8_t[]>(kPieceBytes)),
      new_bytes_(std::make_unique_for_overwrite<uint8_t[]>(kPieceBytes)) {}

Result<> RebaseJob::DoRun() {
  SetTotal(overlay_->size_bytes());
  for (uint64_t offset = 0; offset < overlay_->size_bytes();) {
    uint64_t done = TRY(Piece(offset));
    offset += done;
    TRY(Step(done));
  }
  return {};
}

// What the layer shows; beyond its end, zeros.
Result<> RebaseJob::ReadLayer(Node* node, uint64_t offset, std::span<uint8_t> bytes) {
  uint64_t held = 0;
  if (node && offset < node->size_bytes())
    held = std::min<uint64_t>(bytes.size(), node->size_bytes() - offset);
  if (held > 0) TRY(ReadExactly(*node, offset, bytes.subspan(0, held)));
  std::fill(bytes.begin() + static_cast<ptrdiff_t>(held), bytes.end(), 0);
  return {};
}

Result<uint64_t> RebaseJob::Piece(uint64_t offset) {
  Node* old_backing = BackingOf(overlay_.get());
  uint64_t left = overlay_->size_bytes() - offset;
  ChainExtent own = TRY(StatusAbove(*overlay_, old_backing, offset, left));
  if (own.extent.length == 0)
    return Fail(ErrorCode::kIo, fmt::format("'{}' ends too early", overlay_->name()));
  if (own.extent.allocated || (!old_backing && !new_backing_)) return own.extent.length;
  uint64_t length = std::min({own.extent.length, kPieceBytes, left});
  std::span<uint8_t> before(old_bytes_.get(), length), after(new_bytes_.get(), length);
  TRY(ReadLayer(old_backing, offset, before));
  TRY(ReadLayer(new_backing_.get(), offset, after));
  for (uint64_t at = 0; at < length;) {
    uint64_t end = at;
    auto same = [&](uint64_t from) {
      return std::memcmp(before.data() + from, after.data() + from,
                         std::min(kUnit, length - from)) == 0;
    };
    while (end < length && !same(end)) end = std::min(length, end + kUnit);
    if (end > at) TRY(WriteExactly(*overlay_, offset + at, before.subspan(at, end - at)));
    at = std::min(length, end + kUnit);
  }
  return length;
}

}  // namespace kvartz::block
