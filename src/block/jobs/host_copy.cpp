#include "block/jobs/host_copy.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "block/graph.h"

namespace kvartz::block {
namespace {

// Where the bytes of `node` are in a file. Only raw images may be written to like that.
Result<Extent> Stored(Node& node, uint64_t offset, uint64_t length) {
  Extent extent = TRY(StatusAbove(node, nullptr, offset, length)).extent;
  if (extent.has_offset && extent.file->driver() != std::string_view("file"))
    extent.has_offset = false;
  return extent;
}

int CopyRange(int from_fd, uint64_t from, int to_fd, uint64_t to, uint64_t length) {
  auto source = static_cast<off_t>(from), target = static_cast<off_t>(to);
  while (length > 0) {
    ssize_t copied = copy_file_range(from_fd, &source, to_fd, &target, length, 0);
    if (copied < 0 && errno == EINTR) continue;
    if (copied < 0) return -errno;
    if (copied == 0) return -ENOTSUP;  // the end of the source: what follows reads as zeros
    length -= static_cast<uint64_t>(copied);
  }
  return 0;
}

}  // namespace

int HostCopier::FileOf(const Node& file, int flags) {
  UniqueFd& fd = files_[file.name()];
  if (!fd) fd.Reset(open(file.name().c_str(), flags | O_CLOEXEC));
  return fd ? fd.get() : -errno;
}

int HostCopier::Copy(Node& source, uint64_t from, Node& target, uint64_t to, uint64_t length) {
  if (target.driver() != std::string_view("raw")) return -ENOTSUP;
  while (length > 0) {
    Result<Extent> read = Stored(source, from, length);
    if (!read || !read->has_offset || read->compressed || !read->data || read->length == 0)
      return -ENOTSUP;
    uint64_t part = std::min(length, read->length);
    Node& file = *target.file();
    Result<Extent> write = target.Status(to, part);
    if (!write || !write->has_offset || write->file != &file ||
        file.driver() != std::string_view("file"))
      return -ENOTSUP;
    part = std::min(part, write->length);
    int from_fd = FileOf(*read->file, O_RDONLY), to_fd = FileOf(file, O_WRONLY);
    if (from_fd < 0 || to_fd < 0) return -ENOTSUP;
    int rc = 0;
    workers_.Run([&] { rc = CopyRange(from_fd, read->offset, to_fd, write->offset, part); });
    if (rc != 0) return rc;
    from += part;
    to += part;
    length -= part;
  }
  return 0;
}

}  // namespace kvartz::block
