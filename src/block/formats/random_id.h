// Random UUIDs, as bytes (RFC 4122, version 4).
#pragma once

#include <array>
#include <cstdint>

namespace kvartz::block {

std::array<uint8_t, 16> RandomId();

}  // namespace kvartz::block
