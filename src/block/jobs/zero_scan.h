// Finding zeros in buffers, at the speed of memory.
#pragma once

#include <cstdint>
#include <span>

namespace kvartz::block {

bool IsZero(std::span<const uint8_t> bytes);

// Of the units of `unit` bytes from the start of `bytes` (the last may be short): how many bytes
// are in the run of units that are all zero, or all not, as the first one is (`zero`).
uint64_t LikeRun(std::span<const uint8_t> bytes, uint64_t unit, bool* zero);

}  // namespace kvartz::block
