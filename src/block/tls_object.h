// The objects tls-creds-x509 and tls-creds-psk, as QEMU's --object has them.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "base/tls.h"
#include "block/options.h"

namespace kvartz::block {

// `type`: of the object, without which it isn't one of these.
bool IsTlsObject(const std::string& type);
// Takes endpoint=, dir=, verify-peer=, sanity-check=, priority=, username=, passwordid= (by
// `secret`). Errors: unknown or missing keys; files that are missing or bad.
Result<std::shared_ptr<const TlsCredentials>> MakeTlsObject(
    const std::string& type, Options options,
    const std::function<Result<std::string>(const std::string& id)>& secret);

}  // namespace kvartz::block
