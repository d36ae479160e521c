// On-disk structures of VMDK. Spec: "Virtual Disk Format 5.0" (VMware, 2011); integers are
// little-endian, places are in sectors of 512 bytes.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/endian.h"
#include "base/result.h"

namespace kvartz::block::vmdk {

constexpr uint32_t kMagic = 0x564d444b;  // "KDMV"
constexpr uint64_t kSector = 512;
constexpr uint32_t kEntriesPerTable = 512;
constexpr uint64_t kGdAtEnd = UINT64_MAX;  // the header's copy in the footer says where

// "Hosted Sparse Extent Header".
struct SparseHeader {
  Le32 magic;
  Le32 version;  // 1; 2 with zeroed grains, 3 of stream-optimized ones
  Le32 flags;
  Le64 capacity;
  Le64 grain_size;
  Le64 descriptor_offset;  // 0: none embedded
  Le64 descriptor_size;
  Le32 entries_per_table;
  Le64 rgd_offset;  // redundant grain directory
  Le64 gd_offset;
  Le64 overhead;
  uint8_t unclean_shutdown;
  std::array<char, 4> line_ends;  // "\n \r\n": broken by text-mode transfers
  Le16 compression;               // 0 none, 1 deflate
  std::array<uint8_t, 433> padding;
};
static_assert(sizeof(SparseHeader) == 512);
constexpr uint32_t kNewlineTest = 1 << 0, kRedundantTable = 1 << 1, kZeroedGrains = 1 << 2;
constexpr uint32_t kCompressed = 1 << 16, kMarkers = 1 << 17;

// "Grain Marker": before each compressed grain.
struct GrainMarker {
  Le64 lba;   // sectors of the disk
  Le32 size;  // bytes of what follows
};
static_assert(sizeof(GrainMarker) == 12);

Result<SparseHeader> ParseHeader(std::span<const uint8_t> bytes);

// "The Descriptor File".
struct ExtentLine {
  std::string access, type, filename;
  uint64_t sectors = 0, offset = 0;
};
constexpr uint32_t kNoParent = 0xffffffff;
struct Descriptor {
  uint32_t cid = 0, parent_cid = kNoParent;
  std::string create_type;
  std::string parent_hint;  // where the parent is, with parent_cid
  std::vector<ExtentLine> extents;
};
constexpr size_t kLargestDescriptor = 1 << 20;
Result<Descriptor> ParseDescriptor(std::string_view text);

}  // namespace kvartz::block::vmdk
