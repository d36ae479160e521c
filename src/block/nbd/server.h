// NBD server: exports of nodes, for any number of clients.
//
// Each connection is bounded: options of 64 KiB, 64 requests and 64 MiB of data under way, a
// handshake of 30 s; what a client sends beyond its protocol ends its connection and nothing else.
#pragma once

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/event_loop.h"
#include "base/fd.h"
#include "base/fiber.h"
#include "base/tls.h"
#include "block/dirty_bitmap.h"
#include "block/node.h"

namespace kvartz::block::nbd {

struct Export {
  std::string name = {};
  std::string description = {};
  NodePtr node = nullptr;
  bool writable = false;
  bool allocation_depth = false;                           // offers qemu:allocation-depth
  std::vector<std::shared_ptr<DirtyBitmap>> bitmaps = {};  // qemu:dirty-bitmap:NAME
};

class Connection;

// Loop-owned by the loop of its nodes. Stop before it is destroyed.
class Server {
 public:
  // `most_clients`: at once; more wait to be accepted; 0: any number.
  Server(EventLoop& loop, UniqueFd listener, unsigned most_clients);
  ~Server();

  void Add(std::shared_ptr<Export> added) { exports_.push_back(std::move(added)); }
  const std::vector<std::shared_ptr<Export>>& exports() const { return exports_; }
  // Null: there is none. The empty name is the first one, if there is no other of that name.
  std::shared_ptr<Export> Find(const std::string& name) const;

  size_t ClientsOf(const Export& chosen) const;
  // Fiber: those of its clients that have gone away are waited for, as they may have left requests
  // behind; for a second at most.
  void AwaitLeaving(const Export& chosen);
  // Offers it no more and ends its connections. Fiber: waits until they are gone.
  void Remove(const std::shared_ptr<Export>& gone);
  // Clients must use TLS before anything else, with credentials of a server.
  void RequireTls(std::shared_ptr<const TlsCredentials> credentials) {
    tls_ = std::move(credentials);
  }
  const std::shared_ptr<const TlsCredentials>& tls() const { return tls_; }

  // A connection that somebody else made.
  void Serve(UniqueFd socket);
  // Accepts no more and ends all connections. Fiber: waits until they are gone.
  void Stop();
  size_t clients() const { return connections_.size(); }
  // When a client that got as far as an export has gone.
  std::function<void()> on_client_gone = {};

 private:
  friend class Connection;
  void OnAccept();
  void Watch();
  void Gone(Connection* connection, bool served);

  EventLoop& loop_;
  UniqueFd listener_;
  const unsigned most_clients_;
  bool watching_ = false, stopping_ = false;
  std::shared_ptr<const TlsCredentials> tls_;
  std::vector<std::shared_ptr<Export>> exports_;
  std::set<std::shared_ptr<Connection>> connections_;
  FiberQueue gone_;
};

}  // namespace kvartz::block::nbd
