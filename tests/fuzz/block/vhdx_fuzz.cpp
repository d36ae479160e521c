// A VHDX image of our own, changed where the input says, its checksums put right: without them no
// input gets far.
//
// Input: a byte of flags, then changes: the part (1 byte), the offset within it (2, little-endian),
// a length (1), the bytes.
#include <cstring>
#include <map>

#include "base/crc32c.h"
#include "block/formats/vhdx_log.h"
#include "fuzz/block/image_fuzz.h"

namespace {

using namespace kvartz;         // NOLINT
using namespace kvartz::block;  // NOLINT

constexpr uint64_t kPage = 4096;
constexpr uint64_t kLog = vhdx::kMiB, kMetadata = 2 * vhdx::kMiB,
                   kBat = 3 * vhdx::kMiB;  // where the creator puts them
constexpr uint64_t kParts[] = {
    0,
    vhdx::kHeaderOffsets[0],
    vhdx::kHeaderOffsets[1],
    vhdx::kRegionTableOffsets[0],
    kMetadata,
    vhdx::kRegionTableOffsets[1],
    kMetadata + vhdx::kMetadataTableBytes,
    kBat,
    kLog,
    kLog + 15 * kPage,
};
constexpr size_t kChecksumAt = 4;  // of headers, region tables and log entries alike
enum : uint8_t { kHasLog = 1, kReadOnly = 2, kKeepChecksums = 4 };

using Pages = std::map<uint64_t, std::vector<uint8_t>>;  // by offset; the others are zero
const vhdx::Guid kLogGuid = vhdx::ParseGuid("6B766172-747A-206C-6F67-206775696420");

// A change of a block's table entry, and of the metadata by zeros over what is zero already.
void AddLogEntry(Pages& pages, uint64_t offset, uint64_t number) {
  struct {
    vhdx::LogEntryHeader header;
    vhdx::LogDescriptor descriptors[2];
  } first = {};
  vhdx::LogEntryHeader& header = first.header;
  std::memcpy(header.signature.data(), "loge", 4);
  header.entry_length = 2 * kPage;
  header.sequence_number = number;
  header.descriptor_count = 2;
  header.log_guid = kLogGuid;
  header.flushed_file_offset = 4 * vhdx::kMiB;
  header.last_file_offset = 6 * vhdx::kMiB;
  first.descriptors[0] = {{'z', 'e', 'r', 'o'}, 0, 2 * kPage, kMetadata + 32 * kPage, number};
  first.descriptors[1] = {
      {'d', 'e', 's', 'c'}, 0, 4 * vhdx::kMiB | vhdx::kFullyPresent, kBat, number};
  vhdx::LogDataSector data = {};
  std::memcpy(data.signature.data(), "data", 4);
  data.sequence_low = static_cast<uint32_t>(number);
  auto put = [&](uint64_t at, const void* bytes, size_t size) {
    pages[at].resize(kPage);
    std::memcpy(pages[at].data(), bytes, size);
  };
  put(kLog + offset, &first, sizeof first);
  put(kLog + offset + kPage, &data, sizeof data);
}

Pages Template() {
  std::unique_ptr<EventLoop> loop = *EventLoop::Create();
  UniqueFd fd(memfd_create("template", MFD_CLOEXEC));
  std::string path = "/proc/self/fd/" + std::to_string(fd.get());
  OpenEnv env = {.loop = *loop};
  RunInFiber(*loop, [&] {
    Options options;
    options.Set("size", "48M");
    options.Set("block_size", "1M");
    if (!CreateImage(env, "vhdx", path, std::move(options))) std::abort();
    Result<NodePtr> node = OpenFilename(env, path, "vhdx", {.locking = false});
    std::vector<uint8_t> bytes(512, 0x5a);
    if (!node || WriteAt(**node, 0, bytes) != 0 || !(*node)->Close()) std::abort();
  });
  Pages pages;
  std::vector<uint8_t> page(kPage);
  for (off_t at = 0; pread(fd.get(), page.data(), kPage, at) == static_cast<ssize_t>(kPage);
       at += kPage) {
    if (std::any_of(page.begin(), page.end(), [](uint8_t byte) { return byte != 0; }))
      pages[static_cast<uint64_t>(at)] = page;
  }
  AddLogEntry(pages, 0, 7);
  AddLogEntry(pages, 2 * kPage, 8);
  return pages;
}

// Sparse, as most of it is zero.
class Image {
 public:
  explicit Image(const Pages& pages) {
    if (ftruncate(file_.get(), 5 * vhdx::kMiB) != 0) std::abort();
    for (const auto& [at, page] : pages) Change(at, page);
  }
  void Change(uint64_t at, std::span<const uint8_t> bytes) {
    if (pwrite(file_.get(), bytes.data(), bytes.size(), static_cast<off_t>(at)) < 0) std::abort();
  }
  void NameLog() {
    for (uint64_t at : vhdx::kHeaderOffsets)
      Change(at + offsetof(vhdx::Header, log_guid), kLogGuid);
  }
  void Sum() {
    for (uint64_t at : vhdx::kHeaderOffsets) SumOf(at, vhdx::kHeaderBytes);
    for (uint64_t at : vhdx::kRegionTableOffsets) SumOf(at, vhdx::kRegionTableBytes);
    uint64_t budget = 4 * vhdx::kMiB;
    for (uint64_t at = kLog; at < kMetadata; at += kPage) {
      std::vector<uint8_t> start = Read(at, sizeof(vhdx::LogEntryHeader));
      vhdx::LogEntryHeader header;
      std::memcpy(&header, start.data(), sizeof header);
      if (std::memcmp(header.signature.data(), "loge", 4) != 0 || header.entry_length < kPage ||
          header.entry_length > std::min(budget, kMetadata - at))
        continue;
      budget -= header.entry_length;
      SumOf(at, header.entry_length);
    }
  }
  const UniqueFd& file() const { return file_; }

 private:
  std::vector<uint8_t> Read(uint64_t at, uint64_t length) {
    std::vector<uint8_t> bytes(length);
    if (pread(file_.get(), bytes.data(), length, static_cast<off_t>(at)) < 0) std::abort();
    return bytes;
  }
  void SumOf(uint64_t at, uint64_t length) {
    std::vector<uint8_t> bytes = Read(at, length);
    std::memset(&bytes[kChecksumAt], 0, sizeof(Le32));
    Le32 sum = Crc32c(bytes);
    Change(at + kChecksumAt, {reinterpret_cast<const uint8_t*>(&sum), sizeof sum});
  }
  UniqueFd file_{memfd_create("image", MFD_CLOEXEC)};
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Pages pages = Template();
  if (size == 0) return 0;
  uint8_t flags = data[0];
  Image image(pages);
  if (flags & kHasLog) image.NameLog();
  for (size_t at = 1; at + 4 <= size;) {
    uint64_t part = kParts[data[at] % std::size(kParts)];
    uint64_t offset = data[at + 1] | data[at + 2] << 8;
    size_t length = std::min<size_t>(data[at + 3], size - at - 4);
    image.Change(part + offset, {data + at + 4, length});
    at += 4 + length;
  }
  if (!(flags & kKeepChecksums)) image.Sum();
  FuzzFile("vhdx", image.file(), {.read_only = (flags & kReadOnly) != 0, .locking = false});
  return 0;
}
