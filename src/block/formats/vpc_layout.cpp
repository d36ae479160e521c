#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <string_view>

#include "block/formats/vpc.h"

namespace kvartz::block::vpc {
namespace {

constexpr uint32_t kVersion = 0x00010000;
constexpr uint64_t kMostSectors = uint64_t{65535} * 16 * 255;
// The table is held in memory: 16 MiB for 8 TiB; the format's own limit is 2 TiB.
constexpr uint32_t kMostEntries = 4 << 20;

std::unexpected<Error> Bad(const std::string& what) {
  return Fail(ErrorCode::kInvalid, "VHD: " + what);
}

template <typename T>
bool ChecksumHolds(T structure) {
  uint32_t expected = structure.checksum;
  structure.checksum = 0;
  return Checksum({reinterpret_cast<const uint8_t*>(&structure), sizeof structure}) == expected;
}

}  // namespace

uint32_t Checksum(std::span<const uint8_t> bytes) {
  uint32_t sum = 0;
  for (uint8_t byte : bytes) sum += byte;
  return ~sum;
}

Result<Footer> ParseFooter(std::span<const uint8_t> bytes) {
  Footer footer;
  if (bytes.size() < sizeof footer) return Bad("the file is too short");
  std::memcpy(&footer, bytes.data(), sizeof footer);
  if (std::string_view(footer.cookie.data(), 8) != "conectix")
    return Bad("the footer's cookie is missing");
  if (!ChecksumHolds(footer)) return Bad("the footer's checksum is wrong");
  if (footer.version != kVersion)
    return Bad(fmt::format("unknown version {:#x}", uint32_t{footer.version}));
  if (footer.disk_type != kFixed && footer.disk_type != kDynamic &&
      footer.disk_type != kDifferencing)
    return Bad(fmt::format("unknown disk type {}", uint32_t{footer.disk_type}));
  if (footer.current_size > uint64_t{INT64_MAX} / 2) return Bad("the disk's size is impossible");
  return footer;
}

Result<DynamicHeader> ParseDynamicHeader(std::span<const uint8_t> bytes) {
  DynamicHeader header;
  if (bytes.size() < sizeof header) return Bad("the dynamic header is beyond the end of the file");
  std::memcpy(&header, bytes.data(), sizeof header);
  if (std::string_view(header.cookie.data(), 8) != "cxsparse")
    return Bad("the dynamic header's cookie is missing");
  if (!ChecksumHolds(header)) return Bad("the dynamic header's checksum is wrong");
  uint32_t block = header.block_size;
  if (block < kSector || (block & (block - 1)) != 0 || block > (256u << 20))
    return Bad(fmt::format("blocks of {} bytes", block));
  if (header.table_offset % kSector != 0 || header.table_offset > uint64_t{INT64_MAX} / 2)
    return Bad("the block table is not at a sector's start");
  if (header.max_table_entries > kMostEntries)
    return Bad(fmt::format("a block table of {} entries (at most {} are possible)",
                           uint32_t{header.max_table_entries}, kMostEntries));
  return header;
}

std::string ParentName(const DynamicHeader& header) {
  std::string name;
  for (size_t i = 0; i + 1 < header.parent_name.size(); i += 2) {
    unsigned unit = header.parent_name[i] << 8 | header.parent_name[i + 1];
    if (unit == 0) break;
    name += unit >= ' ' && unit < 0x7f ? static_cast<char>(unit) : '?';
  }
  return name;
}

Geometry GeometryOf(uint64_t sectors) {
  sectors = std::min(sectors, kMostSectors);
  uint64_t per_track, heads, tracks;  // tracks: cylinders times heads
  if (sectors > uint64_t{65535} * 16 * 63) {
    per_track = 255;
    heads = 16;
    tracks = sectors / per_track;
  } else {
    per_track = 17;
    tracks = sectors / per_track;
    heads = std::max<uint64_t>(4, (tracks + 1023) / 1024);
    if (tracks >= heads * 1024 || heads > 16) {
      per_track = 31;
      heads = 16;
      tracks = sectors / per_track;
    }
    if (tracks >= heads * 1024) {
      per_track = 63;
      heads = 16;
      tracks = sectors / per_track;
    }
  }
  return {static_cast<uint16_t>(tracks / heads), static_cast<uint8_t>(heads),
          static_cast<uint8_t>(per_track)};
}

uint64_t DiskSize(const Footer& footer) {
  // Hyper-V, Disk2vhd, XenServer, Azure's tools and qemu-img with force_size mean the size.
  constexpr std::string_view kBySize[] = {"win ", "d2v ", "qem2", "tap", "CTXS"};
  std::string_view creator(footer.creator_application.data(), 4);
  Geometry geometry = {footer.cylinders, footer.heads, footer.sectors_per_track};
  bool by_size = geometry.sectors() == kMostSectors || geometry.sectors() == 0;
  for (std::string_view name : kBySize) by_size = by_size || creator.starts_with(name);
  return by_size ? uint64_t{footer.current_size} : geometry.sectors() * kSector;
}

}  // namespace kvartz::block::vpc
