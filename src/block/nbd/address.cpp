#include "block/nbd/address.h"

#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>

#include "base/unix_socket.h"

namespace kvartz::block::nbd {
namespace {

constexpr int kBacklog = 64;

std::unexpected<Error> Bad(const std::string& text, const char* what) {
  return Fail(ErrorCode::kInvalid,
              fmt::format("'{}': {}; NBD names are nbd:unix:PATH, nbd:HOST:PORT, nbd://HOST/NAME "
                          "or nbd+unix:///NAME?socket=PATH",
                          text, what));
}

// %41 and the like.
std::string Decode(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); i++) {
    unsigned byte = 0;
    if (text[i] == '%' && i + 2 < text.size() && isxdigit(text[i + 1]) && isxdigit(text[i + 2])) {
      byte = static_cast<unsigned>(std::stoul(std::string(text.substr(i + 1, 2)), nullptr, 16));
      out += static_cast<char>(byte);
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

Result<Location> ParseUri(const std::string& text, bool is_unix, std::string_view rest) {
  Location location;
  size_t slash = rest.find('/');
  std::string_view authority = rest.substr(0, slash);
  std::string_view path =
      slash == std::string_view::npos ? std::string_view() : rest.substr(slash + 1);
  size_t question = path.find('?');
  std::string_view query =
      question == std::string_view::npos ? std::string_view() : path.substr(question + 1);
  location.name = Decode(path.substr(0, question));
  if (is_unix) {
    if (!authority.empty() || !query.starts_with("socket="))
      return Bad(text, "?socket=PATH is missing");
    location.address.path = Decode(query.substr(7));
    if (location.address.path.empty()) return Bad(text, "the socket's path is empty");
    return location;
  }
  if (!query.empty()) return Bad(text, "what follows '?' isn't known");
  if (size_t at = authority.find('@'); at != std::string_view::npos)
    authority.remove_prefix(at + 1);
  size_t colon = authority.rfind(':');
  if (authority.starts_with('[')) {  // an IPv6 address
    size_t end = authority.find(']');
    if (end == std::string_view::npos) return Bad(text, "']' is missing");
    location.address.host = authority.substr(1, end - 1);
    if (colon < end) colon = std::string_view::npos;
  } else {
    location.address.host = authority.substr(0, colon);
  }
  if (colon != std::string_view::npos) location.address.port = authority.substr(colon + 1);
  if (location.address.host.empty()) location.address.host = "localhost";
  return location;
}

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

Result<AddressList> Resolve(const Address& address, int flags) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* found = nullptr;
  const char* host = address.host.empty() ? nullptr : address.host.c_str();
  int error = getaddrinfo(host, address.port.c_str(), &hints, &found);
  if (error)
    return Fail(ErrorCode::kNotFound, fmt::format("{}: {}", address.Text(), gai_strerror(error)));
  return AddressList(found, &freeaddrinfo);
}

}  // namespace

std::string Address::Text() const { return path.empty() ? fmt::format("{}:{}", host, port) : path; }

Result<Location> ParseLocation(const std::string& text) {
  std::string_view rest = text;
  if (rest.starts_with("nbd+unix://")) return ParseUri(text, true, rest.substr(11));
  if (rest.starts_with("nbd+tcp://")) return ParseUri(text, false, rest.substr(10));
  if (rest.starts_with("nbd://")) return ParseUri(text, false, rest.substr(6));
  if (rest.starts_with("nbds"))
    return Fail(ErrorCode::kUnsupported,
                "not supported: nbds://; for TLS name the server by options, with tls-creds=ID");
  if (!rest.starts_with("nbd:")) return Bad(text, "this is none");
  rest.remove_prefix(4);
  Location location;
  constexpr std::string_view kName = ":exportname=";
  if (size_t at = rest.find(kName); at != std::string_view::npos) {
    location.name = rest.substr(at + kName.size());
    rest = rest.substr(0, at);
  }
  if (rest.starts_with("unix:")) {
    location.address.path = rest.substr(5);
    if (location.address.path.empty()) return Bad(text, "the socket's path is empty");
    return location;
  }
  size_t colon = rest.rfind(':');
  if (colon == std::string_view::npos || colon + 1 == rest.size())
    return Bad(text, "the port is missing");
  location.address.host = rest.substr(0, colon);
  location.address.port = rest.substr(colon + 1);
  return location;
}

namespace {
std::unexpected<Error> CannotConnect(const Address& address, int error) {
  return Fail(ErrnoError(error, fmt::format("cannot connect to NBD server {}", address.Text())));
}
}  // namespace

void Connector::Cancel() {
  cancelled_ = true;
  WakeWaiting();
}

void Connector::WakeWaiting() {
  if (Fiber* fiber = std::exchange(waiting_, nullptr)) fiber->Wake();
}

void Connector::WaitUntil(int64_t deadline_ns) {
  if (cancelled_) return;
  waiting_ = Fiber::Current();
  Timer timer(loop_, [this] { WakeWaiting(); });
  timer.Arm(deadline_ns);
  Fiber::Suspend();
}

int Connector::AwaitWritable(int fd, int64_t deadline_ns) {
  bool ready = false;
  loop_.Watch(fd, FdEvents::kWrite, [&](FdEvents) {
    ready = true;
    loop_.Rearm(fd, FdEvents::kNone);
    WakeWaiting();
  });
  WaitUntil(deadline_ns);
  loop_.Unwatch(fd);
  if (cancelled_) return -ECANCELED;
  if (!ready) return -ETIMEDOUT;
  int error = 0;
  socklen_t size = sizeof error;
  if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0) return -errno;
  return -error;
}

Result<UniqueFd> Connector::ConnectUnix(const Address& address, int64_t deadline_ns) {
  constexpr int64_t kPauseNs = 10'000'000;
  sockaddr_un name = TRY(UnixName(address.path));
  while (!cancelled_) {
    UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) return CannotConnect(address, errno);
    if (connect(fd.get(), reinterpret_cast<sockaddr*>(&name), sizeof name) == 0) return fd;
    // Many wait to be accepted, and there is no event for a place among them.
    if (errno != EAGAIN) return CannotConnect(address, errno);
    int64_t now = loop_.clock().NowNs();
    if (now >= deadline_ns) return CannotConnect(address, ETIMEDOUT);
    WaitUntil(std::min(deadline_ns, now + kPauseNs));
  }
  return CannotConnect(address, ECANCELED);
}

Result<UniqueFd> Connector::Connect(const Address& address, int64_t deadline_ns) {
  cancelled_ = false;
  if (!address.path.empty()) return ConnectUnix(address, deadline_ns);
  Result<AddressList> list = Resolve(address, AI_NUMERICHOST);
  if (!list) workers_.Run([&] { list = Resolve(address, 0); });
  if (!list) return std::unexpected(list.error());
  int error = ENOENT;
  for (addrinfo* one = list->get(); one && !cancelled_; one = one->ai_next) {
    UniqueFd fd(socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) {
      error = errno;
      continue;
    }
    int rc = connect(fd.get(), one->ai_addr, one->ai_addrlen) == 0 ? 0 : -errno;
    if (rc == -EINPROGRESS) rc = AwaitWritable(fd.get(), deadline_ns);
    int on = 1;
    setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (rc == 0) return fd;
    error = -rc;
  }
  return CannotConnect(address, error);
}

Result<UniqueFd> Listen(const Address& address) {
  auto failed = [&](int error) {
    return Fail(ErrnoError(error, fmt::format("cannot listen on {}", address.Text())));
  };
  if (!address.path.empty()) {
    sockaddr_un name = TRY(UnixName(address.path));
    UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) return failed(errno);
    if (int error = BindUnix(fd.get(), name)) return failed(error);
    if (listen(fd.get(), kBacklog) < 0) return failed(errno);
    return fd;
  }
  AddressList list = TRY(Resolve(address, AI_PASSIVE));
  int error = ENOENT;
  for (addrinfo* one = list.get(); one; one = one->ai_next) {
    UniqueFd fd(socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    int on = 1;
    if (fd) setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (fd && bind(fd.get(), one->ai_addr, one->ai_addrlen) == 0 && listen(fd.get(), kBacklog) == 0)
      return fd;
    error = errno;
  }
  return failed(error);
}

}  // namespace kvartz::block::nbd
