// CRC-32C (Castagnoli; polynomial 0x1EDC6F41 reflected, RFC 3720 appendix B.4).
#pragma once

#include <cstdint>
#include <span>

namespace kvartz {

// Of `bytes`, or of what came before (`crc`) followed by `bytes`.
uint32_t Crc32c(std::span<const uint8_t> bytes, uint32_t crc = 0);

}  // namespace kvartz
