#include "block/nbd/client_link.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/call_on.h"
#include "base/log.h"

namespace kvartz::block::nbd {
namespace {

constexpr int64_t kSecondNs = 1'000'000'000;
constexpr int64_t kAttemptNs = 30 * kSecondNs;
constexpr int64_t kFirstPauseNs = kSecondNs / 4, kLongestPauseNs = 16 * kSecondNs;

}  // namespace

ClientLink::ClientLink(EventLoop& loop, LinkOptions options)
    : loop_(loop),
      options_(std::move(options)),
      connector_(loop),
      patience_(loop, [this] { GiveUp(); }) {}

Result<std::shared_ptr<Client>> ClientLink::Attempt(int64_t deadline_ns) {
  UniqueFd socket = TRY(connector_.Connect(options_.location.address, deadline_ns));
  attempt_ = std::make_shared<Client>(loop_, std::move(socket), options_.tls);
  bool late = false;
  Timer deadline(loop_, [&] {
    late = true;
    attempt_->Break();
  });
  deadline.Arm(deadline_ns);
  std::shared_ptr<Client> client = attempt_;
  if (closing_) client->Break();
  Result<> greeted = client->Handshake(options_.location.name);
  attempt_ = nullptr;
  if (late) return Fail(ErrorCode::kIo, "the NBD server doesn't answer");
  if (!greeted) return std::unexpected(greeted.error());
  return client;
}

Result<> ClientLink::Open() {
  int64_t end = loop_.clock().NowNs() + options_.open_timeout_ns;
  while (true) {
    int64_t now = loop_.clock().NowNs();
    Result<std::shared_ptr<Client>> made =
        Attempt(options_.open_timeout_ns ? std::max(end, now + kFirstPauseNs) : now + kAttemptNs);
    if (made) {
      client_ = std::move(*made);
      info_ = client_->info();
      client_->Start();
      return {};
    }
    if (loop_.clock().NowNs() >= end) return std::unexpected(made.error());
    Pause(kFirstPauseNs);
  }
}

Client* ClientLink::client() {
  if (client_ && client_->broken()) OnLost();
  return client_.get();
}

std::shared_ptr<ClientLink> ClientLink::MoveTo(EventLoop& loop) {
  std::shared_ptr<Client> client;
  if (client_ && !client_->broken()) client = std::exchange(client_, nullptr);
  if (client) client->Pause();
  Close();
  return CallOn(loop_, loop, [&] {
    auto moved = std::make_shared<ClientLink>(loop, options_);
    moved->info_ = info_;
    if (client && !client->broken()) {
      moved->client_ = std::move(client);
      moved->client_->Resume(loop);
    } else {
      moved->StartReconnecting(nullptr);
    }
    return moved;
  });
}

void ClientLink::StartReconnecting(std::shared_ptr<Client> old) {
  waiting_ = options_.reconnect_delay_ns > 0;
  if (waiting_) patience_.Arm(loop_.clock().NowNs() + options_.reconnect_delay_ns);
  reconnecting_ = true;
  Fiber::Start([self = shared_from_this(), old = std::move(old)]() mutable {
    self->Reconnect(std::move(old));
    self->reconnecting_ = false;
    self->ended_.WakeAll();
  });
}

bool ClientLink::OnLost() {
  if (client_ && client_->broken() && !closing_) StartReconnecting(std::exchange(client_, nullptr));
  // Another connection may have come meanwhile.
  return waiting_ || client_;
}

void ClientLink::GiveUp() {
  patience_.Cancel();
  if (std::exchange(waiting_, false)) Tell();
}

// Requests that were split for the old one are sent to the new one.
Result<> ClientLink::CheckSame(const ExportInfo& now) const {
  if (now.size == info_.size && now.min_block == info_.min_block &&
      now.max_block >= info_.max_block && (now.flags & info_.flags) == info_.flags &&
      ((now.flags ^ info_.flags) & kReadOnly) == 0)
    return {};
  return Fail(ErrorCode::kState, "the export isn't the same any more");
}

void ClientLink::Reconnect(std::shared_ptr<Client> old) {
  if (old) old->End();
  old = nullptr;
  std::string where = options_.location.address.Text();
  int64_t pause = kFirstPauseNs;
  for (bool first = true; !closing_; first = false) {
    Result<std::shared_ptr<Client>> made = Attempt(loop_.clock().NowNs() + kAttemptNs);
    if (closing_) return;
    if (made) {
      if (Result<> same = CheckSame((*made)->info()); !same) {
        KLOG(kWarn, "NBD server {}: {}", where, same.error().what);
        return GiveUp();
      }
      client_ = std::move(*made);
      client_->Start();
      patience_.Cancel();
      waiting_ = false;
      if (options_.reconnect_delay_ns) KLOG(kInfo, "NBD server {}: connected again", where);
      return Tell();
    }
    if (first && options_.reconnect_delay_ns)
      KLOG(kWarn, "NBD server {}: the connection is lost, and tried again", where);
    Pause(pause);
    pause = std::min(2 * pause, kLongestPauseNs);
  }
}

void ClientLink::Pause(int64_t ns) {
  if (closing_) return;
  sleeper_ = Fiber::Current();
  Timer timer(loop_, [this] {
    if (Fiber* fiber = std::exchange(sleeper_, nullptr)) fiber->Wake();
  });
  timer.Arm(loop_.clock().NowNs() + ns);
  Fiber::Suspend();
}

void ClientLink::Stop() {
  closing_ = true;
  waiting_ = false;
  patience_.Cancel();
  connector_.Cancel();
  if (attempt_) attempt_->Break();
  if (Fiber* fiber = std::exchange(sleeper_, nullptr)) fiber->Wake();
}

void ClientLink::Close() {
  Stop();
  while (reconnecting_) ended_.Wait();
  if (client_) client_->End();
  client_ = nullptr;
}

void ClientLink::Abandon() {
  on_change = nullptr;
  Stop();
  if (client_) client_->Break();
}

}  // namespace kvartz::block::nbd
