// Locks on disk images, as QEMU's file driver has taken them since 2.10 (its docs: "Image
// locking"), so that machines of both keep out of each other's way.
#pragma once

#include <string>

#include "base/result.h"

namespace kvartz::block {

// What a user of an image does with it. Everybody reads.
struct LockWish {
  bool write = false;
  bool share_write = false;  // bears others that write
};

// Locks the open file `fd` until it is closed. Errors: kBusy with who holds it and what to do; a
// file system without locks is no error.
Result<> LockImage(int fd, const std::string& path, LockWish wish);

// Gives up what LockImage took.
void UnlockImage(int fd);

}  // namespace kvartz::block
