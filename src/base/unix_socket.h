// Names of sockets of the unix domain.
#pragma once

#include <sys/un.h>

#include <string>

#include "base/result.h"

namespace kvartz {

// Errors: too long, or empty.
Result<sockaddr_un> UnixName(const std::string& path);

// Binds the socket `fd`, to listen on it. A socket that a process left there which is gone is
// replaced. Answers 0 or errno; EADDRINUSE: somebody listens there; EEXIST: it is no socket.
int BindUnix(int fd, const sockaddr_un& name);

}  // namespace kvartz
