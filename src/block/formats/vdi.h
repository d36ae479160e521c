// On-disk structures of VDI. Spec: "Virtual Disk Image (VDI)", the header as VirtualBox 4 and later
// write it; all fields little-endian.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "base/endian.h"
#include "base/result.h"

namespace kvartz::block::vdi {

constexpr uint32_t kSignature = 0xbeda107f;
constexpr uint32_t kVersion = 0x00010001;
constexpr uint32_t kDynamic = 1;
constexpr uint32_t kStatic = 2;
constexpr uint32_t kFree = 0xffffffff;  // in the block map: nowhere, reads as zeros
constexpr uint32_t kZero = 0xfffffffe;  // discarded: reads as zeros

struct Header {
  std::array<char, 64> text;  // for people
  Le32 signature;
  Le32 version;
  Le32 header_size;  // of what follows
  Le32 image_type;   // kDynamic, kStatic; 3 undo and 4 differencing aren't supported
  Le32 image_flags;
  std::array<char, 256> description;
  Le32 offset_bmap;  // of the block map, in the file
  Le32 offset_data;  // of the first block
  Le32 cylinders;
  Le32 heads;
  Le32 sectors;
  Le32 sector_size;
  Le32 unused;
  Le64 disk_size;  // bytes
  Le32 block_size;
  Le32 block_extra;
  Le32 blocks_in_image;
  Le32 blocks_allocated;
  std::array<uint8_t, 16> uuid_image;
  std::array<uint8_t, 16> uuid_last_snap;
  std::array<uint8_t, 16> uuid_link;
  std::array<uint8_t, 16> uuid_parent;
  std::array<uint8_t, 56> unused2;
};
static_assert(sizeof(Header) == 512);

// Checks everything that can be checked without the file's length. Errors name what is wrong.
Result<Header> Parse(std::span<const uint8_t> bytes);

}  // namespace kvartz::block::vdi
