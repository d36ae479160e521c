// A file that goes away with its object.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

namespace kvartz::machine::test {

class TempFile {
 public:
  explicit TempFile(const std::vector<uint8_t>& bytes) {
    int fd = mkstemp(path_);
    if (write(fd, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) std::abort();
    close(fd);
  }
  ~TempFile() { unlink(path_); }
  TempFile(const TempFile&) = delete;
  std::string path() const { return path_; }

 private:
  char path_[32] = "/tmp/kvartz-test-XXXXXX";
};

// A multiboot 1 image (address fields) that loads at 1 MiB and begins with `code`, 32-bit.
inline std::vector<uint8_t> MultibootImage(const std::vector<uint8_t>& code) {
  constexpr uint32_t kLoad = 0x100000, kMagic = 0x1badb002, kFlags = 1 << 16;
  uint32_t end = kLoad + 32 + code.size();
  uint32_t words[] = {kMagic, kFlags, 0u - kMagic - kFlags, kLoad, kLoad, end, end, kLoad + 32};
  const auto* bytes = reinterpret_cast<const uint8_t*>(words);
  std::vector<uint8_t> image(bytes, bytes + sizeof words);
  image.insert(image.end(), code.begin(), code.end());
  return image;
}

}  // namespace kvartz::machine::test
