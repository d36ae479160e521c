// Finds an initial RAM disk that was cut off, by walking over its structure without unpacking it.
#pragma once

#include "machine/loader/boot_file.h"

namespace kvartz::machine {

// Archives as of Documentation/driver-api/early-userspace/buffer-format.rst (Linux): "newc" cpio,
// plain or compressed, one after another. Looked into: cpio, zstd, xz, lz4; what is something else
// (gzip among it) is taken as it is. Errors: truncated.
Result<> CheckInitrd(const BootFile& initrd);

}  // namespace kvartz::machine
