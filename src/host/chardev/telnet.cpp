#include "host/chardev/telnet.h"

namespace kvartz::host::telnet {
namespace {
// RFC 854, "TELNET COMMAND STRUCTURE".
constexpr uint8_t kSe = 240, kBrk = 243, kIp = 244, kSb = 250, kWill = 251, kDont = 254, kIac = 255;
}  // namespace

void Escape(std::span<const uint8_t> data, std::string* out) {
  for (uint8_t byte : data) {
    out->push_back(static_cast<char>(byte));
    if (byte == kIac) out->push_back(static_cast<char>(kIac));
  }
}

void InputFilter::Filter(std::span<const uint8_t> data, std::string* plain, bool* line_break) {
  for (uint8_t byte : data) {
    switch (state_) {
      case State::kData:
        if (byte == kIac) {
          state_ = State::kCommand;
        } else {
          plain->push_back(static_cast<char>(byte));
        }
        break;
      case State::kCommand:
        state_ = State::kData;
        if (byte == kIac) plain->push_back(static_cast<char>(kIac));
        if (byte == kBrk || byte == kIp) *line_break = true;
        if (byte >= kWill && byte <= kDont) state_ = State::kOption;
        if (byte == kSb) state_ = State::kSub;
        break;
      case State::kOption:  // what is to be done or not done: we have said what we do
        state_ = State::kData;
        break;
      case State::kSub:
        if (byte == kIac) state_ = State::kSubCommand;
        break;
      case State::kSubCommand:
        state_ = byte == kSe ? State::kData : State::kSub;
        break;
    }
  }
}

}  // namespace kvartz::host::telnet
