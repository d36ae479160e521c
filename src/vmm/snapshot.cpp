#include "vmm/snapshot.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/crc32c.h"
#include "base/endian.h"
#include "base/fd.h"
#include "base/state_visitor.h"
#include "machine/board.h"

namespace kvartz::vmm {
namespace {

constexpr char kMagic[8] = {'K', 'V', 'Z', 'S', 'T', 'A', 'T', 'E'};
constexpr uint32_t kVersion = 1;
constexpr uint64_t kEndOfPages = ~0ull;
constexpr uint64_t kStateMax = 256 << 20;
constexpr size_t kBufferSize = 1 << 20;

// Owned by one thread. After an error everything is a no-op; Finish tells.
class Writer {
 public:
  explicit Writer(int fd) : fd_(fd) { buffer_.reserve(kBufferSize); }

  void Put(const void* data, size_t size) {
    crc_ = Crc32c(std::span(static_cast<const uint8_t*>(data), size), crc_);
    const uint8_t* bytes = static_cast<const uint8_t*>(data);
    while (size > 0) {
      size_t count = std::min(size, kBufferSize - buffer_.size());
      buffer_.insert(buffer_.end(), bytes, bytes + count);
      bytes += count;
      size -= count;
      if (buffer_.size() == kBufferSize) Flush();
    }
  }
  template <typename T>
  void PutObject(const T& object) {
    Put(&object, sizeof(object));
  }
  uint32_t crc() const { return crc_; }
  int Finish() {
    Flush();
    return error_;
  }

 private:
  void Flush() {
    size_t done = 0;
    while (done < buffer_.size() && !error_) {
      ssize_t count = write(fd_, buffer_.data() + done, buffer_.size() - done);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0)
        error_ = errno;
      else
        done += static_cast<size_t>(count);
    }
    buffer_.clear();
  }
  int fd_;
  int error_ = 0;
  uint32_t crc_ = 0;
  std::vector<uint8_t> buffer_;
};

// Owned by one thread.
class Reader {
 public:
  explicit Reader(int fd) : fd_(fd), buffer_(kBufferSize) {}

  // False: the file ends before, or can't be read.
  bool Get(void* data, size_t size) {
    uint8_t* bytes = static_cast<uint8_t*>(data);
    for (size_t left = size; left > 0;) {
      if (begin_ == end_ && !Fill()) return false;
      size_t count = std::min(left, end_ - begin_);
      std::memcpy(bytes, buffer_.data() + begin_, count);
      begin_ += count;
      bytes += count;
      left -= count;
    }
    crc_ = Crc32c(std::span(static_cast<const uint8_t*>(data), size), crc_);
    return true;
  }
  template <typename T>
  bool GetObject(T* object) {
    return Get(object, sizeof(*object));
  }
  uint32_t crc() const { return crc_; }

 private:
  bool Fill() {
    ssize_t count;
    do count = read(fd_, buffer_.data(), buffer_.size());
    while (count < 0 && errno == EINTR);
    begin_ = 0;
    end_ = count > 0 ? static_cast<size_t>(count) : 0;
    return end_ > 0;
  }
  int fd_;
  uint32_t crc_ = 0;
  std::vector<uint8_t> buffer_;
  size_t begin_ = 0, end_ = 0;
};

std::unexpected<Error> Damaged(const char* what) {
  return Fail(ErrorCode::kInvalid, fmt::format("damaged, or no saved machine: {}", what));
}

bool AllZero(const uint8_t* page) {
  return page[0] == 0 && std::memcmp(page, page + 1, kPageSize - 1) == 0;
}

// The next page at or after `offset` that the host holds memory for.
uint64_t NextHeld(const RamBlock& block, uint64_t offset) {
  if (block.fd() < 0 || offset >= block.size()) return offset;
  off_t data = lseek(block.fd(), static_cast<off_t>(offset), SEEK_DATA);
  if (data < 0) return errno == ENXIO ? block.size() : offset;
  return static_cast<uint64_t>(data) & ~(kPageSize - 1);
}

void WriteBlock(Writer& writer, const RamBlock& block) {
  writer.PutObject(Le16(static_cast<uint16_t>(block.name().size())));
  writer.Put(block.name().data(), block.name().size());
  writer.PutObject(Le64(block.size()));
  for (uint64_t offset = NextHeld(block, 0); offset < block.size();
       offset = NextHeld(block, offset + kPageSize)) {
    const uint8_t* page = block.host() + offset;
    if (AllZero(page)) continue;
    writer.PutObject(Le64(offset));
    writer.Put(page, kPageSize);
  }
  writer.PutObject(Le64(kEndOfPages));
}

// Zeros, and no host memory behind them.
void Discard(RamBlock& block) {
  if (block.fd() >= 0 && fallocate(block.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                                   static_cast<off_t>(block.size())) == 0) {
    return;
  }
  if (block.fd() < 0 && madvise(block.host(), block.size(), MADV_DONTNEED) == 0) return;
  std::memset(block.host(), 0, block.size());
}

Result<> ReadBlock(Reader& reader, RamBlock& block) {
  Le16 name_size;
  if (!reader.GetObject(&name_size)) return Damaged("truncated");
  std::string name(name_size, 0);
  Le64 size;
  if (!reader.Get(name.data(), name.size()) || !reader.GetObject(&size))
    return Damaged("truncated");
  if (name != block.name() || size != block.size()) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format(
            "the saved machine has other memory ({} bytes of '{}', here {} of '{}'); use its "
            "options",
            static_cast<uint64_t>(size), name, block.size(), block.name()));
  }
  Discard(block);
  for (uint64_t next = 0;;) {
    Le64 offset;
    if (!reader.GetObject(&offset)) return Damaged("truncated");
    if (offset == kEndOfPages) return {};
    if (offset < next || offset % kPageSize != 0 || offset > block.size() - kPageSize)
      return Damaged("a page out of place");
    if (!reader.Get(block.host() + offset, kPageSize)) return Damaged("truncated");
    next = offset + kPageSize;
  }
}

}  // namespace

Result<> SaveMachine(machine::Board& board, const std::string& path) {
  std::string partial = path + ".part";
  UniqueFd fd(open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!fd) return Fail(ErrnoError(errno, "cannot write " + partial));
  Writer writer(fd.get());
  writer.Put(kMagic, sizeof(kMagic));
  writer.PutObject(Le32(kVersion));
  writer.PutObject(Le32(static_cast<uint32_t>(board.ram_blocks().size())));
  for (const auto& block : board.ram_blocks()) WriteBlock(writer, *block);
  std::vector<uint8_t> state = SaveState([&](StateVisitor& v) { board.VisitState(v); });
  writer.PutObject(Le64(state.size()));
  writer.Put(state.data(), state.size());
  writer.PutObject(Le32(writer.crc()));
  int error = writer.Finish();
  if (error == 0 && rename(partial.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) {
    unlink(partial.c_str());
    return Fail(ErrnoError(error, "cannot write " + path));
  }
  return {};
}

Result<> LoadMachine(machine::Board& board, const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return Fail(ErrnoError(errno, "cannot open " + path));
  Reader reader(fd.get());
  char magic[sizeof(kMagic)];
  Le32 version, blocks;
  if (!reader.Get(magic, sizeof(magic)) || std::memcmp(magic, kMagic, sizeof(magic)) != 0)
    return Damaged("the beginning");
  if (!reader.GetObject(&version) || version != kVersion) return Damaged("unknown version");
  if (!reader.GetObject(&blocks) || blocks != board.ram_blocks().size())
    return Damaged("another number of memory blocks");
  for (const auto& block : board.ram_blocks()) TRY(ReadBlock(reader, *block));
  Le64 size;
  if (!reader.GetObject(&size) || size > kStateMax) return Damaged("the size of the state");
  std::vector<uint8_t> state(size);
  if (!reader.Get(state.data(), state.size())) return Damaged("truncated");
  uint32_t expected = reader.crc();
  Le32 crc;
  if (!reader.GetObject(&crc) || crc != expected) return Damaged("checksum");
  return LoadState(state, [&](StateVisitor& v) { board.VisitState(v); });
}

}  // namespace kvartz::vmm
