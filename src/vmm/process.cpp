#include "vmm/process.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>

#include <cerrno>

namespace kvartz::vmm {

Result<Daemon::Role> Daemon::Fork() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return Fail(ErrnoError(errno, "-daemonize: cannot make a pipe"));
  UniqueFd read_end(ends[0]), write_end(ends[1]);
  pid_t child = fork();
  if (child < 0) return Fail(ErrnoError(errno, "-daemonize: cannot fork"));
  if (child > 0) {
    pipe_ = std::move(read_end);
    return Role::kParent;
  }
  setsid();
  pipe_ = std::move(write_end);
  return Role::kChild;
}

Result<> Daemon::Ready() {
  if (!pipe_) return {};
  UniqueFd null(open("/dev/null", O_RDWR | O_CLOEXEC));
  if (!null || chdir("/") != 0)
    return Fail(ErrnoError(errno, "-daemonize: cannot leave the terminal"));
  for (int standard : {0, 1, 2}) {
    if (dup2(null.get(), standard) < 0)
      return Fail(ErrnoError(errno, "-daemonize: cannot leave the terminal"));
  }
  char ready = 0;
  if (write(pipe_.get(), &ready, 1) != 1)
    return Fail(ErrnoError(errno, "-daemonize: the parent is gone"));
  pipe_.Reset();
  return {};
}

int Daemon::WaitForChild() {
  char ready = 0;
  ssize_t count;
  do count = read(pipe_.get(), &ready, 1);
  while (count < 0 && errno == EINTR);
  return count == 1 ? 0 : 1;
}

Result<> Pidfile::Take(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!fd) return Fail(ErrnoError(errno, fmt::format("-pidfile {}: cannot open it", path)));
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  struct flock holder = lock;
  if (fcntl(fd.get(), F_SETLK, &lock) != 0) {
    bool known = fcntl(fd.get(), F_GETLK, &holder) == 0 && holder.l_type != F_UNLCK;
    return Fail(ErrorCode::kBusy,
                fmt::format("-pidfile {}: in use by process {}; end it or choose another file",
                            path, known ? std::to_string(holder.l_pid) : "?"));
  }
  std::string text = fmt::format("{}\n", getpid());
  if (ftruncate(fd.get(), 0) != 0 ||
      write(fd.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    return Fail(ErrnoError(errno, fmt::format("-pidfile {}: cannot write it", path)));
  }
  path_ = path;
  fd_ = std::move(fd);
  return {};
}

Pidfile::~Pidfile() {
  if (fd_) unlink(path_.c_str());
}

}  // namespace kvartz::vmm
