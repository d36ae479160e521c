#include "base/unix_socket.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/fd.h"
#include "base/lingering.h"

namespace kvartz {
namespace {

enum class Listener : uint8_t { kNone, kGone, kAlive };

// Has ended, whether its parent has noticed or not.
bool IsGone(pid_t pid) {
  UniqueFd process(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  if (!process) return errno == ESRCH;
  pollfd ended = {process.get(), POLLIN, 0};
  return poll(&ended, 1, 0) == 1;
}

Listener LookFor(const sockaddr_un& name) {
  UniqueFd probe(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (connect(probe.get(), reinterpret_cast<const sockaddr*>(&name), sizeof name) < 0)
    return errno == ECONNREFUSED || errno == ENOENT ? Listener::kNone : Listener::kAlive;
  ucred peer = {};
  socklen_t size = sizeof peer;
  const bool known =
      getsockopt(probe.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.pid > 0;
  return known && IsGone(peer.pid) ? Listener::kGone : Listener::kAlive;
}

bool IsOtherFile(const char* path) {
  struct stat st;
  return lstat(path, &st) == 0 && !S_ISSOCK(st.st_mode);
}

}  // namespace

Result<sockaddr_un> UnixName(const std::string& path) {
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof name.sun_path)
    return Fail(ErrorCode::kInvalid,
                fmt::format("the socket path '{}' must have 1 to {} characters", path,
                            sizeof name.sun_path - 1));
  std::memcpy(name.sun_path, path.data(), path.size());
  return name;
}

int BindUnix(int fd, const sockaddr_un& name) {
  Lingering lingering;
  while (true) {
    if (bind(fd, reinterpret_cast<const sockaddr*>(&name), sizeof name) == 0) return 0;
    if (errno != EADDRINUSE) return errno;
    if (IsOtherFile(name.sun_path)) return EEXIST;
    Listener listener = LookFor(name);
    if (listener == Listener::kNone) {
      if (unlink(name.sun_path) < 0 && errno != ENOENT) return errno;
    } else if (listener == Listener::kAlive || !lingering.Wait()) {
      return EADDRINUSE;
    }
  }
}

}  // namespace kvartz
