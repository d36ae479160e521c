// Chardevs on stream sockets: unix and TCP, as server (one client at a time) and as client.
#include <errno.h>
#include <fmt/core.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/log.h"
#include "base/print.h"
#include "base/unix_socket.h"
#include "host/chardev/backend.h"
#include "host/chardev/chardev.h"
#include "host/chardev/telnet.h"

namespace kvartz::host {
namespace {

constexpr size_t kReadMax = 4096;

struct Address {
  sockaddr_storage storage = {};
  socklen_t size = 0;
  int family = AF_UNSPEC;
};

Result<Address> UnixAddress(const std::string& path) {
  Address address;
  sockaddr_un name = TRY(UnixName(path));
  std::memcpy(&address.storage, &name, sizeof(name));
  address.size = sizeof(name);
  address.family = AF_UNIX;
  return address;
}

Result<Address> TcpAddress(const std::string& host, const std::string& port, bool passive) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = passive ? AI_PASSIVE : 0;
  addrinfo* found = nullptr;
  int error = getaddrinfo(host.empty() ? nullptr : host.c_str(), port.c_str(), &hints, &found);
  if (error != 0) {
    return Fail(ErrorCode::kNotFound,
                fmt::format("address {}:{}: {}", host, port, gai_strerror(error)));
  }
  Address address;
  address.size = found->ai_addrlen;
  address.family = found->ai_family;
  std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
  freeaddrinfo(found);
  return address;
}

std::string Name(const ChardevConfig& config) {
  if (config.host.empty() && config.port.empty()) return "unix:" + config.path;
  return fmt::format("{}:{}:{}", config.telnet ? "telnet" : "tcp", config.host, config.port);
}

// Loop-owned.
class SocketBackend final : public CharBackend {
 public:
  SocketBackend(Chardev& chardev, EventLoop& loop)
      : chardev_(chardev), loop_(loop), retry_(loop, [this] { Reconnect(); }) {}

  ~SocketBackend() override {
    CloseConnection();
    if (listener_) {
      if (accepting_) loop_.Unwatch(listener_.get());
      if (config().host.empty() && config().port.empty()) unlink(config().path.c_str());
    }
  }

  Result<> Open() {
    const ChardevConfig& c = config();
    bool local = c.host.empty() && c.port.empty();
    address_ = TRY(local ? UnixAddress(c.path) : TcpAddress(c.host, c.port, c.server));
    if (c.server) {
      TRY(Listen(local));
      if (c.wait) TRY(WaitForClient());
      return {};
    }
    UniqueFd fd(socket(address_.family,
                       SOCK_STREAM | SOCK_CLOEXEC | (c.reconnect_s ? SOCK_NONBLOCK : 0), 0));
    if (!fd) return Fail(ErrnoError(errno, "cannot make a socket"));
    int result = connect(fd.get(), reinterpret_cast<sockaddr*>(&address_.storage), address_.size);
    if (result == 0) {
      connection_ = std::move(fd);
    } else if (!c.reconnect_s) {
      return Fail(ErrnoError(errno, "cannot connect to " + Name(c)));
    } else if (errno == EINPROGRESS) {
      connecting_ = std::move(fd);
    }
    return {};
  }

  void Start() override {
    if (connection_) {
      Connected();
    } else if (connecting_) {
      WatchConnecting();
    } else if (config().server) {
      AcceptMore();
    } else {
      RetryLater();
    }
  }

  size_t Write(std::span<const uint8_t> data) override {
    if (!connection_) return data.size();
    if (!config().telnet) {
      size_t sent = Send(data);
      if (sent < data.size()) WantWrite();
      return sent;
    }
    size_t taken = 0;
    if (FlushTelnet() && !data.empty()) {
      taken = data.size();
      telnet::Escape(data, &telnet_out_);
      FlushTelnet();
    }
    if (taken < data.size() || !telnet_out_.empty()) WantWrite();
    return taken;
  }

  void InputRoomChanged() override { UpdateWatch(); }

  void Disconnect() override {
    // Not at once: the caller may be within a callback of this connection.
    loop_.Post([alive = std::weak_ptr<int>(alive_), this] {
      if (alive.lock()) Lost();
    });
  }

  std::string Describe() const override {
    return fmt::format("{}{}{}", connection_ ? "" : "disconnected:", Name(config()),
                       config().server ? ",server=on" : "");
  }
  int output_fd() const override { return connection_.get(); }

 private:
  const ChardevConfig& config() const { return chardev_.config(); }

  Result<> Listen(bool local) {
    UniqueFd fd(socket(address_.family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) return Fail(ErrnoError(errno, "cannot make a socket"));
    int on = 1;
    if (!local) setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    int result = Bind(fd.get());
    if (result == 0 && listen(fd.get(), 1) != 0) result = errno;
    if (result == EADDRINUSE) {
      return Fail(ErrorCode::kBusy,
                  fmt::format("cannot listen on {}: in use by another process; choose another {}",
                              Name(config()), local ? "path" : "port"));
    }
    if (result != 0) return Fail(ErrnoError(result, "cannot listen on " + Name(config())));
    listener_ = std::move(fd);
    return {};
  }

  // 0 or errno.
  int Bind(int fd) const {
    if (address_.family == AF_UNIX)
      return BindUnix(fd, reinterpret_cast<const sockaddr_un&>(address_.storage));
    return bind(fd, reinterpret_cast<const sockaddr*>(&address_.storage), address_.size) == 0
               ? 0
               : errno;
  }

  Result<> WaitForClient() {
    Print(stderr, "kvartz-vmm: info: waiting for a client on {}\n", Name(config()));
    for (;;) {
      pollfd wait{listener_.get(), POLLIN, 0};
      if (poll(&wait, 1, -1) < 0 && errno != EINTR) return Fail(ErrnoError(errno, "poll"));
      connection_.Reset(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (connection_) return {};
    }
  }

  void AcceptMore() {
    accepting_ = true;
    loop_.Watch(listener_.get(), FdEvents::kRead, [this](FdEvents) {
      connection_.Reset(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!connection_) return;
      loop_.Unwatch(listener_.get());
      accepting_ = false;
      Connected();
    });
  }

  void Connected() {
    int on = 1;
    if (address_.family != AF_UNIX)
      setsockopt(connection_.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    telnet_ = {};
    telnet_out_.clear();
    want_write_ = false;
    loop_.Watch(connection_.get(), FdEvents::kNone, [this](FdEvents ready) { Ready(ready); });
    if (config().telnet) {
      telnet_out_ = telnet::kGreeting;
      if (!FlushTelnet()) want_write_ = true;
    }
    chardev_.SetOpen(true);
    UpdateWatch();
  }

  void Ready(FdEvents ready) {
    std::weak_ptr<int> alive = alive_;
    if (static_cast<uint32_t>(ready) & static_cast<uint32_t>(FdEvents::kWrite)) {
      want_write_ = false;
      chardev_.Writable();
    }
    if (alive.lock() && connection_ &&
        (static_cast<uint32_t>(ready) & static_cast<uint32_t>(FdEvents::kRead)))
      Read();
    if (alive.lock()) UpdateWatch();
  }

  void Read() {
    uint8_t buffer[kReadMax];
    size_t room = std::min(chardev_.InputRoom(), sizeof(buffer));
    if (room == 0) return;
    ssize_t count = recv(connection_.get(), buffer, room, MSG_DONTWAIT);
    if (count < 0 && (errno == EINTR || errno == EAGAIN)) return;
    if (count <= 0) return Lost();
    std::span<const uint8_t> data(buffer, static_cast<size_t>(count));
    if (!config().telnet) return chardev_.Input(data);
    std::string plain;
    bool line_break = false;
    telnet_.Filter(data, &plain, &line_break);
    chardev_.Input(std::span(reinterpret_cast<const uint8_t*>(plain.data()), plain.size()));
    if (line_break) chardev_.Break();
  }

  // Errors of the connection show up as the end of its input.
  size_t Send(std::span<const uint8_t> data) {
    size_t done = 0;
    while (done < data.size()) {
      ssize_t count = send(connection_.get(), data.data() + done, data.size() - done,
                           MSG_DONTWAIT | MSG_NOSIGNAL);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0 && errno == EAGAIN) return done;
      if (count < 0) return data.size();
      done += static_cast<size_t>(count);
    }
    return done;
  }

  bool FlushTelnet() {
    telnet_out_.erase(0, Send(std::span(reinterpret_cast<const uint8_t*>(telnet_out_.data()),
                                        telnet_out_.size())));
    return telnet_out_.empty();
  }

  void WantWrite() {
    want_write_ = true;
    UpdateWatch();
  }

  void UpdateWatch() {
    if (!connection_) return;
    uint32_t events = (chardev_.InputRoom() > 0 ? static_cast<uint32_t>(FdEvents::kRead) : 0) |
                      (want_write_ ? static_cast<uint32_t>(FdEvents::kWrite) : 0);
    loop_.Rearm(connection_.get(), static_cast<FdEvents>(events));
  }

  void CloseConnection() {
    if (connection_ && chardev_.open()) loop_.Unwatch(connection_.get());
    if (connecting_) loop_.Unwatch(connecting_.get());
    connection_.Reset();
    connecting_.Reset();
  }

  void Lost() {
    if (!connection_) return;
    CloseConnection();
    chardev_.SetOpen(false);
    if (config().server) {
      AcceptMore();
    } else {
      RetryLater();
    }
  }

  void RetryLater() {
    if (config().reconnect_s)
      retry_.Arm(loop_.clock().NowNs() + int64_t{config().reconnect_s} * 1'000'000'000);
  }

  void Reconnect() {
    connecting_.Reset(socket(address_.family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!connecting_) return RetryLater();
    if (connect(connecting_.get(), reinterpret_cast<sockaddr*>(&address_.storage), address_.size) ==
        0) {
      connection_ = std::move(connecting_);
      Connected();
    } else if (errno == EINPROGRESS) {
      WatchConnecting();
    } else {
      connecting_.Reset();
      RetryLater();
    }
  }

  void WatchConnecting() {
    loop_.Watch(connecting_.get(), FdEvents::kWrite, [this](FdEvents) {
      loop_.Unwatch(connecting_.get());
      int error = 0;
      socklen_t size = sizeof(error);
      getsockopt(connecting_.get(), SOL_SOCKET, SO_ERROR, &error, &size);
      if (error != 0) {
        connecting_.Reset();
        return RetryLater();
      }
      connection_ = std::move(connecting_);
      Connected();
    });
  }

  Chardev& chardev_;
  EventLoop& loop_;
  Timer retry_;
  Address address_;
  UniqueFd listener_, connection_, connecting_;
  bool accepting_ = false;
  bool want_write_ = false;
  telnet::InputFilter telnet_;
  std::string telnet_out_;
  std::shared_ptr<int> alive_ = std::make_shared<int>();
};

}  // namespace

Result<std::unique_ptr<CharBackend>> MakeSocketBackend(Chardev& chardev, EventLoop& loop) {
  auto backend = std::make_unique<SocketBackend>(chardev, loop);
  TRY(backend->Open());
  return backend;
}

}  // namespace kvartz::host
