#include "machine/loader/initrd_check.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace kvartz::machine {

namespace {
// Reads small pieces in order; a piece that the file lacks ends the walk.
class Walker {
 public:
  explicit Walker(const BootFile& file) : file_(file) {}
  uint64_t at = 0;
  bool read_failed() const { return failed_; }

  bool Has(uint64_t size) const { return at <= file_.size() && size <= file_.size() - at; }
  // Bytes at `at`, or null if the file ends before.
  const uint8_t* Peek(size_t size) {
    if (!Has(size)) return nullptr;
    if (at < begin_ || at + size > begin_ + window_.size()) {
      constexpr size_t kWindow = 65536;
      Result<std::vector<uint8_t>> bytes = file_.ReadSome(at, std::max(size, kWindow));
      if (!bytes) {
        failed_ = true;
        return nullptr;
      }
      window_ = std::move(*bytes);
      begin_ = at;
      if (window_.size() < size) return nullptr;
    }
    return &window_[at - begin_];
  }
  uint32_t Le(const uint8_t* bytes, unsigned size) const {
    uint32_t value = 0;
    for (unsigned i = 0; i < size; i++) value |= uint32_t{bytes[i]} << (8 * i);
    return value;
  }

 private:
  const BootFile& file_;
  std::vector<uint8_t> window_;
  uint64_t begin_ = 0;
  bool failed_ = false;
};

bool StartsWith(const uint8_t* bytes, std::string_view magic) {
  return bytes && std::memcmp(bytes, magic.data(), magic.size()) == 0;
}

// "070701", then 13 numbers of 8 hexadecimal digits; name and contents are padded to 4 bytes.
bool WalkCpio(Walker& w) {
  constexpr size_t kHeader = 110, kFileSize = 54, kNameSize = 94;
  while (true) {
    const uint8_t* header = w.Peek(kHeader);
    if (!header) return false;
    auto field = [&](size_t offset) {
      return std::strtoull(std::string(reinterpret_cast<const char*>(header) + offset, 8).c_str(),
                           nullptr, 16);
    };
    if (!StartsWith(header, "07070"))
      return true;  // not an archive after all: the kernel's business
    uint64_t name_size = field(kNameSize), file_size = field(kFileSize);
    constexpr std::string_view kEnd = "TRAILER!!!";
    const uint8_t* whole = name_size <= 4096 ? w.Peek(kHeader + name_size) : nullptr;
    if (name_size > 4096) return true;
    if (!whole) return false;
    bool end = name_size == kEnd.size() + 1 && StartsWith(whole + kHeader, kEnd);
    w.at = (w.at + kHeader + name_size + 3) & ~3ull;
    if (end) return true;
    if (!w.Has(file_size)) return false;
    w.at = (w.at + file_size + 3) & ~3ull;
  }
}

// RFC 8878, 3.1.1: a frame header, blocks until the last one, perhaps a checksum.
bool WalkZstd(Walker& w) {
  const uint8_t* start = w.Peek(5);
  if (!start) return false;
  uint8_t descriptor = start[4];
  bool single_segment = descriptor & 0x20, checksum = descriptor & 4;
  constexpr unsigned kDictionary[] = {0, 1, 2, 4}, kContentSize[] = {0, 2, 4, 8};
  unsigned content =
      descriptor >> 6 == 0 ? (single_segment ? 1 : 0) : kContentSize[descriptor >> 6];
  w.at += 5 + (single_segment ? 0 : 1) + kDictionary[descriptor & 3] + content;
  while (true) {
    const uint8_t* block = w.Peek(3);
    if (!block) return false;
    uint32_t header = w.Le(block, 3);
    bool last = header & 1, run_length = (header >> 1 & 3) == 1;
    uint64_t size = 3 + (run_length ? 1 : header >> 3);
    if (!w.Has(size)) return false;
    w.at += size;
    if (last) break;
  }
  if (checksum && !w.Has(4)) return false;
  if (checksum) w.at += 4;
  return true;
}

// The legacy frames of lz4: blocks with their sizes, to the end of the file or the next archive.
bool WalkLz4(Walker& w) {
  w.at += 4;
  while (w.Has(1)) {
    const uint8_t* size = w.Peek(4);
    if (!size) return false;
    uint32_t block = w.Le(size, 4);
    if (block == 0 || block > (9u << 20)) return true;
    if (!w.Has(4ull + block)) return false;
    w.at += 4ull + block;
  }
  return true;
}

// The .xz format 1.1.0, 2.1.2: it ends in a footer, whose last bytes are "YZ".
bool WalkXz(Walker& w, uint64_t size) {
  w.at = size;
  while (w.at >= 4) {
    w.at -= 4;
    const uint8_t* tail = w.Peek(4);
    if (!tail) return false;
    if (w.Le(tail, 4) == 0) continue;  // padding
    bool footer = tail[2] == 'Y' && tail[3] == 'Z';
    w.at = size;
    return footer;
  }
  return false;
}
}  // namespace

Result<> CheckInitrd(const BootFile& initrd) {
  Walker w(initrd);
  while (w.Has(1)) {
    const uint8_t* byte = w.Peek(1);
    if (!byte) break;
    if (*byte == 0) {  // padding between archives
      w.at++;
      continue;
    }
    const uint8_t* magic = w.Peek(6);
    if (!magic) break;
    uint64_t before = w.at;
    bool whole = true, known = true;
    if (StartsWith(magic, "070701") || StartsWith(magic, "070702")) {
      whole = WalkCpio(w);
    } else if (StartsWith(magic, "\x28\xb5\x2f\xfd")) {
      whole = WalkZstd(w);
    } else if (StartsWith(magic, std::string_view("\xfd"
                                                  "7zXZ\0",
                                                  6))) {
      whole = WalkXz(w, initrd.size());
    } else if (StartsWith(magic, "\x02\x21\x4c\x18")) {
      whole = WalkLz4(w);
    } else {
      known = false;
    }
    if (w.read_failed() || !known) break;
    if (!whole) {
      return initrd.Bad("is truncated: its last archive goes on beyond the " +
                        std::to_string(initrd.size()) +
                        " bytes of the file; copy or build it again");
    }
    if (w.at == before) break;
  }
  return {};
}

}  // namespace kvartz::machine
