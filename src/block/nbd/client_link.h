// The way to an NBD server: connects, and connects again when the connection is lost.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "block/nbd/address.h"
#include "block/nbd/client.h"

namespace kvartz::block::nbd {

struct LinkOptions {
  Location location = {};
  ClientTls tls = {};
  // How long requests wait for another connection when one is lost; 0: they fail at once. (It is
  // tried until it succeeds, all the same.)
  int64_t reconnect_delay_ns = 0;
  // How long opening tries; 0: once.
  int64_t open_timeout_ns = 0;
};

// Loop-owned. Kept alive by what it has under way.
class ClientLink : public std::enable_shared_from_this<ClientLink> {
 public:
  ClientLink(EventLoop& loop, LinkOptions options);

  // Fiber: the first connection. Errors name the server's trouble.
  Result<> Open();
  // Fiber, with nothing under way: the same on another loop; this one is of no use any more.
  std::shared_ptr<ClientLink> MoveTo(EventLoop& loop);
  // Null: there is no connection now.
  Client* client();
  // There is none, but there may be soon: requests wait for it.
  bool worth_waiting() const { return waiting_; }
  const ExportInfo& info() const { return info_; }  // of the export, from the first connection

  // A request ended with Client::kLost: it is tried again if this says so, when on_change is
  // called.
  bool OnLost();
  // Called outside of fibers or in one: it is connected again, or not worth waiting for any more.
  std::function<void()> on_change = {};

  // Fiber: says goodbye; nothing is under way afterwards.
  void Close();
  // At once, without telling anybody.
  void Abandon();

 private:
  Result<std::shared_ptr<Client>> Attempt(int64_t deadline_ns);
  void StartReconnecting(std::shared_ptr<Client> old);
  void Reconnect(std::shared_ptr<Client> old);
  Result<> CheckSame(const ExportInfo& now) const;
  void Pause(int64_t ns);  // or until Stop
  void Stop();
  void GiveUp();
  void Tell() {
    if (on_change) on_change();
  }

  EventLoop& loop_;
  const LinkOptions options_;
  Connector connector_;
  ExportInfo info_;
  std::shared_ptr<Client> client_;
  std::shared_ptr<Client> attempt_;  // in its handshake
  Timer patience_;
  Fiber* sleeper_ = nullptr;
  bool waiting_ = false, reconnecting_ = false, closing_ = false;
  FiberQueue ended_;
};

}  // namespace kvartz::block::nbd
