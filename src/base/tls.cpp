#include "base/tls.h"

#include <fmt/format.h>
#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <unistd.h>

#include <cerrno>
#include <ctime>
#include <fstream>
#include <sstream>
#include <vector>

namespace kvartz {
namespace {

constexpr const char* kPskPriorities = ":+ECDHE-PSK:+DHE-PSK:+PSK";

std::unexpected<Error> Failed(const std::string& what, int rc) {
  return Fail(ErrorCode::kInvalid, fmt::format("{}: {}", what, gnutls_strerror(rc)));
}

Result<std::string> ReadCredential(const std::string& path) {
  constexpr size_t kMost = 1 << 20;
  if (access(path.c_str(), R_OK) < 0) return Fail(ErrnoError(errno, "cannot open '" + path + "'"));
  std::ifstream file(path, std::ios::binary);
  std::string text(kMost + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (file.bad() || text.size() > kMost)
    return Fail(ErrorCode::kInvalid, fmt::format("cannot read '{}'", path));
  return text;
}

gnutls_datum_t DatumOf(const std::string& text) {
  return {reinterpret_cast<unsigned char*>(const_cast<char*>(text.data())),
          static_cast<unsigned>(text.size())};
}

// The certificates of a file.
class CertificateList {
 public:
  ~CertificateList() {
    for (unsigned i = 0; i < count_; i++) gnutls_x509_crt_deinit(list_[i]);
    gnutls_free(list_);
  }
  Result<> Load(const std::string& path) {
    std::string text = TRY(ReadCredential(path));
    gnutls_datum_t datum = DatumOf(text);
    int rc = gnutls_x509_crt_list_import2(&list_, &count_, &datum, GNUTLS_X509_FMT_PEM, 0);
    return rc < 0 ? Failed("'" + path + "'", rc) : Result<>();
  }
  gnutls_x509_crt_t* list() const { return list_; }
  unsigned count() const { return count_; }

 private:
  gnutls_x509_crt_t* list_ = nullptr;
  unsigned count_ = 0;
};

// What peers would refuse is better said at once.
Result<> CheckOwnCertificate(const std::string& path, const std::string& ca_path) {
  CertificateList own, authorities;
  TRY(own.Load(path));
  TRY(authorities.Load(ca_path));
  time_t now = time(nullptr);
  if (gnutls_x509_crt_get_activation_time(own.list()[0]) > now)
    return Fail(ErrorCode::kInvalid, fmt::format("the certificate '{}' isn't valid yet", path));
  if (gnutls_x509_crt_get_expiration_time(own.list()[0]) < now)
    return Fail(ErrorCode::kInvalid, fmt::format("the certificate '{}' has expired", path));
  unsigned status = 0;
  int rc = gnutls_x509_crt_list_verify(own.list(), own.count(), authorities.list(),
                                       authorities.count(), nullptr, 0, 0, &status);
  if (rc < 0) return Failed("'" + path + "'", rc);
  if (status != 0)
    return Fail(ErrorCode::kInvalid,
                fmt::format("the certificate '{}' is not of the authority '{}'", path, ca_path));
  return {};
}

// The key of `name` in lines of "NAME:HEX".
Result<std::string> FindPsk(const std::string& path, const std::string& name) {
  std::istringstream lines(TRY(ReadCredential(path)));
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with(name + ":")) return line.substr(name.size() + 1);
  }
  return Fail(ErrorCode::kNotFound, fmt::format("'{}' has no key of the name '{}'", path, name));
}

}  // namespace

// ---- credentials ----

struct TlsCredentials::Gnutls {
  TlsSpec spec;
  gnutls_certificate_credentials_t x509 = nullptr;
  gnutls_psk_client_credentials_t psk_client = nullptr;
  gnutls_psk_server_credentials_t psk_server = nullptr;
  gnutls_priority_t priority = nullptr;

  ~Gnutls() {
    if (x509) gnutls_certificate_free_credentials(x509);
    if (psk_client) gnutls_psk_free_client_credentials(psk_client);
    if (psk_server) gnutls_psk_free_server_credentials(psk_server);
    if (priority) gnutls_priority_deinit(priority);
  }

  bool server() const { return spec.endpoint == TlsSpec::Endpoint::kServer; }

  Result<> LoadX509() {
    if (int rc = gnutls_certificate_allocate_credentials(&x509)) return Failed("TLS", rc);
    std::string ca = spec.dir + "/ca-cert.pem", crl = spec.dir + "/ca-crl.pem";
    std::string side = spec.dir + (server() ? "/server" : "/client");
    std::string cert = side + "-cert.pem", key = side + "-key.pem";
    bool has_ca = access(ca.c_str(), F_OK) == 0;
    // A server that doesn't ask whom it talks to needs none.
    if (has_ca || spec.verify_peer || !server()) {
      std::string text = TRY(ReadCredential(ca));
      gnutls_datum_t datum = DatumOf(text);
      int rc = gnutls_certificate_set_x509_trust_mem(x509, &datum, GNUTLS_X509_FMT_PEM);
      if (rc <= 0) return Failed("'" + ca + "'", rc < 0 ? rc : GNUTLS_E_NO_CERTIFICATE_FOUND);
    }
    if (access(crl.c_str(), F_OK) == 0) {
      int rc = gnutls_certificate_set_x509_crl_file(x509, crl.c_str(), GNUTLS_X509_FMT_PEM);
      if (rc < 0) return Failed("'" + crl + "'", rc);
    }
    bool has_own = access(cert.c_str(), F_OK) == 0 && access(key.c_str(), F_OK) == 0;
    if (has_own || server()) {
      TRY(ReadCredential(cert));
      TRY(ReadCredential(key));
      int rc = gnutls_certificate_set_x509_key_file2(
          x509, cert.c_str(), key.c_str(), GNUTLS_X509_FMT_PEM,
          spec.password.empty() ? nullptr : spec.password.c_str(), 0);
      if (rc < 0) return Failed(fmt::format("'{}' and '{}'", cert, key), rc);
      if (spec.sanity_check && has_ca) TRY(CheckOwnCertificate(cert, ca));
    }
    if (server()) gnutls_certificate_set_known_dh_params(x509, GNUTLS_SEC_PARAM_MEDIUM);
    return {};
  }

  Result<> LoadPsk() {
    std::string path = spec.dir + "/keys.psk";
    TRY(ReadCredential(path));
    if (server()) {
      if (int rc = gnutls_psk_allocate_server_credentials(&psk_server)) return Failed("TLS", rc);
      int rc = gnutls_psk_set_server_credentials_file(psk_server, path.c_str());
      if (rc < 0) return Failed("'" + path + "'", rc);
      gnutls_psk_set_server_known_dh_params(psk_server, GNUTLS_SEC_PARAM_MEDIUM);
      return {};
    }
    std::string name = spec.username.empty() ? "qemu" : spec.username;
    std::string key = TRY(FindPsk(path, name));
    gnutls_datum_t datum = DatumOf(key);
    if (int rc = gnutls_psk_allocate_client_credentials(&psk_client)) return Failed("TLS", rc);
    int rc =
        gnutls_psk_set_client_credentials(psk_client, name.c_str(), &datum, GNUTLS_PSK_KEY_HEX);
    return rc < 0 ? Failed(fmt::format("the key of '{}' in '{}'", name, path), rc) : Result<>();
  }
};

TlsCredentials::TlsCredentials() : gnutls_(std::make_unique<Gnutls>()) {}
TlsCredentials::~TlsCredentials() = default;

Result<std::shared_ptr<const TlsCredentials>> TlsCredentials::Create(const TlsSpec& spec) {
  std::shared_ptr<TlsCredentials> made(new TlsCredentials);
  Gnutls& gnutls = *made->gnutls_;
  gnutls.spec = spec;
  made->endpoint_ = spec.endpoint;
  bool psk = spec.kind == TlsSpec::Kind::kPsk;
  if (psk) {
    TRY(gnutls.LoadPsk());
  } else {
    TRY(gnutls.LoadX509());
  }
  std::string priority = spec.priority.empty() ? "NORMAL" : spec.priority;
  if (psk) priority += kPskPriorities;
  if (int rc = gnutls_priority_init(&gnutls.priority, priority.c_str(), nullptr))
    return Failed(fmt::format("priority={}", spec.priority), rc);
  return std::shared_ptr<const TlsCredentials>(std::move(made));
}

// ---- sessions ----

struct TlsSession::Gnutls {
  gnutls_session_t session = nullptr;
  ~Gnutls() {
    if (session) gnutls_deinit(session);
  }
};

TlsSession::TlsSession() : gnutls_(std::make_unique<Gnutls>()) {}
TlsSession::~TlsSession() = default;

Result<std::unique_ptr<TlsSession>> TlsSession::Create(
    std::shared_ptr<const TlsCredentials> credentials, int socket, const std::string& hostname) {
  const TlsCredentials::Gnutls& from = *credentials->gnutls_;
  std::unique_ptr<TlsSession> made(new TlsSession);
  gnutls_session_t& session = made->gnutls_->session;
  unsigned flags =
      GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL | (from.server() ? GNUTLS_SERVER : GNUTLS_CLIENT);
  if (int rc = gnutls_init(&session, flags)) return Failed("TLS", rc);
  if (int rc = gnutls_priority_set(session, from.priority)) return Failed("TLS", rc);
  int rc = from.x509         ? gnutls_credentials_set(session, GNUTLS_CRD_CERTIFICATE, from.x509)
           : from.psk_server ? gnutls_credentials_set(session, GNUTLS_CRD_PSK, from.psk_server)
                             : gnutls_credentials_set(session, GNUTLS_CRD_PSK, from.psk_client);
  if (rc) return Failed("TLS", rc);
  if (from.x509 && from.server() && from.spec.verify_peer)
    gnutls_certificate_server_set_request(session, GNUTLS_CERT_REQUIRE);
  if (from.x509 && !from.server()) {
    if (hostname.empty() && from.spec.verify_peer)
      return Fail(ErrorCode::kInvalid,
                  "TLS checks the server's name, and none is known: give tls-hostname");
    if (!hostname.empty())
      gnutls_server_name_set(session, GNUTLS_NAME_DNS, hostname.data(), hostname.size());
  }
  gnutls_transport_set_int(session, socket);
  made->hostname_ = hostname;
  made->credentials_ = std::move(credentials);
  return made;
}

Result<TlsSession::Step> TlsSession::Handshake() {
  gnutls_session_t session = gnutls_->session;
  int rc = 0;
  do {
    rc = gnutls_handshake(session);
    if (rc == GNUTLS_E_AGAIN || rc == GNUTLS_E_INTERRUPTED)
      return gnutls_record_get_direction(session) ? Step::kAwaitWrite : Step::kAwaitRead;
  } while (rc < 0 && !gnutls_error_is_fatal(rc));
  if (rc < 0) {
    std::string alert;
    if (rc == GNUTLS_E_FATAL_ALERT_RECEIVED) {
      const char* name = gnutls_alert_get_name(gnutls_alert_get(session));
      alert = fmt::format(" ({})", name ? name : "unknown");
    }
    return Fail(ErrorCode::kPermission,
                fmt::format("TLS handshake failed: {}{}", gnutls_strerror(rc), alert));
  }
  TRY(CheckPeer());
  return Step::kDone;
}

Result<> TlsSession::CheckPeer() const {
  const TlsCredentials::Gnutls& from = *credentials_->gnutls_;
  if (!from.x509 || !from.spec.verify_peer) return {};
  unsigned status = 0;
  int rc = gnutls_certificate_verify_peers3(gnutls_->session,
                                            from.server() ? nullptr : hostname_.c_str(), &status);
  if (rc < 0)
    return Fail(ErrorCode::kPermission,
                fmt::format("the peer's certificate can't be checked: {}", gnutls_strerror(rc)));
  if (status == 0) return {};
  gnutls_datum_t text = {};
  std::string why = "it isn't trusted";
  if (gnutls_certificate_verification_status_print(status, GNUTLS_CRT_X509, &text, 0) == 0) {
    why.assign(reinterpret_cast<const char*>(text.data), text.size);
    gnutls_free(text.data);
    while (!why.empty() && (why.back() == ' ' || why.back() == '.' || why.back() == '\0'))
      why.pop_back();
  }
  return Fail(ErrorCode::kPermission, fmt::format("the peer's certificate is refused: {}", why));
}

namespace {
int64_t Errno(int64_t rc) {
  if (rc >= 0) return rc;
  if (rc == GNUTLS_E_AGAIN || rc == GNUTLS_E_INTERRUPTED) return -EAGAIN;
  return rc == GNUTLS_E_PREMATURE_TERMINATION ? -EPIPE : -EIO;
}
}  // namespace

int64_t TlsSession::Receive(std::span<uint8_t> bytes) {
  int64_t rc = 0;
  do {  // the peer may want other keys, which GnuTLS sees to
    rc = gnutls_record_recv(gnutls_->session, bytes.data(), bytes.size());
  } while (rc < 0 && rc != GNUTLS_E_AGAIN && rc != GNUTLS_E_INTERRUPTED &&
           rc != GNUTLS_E_REHANDSHAKE && !gnutls_error_is_fatal(static_cast<int>(rc)));
  return rc == GNUTLS_E_REHANDSHAKE ? -EPROTO : Errno(rc);
}

int64_t TlsSession::Send(std::span<const uint8_t> bytes) {
  return Errno(gnutls_record_send(gnutls_->session, bytes.data(), bytes.size()));
}

bool TlsSession::Pending() const { return gnutls_record_check_pending(gnutls_->session) > 0; }

void TlsSession::Bye() { gnutls_bye(gnutls_->session, GNUTLS_SHUT_WR); }

}  // namespace kvartz
