// Telnet's in-band commands (RFC 854, 855): enough for a client in character mode.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace kvartz::host::telnet {

// IAC WILL ECHO, IAC WILL SUPPRESS-GO-AHEAD, IAC WILL BINARY, IAC DO BINARY (RFC 857, 858, 856).
constexpr std::string_view kGreeting("\xff\xfb\x01\xff\xfb\x03\xff\xfb\x00\xff\xfd\x00", 12);

// Appends `data` with each byte 0xff doubled.
void Escape(std::span<const uint8_t> data, std::string* out);

// Loop-owned by its connection.
class InputFilter {
 public:
  // Appends to `plain` what isn't a command. `line_break`: set to true on BRK or IP.
  void Filter(std::span<const uint8_t> data, std::string* plain, bool* line_break);

 private:
  enum class State { kData, kCommand, kOption, kSub, kSubCommand };
  State state_ = State::kData;
};

}  // namespace kvartz::host::telnet
