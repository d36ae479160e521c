// Format vdi: VirtualBox's images, dynamic and static.
#include "block/formats/vdi.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "block/fiber_io.h"
#include "block/formats/format_checker.h"
#include "block/formats/mapped_node.h"
#include "block/formats/random_id.h"
#include "block/graph.h"

namespace kvartz::block {
namespace vdi {
namespace {
constexpr uint32_t kBlockBytes = 1 << 20;
constexpr uint32_t kSector = 512;
// The map is held in memory: 64 MiB for 16 TiB.
constexpr uint32_t kMostBlocks = 16 << 20;
}  // namespace

Result<Header> Parse(std::span<const uint8_t> bytes) {
  Header header;
  auto bad = [](std::string what) { return Fail(ErrorCode::kInvalid, "VDI header: " + what); };
  if (bytes.size() < sizeof header) return bad("the file is too short");
  std::memcpy(&header, bytes.data(), sizeof header);
  if (header.signature != kSignature) return bad("the signature is missing");
  if (header.version != kVersion)
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: VDI version {}.{}", header.version >> 16,
                            header.version & 0xffff));
  if (header.image_type != kDynamic && header.image_type != kStatic)
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: VDI image type {} (dynamic and static are)",
                            uint32_t{header.image_type}));
  if (header.block_size != kBlockBytes)
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: VDI blocks of {} bytes (1 MiB are)",
                            uint32_t{header.block_size}));
  if (header.block_extra != 0)
    return Fail(ErrorCode::kUnsupported, "not supported yet: VDI blocks with extra bytes");
  if (header.sector_size != kSector)
    return bad(fmt::format("sectors of {} bytes", uint32_t{header.sector_size}));
  if (header.offset_bmap % kSector != 0 || header.offset_data % kSector != 0)
    return bad("block map or data are not at a sector's start");
  if (header.offset_bmap < sizeof(Header)) return bad("the block map is within the header");
  if (header.blocks_in_image > kMostBlocks)
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: a VDI of {} blocks (up to {} are)",
                            uint32_t{header.blocks_in_image}, kMostBlocks));
  if (header.disk_size > uint64_t{header.blocks_in_image} * kBlockBytes)
    return bad("the disk is larger than its blocks");
  uint64_t map_end = header.offset_bmap + uint64_t{header.blocks_in_image} * 4;
  if (header.offset_data < map_end) return bad("block map and data overlap");
  constexpr std::array<uint8_t, 16> kNone = {};
  if (header.uuid_link != kNone || header.uuid_parent != kNone)
    return Fail(ErrorCode::kUnsupported, "not supported yet: VDI with a parent");
  return header;
}

namespace {

class VdiNode final : public MappedNode {
 public:
  VdiNode(NodePtr file, bool read_only, const Header& header, std::vector<Le32> map)
      : MappedNode(std::move(file), read_only, (header.disk_size + kSector - 1) / kSector * kSector,
                   kBlockBytes),
        header_(header),
        map_(std::move(map)) {
    for (const Le32& entry : map_) {
      if (entry < kZero) next_ = std::max<uint64_t>(next_, uint64_t{entry} + 1);
    }
  }
  const char* driver() const override { return "vdi"; }
  ImageEditor* editor() override { return &editor_; }

 private:
  // That no two blocks are in one place.
  Result<CheckResult> CheckMap(const ReportFn& report) {
    CheckResult result;
    uint64_t held = next_;
    std::vector<bool> used(held);
    for (size_t i = 0; i < map_.size(); i++) {
      uint32_t entry = map_[i];
      if (entry >= kZero) continue;
      result.allocated_clusters++;
      if (entry >= header_.blocks_in_image) {
        report(fmt::format("ERROR: block index {} out of range, is {}", i, entry));
        result.corruptions++;
      } else if (used[entry]) {
        report(fmt::format("ERROR: block index {} also used by {}", entry, i));
        result.corruptions++;
      } else {
        used[entry] = true;
      }
    }
    if (result.allocated_clusters != header_.blocks_allocated) {
      report(fmt::format("ERROR: allocated blocks mismatch, is {}, should be {}",
                         result.allocated_clusters, uint32_t{header_.blocks_allocated}));
      result.corruptions++;
    }
    result.allocated_clusters = 0;  // the format's tools don't tell
    return result;
  }

  uint64_t OffsetOf(uint64_t entry) const { return header_.offset_data + entry * kBlockBytes; }

  int Find(uint64_t offset, Place& place) override {
    uint32_t entry = map_[offset / kBlockBytes];
    place = {};
    // There is never a parent: what is nowhere is known to be zeros, too.
    place.kind = entry >= kZero ? Place::Kind::kZero : Place::Kind::kStored;
    if (entry >= kZero) return 0;
    place.offset = OffsetOf(entry) + offset % kBlockBytes;
    return 0;
  }

  int NewPlace(uint64_t, uint64_t& offset) override {
    if (next_ >= kZero) return -ENOSPC;
    offset = OffsetOf(next_);
    uint64_t end = offset + kBlockBytes;
    if (file_->size_bytes() < end && !file_->Resize({.size = end})) return -EIO;
    return 0;
  }

  int Publish(uint64_t index, uint64_t) override {
    auto entry = static_cast<uint32_t>(next_);
    map_[index] = entry;
    if (int rc = WriteMap(index)) {
      map_[index] = kFree;
      return rc;
    }
    next_++;
    header_.blocks_allocated = header_.blocks_allocated + 1;
    return 0;
  }

  int WriteMap(uint64_t index) {
    constexpr uint64_t kEntries = kSector / sizeof(Le32);
    uint64_t first = index / kEntries * kEntries;
    Le32 sector[kEntries] = {};
    std::copy_n(map_.begin() + static_cast<ptrdiff_t>(first),
                std::min<uint64_t>(kEntries, map_.size() - first), sector);
    return WriteAt(*file_, header_.offset_bmap + first * sizeof(Le32),
                   {reinterpret_cast<const uint8_t*>(sector), kSector});
  }

  // The count of blocks is told when the image is closed: who reads it meanwhile counts.
  Result<> EndWriting() override {
    TRY(Flush(*file_));
    return WriteExactly(*file_, 0, {reinterpret_cast<const uint8_t*>(&header_), sizeof header_});
  }

  Header header_;
  std::vector<Le32> map_;
  uint64_t next_ = 0;  // the first block of the file that nothing is in, nor after it
  FormatChecker editor_{*this, [this](const ReportFn& report) { return CheckMap(report); }};
};

int Probe(std::span<const uint8_t> head) {
  if (head.size() < sizeof(Header)) return 0;
  Le32 signature;
  std::memcpy(&signature, head.data() + offsetof(Header, signature), sizeof signature);
  return signature == kSignature ? 100 : 0;
}

Result<NodePtr> Open(const OpenEnv& env, const NodeOptions& node, Options& options) {
  NodePtr file = TRY(MappedNode::OpenFile(env, node, options, "vdi"));
  std::vector<uint8_t> bytes(std::min<uint64_t>(sizeof(Header), file->size_bytes()));
  TRY(ReadExactly(*file, 0, bytes));
  Result<Header> header = Parse(bytes);
  if (!header)
    return Fail(std::move(header).error().In(fmt::format("disk image '{}'", file->name())));
  uint64_t map_bytes = uint64_t{header->blocks_in_image} * sizeof(Le32);
  if (header->offset_bmap + map_bytes > file->size_bytes()) {
    return Fail(ErrorCode::kInvalid, fmt::format("disk image '{}': VDI block map beyond end of "
                                                 "file (offset {:#x}, {} bytes, file {:#x})",
                                                 file->name(), uint32_t{header->offset_bmap},
                                                 map_bytes, file->size_bytes()));
  }
  std::vector<Le32> map(header->blocks_in_image);
  TRY(ReadExactly(*file, header->offset_bmap, {reinterpret_cast<uint8_t*>(map.data()), map_bytes}));
  for (size_t i = 0; i < map.size(); i++) {
    if (map[i] < kZero && map[i] >= header->blocks_in_image && !node.for_check)
      return Fail(ErrorCode::kInvalid, fmt::format("disk image '{}': VDI block {} is said to be at "
                                                   "{}, beyond the image; run kvartz img check",
                                                   file->name(), i, uint32_t{map[i]}));
  }
  return std::make_shared<VdiNode>(std::move(file), node.read_only, *header, std::move(map));
}

Result<> Create(const OpenEnv& env, const std::string& filename, Options& options) {
  uint64_t size = TRY(options.TakeSize("size", 0));
  bool is_static = TRY(options.TakeBool("static", false));
  Preallocation preallocation = TRY(ParsePreallocation(options.Take("preallocation", "off")));
  if (preallocation != Preallocation::kOff && preallocation != Preallocation::kMetadata)
    return Fail(ErrorCode::kInvalid, "preallocation of format vdi is off or metadata");
  if (preallocation == Preallocation::kMetadata) is_static = true;
  uint64_t blocks = size / kBlockBytes + (size % kBlockBytes != 0);
  if (blocks > kMostBlocks)
    return Fail(ErrorCode::kInvalid, fmt::format("format vdi: a disk has at most {} bytes",
                                                 uint64_t{kMostBlocks} * kBlockBytes));
  size = (size + kSector - 1) / kSector * kSector;
  Header header = {};
  constexpr std::string_view kText = "<<< Kvartz Virtual Disk Image >>>\n";
  std::copy(kText.begin(), kText.end(), header.text.begin());
  header.signature = kSignature;
  header.version = kVersion;
  header.header_size = 0x180;
  header.image_type = is_static ? kStatic : kDynamic;
  header.offset_bmap = 0x200;
  uint64_t map_bytes = (blocks * sizeof(Le32) + kSector - 1) / kSector * kSector;
  header.offset_data = static_cast<uint32_t>(0x200 + map_bytes);
  header.sector_size = kSector;
  header.disk_size = size;
  header.block_size = kBlockBytes;
  header.blocks_in_image = static_cast<uint32_t>(blocks);
  header.blocks_allocated = is_static ? static_cast<uint32_t>(blocks) : 0;
  header.uuid_image = RandomId();
  header.uuid_last_snap = RandomId();
  std::vector<Le32> map(map_bytes / sizeof(Le32));
  for (uint64_t i = 0; i < blocks; i++) map[i] = is_static ? static_cast<uint32_t>(i) : kFree;
  NodePtr file = TRY(CreateFile(env, filename));
  TRY(WriteExactly(*file, 0, {reinterpret_cast<const uint8_t*>(&header), sizeof header}));
  if (map_bytes > 0)
    TRY(WriteExactly(*file, header.offset_bmap,
                     {reinterpret_cast<const uint8_t*>(map.data()), map_bytes}));
  if (is_static)
    TRY(file->Resize({.size = header.offset_data + blocks * kBlockBytes, .exact = false}));
  return file->Close();
}

constexpr OptionRow kCreateOptions[] = {
    {"static", OptionRow::Type::kBool, "VDI static (pre-allocated) image", "off"},
    {"preallocation", OptionRow::Type::kString, "off, or metadata: the same as static=on"},
};

}  // namespace
}  // namespace vdi

extern const Driver kVdiDriver;
const Driver kVdiDriver = {
    .name = "vdi",
    .kind = Driver::Kind::kFormat,
    .probe = vdi::Probe,
    .open = vdi::Open,
    .create_options = vdi::kCreateOptions,
    .create = vdi::Create,
};

}  // namespace kvartz::block
