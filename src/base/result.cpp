#include "base/result.h"

#include <cerrno>
#include <cstring>

namespace kvartz {
namespace {

ErrorCode CodeOf(int errno_value) {
  switch (errno_value) {
    case ENOENT:
    case ENODEV:
    case ENXIO:
    case ESRCH:
      return ErrorCode::kNotFound;
    case EEXIST:
      return ErrorCode::kExists;
    case EACCES:
    case EPERM:
    case EROFS:
      return ErrorCode::kPermission;
    case EBUSY:
    case EAGAIN:
    case EADDRINUSE:
    case ETXTBSY:
      return ErrorCode::kBusy;
    case EOPNOTSUPP:
    case ENOSYS:
    case ENOTTY:
      return ErrorCode::kUnsupported;
    case ENOMEM:
    case ENOSPC:
    case EDQUOT:
    case EMFILE:
    case ENFILE:
      return ErrorCode::kNoSpace;
    case EINVAL:
    case ENAMETOOLONG:
    case EISDIR:
    case ENOTDIR:
      return ErrorCode::kInvalid;
    default:
      return ErrorCode::kIo;
  }
}

}  // namespace

Error ErrnoError(int errno_value, const std::string& what) {
  const char* text = strerrordesc_np(errno_value);
  return {CodeOf(errno_value),
          what + ": " + (text ? text : "error " + std::to_string(errno_value))};
}

}  // namespace kvartz
