#include "block/tls_object.h"

#include <fmt/format.h>

namespace kvartz::block {

bool IsTlsObject(const std::string& type) {
  return type == "tls-creds-x509" || type == "tls-creds-psk";
}

Result<std::shared_ptr<const TlsCredentials>> MakeTlsObject(
    const std::string& type, Options options,
    const std::function<Result<std::string>(const std::string& id)>& secret) {
  TlsSpec spec;
  bool psk = type == "tls-creds-psk";
  spec.kind = psk ? TlsSpec::Kind::kPsk : TlsSpec::Kind::kX509;
  std::string endpoint = options.Take("endpoint", "client");
  if (endpoint != "client" && endpoint != "server")
    return Fail(ErrorCode::kInvalid, fmt::format("endpoint={}: it is client or server", endpoint));
  spec.endpoint = endpoint == "server" ? TlsSpec::Endpoint::kServer : TlsSpec::Endpoint::kClient;
  spec.dir = options.Take("dir", "");
  if (spec.dir.empty()) return Fail(ErrorCode::kInvalid, "dir= is missing");
  spec.verify_peer = TRY(options.TakeBool("verify-peer", true));
  spec.priority = options.Take("priority", "");
  if (psk) {
    spec.username = options.Take("username", "");
    if (!spec.username.empty() && spec.endpoint == TlsSpec::Endpoint::kServer)
      return Fail(ErrorCode::kInvalid, "username= is for clients");
    TRY(options.RefuseRest(type, {"id", "endpoint", "dir", "verify-peer", "priority", "username"}));
  } else {
    spec.sanity_check = TRY(options.TakeBool("sanity-check", true));
    if (auto id = options.Take("passwordid")) spec.password = TRY(secret(*id));
    TRY(options.RefuseRest(
        type, {"id", "endpoint", "dir", "verify-peer", "priority", "sanity-check", "passwordid"}));
  }
  return TlsCredentials::Create(spec);
}

}  // namespace kvartz::block
