#include "machine/loader/boot_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/file_error.h"

namespace kvartz::machine {

Result<BootFile> BootFile::Open(const std::string& what, const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return Fail(OpenFileError(what, path, errno));
  return FromFd(what, path, std::move(fd));
}

Result<BootFile> BootFile::FromFd(const std::string& what, const std::string& path, UniqueFd fd) {
  struct stat info;
  if (fstat(fd.get(), &info) < 0)
    return Fail(ErrnoError(errno, "cannot read " + what + " '" + path + "'"));
  BootFile file;
  file.what_ = what;
  file.path_ = path;
  if (!S_ISREG(info.st_mode)) return file.Bad("is not a regular file; name the file itself");
  file.fd_ = std::move(fd);
  file.size_ = info.st_size;
  if (file.size_ == 0) return file.Bad("is empty; copy or download it again");
  return file;
}

std::unexpected<Error> BootFile::Bad(const std::string& text, ErrorCode code) const {
  return Fail(code, what_ + " '" + path_ + "': " + text);
}

Result<> BootFile::Read(uint64_t offset, void* data, uint64_t size) const {
  uint64_t done = 0;
  while (done < size) {
    ssize_t n = pread(fd_.get(), static_cast<uint8_t*>(data) + done,
                      std::min<uint64_t>(size - done, 1u << 30), offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Fail(ErrnoError(errno, "cannot read " + what_ + " '" + path_ + "'"));
    if (n == 0) {
      return Bad("is truncated: " + std::to_string(offset + size) + " bytes are needed, it has " +
                 std::to_string(offset + done) + "; copy or download it again");
    }
    done += n;
  }
  return {};
}

Result<std::vector<uint8_t>> BootFile::ReadSome(uint64_t offset, uint64_t size) const {
  if (offset >= size_) return std::vector<uint8_t>();
  std::vector<uint8_t> data(std::min(size, size_ - offset));
  TRY(Read(offset, data.data(), data.size()));
  return data;
}

}  // namespace kvartz::machine
