// Opening the host's file of a disk image: the errors that people meet, and what O_DIRECT asks for.
#pragma once

#include "base/fd.h"
#include "block/node.h"

namespace kvartz::block {

struct OpenedFile {
  UniqueFd fd;
  bool is_device = false;
  bool read_only = false;         // as wished, or because nothing else was permitted
  uint64_t size_bytes = 0;        // rounded up to 512 (and to direct_alignment)
  uint64_t length_bytes = 0;      // as it is
  uint32_t direct_alignment = 0;  // of offsets, lengths and memory with O_DIRECT; 0 without
  uint32_t discard_granularity = 0;
};

// Opens, checks and locks. Errors name the image and what to do.
Result<OpenedFile> OpenImageFile(const ImageOptions& options);
// Makes the file, or empties the one that is there; a device stays as it is. Locked for writing.
Result<OpenedFile> CreateImageFile(const ImageOptions& options);
// Opens anew what `fd` has open, and takes over its locks.
Result<OpenedFile> ReopenImageFile(const ImageOptions& options, int fd);

}  // namespace kvartz::block
