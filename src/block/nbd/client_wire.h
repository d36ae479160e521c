// Putting options together and taking replies apart, and what is said when a server doesn't behave.
#pragma once

#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "block/nbd/protocol.h"

namespace kvartz::block::nbd {

inline std::unexpected<Error> Broken(const std::string& what) {
  return Fail(ErrorCode::kIo, "the NBD server breaks the protocol: " + what);
}

inline std::unexpected<Error> Lost(int rc) {
  return Fail(rc == -EPIPE ? Error{ErrorCode::kIo, "the NBD server closed the connection"}
                           : ErrnoError(-rc, "the connection to the NBD server failed"));
}

inline std::unexpected<Error> NeedsTls() {
  return Fail(ErrorCode::kPermission, "the NBD server demands TLS: give tls-creds");
}

template <typename T>
void Append(std::vector<uint8_t>& to, const T& value) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
  to.insert(to.end(), bytes, bytes + sizeof value);
}

inline void AppendText(std::vector<uint8_t>& to, std::string_view text) {
  Append(to, Be32(static_cast<uint32_t>(text.size())));
  to.insert(to.end(), text.begin(), text.end());
}

// The caller has seen to the size.
template <typename T>
T At(std::span<const uint8_t> bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

}  // namespace kvartz::block::nbd
