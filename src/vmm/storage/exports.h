// Nodes of the machine that others reach by NBD: nbd-server-start, block-export-add.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "block/nbd/address.h"
#include "block/nbd/server.h"
#include "block/registry.h"
#include "vmm/storage/gate_node.h"

namespace kvartz::vmm {

struct ExportSettings {
  std::string id = {};
  std::string name = {};  // what clients ask for
  std::string description = {};
  block::NodePtr node = nullptr;
  bool writable = false;
  std::vector<std::shared_ptr<block::DirtyBitmap>> bitmaps = {};
};

// Owned by the main loop; what serves the clients is on the loop of the exported nodes, which is
// the same for all exports at a time. Fiber: all that returns a Result.
class Exports {
 public:
  explicit Exports(block::Registry& registry) : registry_(registry) {}
  ~Exports();

  bool listening() const { return static_cast<bool>(listener_); }
  // `most_clients`: at once; 0: any number. Errors: there is a server already; the host's.
  // `tls`: clients must use it, with these credentials of a server; null: they can't.
  Result<> Start(const block::nbd::Address& address, unsigned most_clients,
                 std::shared_ptr<const TlsCredentials> tls = nullptr);
  // Exports go, too. Errors: there is no server.
  Result<> Stop();
  Result<> Add(const ExportSettings& settings);
  // kSafe: not while clients are connected.
  enum class Mode : uint8_t { kSafe, kHard };
  Result<> Remove(const std::string& id, Mode mode);

  struct One {
    ExportSettings settings;
    std::shared_ptr<GateNode> gate;
    std::shared_ptr<block::nbd::Export> shown;
  };
  const std::vector<One>& list() const { return exports_; }
  const One* Find(const std::string& id) const;
  const One* FindName(const std::string& name) const;
  // Told, on the main loop, when an export has gone: BLOCK_EXPORT_DELETED.
  std::function<void(const std::string& id)> on_deleted = {};

 private:
  Result<> MakeServer(EventLoop& loop);
  void EndServer();

  block::Registry& registry_;
  UniqueFd listener_;
  std::string socket_path_;  // is removed at the end
  unsigned most_clients_ = 0;
  std::shared_ptr<const TlsCredentials> tls_;
  EventLoop* server_loop_ = nullptr;
  std::unique_ptr<block::nbd::Server> server_;
  std::vector<One> exports_;
};

}  // namespace kvartz::vmm
