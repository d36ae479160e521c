#include "block/jobs/zero_scan.h"

#include <algorithm>
#include <cstring>

namespace kvartz::block {

bool IsZero(std::span<const uint8_t> bytes) {
  constexpr size_t kHead = 16;
  for (size_t i = 0; i < std::min(kHead, bytes.size()); i++) {
    if (bytes[i] != 0) return false;
  }
  if (bytes.size() <= kHead) return true;
  // Each byte equals the one before it.
  return std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0;
}

uint64_t LikeRun(std::span<const uint8_t> bytes, uint64_t unit, bool* zero) {
  uint64_t run = std::min<uint64_t>(unit, bytes.size());
  *zero = IsZero(bytes.subspan(0, run));
  while (run < bytes.size()) {
    uint64_t next = std::min<uint64_t>(unit, bytes.size() - run);
    if (IsZero(bytes.subspan(run, next)) != *zero) break;
    run += next;
  }
  return run;
}

}  // namespace kvartz::block
