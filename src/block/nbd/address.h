// Where NBD servers listen and clients connect.
#pragma once

#include <string>

#include "base/event_loop.h"
#include "base/fd.h"
#include "base/fiber.h"
#include "base/result.h"
#include "base/workers.h"

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

// One attempt to connect; the loop goes on meanwhile. Loop-owned.
class Connector {
 public:
  explicit Connector(EventLoop& loop) : loop_(loop), workers_(loop, 1) {}
  // Fiber: a non-blocking socket. Errors: nobody there, unknown, no answer until `deadline_ns`.
  Result<UniqueFd> Connect(const Address& address, int64_t deadline_ns);
  // The Connect under way fails soon.
  void Cancel();

 private:
  Result<UniqueFd> ConnectUnix(const Address& address, int64_t deadline_ns);
  int AwaitWritable(int fd, int64_t deadline_ns);  // 0 or -errno
  void WaitUntil(int64_t deadline_ns);             // or until somebody wakes it
  void WakeWaiting();

  EventLoop& loop_;
  Workers workers_;  // names are looked up there
  Fiber* waiting_ = nullptr;
  bool cancelled_ = false;
};

// Non-blocking.
// A unix socket that nobody listens on any more is replaced.
Result<UniqueFd> Listen(const Address& address);

}  // namespace kvartz::block::nbd
