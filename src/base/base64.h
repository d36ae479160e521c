// Base64 (RFC 4648, section 4).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvartz {

// Line ends are skipped, padding may be left out. Nothing: it is no base64 text.
std::optional<std::vector<uint8_t>> DecodeBase64(std::string_view text);

}  // namespace kvartz
