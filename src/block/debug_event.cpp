#include "block/debug_event.h"

#include <fmt/format.h>

namespace kvartz::block {
namespace {

struct Row {
  const char* name;
  DebugEvent event;
};
constexpr Row kRows[] = {
    {"none", DebugEvent::kNone},
    {"read_aio", DebugEvent::kReadAio},
    {"read_backing_aio", DebugEvent::kReadBackingAio},
    {"read_compressed", DebugEvent::kReadCompressed},
    {"write_aio", DebugEvent::kWriteAio},
    {"write_compressed", DebugEvent::kWriteCompressed},
    {"cow_read", DebugEvent::kCowRead},
    {"l1_update", DebugEvent::kL1Update},
    {"l2_load", DebugEvent::kL2Load},
    {"l2_update", DebugEvent::kL2Update},
    {"reftable_update", DebugEvent::kReftableUpdate},
    {"refblock_load", DebugEvent::kRefblockLoad},
    {"refblock_update", DebugEvent::kRefblockUpdate},
    {"cluster_alloc", DebugEvent::kClusterAlloc},
    {"cluster_free", DebugEvent::kClusterFree},
    {"flush_to_disk", DebugEvent::kFlushToDisk},
    {"pwritev", DebugEvent::kPwritev},
    {"pwritev_zero", DebugEvent::kPwritevZero},
    {"pwritev_done", DebugEvent::kPwritevDone},
};

}  // namespace

Result<DebugEvent> ParseDebugEvent(const std::string& name) {
  std::string known;
  for (const Row& row : kRows) {
    if (name == row.name) return row.event;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", row.name);
  }
  return Fail(ErrorCode::kUnsupported,
              fmt::format("not supported yet: event={}; there are {}", name, known));
}

}  // namespace kvartz::block
