// Why a file can't be opened, said so that the user knows what to do.
#pragma once

#include <string>

#include "base/result.h"

namespace kvartz {

// `what` names the file's role ("kernel", "disk image"). Names the directory on the way that is
// missing or closed, and the uid that lacks a permission. `if_missing`: what to do about a file
// that isn't there.
Error OpenFileError(const std::string& what, const std::string& path, int errno_value,
                    const std::string& if_missing = "check the path");

}  // namespace kvartz
