// Where NBD servers listen and clients connect.
#pragma once

#include <string>

#include "base/fd.h"
#include "base/result.h"

namespace kvartz::block::nbd {

constexpr const char* kDefaultPort = "10809";

struct Address {
  std::string path = {};  // of a unix socket; empty: TCP
  std::string host = {};
  std::string port = kDefaultPort;
  std::string Text() const;
};

// What an export is called by in image names:
//   nbd:unix:PATH[:exportname=NAME]          nbd:HOST:PORT[:exportname=NAME]
//   nbd://HOST[:PORT]/NAME                   nbd+unix:///NAME?socket=PATH
struct Location {
  Address address = {};
  std::string name = {};
};
Result<Location> ParseLocation(const std::string& text);

// Non-blocking sockets. Connecting waits (before the loop runs, or in a fiber that may stop it for
// as long as the host tries).
Result<UniqueFd> Connect(const Address& address);
// A unix socket that nobody listens on any more is replaced.
Result<UniqueFd> Listen(const Address& address);

}  // namespace kvartz::block::nbd
