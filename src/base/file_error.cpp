#include "base/file_error.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>

#include <cerrno>

namespace kvartz {
namespace {

// The first directory on the way to `path` that is missing or may not be entered; empty: the way is
// free.
std::string FirstObstacle(const std::string& path, int error) {
  for (size_t slash = path.find('/', 1); slash != path.npos; slash = path.find('/', slash + 1)) {
    std::string part = path.substr(0, slash);
    int mode = error == ENOENT ? F_OK : X_OK;
    if (faccessat(AT_FDCWD, part.c_str(), mode, AT_EACCESS) < 0 && errno == error) return part;
  }
  return "";
}

}  // namespace

Error OpenFileError(const std::string& what, const std::string& path, int errno_value,
                    const std::string& if_missing) {
  const std::string file = fmt::format("{} '{}'", what, path);
  const std::string obstacle = FirstObstacle(path, errno_value);
  switch (errno_value) {
    case ENOENT:
      return {ErrorCode::kNotFound,
              fmt::format("{} doesn't exist: {}", file,
                          obstacle.empty() ? if_missing
                                           : fmt::format("there is no directory '{}'", obstacle))};
    case EACCES:
    case EPERM:
      if (!obstacle.empty()) {
        return {ErrorCode::kPermission,
                fmt::format("{} cannot be opened: uid {} may not enter the directory '{}'", file,
                            geteuid(), obstacle)};
      }
      return {ErrorCode::kPermission,
              fmt::format("{} is not readable by uid {}: give it access (chmod or chown)", file,
                          geteuid())};
    case EISDIR:
      return {ErrorCode::kInvalid, fmt::format("{} is a directory", file)};
    default:
      return ErrnoError(errno_value, fmt::format("cannot open {}", file));
  }
}

}  // namespace kvartz
