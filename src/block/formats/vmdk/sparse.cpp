#include "block/formats/vmdk/sparse.h"

#include <fmt/format.h>
#include <libdeflate.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "block/fiber_io.h"
#include "block/formats/vmdk/parent.h"

namespace kvartz::block::vmdk {
namespace {

constexpr size_t kCachedTables = 256;  // 2 KiB each
constexpr uint32_t kZeroGrain = 1;
constexpr int kCompressionLevel = 6;

std::span<uint8_t> BytesOf(std::vector<Le32>& table) {
  return {reinterpret_cast<uint8_t*>(table.data()), table.size() * sizeof(Le32)};
}

uint64_t RoundUp(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

Result<std::vector<Le32>> ReadDirectory(Node& file, uint64_t sector, uint64_t entries) {
  if (sector * kSector + entries * sizeof(Le32) > file.size_bytes())
    return Fail(ErrorCode::kInvalid,
                fmt::format("VMDK: grain directory beyond end of file (sector {}, {} entries)",
                            sector, entries));
  std::vector<Le32> directory(entries);
  TRY(ReadExactly(file, sector * kSector, BytesOf(directory)));
  return directory;
}

struct Inflater {
  Inflater() : state(libdeflate_alloc_decompressor()) {}
  ~Inflater() { libdeflate_free_decompressor(state); }
  libdeflate_decompressor* state;
};

}  // namespace

SparseNode::SparseNode(NodePtr file, bool read_only, const SparseHeader& header,
                       std::vector<Le32> directory, std::vector<Le32> redundant,
                       Descriptor descriptor, std::string text)
    : MappedNode(std::move(file), read_only, header.capacity * kSector,
                 header.grain_size * kSector),
      header_(header),
      directory_(std::move(directory)),
      redundant_(std::move(redundant)),
      descriptor_(std::move(descriptor)),
      text_(std::move(text)) {}

Result<> SparseNode::SetBacking(NodePtr backing) {
  if (backing && !parent_checked_) {
    TRY(CheckParent(*this, descriptor_, *backing));
    parent_checked_ = true;
  }
  return MappedNode::SetBacking(std::move(backing));
}

Result<std::shared_ptr<SparseNode>> SparseNode::Open(NodePtr file, const NodeOptions& node) {
  std::vector<uint8_t> bytes(std::min<uint64_t>(sizeof(SparseHeader), file->size_bytes()));
  TRY(ReadExactly(*file, 0, bytes));
  SparseHeader header = TRY(ParseHeader(bytes));
  Descriptor descriptor;
  std::string text;
  if (header.descriptor_offset != 0) {
    if ((header.descriptor_offset + header.descriptor_size) * kSector > file->size_bytes())
      return Fail(ErrorCode::kInvalid, "VMDK: the descriptor is beyond the end of the file");
    text.resize(header.descriptor_size * kSector);
    TRY(ReadExactly(*file, header.descriptor_offset * kSector,
                    {reinterpret_cast<uint8_t*>(text.data()), text.size()}));
    // Of a part of an image, its maker may have left the place empty.
    if (text.starts_with('\0'))
      text.clear();
    else
      descriptor = TRY(ParseDescriptor(text));
  }
  bool footer = header.gd_offset == kGdAtEnd;
  if (footer) {
    // The footer is the last sector but one: an end-of-stream marker follows.
    if (file->size_bytes() < 4 * kSector)
      return Fail(ErrorCode::kInvalid, "VMDK: the footer is missing");
    TRY(ReadExactly(*file, file->size_bytes() - 2 * kSector, bytes));
    header = TRY(ParseHeader(bytes));
    if (header.gd_offset == kGdAtEnd)
      return Fail(ErrorCode::kInvalid, "VMDK: the footer has no grain directory");
  }
  if (footer && !node.read_only)
    return Fail(
        ErrorCode::kUnsupported,
        fmt::format("not supported yet: writing to VMDK '{}', a finished stream", file->name()));
  uint64_t reach = header.grain_size * kEntriesPerTable;
  uint64_t entries = (header.capacity + reach - 1) / reach;
  auto directory = TRY(ReadDirectory(*file, header.gd_offset, entries));
  std::vector<Le32> redundant;
  if ((header.flags & kRedundantTable) && header.rgd_offset != 0)
    redundant = TRY(ReadDirectory(*file, header.rgd_offset, entries));
  return std::make_shared<SparseNode>(std::move(file), node.read_only, header, std::move(directory),
                                      std::move(redundant), std::move(descriptor), std::move(text));
}

SparseNode::Table* SparseNode::Load(uint64_t index, int& rc) {
  auto number = static_cast<uint32_t>(index / kEntriesPerTable);
  auto it = by_number_.find(number);
  if (it != by_number_.end()) {
    tables_.splice(tables_.begin(), tables_, it->second);
    return &it->second->second;
  }
  // One load at a time: what SetEntry changes meanwhile it then finds in memory, and changes there.
  FiberLock lock(loading_);
  it = by_number_.find(number);
  if (it != by_number_.end()) return &it->second->second;
  Table table(kEntriesPerTable);
  uint64_t sector = directory_[number];
  if (sector != 0) {
    rc = ReadAt(*file_, sector * kSector, BytesOf(table));
    if (rc) return nullptr;
  }
  if (tables_.size() >= kCachedTables) {
    by_number_.erase(tables_.back().first);
    tables_.pop_back();
  }
  tables_.emplace_front(number, std::move(table));
  by_number_[number] = tables_.begin();
  return &tables_.front().second;
}

int SparseNode::Find(uint64_t offset, Place& place) {
  int rc = 0;
  uint64_t index = offset / block_bytes();
  Table* table = Load(index, rc);
  if (!table) return rc;
  uint32_t entry = (*table)[index % kEntriesPerTable];
  place = {};
  if (entry == 0) return 0;
  if (entry == kZeroGrain && (header_.flags & kZeroedGrains)) {
    place.kind = Place::Kind::kZero;
    return 0;
  }
  if (entry * kSector >= file_->size_bytes()) return -EIO;
  if (is_compressed()) {
    place = {Place::Kind::kCompressed, entry * kSector};
  } else {
    place = {Place::Kind::kStored, entry * kSector + offset % block_bytes()};
  }
  return 0;
}

uint64_t SparseNode::End() const {
  return RoundUp(std::max<uint64_t>(file_->size_bytes(), header_.overhead * kSector), kSector);
}

int SparseNode::NewPlace(uint64_t, uint64_t& offset) {
  if (is_compressed()) return -ENOTSUP;
  offset = RoundUp(End(), block_bytes());
  uint64_t end = offset + block_bytes();
  if (end / kSector > UINT32_MAX) return -EFBIG;
  return file_->Resize({.size = end}) ? 0 : -EIO;
}

int SparseNode::Publish(uint64_t index, uint64_t offset) {
  return SetEntry(index, static_cast<uint32_t>(offset / kSector));
}

int SparseNode::MarkZero(uint64_t index) {
  if (!(header_.flags & kZeroedGrains)) return -ENOTSUP;
  return SetEntry(index, kZeroGrain);
}

// First the redundant table, as VMware's own do, then the one that is read.
int SparseNode::SetEntry(uint64_t index, uint32_t value) {
  uint64_t number = index / kEntriesPerTable, slot = index % kEntriesPerTable;
  if (directory_[number] == 0) return -ENOTSUP;
  Le32 entry = value;
  std::span<const uint8_t> bytes(reinterpret_cast<const uint8_t*>(&entry), sizeof entry);
  if (!redundant_.empty() && redundant_[number] != 0) {
    if (int rc = WriteAt(*file_, redundant_[number] * kSector + slot * sizeof entry, bytes))
      return rc;
  }
  if (int rc = WriteAt(*file_, directory_[number] * kSector + slot * sizeof entry, bytes))
    return rc;
  int rc = 0;
  Table* table = Load(index, rc);
  if (!table) return rc;
  (*table)[slot] = entry;
  return 0;
}

int SparseNode::ReadCompressed(const Place& place, uint64_t index, std::span<uint8_t> block) {
  GrainMarker marker;
  uint64_t left = file_->size_bytes() - place.offset;
  if (left < sizeof marker) return -EIO;
  if (int rc = ReadAt(*file_, place.offset, {reinterpret_cast<uint8_t*>(&marker), sizeof marker}))
    return rc;
  uint64_t size = marker.size;
  if (marker.lba != index * header_.grain_size || size == 0 || size > 2 * block.size() ||
      size > left - sizeof marker)
    return -EIO;
  auto packed = std::make_unique_for_overwrite<uint8_t[]>(size);
  if (int rc = ReadAt(*file_, place.offset + sizeof marker, {packed.get(), size})) return rc;
  thread_local Inflater inflater;
  size_t got = 0;
  if (libdeflate_zlib_decompress(inflater.state, packed.get(), size, block.data(), block.size(),
                                 &got) != LIBDEFLATE_SUCCESS)
    return -EIO;
  // The last grain may be cut short.
  std::fill(block.begin() + static_cast<ptrdiff_t>(got), block.end(), 0);
  return 0;
}

// A grain of a stream is written once.
int SparseNode::WriteCompressed(uint64_t index, std::span<const uint8_t> block) {
  if (!is_compressed()) return -ENOTSUP;
  Place place;
  if (int rc = Find(index * block_bytes(), place)) return rc;
  if (place.kind != Place::Kind::kNowhere) return -EEXIST;
  libdeflate_compressor* compressor = libdeflate_alloc_compressor(kCompressionLevel);
  if (!compressor) return -ENOMEM;
  std::vector<uint8_t> record(sizeof(GrainMarker) +
                              libdeflate_zlib_compress_bound(compressor, block.size()));
  size_t size = libdeflate_zlib_compress(compressor, block.data(), block.size(),
                                         record.data() + sizeof(GrainMarker),
                                         record.size() - sizeof(GrainMarker));
  libdeflate_free_compressor(compressor);
  if (size == 0) return -EIO;
  GrainMarker marker;
  marker.lba = index * header_.grain_size;
  marker.size = static_cast<uint32_t>(size);
  std::memcpy(record.data(), &marker, sizeof marker);
  record.resize(sizeof marker + size);
  record.resize(RoundUp(record.size(), kSector));
  uint64_t at = End();
  if ((at + record.size()) / kSector > UINT32_MAX) return -EFBIG;
  if (int rc = WriteAt(*file_, at, record)) return rc;
  return SetEntry(index, static_cast<uint32_t>(at / kSector));
}

// Another content, another CID: so a child notices.
int SparseNode::BeginWriting() {
  if (text_.empty()) return 0;
  std::string text = WithCid(text_, NewCid());
  text.resize(text_.size());  // of zeros at its end
  text_ = text;
  return WriteAt(*file_, header_.descriptor_offset * kSector,
                 {reinterpret_cast<const uint8_t*>(text_.data()), text_.size()});
}

Result<ImageInfo> SparseNode::Info() {
  ImageInfo info = TRY(MappedNode::Info());
  info.compressed = is_compressed();
  TellParent(*this, descriptor_, info);
  if (text_.empty()) return info;
  Descriptor now = TRY(ParseDescriptor(text_));
  InfoValue::Object extent = {{"filename", {name()}},
                              {"format", {std::string()}},
                              {"virtual-size", {size_bytes_}},
                              {"cluster-size", {block_bytes()}}};
  if (is_compressed()) extent.push_back({"compressed", {true}});
  InfoValue::Array extents;
  extents.push_back({std::move(extent)});
  info.specific = {{"create-type", {now.create_type}},
                   {"cid", {uint64_t{now.cid}}},
                   {"parent-cid", {uint64_t{now.parent_cid}}},
                   {"extents", {std::move(extents)}}};
  return info;
}

Result<CheckResult> SparseNode::CheckAll(const ReportFn& report) {
  CheckResult result;
  for (uint64_t index = 0; index < (size_bytes_ + block_bytes() - 1) / block_bytes(); index++) {
    if (directory_[index / kEntriesPerTable] == 0) {
      index += kEntriesPerTable - 1;
      continue;
    }
    Place place;
    int rc = Find(index * block_bytes(), place);
    if (rc == -EIO) {
      report(fmt::format(
          "ERROR: cannot read the grain at sector {}, or it is beyond the end of the file",
          index * header_.grain_size));
      result.corruptions++;
    } else if (rc) {
      return Fail(IoError(*this, "examine", index * block_bytes(), rc));
    }
  }
  return result;
}

}  // namespace kvartz::block::vmdk
