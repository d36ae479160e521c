#include "cli/nbd/background.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

namespace kvartz::cli {

Result<bool> Background::Fork() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) < 0) return Fail(ErrnoError(errno, "cannot make a pipe"));
  read_.Reset(ends[0]);
  write_.Reset(ends[1]);
  pid_t child = fork();
  if (child < 0) return Fail(ErrnoError(errno, "cannot start a process"));
  (child == 0 ? read_ : write_).Reset();
  if (child == 0) setsid();
  return child == 0;
}

int Background::AwaitReady() {
  char byte;
  ssize_t got;
  do {
    got = read(read_.get(), &byte, 1);
  } while (got < 0 && errno == EINTR);
  return got == 1 ? 0 : 1;
}

void Background::Ready() {
  if (!write_) return;
  UniqueFd null(open("/dev/null", O_RDWR | O_CLOEXEC));
  for (int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) dup2(null.get(), fd);
  // A parent that is gone doesn't matter.
  [[maybe_unused]] ssize_t sent = write(write_.get(), "1", 1);
  write_.Reset();
}

}  // namespace kvartz::cli
