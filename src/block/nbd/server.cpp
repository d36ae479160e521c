#include "block/nbd/server.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "base/check.h"
#include "block/nbd/connection.h"

namespace kvartz::block::nbd {

Server::Server(EventLoop& loop, UniqueFd listener, unsigned most_clients)
    : loop_(loop), listener_(std::move(listener)), most_clients_(most_clients) {
  Watch();
}

Server::~Server() {
  VERIFY(connections_.empty());
  if (watching_) loop_.Unwatch(listener_.get());
}

void Server::Watch() {
  bool room =
      !stopping_ && listener_ && (most_clients_ == 0 || connections_.size() < most_clients_);
  if (room == watching_) return;
  watching_ = room;
  if (room) {
    loop_.Watch(listener_.get(), FdEvents::kRead, [this](FdEvents) { OnAccept(); });
  } else {
    loop_.Unwatch(listener_.get());
  }
}

void Server::OnAccept() {
  UniqueFd socket(accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (socket) Serve(std::move(socket));
}

void Server::Serve(UniqueFd socket) {
  auto connection = std::make_shared<Connection>(*this, loop_, std::move(socket));
  connections_.insert(connection);
  Watch();
  connection->Start();
}

std::shared_ptr<Export> Server::Find(const std::string& name) const {
  for (const auto& one : exports_) {
    if (one->name == name) return one;
  }
  return name.empty() && exports_.size() == 1 ? exports_[0] : nullptr;
}

size_t Server::ClientsOf(const Export& chosen) const {
  return static_cast<size_t>(std::ranges::count_if(
      connections_, [&](const auto& one) { return one->chosen() == &chosen; }));
}

void Server::AwaitLeaving(const Export& chosen) {
  constexpr int64_t kPatienceNs = 1'000'000'000;
  bool over = false;
  Timer patience(loop_, [&] {
    over = true;
    gone_.WakeAll();
  });
  patience.Arm(loop_.clock().NowNs() + kPatienceNs);
  auto leaving = [&](const auto& one) { return one->chosen() == &chosen && one->is_leaving(); };
  while (!over && std::ranges::any_of(connections_, leaving)) gone_.Wait();
}

void Server::Remove(const std::shared_ptr<Export>& gone) {
  std::erase(exports_, gone);
  for (const auto& connection : connections_) {
    if (connection->chosen() == gone.get()) connection->End();
  }
  while (ClientsOf(*gone) > 0) gone_.Wait();
}

void Server::Gone(Connection* connection, bool served) {
  connections_.erase(connection->shared_from_this());
  Watch();
  gone_.WakeAll();
  if (served && on_client_gone) on_client_gone();
}

void Server::Stop() {
  stopping_ = true;
  Watch();
  for (const auto& connection : connections_) connection->End();
  while (!connections_.empty()) gone_.Wait();
}

}  // namespace kvartz::block::nbd
