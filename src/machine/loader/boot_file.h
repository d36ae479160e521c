// A file that is loaded into the guest: kernel, initrd, firmware. Kept open, so that a reset loads
// it again, whatever became of its name meanwhile.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/result.h"

namespace kvartz::machine {

// Immutable once opened.
class BootFile {
 public:
  BootFile() = default;
  // `what`: "kernel", "initrd"... for messages. Errors: missing, not readable, a directory, empty.
  static Result<BootFile> Open(const std::string& what, const std::string& path);
  // As above, of an open descriptor.
  static Result<BootFile> FromFd(const std::string& what, const std::string& path, UniqueFd fd);

  uint64_t size() const { return size_; }
  const std::string& path() const { return path_; }
  explicit operator bool() const { return static_cast<bool>(fd_); }

  // All of [offset, offset + size), or an error that says how much is there.
  Result<> Read(uint64_t offset, void* data, uint64_t size) const;
  // At most `size` bytes from `offset`.
  Result<std::vector<uint8_t>> ReadSome(uint64_t offset, uint64_t size) const;
  // "kernel 'vmlinuz': TEXT".
  std::unexpected<Error> Bad(const std::string& text, ErrorCode code = ErrorCode::kInvalid) const;

 private:
  std::string what_, path_;
  UniqueFd fd_;
  uint64_t size_ = 0;
};

}  // namespace kvartz::machine
