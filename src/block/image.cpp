// OpenImage: from what the user wrote to a chain of nodes.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string_view>

#include "base/log.h"
#include "base/text.h"
#include "block/file_node.h"
#include "block/file_open.h"
#include "block/node.h"

namespace kvartz::block {
namespace {

// How images begin that aren't raw ones, from each format's specification.
struct Magic {
  const char* format;
  size_t offset;
  std::string_view bytes;
};
constexpr Magic kMagics[] = {
    {"qcow2", 0, "QFI\xfb"},
    {"vmdk", 0, "KDMV"},
    {"vmdk", 0, "COWD"},
    {"vmdk", 0, "# Disk DescriptorFile"},
    {"vdi", 0x40, "\x7f\x10\xda\xbe"},
    {"vpc", 0, "conectix"},
    {"vhdx", 0, "vhdxfile"},
    {"luks", 0, "LUKS\xba\xbe"},
    {"qed", 0, std::string_view("QED\0", 4)},
    {"parallels", 0, "WithoutFreeSpace"},
};

std::unexpected<Error> NotSupported(const std::string& path, std::string_view format) {
  return Fail(ErrorCode::kUnsupported,
              fmt::format("not supported yet: disk image '{0}' is in format {1}; convert it to raw "
                          "(qemu-img convert -O raw "
                          "'{0}' '{0}.raw')",
                          path, format));
}

Result<std::string> ProbeFormat(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  char start[512] = {};
  if (!fd || pread(fd.get(), start, sizeof(start), 0) < 0) {
    return Fail(ErrnoError(errno, fmt::format("cannot read disk image '{}'", path)));
  }
  for (const Magic& magic : kMagics) {
    if (std::memcmp(start + magic.offset, magic.bytes.data(), magic.bytes.size()) == 0)
      return magic.format;
  }
  return "raw";
}

}  // namespace

Result<CacheMode> ParseCacheMode(const std::string& name) {
  if (name == "writeback") return CacheMode::kWriteback;
  if (name == "none" || name == "off") return CacheMode::kNone;
  if (name == "writethrough") return CacheMode::kWritethrough;
  if (name == "directsync") return CacheMode::kDirectSync;
  if (name == "unsafe") return CacheMode::kUnsafe;
  return Fail(
      ErrorCode::kInvalid,
      fmt::format(
          "unknown cache mode '{}': it is one of writeback, none, writethrough, directsync, unsafe",
          name));
}

Result<std::shared_ptr<Node>> OpenImage(EventLoop& loop, const ImageOptions& options) {
  if (!options.format.empty() && options.format != "raw") {
    for (const Magic& magic : kMagics) {
      if (options.format == magic.format) return NotSupported(options.path, options.format);
    }
    return Fail(ErrorCode::kInvalid,
                fmt::format("unknown image format '{}' (raw is supported)", options.format));
  }
  std::shared_ptr<Node> file = TRY(OpenFileNode(loop, options));
  if (file->size_bytes() == 0) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("disk image '{0}' is empty: give it a size (truncate -s 10G '{0}')",
                            options.path));
  }
  if (options.format.empty()) {
    std::string format = TRY(ProbeFormat(options.path));
    if (format != "raw") return NotSupported(options.path, format);
    KLOG(kWarn, "disk image '{}' looks like a raw one; say format=raw to be sure", options.path);
  }
  if (options.raw_offset > file->size_bytes() ||
      (options.raw_size != UINT64_MAX &&
       options.raw_size > file->size_bytes() - options.raw_offset)) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("offset {} and size {} reach beyond the end of disk image '{}' ({} bytes)",
                    options.raw_offset, options.raw_size, options.path, file->size_bytes()));
  }
  uint64_t size = std::min(options.raw_size, file->size_bytes() - options.raw_offset);
  uint32_t unit = std::max<uint32_t>(512, file->limits().request_alignment);
  if ((options.raw_offset | size) % unit != 0) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("offset and size of disk image '{}' must be multiples of {}",
                            options.path, unit));
  }
  return MakeRawNode(std::move(file), options.raw_offset, size);
}

}  // namespace kvartz::block
