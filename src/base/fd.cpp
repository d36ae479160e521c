#include "base/fd.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

namespace kvartz {

void UniqueFd::Reset(int fd) {
  if (fd_ >= 0) close(fd_);
  fd_ = fd;
}

Result<EventFd> EventFd::Create() {
  EventFd event;
  event.fd_.Reset(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!event.fd_) return Fail(ErrnoError(errno, "cannot create an eventfd"));
  return event;
}

void EventFd::Signal() const {
  uint64_t one = 1;
  // The only failure is a full counter, which is as signalled as can be.
  [[maybe_unused]] ssize_t n = write(fd_.get(), &one, sizeof(one));
}

bool EventFd::Consume() const {
  uint64_t count = 0;
  return read(fd_.get(), &count, sizeof(count)) == sizeof(count);
}

Result<UniqueFd> CreateMemFd(const char* name, unsigned long size, unsigned extra_flags) {
  UniqueFd fd(memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | extra_flags));
  if (!fd) return Fail(ErrnoError(errno, std::string("cannot create memory file '") + name + "'"));
  if (ftruncate(fd.get(), static_cast<off_t>(size)) < 0) {
    return Fail(ErrnoError(errno, std::string("cannot size memory file '") + name + "' to " +
                                      std::to_string(size) + " bytes"));
  }
  if (fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
    return Fail(ErrnoError(errno, std::string("cannot seal memory file '") + name + "'"));
  }
  return fd;
}

}  // namespace kvartz
