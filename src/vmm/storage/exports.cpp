#include "vmm/storage/exports.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>

#include "base/check.h"

namespace kvartz::vmm {

Exports::~Exports() { VERIFY(!server_ && exports_.empty()); }

Result<> Exports::Start(const block::nbd::Address& address, unsigned most_clients,
                        std::shared_ptr<const TlsCredentials> tls) {
  if (listener_) return Fail(ErrorCode::kState, "NBD server already running");
  listener_ = TRY(block::nbd::Listen(address));
  socket_path_ = address.path;
  most_clients_ = most_clients;
  tls_ = std::move(tls);
  return {};
}

Result<> Exports::Stop() {
  if (!listener_) return Fail(ErrorCode::kState, "NBD server not running");
  while (!exports_.empty()) TRY(Remove(exports_.back().settings.id, Mode::kHard));
  listener_.Reset();
  tls_.reset();
  if (!socket_path_.empty()) unlink(socket_path_.c_str());
  return {};
}

const Exports::One* Exports::Find(const std::string& id) const {
  auto it = std::ranges::find_if(exports_, [&](const One& one) { return one.settings.id == id; });
  return it == exports_.end() ? nullptr : &*it;
}

const Exports::One* Exports::FindName(const std::string& name) const {
  auto it =
      std::ranges::find_if(exports_, [&](const One& one) { return one.settings.name == name; });
  return it == exports_.end() ? nullptr : &*it;
}

Result<> Exports::MakeServer(EventLoop& loop) {
  UniqueFd listener(fcntl(listener_.get(), F_DUPFD_CLOEXEC, 0));
  if (!listener) return Fail(ErrnoError(errno, "cannot listen"));
  server_loop_ = &loop;
  CallOn(registry_.loop(), loop, [&] {
    server_ = std::make_unique<block::nbd::Server>(loop, std::move(listener), most_clients_);
    if (tls_) server_->RequireTls(tls_);
  });
  return {};
}

void Exports::EndServer() {
  if (!server_) return;
  CallOn(registry_.loop(), *server_loop_, [&] {
    server_->Stop();
    server_.reset();
  });
}

Result<> Exports::Add(const ExportSettings& settings) {
  if (!listener_) return Fail(ErrorCode::kState, "NBD server not running");
  if (Find(settings.id))
    return Fail(ErrorCode::kExists,
                fmt::format("Block export id '{}' is already in use", settings.id));
  if (FindName(settings.name)) {
    return Fail(ErrorCode::kExists,
                fmt::format("NBD server already has export named '{}'", settings.name));
  }
  if (settings.writable && settings.node->read_only())
    return Fail(ErrorCode::kPermission, "Cannot export read-only node as writable");
  EventLoop& loop = settings.node->loop();
  if (!exports_.empty() && &loop != server_loop_) {
    return Fail(ErrorCode::kUnsupported,
                "not supported yet: exports of nodes that are served by different threads");
  }
  auto gate =
      std::make_shared<GateNode>(loop, fmt::format("export '{}'", settings.id), settings.writable);
  TRY(registry_.Attach(*gate, settings.node, loop));
  if (!server_) {
    if (Result<> made = MakeServer(loop); !made) {
      (void)registry_.Detach(*gate);
      return made;
    }
  }
  auto shown =
      std::make_shared<block::nbd::Export>(block::nbd::Export{.name = settings.name,
                                                              .description = settings.description,
                                                              .node = gate,
                                                              .writable = settings.writable,
                                                              .bitmaps = settings.bitmaps});
  CallOn(registry_.loop(), loop, [&] { server_->Add(shown); });
  exports_.push_back({settings, std::move(gate), std::move(shown)});
  return {};
}

Result<> Exports::Remove(const std::string& id, Mode mode) {
  const One* found = Find(id);
  if (!found) return Fail(ErrorCode::kNotFound, fmt::format("Export '{}' is not found", id));
  One one = *found;
  EventLoop& loop = *server_loop_;
  bool gone = CallOn(registry_.loop(), loop, [&] {
    if (mode == Mode::kSafe) {
      server_->AwaitLeaving(*one.shown);
      if (server_->ClientsOf(*one.shown) > 0) return false;
    }
    server_->Remove(one.shown);
    return true;
  });
  if (!gone) {
    return Fail(
        ErrorCode::kBusy,
        fmt::format("export '{}' still in use; with mode=hard its clients are cut off", id));
  }
  std::erase_if(exports_, [&](const One& other) { return other.gate == one.gate; });
  if (exports_.empty()) EndServer();
  TRY(registry_.Detach(*one.gate));
  if (on_deleted) on_deleted(id);
  return {};
}

}  // namespace kvartz::vmm
