#include "block/formats/random_id.h"

#include <sys/random.h>

#include "base/check.h"

namespace kvartz::block {

std::array<uint8_t, 16> RandomId() {
  std::array<uint8_t, 16> id;
  // 16 bytes never come in parts, and the host's pool is filled by now.
  VERIFY(getrandom(id.data(), id.size(), 0) == static_cast<ssize_t>(id.size()));
  id[6] = static_cast<uint8_t>((id[6] & 0x0f) | 0x40);
  id[8] = static_cast<uint8_t>((id[8] & 0x3f) | 0x80);
  return id;
}

}  // namespace kvartz::block
