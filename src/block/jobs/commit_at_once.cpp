// The human monitor's commit: an image goes into the one below it while its guest waits.
#include <fmt/format.h>

#include <algorithm>

#include "base/log.h"
#include "block/fiber_io.h"
#include "block/graph.h"
#include "block/jobs/live.h"
#include "block/jobs/range_copier.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kPieceBytes = 16 << 20;

// On the loop of both.
Result<> MoveDown(Node& top, Node& base) {
  if (base.size_bytes() < top.size_bytes())
    TRY(base.Resize({.size = top.size_bytes(), .zero_added = true}));
  RangeCopier copier = {.source = &top, .base = &base, .target = &base};
  for (uint64_t at = 0; at < top.size_bytes();) {
    uint64_t length = std::min(kPieceBytes, top.size_bytes() - at);
    bool reading = false;
    if (int rc = copier.Copy(at, length, &reading)) {
      return Fail(ErrnoError(-rc, fmt::format("cannot {} '{}' at {:#x}", reading ? "read" : "write",
                                              (reading ? top : base).name(), at)));
    }
    at += length;
  }
  TRY(Flush(base));
  if (!top.editor()) return {};
  // What can't be emptied stays as it is, and shows the same.
  Result<> emptied = top.editor()->MakeEmpty();
  if (!emptied && emptied.error().code != ErrorCode::kUnsupported) return emptied;
  return Flush(top);
}

}  // namespace

Result<> CommitAtOnce(Registry& registry, const NodePtr& disk) {
  NodePtr top = registry.PtrOf(*SkipFilters(disk.get()));
  Node* below = BackingOf(top.get());
  if (!below)
    return Fail(ErrorCode::kUnsupported, fmt::format("'{}' has no backing file", top->name()));
  TRY(CheckCommits(*top));
  NodePtr base = registry.PtrOf(*below);
  Registry::Quiesced quiet(registry, base.get());
  for (const NodePtr& node : {disk, top, base}) TRY(registry.CheckFree(*node));
  for (const NodePtr& parent : registry.ParentsOf(*base)) {
    if (parent == top) continue;
    return Fail(ErrorCode::kBusy, fmt::format("Node '{}' is busy: it is in use by node '{}'",
                                              base->node_name(), parent->node_name()));
  }
  for (const NodeUser* user : registry.users()) {
    if (user->node() != base) continue;
    return Fail(ErrorCode::kBusy, fmt::format("Node '{}' is busy: it is in use by {}",
                                              base->node_name(), user->UserName()));
  }
  return registry.On(*top, [&]() -> Result<> {
    if (top->read_only())
      return Fail(ErrorCode::kPermission, fmt::format("'{}' is read-only", top->name()));
    const bool was_read_only = base->read_only();
    if (was_read_only) TRY(base->SetReadOnly(false));
    Result<> moved = MoveDown(*top, *base);
    if (!was_read_only) return moved;
    if (Result<> back = base->SetReadOnly(true); !back)
      KLOG(kWarn, "'{}' stays writable: {}", base->name(), back.error().what);
    return moved;
  });
}

}  // namespace kvartz::block
