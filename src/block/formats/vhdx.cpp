// Format vhdx: Hyper-V's images, dynamic and fixed.
//
// Writing: a table entry is 8 bytes within one sector, written after the block that it leads to; so
// the file is whole at any moment, and nothing has to go through the log.
#include "block/formats/vhdx.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "base/crc32c.h"
#include "block/fiber_io.h"
#include "block/formats/format_checker.h"
#include "block/formats/mapped_node.h"
#include "block/formats/random_id.h"
#include "block/formats/vhdx_log.h"
#include "block/graph.h"

namespace kvartz::block {
namespace vhdx {
namespace {

constexpr uint64_t kDefaultLogBytes = 1 << 20;

uint64_t RoundUp(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

Result<> WriteHeader(Node& file, Header header, unsigned slot, uint64_t sequence) {
  std::vector<uint8_t> bytes(kHeaderBytes);
  header.sequence_number = sequence;
  header.checksum = 0;
  std::memcpy(bytes.data(), &header, sizeof header);
  header.checksum = Crc32c(bytes);
  std::memcpy(bytes.data(), &header, sizeof header);
  return WriteExactly(file, kHeaderOffsets[slot], bytes);
}

struct CurrentHeader {
  Header header;
  unsigned slot = 0;
};

class VhdxNode final : public MappedNode {
 public:
  VhdxNode(NodePtr file, bool read_only, const CurrentHeader& header, const Regions& regions,
           const Disk& disk, std::vector<Le64> table)
      : MappedNode(std::move(file), read_only, disk.size, disk.block_size),
        header_(header),
        regions_(regions),
        disk_(disk),
        table_(std::move(table)) {
    limits_.request_alignment =
        std::max(limits_.request_alignment, disk.logical_sector > 512 ? disk.logical_sector : 1);
  }
  const char* driver() const override { return "vhdx"; }
  ImageEditor* editor() override { return &editor_; }

 private:
  int Find(uint64_t offset, Place& place) override {
    uint64_t entry = table_[disk_.EntryOf(offset / block_bytes())];
    place = {};
    switch (entry & kStateMask) {
      case kFullyPresent:
        place = {Place::Kind::kStored, (entry & kPlaceMask) + offset % block_bytes()};
        return 0;
      case kZero:
      case kUnmapped:
        place.kind = Place::Kind::kZero;
        return 0;
      case kNotPresent:
      case kUndefined:
        return 0;
      default:
        return -EIO;
    }
  }
  int NewPlace(uint64_t, uint64_t& offset) override {
    offset = RoundUp(file_->size_bytes(), kMiB);
    return file_->Resize({.size = offset + block_bytes()}) ? 0 : -EIO;
  }
  int Publish(uint64_t index, uint64_t offset) override {
    uint64_t slot = disk_.EntryOf(index);
    Le64 entry = offset | kFullyPresent;
    int rc = WriteAt(*file_, regions_.bat_offset + slot * sizeof entry,
                     {reinterpret_cast<const uint8_t*>(&entry), sizeof entry});
    if (rc == 0) table_[slot] = entry;
    return rc;
  }
  // 2.2.2: who writes says so with new guids, in both headers, one after the other.
  int BeginWriting() override {
    Header header = header_.header;
    header.file_write_guid = RandomId();
    header.data_write_guid = RandomId();
    uint64_t sequence = header.sequence_number;
    for (int i = 0; i < 2; i++) {
      header_.slot ^= 1;
      if (!WriteHeader(*file_, header, header_.slot, ++sequence)) return -EIO;
      if (int rc = FlushNode(*file_)) return rc;
    }
    header_.header = header;
    header_.header.sequence_number = sequence;
    return 0;
  }

  // That each block is in a place of its own, within the file.
  Result<CheckResult> CheckTable(const ReportFn& report) {
    CheckResult result;
    auto bad = [&](const std::string& line) {
      report("ERROR: " + line);
      result.corruptions++;
    };
    struct Used {
      uint64_t offset, bytes;
    };
    std::vector<Used> used = {{0, kMiB},
                              {header_.header.log_offset, header_.header.log_length},
                              {regions_.bat_offset, regions_.bat_length},
                              {regions_.metadata_offset, regions_.metadata_length}};
    for (uint64_t block = 0; block < disk_.blocks(); block++) {
      uint64_t entry = table_[disk_.EntryOf(block)], place = entry & kPlaceMask;
      uint64_t state = entry & kStateMask;
      if (state == kFullyPresent) {
        used.push_back({place, block_bytes()});
        if (place > file_->size_bytes() || block_bytes() > file_->size_bytes() - place)
          bad(fmt::format("block {} is beyond the end of the file, at {:#x}", block, place));
      } else if (state > kUnmapped) {
        bad(fmt::format("block {} is in state {}", block, state));
      }
    }
    std::ranges::sort(used, {}, &Used::offset);
    for (size_t i = 1; i < used.size(); i++) {
      if (used[i].offset - used[i - 1].offset < used[i - 1].bytes)
        bad(fmt::format("what is at {:#x} reaches into what is at {:#x}", used[i - 1].offset,
                        used[i].offset));
    }
    return result;
  }

  CurrentHeader header_;
  const Regions regions_;
  const Disk disk_;
  std::vector<Le64> table_;
  FormatChecker editor_{*this, [this](const ReportFn& report) { return CheckTable(report); }};
};

int Probe(std::span<const uint8_t> head) {
  return head.size() >= 8 && std::memcmp(head.data(), "vhdxfile", 8) == 0 ? 100 : 0;
}

// What there is of [offset, offset + length).
Result<std::vector<uint8_t>> ReadPart(Node& file, uint64_t offset, uint64_t length) {
  uint64_t held = offset < file.size_bytes() ? std::min(length, file.size_bytes() - offset) : 0;
  std::vector<uint8_t> bytes(held);
  TRY(ReadExactly(file, offset, bytes));
  return bytes;
}

Result<CurrentHeader> FindHeader(Node& file) {
  CurrentHeader current;
  Result<Header> best = Fail(ErrorCode::kInvalid, "VHDX: there is no header");
  for (unsigned slot = 0; slot < 2; slot++) {
    std::vector<uint8_t> bytes = TRY(ReadPart(file, kHeaderOffsets[slot], kHeaderBytes));
    Result<Header> header = ParseHeader(bytes);
    if (header && (!best || header->sequence_number > best->sequence_number)) {
      best = header;
      current.slot = slot;
    } else if (!best && !header) {
      best = std::move(header);
    }
  }
  current.header = TRY(std::move(best));
  return current;
}

// Afterwards the log counts no more.
Result<> Replay(Node& file, CurrentHeader& current) {
  TRY(ReplayLog(file, current.header));
  Header header = current.header;
  header.log_guid = Guid{};
  for (int i = 0; i < 2; i++) {
    current.slot ^= 1;
    header.sequence_number = header.sequence_number + 1;
    TRY(WriteHeader(file, header, current.slot, header.sequence_number));
    TRY(Flush(file));
  }
  current.header = header;
  return {};
}

Result<NodePtr> OpenChecked(NodePtr file, const NodeOptions& node) {
  std::vector<uint8_t> head = TRY(ReadPart(*file, 0, 8));
  if (!Probe(head)) return Fail(ErrorCode::kInvalid, "VHDX: the signature is missing");
  CurrentHeader header = TRY(FindHeader(*file));
  if (header.header.log_guid != Guid{}) {
    if (node.read_only)
      return Fail(ErrorCode::kState,
                  "VHDX: it wasn't closed, and its log must be replayed: open it for writing once "
                  "(kvartz io -c length FILE)");
    TRY(Replay(*file, header));
  }
  std::vector<uint8_t> table_bytes =
      TRY(ReadPart(*file, kRegionTableOffsets[0], kRegionTableBytes));
  Result<Regions> first = ParseRegionTable(table_bytes);
  if (!first) table_bytes = TRY(ReadPart(*file, kRegionTableOffsets[1], kRegionTableBytes));
  Regions regions = first ? *first : TRY(ParseRegionTable(table_bytes));
  std::vector<uint8_t> metadata =
      TRY(ReadPart(*file, regions.metadata_offset,
                   std::min<uint64_t>(regions.metadata_length, 2 * kMetadataTableBytes)));
  Disk disk = TRY(ParseMetadata(metadata));
  uint64_t bytes = disk.entries() * sizeof(Le64);
  if (bytes > regions.bat_length || regions.bat_offset > file->size_bytes() ||
      bytes > file->size_bytes() - regions.bat_offset)
    return Fail(ErrorCode::kInvalid, fmt::format("VHDX: the block table is beyond its region or "
                                                 "the end of the file (offset {:#x}, {} bytes)",
                                                 regions.bat_offset, bytes));
  std::vector<Le64> table(disk.entries());
  TRY(ReadExactly(*file, regions.bat_offset, {reinterpret_cast<uint8_t*>(table.data()), bytes}));
  for (uint64_t block = 0; block < disk.blocks(); block++) {
    uint64_t entry = table[disk.EntryOf(block)];
    uint64_t place = entry & kPlaceMask;
    if ((entry & kStateMask) == kFullyPresent && (place < kMiB || place > uint64_t{INT64_MAX} / 2))
      return Fail(ErrorCode::kInvalid,
                  fmt::format("VHDX: block {} is said to be at {:#x}", block, place));
  }
  return std::make_shared<VhdxNode>(std::move(file), node.read_only, header, regions, disk,
                                    std::move(table));
}

Result<NodePtr> Open(const OpenEnv& env, const NodeOptions& node, Options& options) {
  NodePtr file = TRY(MappedNode::OpenFile(env, node, options, "vhdx"));
  std::string name = file->name();
  Result<NodePtr> opened = OpenChecked(std::move(file), node);
  if (!opened) return Fail(std::move(opened).error().In(fmt::format("disk image '{}'", name)));
  return opened;
}

uint32_t DefaultBlockBytes(uint64_t size) {
  constexpr uint64_t kGiB = 1 << 30;
  return static_cast<uint32_t>((size > 32 * 1024 * kGiB ? 64
                                : size > 100 * kGiB     ? 32
                                : size > kGiB           ? 16
                                                        : 8) *
                               kMiB);
}

struct Plan {
  Disk disk;
  uint64_t log_bytes = kDefaultLogBytes;
  bool fixed = false;
  bool zeros = false;  // blocks that aren't there are marked so
  uint64_t log_offset() const { return kMiB; }
  uint64_t metadata_offset() const { return log_offset() + log_bytes; }
  uint64_t bat_offset() const { return metadata_offset() + kMiB; }
  uint64_t bat_bytes() const {
    return RoundUp(std::max<uint64_t>(1, disk.entries() * sizeof(Le64)), kMiB);
  }
  uint64_t data_offset() const { return bat_offset() + bat_bytes(); }
};

std::vector<uint8_t> RegionTable(const Plan& plan) {
  std::vector<uint8_t> bytes(kRegionTableBytes);
  RegionTableHeader header = {{'r', 'e', 'g', 'i'}, 0, 2, 0};
  RegionEntry entries[2] = {
      {kBatRegion, plan.bat_offset(), static_cast<uint32_t>(plan.bat_bytes()), 1},
      {kMetadataRegion, plan.metadata_offset(), static_cast<uint32_t>(kMiB), 1}};
  std::memcpy(bytes.data() + sizeof header, entries, sizeof entries);
  std::memcpy(bytes.data(), &header, sizeof header);
  header.checksum = Crc32c(bytes);
  std::memcpy(bytes.data(), &header, sizeof header);
  return bytes;
}

std::vector<uint8_t> Metadata(const Plan& plan) {
  std::vector<uint8_t> bytes(kMetadataTableBytes);
  MetadataTableHeader header = {};
  std::memcpy(header.signature.data(), "metadata", 8);
  auto add = [&](const Guid& id, uint32_t flags, const std::vector<uint8_t>& value) {
    MetadataEntry entry = {id, static_cast<uint32_t>(bytes.size()),
                           static_cast<uint32_t>(value.size()), flags | kIsRequired, 0};
    std::memcpy(bytes.data() + sizeof header + header.entry_count * sizeof entry, &entry,
                sizeof entry);
    header.entry_count = static_cast<uint16_t>(header.entry_count + 1);
    bytes.insert(bytes.end(), value.begin(), value.end());
  };
  auto number = [](auto value) {
    const auto* raw = reinterpret_cast<const uint8_t*>(&value);
    return std::vector<uint8_t>(raw, raw + sizeof value);
  };
  uint64_t parameters = uint64_t{plan.fixed} << 32 | plan.disk.block_size;
  add(kFileParameters, 0, number(Le64(parameters)));
  add(kVirtualDiskSize, kIsVirtualDisk, number(Le64(plan.disk.size)));
  Guid id = RandomId();
  add(kPage83Data, kIsVirtualDisk, {id.begin(), id.end()});
  add(kLogicalSectorSize, kIsVirtualDisk, number(Le32(plan.disk.logical_sector)));
  add(kPhysicalSectorSize, kIsVirtualDisk, number(Le32(4096)));
  std::memcpy(bytes.data(), &header, sizeof header);
  return bytes;
}

Result<> WriteImage(Node& file, const Plan& plan) {
  std::vector<uint8_t> identifier(512 + 8);
  std::memcpy(identifier.data(), "vhdxfile", 8);
  constexpr std::string_view kCreator = "Kvartz";
  for (size_t i = 0; i < kCreator.size(); i++)
    identifier[8 + 2 * i] = static_cast<uint8_t>(kCreator[i]);  // UTF-16
  TRY(file.Resize(
      {.size = plan.data_offset() + (plan.fixed ? plan.disk.blocks() * plan.disk.block_size : 0),
       .exact = false}));
  if (plan.fixed || plan.zeros) {
    std::vector<Le64> table(plan.disk.entries());
    for (uint64_t i = 0; i < plan.disk.blocks(); i++) {
      table[plan.disk.EntryOf(i)] =
          plan.fixed ? (plan.data_offset() + i * plan.disk.block_size) | kFullyPresent : kZero;
    }
    TRY(WriteExactly(
        file, plan.bat_offset(),
        {reinterpret_cast<const uint8_t*>(table.data()), table.size() * sizeof(Le64)}));
  }
  TRY(WriteExactly(file, plan.metadata_offset(), Metadata(plan)));
  for (uint64_t offset : kRegionTableOffsets) TRY(WriteExactly(file, offset, RegionTable(plan)));
  Header header = {};
  std::memcpy(header.signature.data(), "head", 4);
  header.file_write_guid = RandomId();
  header.data_write_guid = RandomId();
  header.version = 1;
  header.log_length = static_cast<uint32_t>(plan.log_bytes);
  header.log_offset = plan.log_offset();
  TRY(WriteHeader(file, header, 0, 1));
  TRY(WriteHeader(file, header, 1, 2));
  return WriteExactly(file, 0, identifier);
}

Result<> Create(const OpenEnv& env, const std::string& filename, Options& options) {
  Plan plan;
  plan.disk.logical_sector = 512;
  plan.disk.size = RoundUp(TRY(options.TakeSize("size", 0)), plan.disk.logical_sector);
  uint64_t block = TRY(options.TakeSize("block_size", 0));
  plan.log_bytes = TRY(options.TakeSize("log_size", kDefaultLogBytes));
  plan.zeros = TRY(options.TakeBool("block_state_zero", false));
  std::string subformat = options.Take("subformat", "dynamic");
  if (subformat != "dynamic" && subformat != "fixed")
    return Fail(ErrorCode::kInvalid,
                fmt::format("subformat '{}' of format vhdx: it is dynamic or fixed", subformat));
  plan.fixed = subformat == "fixed";
  if (plan.disk.size > uint64_t{64} << 40)
    return Fail(ErrorCode::kInvalid, "format vhdx: a disk has at most 64 TiB");
  if (plan.log_bytes < kMiB || plan.log_bytes % kMiB != 0 || plan.log_bytes > uint64_t{1} << 31)
    return Fail(ErrorCode::kInvalid,
                "log_size of format vhdx must be a multiple of 1 MiB, up to 2 GiB");
  if (block == 0) block = DefaultBlockBytes(plan.disk.size);
  if (block < kMiB || block > 256 * kMiB || !std::has_single_bit(block))
    return Fail(ErrorCode::kInvalid,
                "block_size of format vhdx must be a power of two from 1 MiB to 256 MiB");
  plan.disk.block_size = static_cast<uint32_t>(block);
  if (plan.disk.entries() > Disk::kMostEntries)
    return Fail(ErrorCode::kInvalid,
                "format vhdx: the disk has too many blocks; give it a larger block_size");
  NodePtr file = TRY(CreateFile(env, filename));
  TRY(WriteImage(*file, plan));
  return file->Close();
}

constexpr OptionRow kCreateOptions[] = {
    {"log_size", OptionRow::Type::kSize, "Log size; min 1MB.", "1048576"},
    {"block_size", OptionRow::Type::kSize,
     "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.", "0"},
    {"subformat", OptionRow::Type::kString,
     "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'."},
    {"block_state_zero", OptionRow::Type::kBool,
     "Use payload blocks of type 'ZERO' where nothing is yet. Non-standard; both read as zeros."},
};

}  // namespace
}  // namespace vhdx

extern const Driver kVhdxDriver;
const Driver kVhdxDriver = {
    .name = "vhdx",
    .kind = Driver::Kind::kFormat,
    .probe = vhdx::Probe,
    .open = vhdx::Open,
    .create_options = vhdx::kCreateOptions,
    .create = vhdx::Create,
};

}  // namespace kvartz::block
