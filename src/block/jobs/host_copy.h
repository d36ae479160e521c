// Copies between files by the host itself (copy_file_range): where it can, blocks are shared and
// nothing is moved.
#pragma once

#include <map>
#include <string>

#include "base/fd.h"
#include "base/workers.h"
#include "block/node.h"

namespace kvartz::block {

// Loop-owned. Files are opened a second time, by their names.
class HostCopier {
 public:
  explicit HostCopier(EventLoop& loop) : workers_(loop, 2) {}

  // Fiber: 0, or -errno with any part of it copied. -ENOTSUP: not of these nodes; what both show
  // must be stored as it is, in files.
  int Copy(Node& source, uint64_t from, Node& target, uint64_t to, uint64_t length);

 private:
  int FileOf(const Node& file, int flags);  // descriptor, or -errno
  std::map<std::string, UniqueFd> files_;
  Workers workers_;
};

}  // namespace kvartz::block
