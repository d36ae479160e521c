// TLS over stream sockets, by GnuTLS: credentials as QEMU's tls-creds objects have them, and
// sessions that never block.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/result.h"

namespace kvartz {

struct TlsSpec {
  enum class Kind : uint8_t { kX509, kPsk };
  enum class Endpoint : uint8_t { kClient, kServer };
  Kind kind = Kind::kX509;
  Endpoint endpoint = Endpoint::kClient;
  // kX509: ca-cert.pem, ca-crl.pem (if it is there), and server- or client-cert.pem and -key.pem (a
  // client needs none). kPsk: keys.psk, lines of "NAME:HEX".
  std::string dir = {};
  // The peer must show a certificate of the CA; clients check the server's name, too.
  bool verify_peer = true;
  bool sanity_check = true;   // our own certificate is of the CA, and neither too young nor too old
  std::string priority = {};  // GnuTLS's words; empty: its defaults
  std::string password = {};  // of the key's file; empty: none
  std::string username = {};  // kPsk, client: which key; empty: "qemu"
};

// Immutable; shared by sessions.
class TlsCredentials {
 public:
  // Reads the files. Errors name the one that is missing or bad.
  static Result<std::shared_ptr<const TlsCredentials>> Create(const TlsSpec& spec);
  ~TlsCredentials();
  TlsCredentials(const TlsCredentials&) = delete;
  TlsCredentials& operator=(const TlsCredentials&) = delete;
  TlsSpec::Endpoint endpoint() const { return endpoint_; }

 private:
  friend class TlsSession;
  struct Gnutls;
  TlsCredentials();
  const std::unique_ptr<Gnutls> gnutls_;
  TlsSpec::Endpoint endpoint_ = TlsSpec::Endpoint::kClient;
};

// One connection; used by one thread. Answers are counts or -errno; -EAGAIN: the socket isn't
// ready.
class TlsSession {
 public:
  // `socket`: non-blocking, stays the caller's and open. `hostname`: whom a client wants to talk
  // to.
  static Result<std::unique_ptr<TlsSession>> Create(
      std::shared_ptr<const TlsCredentials> credentials, int socket, const std::string& hostname);
  ~TlsSession();
  TlsSession(const TlsSession&) = delete;
  TlsSession& operator=(const TlsSession&) = delete;

  enum class Step : uint8_t { kDone, kAwaitRead, kAwaitWrite };
  // Until it is kDone; the peer is who it should be then. Errors: the peer speaks no TLS, no common
  // key, a certificate that isn't accepted.
  Result<Step> Handshake();
  int64_t Receive(std::span<uint8_t> bytes);  // 0: the peer ended it
  // After -EAGAIN the same bytes must come again.
  int64_t Send(std::span<const uint8_t> bytes);
  bool Pending() const;  // Receive would have something at once
  void Bye();            // says that nothing follows; doesn't wait

 private:
  struct Gnutls;
  TlsSession();
  Result<> CheckPeer() const;
  const std::unique_ptr<Gnutls> gnutls_;
  std::shared_ptr<const TlsCredentials> credentials_;
  std::string hostname_;
};

}  // namespace kvartz
