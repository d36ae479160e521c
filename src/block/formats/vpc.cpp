// Format vpc: Virtual PC's and Hyper-V's VHD images, fixed and dynamic.
#include "block/formats/vpc.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "base/clock.h"
#include "block/fiber_io.h"
#include "block/formats/mapped_node.h"
#include "block/formats/random_id.h"
#include "block/graph.h"

namespace kvartz::block {
namespace vpc {
namespace {

constexpr uint32_t kBlockBytes = 2 << 20;
constexpr uint64_t kMostBytes = uint64_t{2040} << 30;  // "Dynamic disks": 2040 GB
constexpr int64_t kEpoch2000 = 946684800;

template <typename T>
std::span<const uint8_t> BytesOf(const T& structure) {
  return {reinterpret_cast<const uint8_t*>(&structure), sizeof structure};
}

uint64_t RoundUp(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

uint64_t BitmapBytes(uint64_t block_bytes) { return RoundUp(block_bytes / kSector / 8, kSector); }

// All of the disk is in the file, as it is.
class FixedNode final : public MappedNode {
 public:
  FixedNode(NodePtr file, bool read_only, uint64_t size)
      : MappedNode(std::move(file), read_only, size, kBlockBytes) {}
  const char* driver() const override { return "vpc"; }
  Result<ImageInfo> Info() override {
    return ImageInfo{.format = driver(), .virtual_size = size_bytes_};
  }

 private:
  int Find(uint64_t offset, Place& place) override {
    place = {Place::Kind::kStored, offset};
    return 0;
  }
  int NewPlace(uint64_t, uint64_t&) override { return -EIO; }
  int Publish(uint64_t, uint64_t) override { return -EIO; }
};

class DynamicNode final : public MappedNode {
 public:
  DynamicNode(NodePtr file, bool read_only, uint64_t size, const Footer& footer,
              const DynamicHeader& header, std::vector<Be32> table)
      : MappedNode(std::move(file), read_only, size, header.block_size),
        footer_(footer),
        table_offset_(header.table_offset),
        table_(std::move(table)),
        bitmap_bytes_(BitmapBytes(header.block_size)) {
    // The footer stands after the last block.
    end_ = RoundUp(table_offset_ + table_.size() * sizeof(Be32), kSector);
    for (const Be32& entry : table_) {
      if (entry != kFree)
        end_ = std::max(end_, uint64_t{entry} * kSector + bitmap_bytes_ + block_bytes());
    }
  }
  const char* driver() const override { return "vpc"; }

 private:
  int Find(uint64_t offset, Place& place) override {
    uint32_t entry = table_[offset / block_bytes()];
    place = {};
    if (entry == kFree) return 0;
    place = {Place::Kind::kStored,
             uint64_t{entry} * kSector + bitmap_bytes_ + offset % block_bytes()};
    return 0;
  }

  // The footer moves to the new end before the block takes its place.
  int NewPlace(uint64_t, uint64_t& offset) override {
    uint64_t new_end = end_ + bitmap_bytes_ + block_bytes();
    if (new_end / kSector >= kFree) return -ENOSPC;
    offset = end_ + bitmap_bytes_;
    if (file_->size_bytes() < new_end && !file_->Resize({.size = new_end})) return -EIO;
    if (int rc = WriteAt(*file_, new_end, BytesOf(footer_))) return rc;
    // One bit a sector: all of the block is there.
    std::vector<uint8_t> bitmap(bitmap_bytes_, 0xff);
    return WriteAt(*file_, end_, bitmap);
  }

  int Publish(uint64_t index, uint64_t offset) override {
    table_[index] = static_cast<uint32_t>((offset - bitmap_bytes_) / kSector);
    constexpr uint64_t kEntries = kSector / sizeof(Be32);
    uint64_t first = index / kEntries * kEntries;
    Be32 sector[kEntries];
    std::fill_n(sector, kEntries, Be32(kFree));
    std::copy_n(table_.begin() + static_cast<ptrdiff_t>(first),
                std::min<uint64_t>(kEntries, table_.size() - first), sector);
    int rc = WriteAt(*file_, table_offset_ + first * sizeof(Be32),
                     {reinterpret_cast<const uint8_t*>(sector), kSector});
    if (rc) {
      table_[index] = kFree;
      return rc;
    }
    end_ = offset + block_bytes();
    return 0;
  }

  const Footer footer_;
  const uint64_t table_offset_;
  std::vector<Be32> table_;
  const uint64_t bitmap_bytes_;
  uint64_t end_ = 0;
};

int Probe(std::span<const uint8_t> head) {
  return head.size() >= 8 && std::memcmp(head.data(), "conectix", 8) == 0 ? 100 : 0;
}

Result<NodePtr> OpenDynamic(NodePtr file, const NodeOptions& node, const Footer& footer) {
  if (footer.data_offset > file->size_bytes())
    return Fail(ErrorCode::kInvalid, "VHD: the dynamic header is beyond the end of the file");
  std::vector<uint8_t> bytes(
      std::min<uint64_t>(sizeof(DynamicHeader), file->size_bytes() - footer.data_offset));
  TRY(ReadExactly(*file, footer.data_offset, bytes));
  DynamicHeader header = TRY(ParseDynamicHeader(bytes));
  if (footer.disk_type == kDifferencing) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: differencing VHD (its parent is '{}')",
                            ParentName(header)));
  }
  uint64_t size = DiskSize(footer);
  if (uint64_t{header.max_table_entries} * header.block_size < size)
    return Fail(ErrorCode::kInvalid, "VHD: the block table is too small for the disk");
  uint64_t table_bytes = uint64_t{header.max_table_entries} * sizeof(Be32);
  if (header.table_offset + table_bytes > file->size_bytes())
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("VHD: the block table is beyond the end of the file (offset {:#x}, {} bytes)",
                    uint64_t{header.table_offset}, table_bytes));
  std::vector<Be32> table(header.max_table_entries);
  TRY(ReadExactly(*file, header.table_offset,
                  {reinterpret_cast<uint8_t*>(table.data()), table_bytes}));
  uint64_t meta_end =
      std::max<uint64_t>(header.table_offset + table_bytes, footer.data_offset + sizeof header);
  for (size_t i = 0; i < table.size(); i++) {
    if (table[i] != kFree && uint64_t{table[i]} * kSector < meta_end)
      return Fail(ErrorCode::kInvalid,
                  fmt::format("VHD: block {} is said to be at sector {}, within the tables", i,
                              uint32_t{table[i]}));
  }
  return std::make_shared<DynamicNode>(std::move(file), node.read_only, size, footer, header,
                                       std::move(table));
}

Result<NodePtr> OpenChecked(NodePtr file, const NodeOptions& node) {
  uint64_t length = file->size_bytes();
  if (length < kSector) return Fail(ErrorCode::kInvalid, "VHD: the file is too short");
  std::vector<uint8_t> sector(kSector);
  TRY(ReadExactly(*file, 0, sector));
  Result<Footer> footer = ParseFooter(sector);
  if (!footer && footer.error().code == ErrorCode::kUnsupported)
    return std::unexpected(footer.error());
  if (!footer) {
    TRY(ReadExactly(*file, length - kSector, sector));
    footer = ParseFooter(sector);
  }
  if (!footer) return std::unexpected(footer.error());
  if (footer->disk_type != kFixed) return OpenDynamic(std::move(file), node, *footer);
  uint64_t size = DiskSize(*footer);
  if (size > length - kSector) size = footer->current_size;
  if (size > length - kSector || size % kSector != 0)
    return Fail(ErrorCode::kInvalid,
                fmt::format("VHD: a disk of {} bytes in a file of {}", size, length));
  return std::make_shared<FixedNode>(std::move(file), node.read_only, size);
}

Result<NodePtr> Open(const OpenEnv& env, const NodeOptions& node, Options& options) {
  NodePtr file = TRY(MappedNode::OpenFile(env, node, options, "vpc"));
  std::string name = file->name();
  Result<NodePtr> opened = OpenChecked(std::move(file), node);
  if (!opened) return Fail(std::move(opened).error().In(fmt::format("disk image '{}'", name)));
  return opened;
}

Footer MakeFooter(uint64_t sectors, const Geometry& geometry, bool is_fixed, bool by_size) {
  Footer footer = {};
  auto text = [](auto& to, std::string_view from) {
    std::copy(from.begin(), from.end(), to.begin());
  };
  text(footer.cookie, "conectix");
  footer.features = 2;  // "Reserved: this bit must always be set to 1"
  footer.version = 0x00010000;
  footer.data_offset = is_fixed ? kNoOffset : sizeof(Footer);
  footer.timestamp = static_cast<uint32_t>(HostRealtimeNs() / 1'000'000'000 - kEpoch2000);
  text(footer.creator_application, by_size ? "qem2" : "kvtz");
  footer.creator_version = 0x00050003;
  text(footer.creator_host_os, "Wi2k");
  footer.original_size = sectors * kSector;
  footer.current_size = sectors * kSector;
  footer.cylinders = geometry.cylinders;
  footer.heads = geometry.heads;
  footer.sectors_per_track = geometry.sectors_per_track;
  footer.disk_type = is_fixed ? kFixed : kDynamic;
  footer.unique_id = RandomId();
  footer.checksum = Checksum(BytesOf(footer));
  return footer;
}

Result<> CreateDynamic(Node& file, const Footer& footer, uint64_t size) {
  DynamicHeader header = {};
  constexpr std::string_view kCookie = "cxsparse";
  std::copy(kCookie.begin(), kCookie.end(), header.cookie.begin());
  header.data_offset = kNoOffset;
  header.table_offset = sizeof(Footer) + sizeof(DynamicHeader);
  header.header_version = 0x00010000;
  header.max_table_entries = static_cast<uint32_t>((size + kBlockBytes - 1) / kBlockBytes);
  header.block_size = kBlockBytes;
  header.checksum = Checksum(BytesOf(header));
  std::vector<uint8_t> table(RoundUp(header.max_table_entries * sizeof(Be32), kSector), 0xff);
  TRY(WriteExactly(file, header.table_offset, table));
  TRY(WriteExactly(file, header.table_offset + table.size(), BytesOf(footer)));
  TRY(WriteExactly(file, sizeof(Footer), BytesOf(header)));
  return WriteExactly(file, 0, BytesOf(footer));
}

Result<> Create(const OpenEnv& env, const std::string& filename, Options& options) {
  uint64_t size = TRY(options.TakeSize("size", 0));
  bool force_size = TRY(options.TakeBool("force_size", false));
  std::string subformat = options.Take("subformat", "dynamic");
  if (subformat != "dynamic" && subformat != "fixed")
    return Fail(ErrorCode::kInvalid,
                fmt::format("subformat '{}' of format vpc: it is dynamic or fixed", subformat));
  if (size > kMostBytes)
    return Fail(ErrorCode::kInvalid,
                fmt::format("format vpc: a disk has at most {} bytes", kMostBytes));
  uint64_t sectors = (size + kSector - 1) / kSector;
  // The smallest geometry that holds the disk, whose size is that of the geometry then.
  Geometry geometry = GeometryOf(sectors);
  for (uint64_t more = 1; !force_size && geometry.sectors() < sectors && geometry.cylinders < 65535;
       more++)
    geometry = GeometryOf(sectors + more);
  bool by_size = force_size || geometry.sectors() < sectors || geometry.cylinders == 65535;
  if (!by_size) sectors = geometry.sectors();
  bool is_fixed = subformat == "fixed";
  Footer footer = MakeFooter(sectors, geometry, is_fixed, by_size);
  NodePtr file = TRY(CreateFile(env, filename));
  if (is_fixed) {
    TRY(file->Resize({.size = sectors * kSector, .exact = false}));
    TRY(WriteExactly(*file, sectors * kSector, BytesOf(footer)));
  } else {
    TRY(CreateDynamic(*file, footer, sectors * kSector));
  }
  return file->Close();
}

constexpr OptionRow kCreateOptions[] = {
    {"subformat", OptionRow::Type::kString,
     "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} "},
    {"force_size", OptionRow::Type::kBool,
     "Force disk size calculation to use the actual size specified, rather than using the nearest "
     "CHS-based calculation"},
};

}  // namespace
}  // namespace vpc

extern const Driver kVpcDriver;
const Driver kVpcDriver = {
    .name = "vpc",
    .kind = Driver::Kind::kFormat,
    .probe = vpc::Probe,
    .open = vpc::Open,
    .create_options = vpc::kCreateOptions,
    .create = vpc::Create,
};

}  // namespace kvartz::block
