#include "block/protocols/file_open.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <memory>

#include "base/file_error.h"
#include "base/log.h"
#include "block/protocols/file_lock.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kSectorSize = 512;

bool IsDirect(CacheMode cache) {
  return cache == CacheMode::kNone || cache == CacheMode::kDirectSync;
}

int OpenFlags(const ImageOptions& options) {
  // O_NONBLOCK: a pipe in the image's place must not hang us here; cleared afterwards.
  int flags = O_CLOEXEC | O_NOCTTY | O_NONBLOCK | (options.read_only ? O_RDONLY : O_RDWR);
  if (IsDirect(options.cache)) flags |= O_DIRECT;
  if (options.cache == CacheMode::kWritethrough || options.cache == CacheMode::kDirectSync)
    flags |= O_DSYNC;
  return flags;
}

std::unexpected<Error> OpenError(const ImageOptions& options, int error) {
  const std::string& path = options.path;
  const bool readable = faccessat(AT_FDCWD, path.c_str(), R_OK, AT_EACCESS) == 0;
  if (error == EROFS || ((error == EACCES || error == EPERM) && readable)) {
    return Fail(ErrorCode::kPermission,
                fmt::format("disk image '{}' is not writable by uid {}: give it access, or attach "
                            "the image with readonly=on",
                            path, geteuid()));
  }
  if (error == EINVAL && IsDirect(options.cache)) {
    return Fail(
        ErrorCode::kUnsupported,
        fmt::format("disk image '{}' is on a file system without direct I/O: use cache=writeback",
                    path));
  }
  return Fail(
      OpenFileError("disk image", path, error,
                    fmt::format("check the path, or create it (truncate -s 10G '{}')", path)));
}

// The smallest unit that direct I/O takes here; found by trying, since few file systems tell.
Result<uint32_t> ProbeDirectAlignment(int fd, const std::string& path) {
  constexpr uint32_t kLargest = 4096;
  std::unique_ptr<void, decltype(&free)> buffer(aligned_alloc(2 * kLargest, 2 * kLargest), &free);
  if (!buffer) return Fail(ErrorCode::kNoSpace, "out of memory");
  for (uint32_t unit = 512; unit <= kLargest; unit *= 2) {
    // At an address that is aligned to `unit` and no more.
    if (pread(fd, static_cast<char*>(buffer.get()) + unit % kLargest, unit, 0) >= 0) return unit;
    if (errno != EINVAL)
      return Fail(ErrnoError(errno, fmt::format("cannot read disk image '{}'", path)));
  }
  return Fail(
      ErrorCode::kUnsupported,
      fmt::format("disk image '{}' is on a device without usable direct I/O: use cache=writeback",
                  path));
}

uint64_t RoundUp(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

LockWish WishOf(const ImageOptions& options) {
  return {!options.read_only, options.share_write || options.force_share};
}

// Sizes and alignments of what is open.
Result<> Examine(const ImageOptions& options, OpenedFile& file) {
  struct stat st;
  if (fstat(file.fd.get(), &st) < 0) return OpenError(options, errno);
  file.read_only = options.read_only;
  file.is_device = S_ISBLK(st.st_mode);
  file.length_bytes = static_cast<uint64_t>(st.st_size);
  file.discard_granularity = static_cast<uint32_t>(std::max<int64_t>(st.st_blksize, 512));
  if (file.is_device) {
    int sector = 512;
    if (ioctl(file.fd.get(), BLKGETSIZE64, &file.length_bytes) < 0 ||
        ioctl(file.fd.get(), BLKSSZGET, &sector) < 0) {
      return Fail(
          ErrnoError(errno, fmt::format("cannot tell the size of device '{}'", options.path)));
    }
    file.discard_granularity = static_cast<uint32_t>(sector);
  }
  file.size_bytes = RoundUp(file.length_bytes, kSectorSize);
  if (IsDirect(options.cache)) {
    file.direct_alignment = TRY(ProbeDirectAlignment(file.fd.get(), options.path));
    file.size_bytes = RoundUp(file.size_bytes, file.direct_alignment);
  }
  return {};
}

// A file or a device, with the flags it is used with.
Result<UniqueFd> OpenChecked(const ImageOptions& options, int more_flags) {
  UniqueFd fd(open(options.path.c_str(), OpenFlags(options) | more_flags, 0644));
  if (!fd) return OpenError(options, errno);
  struct stat st;
  if (fstat(fd.get(), &st) < 0) return OpenError(options, errno);
  if (S_ISDIR(st.st_mode)) return OpenError(options, EISDIR);
  if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("disk image '{}' is neither a file nor a block device", options.path));
  }
  fcntl(fd.get(), F_SETFL, OpenFlags(options) & ~O_NONBLOCK);
  return fd;
}

}  // namespace

Result<OpenedFile> OpenImageFile(const ImageOptions& options) {
  OpenedFile file;
  ImageOptions used = options;
  Result<UniqueFd> fd = OpenChecked(used, 0);
  if (!fd && options.auto_read_only && fd.error().code == ErrorCode::kPermission) {
    used.read_only = true;
    fd = OpenChecked(used, 0);
  }
  file.fd = TRY(std::move(fd));
  if (used.locking == ImageOptions::Locking::kAuto)
    TRY(LockImage(file.fd.get(), used.path, WishOf(used)));
  TRY(Examine(used, file));
  return file;
}

Result<OpenedFile> CreateImageFile(const ImageOptions& options) {
  OpenedFile file;
  file.fd = TRY(OpenChecked(options, O_CREAT));
  // Emptied only once nobody else uses it.
  if (options.locking == ImageOptions::Locking::kAuto)
    TRY(LockImage(file.fd.get(), options.path, WishOf(options)));
  TRY(Examine(options, file));
  if (!file.is_device) {
    if (ftruncate(file.fd.get(), 0) < 0) return OpenError(options, errno);
    file.size_bytes = file.length_bytes = 0;
  }
  return file;
}

Result<OpenedFile> ReopenImageFile(const ImageOptions& options, int fd) {
  OpenedFile file;
  file.fd = TRY(OpenChecked(options, 0));
  struct stat before, after;
  if (fstat(fd, &before) < 0 || fstat(file.fd.get(), &after) < 0 || before.st_dev != after.st_dev ||
      before.st_ino != after.st_ino) {
    return Fail(ErrorCode::kState,
                fmt::format("'{}' is another file now than when it was opened", options.path));
  }
  if (options.locking == ImageOptions::Locking::kAuto) {
    UnlockImage(fd);
    if (Result<> locked = LockImage(file.fd.get(), options.path, WishOf(options)); !locked) {
      ImageOptions old = options;
      old.read_only = !options.read_only;
      Result<> back = LockImage(fd, old.path, WishOf(old));
      if (!back) KLOG(kWarn, "{}", back.error().what);
      return Fail(std::move(locked).error());
    }
  }
  TRY(Examine(options, file));
  return file;
}

}  // namespace kvartz::block
