// What formats tell the filter blkdebug of: the moments at which a test may want something to fail.
// Names are QEMU's (BlkdebugEvent).
#pragma once

#include <cstdint>
#include <string>

#include "base/result.h"

namespace kvartz::block {

enum class DebugEvent : uint8_t {
  kNone,  // the image was opened
  kReadAio,
  kReadBackingAio,
  kReadCompressed,
  kWriteAio,
  kWriteCompressed,
  kCowRead,
  kL1Update,
  kL2Load,
  kL2Update,
  kReftableUpdate,
  kRefblockLoad,
  kRefblockUpdate,
  kClusterAlloc,
  kClusterFree,
  kFlushToDisk,
  kPwritev,  // these three by the filter itself
  kPwritevZero,
  kPwritevDone,
};

// Errors: unknown, or one that nothing here tells of.
Result<DebugEvent> ParseDebugEvent(const std::string& name);

}  // namespace kvartz::block
