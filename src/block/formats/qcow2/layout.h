// What a qcow2 file looks like: header, extensions and entries of its tables.
// Spec: QEMU's docs/interop/qcow2.txt, version 2 and 3. All integers are big-endian.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/endian.h"
#include "base/result.h"

namespace kvartz::block::qcow2 {

constexpr uint32_t kMagic = 0x514649fb;
constexpr uint32_t kMinClusterBits = 9, kMaxClusterBits = 21;
constexpr uint64_t kMaxL1Bytes = 32 << 20;
constexpr uint64_t kMaxReftableBytes = 8 << 20;
constexpr uint32_t kMaxSnapshots = 65536;
constexpr uint32_t kMaxBackingName = 1023;
constexpr uint32_t kMaxBitmaps = 65535;
constexpr uint64_t kMaxBitmapDirectoryBytes = uint64_t{kMaxBitmaps} * 2048;
constexpr uint64_t kMaxBitmapBytes = 512 << 20;         // of one, as it is stored
constexpr uint64_t kMaxImageBytes = uint64_t{1} << 56;  // what fits into an entry's offset

// Section "Header".
struct HeaderDisk {
  Be32 magic;
  Be32 version;  // 2 or 3
  Be64 backing_file_offset;
  Be32 backing_file_size;
  Be32 cluster_bits;
  Be64 size;
  Be32 crypt_method;
  Be32 l1_size;  // entries
  Be64 l1_table_offset;
  Be64 refcount_table_offset;
  Be32 refcount_table_clusters;
  Be32 nb_snapshots;
  Be64 snapshots_offset;
  // Version 3 only.
  Be64 incompatible_features;
  Be64 compatible_features;
  Be64 autoclear_features;
  Be32 refcount_order;  // 1 << this are the bits of a refcount
  Be32 header_length;
  uint8_t compression_type;
  uint8_t padding[7];
};
constexpr size_t kHeaderV2Bytes = 72;
constexpr size_t kHeaderV3MinBytes = 104;
static_assert(sizeof(HeaderDisk) == 112);

enum Incompatible : uint64_t {
  kDirty = 1 << 0,    // refcounts may be wrong
  kCorrupt = 1 << 1,  // not to be written before it is repaired
  kDataFile = 1 << 2,
  kCompression = 1 << 3,  // compression_type isn't 0
  kExtendedL2 = 1 << 4,
};
constexpr uint64_t kKnownIncompatible = 0x1f;
constexpr uint64_t kLazyRefcounts = 1;  // compatible
enum Autoclear : uint64_t { kBitmapsValid = 1 << 0, kRawExternal = 1 << 1 };

enum class Compression : uint8_t { kZlib = 0, kZstd = 1 };
enum class Crypt : uint32_t { kNone = 0, kAes = 1, kLuks = 2 };

// Section "Header extensions".
enum ExtensionType : uint32_t {
  kEnd = 0,
  kBackingFormat = 0xe2792aca,
  kFeatureNames = 0x6803f857,
  kBitmapsExtension = 0x23852875,
  kCryptoHeader = 0x0537be77,
  kDataFileName = 0x44415441,
};

struct Extension {
  uint32_t type = 0;
  std::vector<uint8_t> data;
};

struct CryptoExtensionDisk {
  Be64 offset;  // of the LUKS header, a cluster's beginning
  Be64 bytes;
};
static_assert(sizeof(CryptoExtensionDisk) == 16);
constexpr uint64_t kMaxCryptoBytes = 64 << 20;

struct BitmapsExtensionDisk {
  Be32 nb_bitmaps;
  Be32 reserved;
  Be64 directory_size;
  Be64 directory_offset;
};
static_assert(sizeof(BitmapsExtensionDisk) == 24);

// The header, checked.
struct Header {
  uint32_t version = 3;
  uint32_t cluster_bits = 16;
  uint64_t size = 0;
  Crypt crypt = Crypt::kNone;
  uint32_t l1_entries = 0;
  uint64_t l1_offset = 0;
  uint64_t reftable_offset = 0;
  uint32_t reftable_clusters = 0;
  uint32_t snapshot_count = 0;
  uint64_t snapshots_offset = 0;
  uint64_t incompatible = 0, compatible = 0, autoclear = 0;
  uint32_t refcount_order = 4;
  Compression compression = Compression::kZlib;

  std::string backing_file;
  std::string backing_format;
  std::string data_file;
  uint32_t bitmap_count = 0;
  uint64_t bitmaps_size = 0, bitmaps_offset = 0;  // the directory; 0: none
  uint64_t crypto_offset = 0, crypto_bytes = 0;   // the LUKS header; 0: none
  std::vector<Extension> others;                  // kept as they are

  bool has_data_file() const { return incompatible & kDataFile; }
  bool extended_l2() const { return incompatible & kExtendedL2; }
};

// Reads a header from the beginning of a file: the first cluster, or the whole file if that is
// shorter. Checks all that can be told without the rest of the file.
Result<Header> ParseHeader(std::span<const uint8_t> bytes);
// How long the first cluster is by the first 24 bytes; 0: no qcow2.
uint64_t FirstClusterBytes(std::span<const uint8_t> start);
// As the first cluster begins (at most that long). Error: it has no room for all of it.
Result<std::vector<uint8_t>> SerializeHeader(const Header& header);

// Sizes that follow from a header.
struct Geometry {
  Geometry() = default;
  explicit Geometry(const Header& header);

  uint32_t cluster_bits = 16;
  uint64_t cluster_size = 65536;
  uint32_t subclusters = 1;  // in a cluster: 1, or 32
  uint64_t subcluster_size = 65536;
  uint32_t l2_entry_bytes = 8;
  uint64_t l2_entries = 8192;      // in a table
  uint64_t l2_covers = 512 << 20;  // bytes of the disk
  uint32_t refcount_order = 4;
  uint64_t refblock_entries = 32768;
  uint64_t max_refcount = 65535;
  uint64_t slice_bytes = 4096;  // of tables, as they are cached and written
  uint32_t csize_shift = 54;    // where a compressed cluster's sector count begins

  uint64_t RoundUp(uint64_t bytes) const {
    return (bytes + cluster_size - 1) & ~(cluster_size - 1);
  }
  uint64_t InCluster(uint64_t offset) const { return offset & (cluster_size - 1); }
  uint64_t Clusters(uint64_t bytes) const { return RoundUp(bytes) >> cluster_bits; }
  uint64_t L1Entries(uint64_t size) const { return (size + l2_covers - 1) / l2_covers; }
};

// Entries of L1 and L2 tables.
constexpr uint64_t kCopied = uint64_t{1} << 63;  // the refcount is exactly one
constexpr uint64_t kPacked = uint64_t{1} << 62;  // the cluster is compressed
constexpr uint64_t kZeroFlag = 1;
constexpr uint64_t kOffsetMask = 0x00fffffffffffe00;
constexpr uint64_t kL1Reserved = 0x7f000000000001ff;
constexpr uint64_t kReftableMask = 0xfffffffffffffe00;

// Refcounts in a block of them: entry `index`, 1 << `order` bits.
uint64_t GetRefcount(const uint8_t* block, uint32_t order, uint64_t index);
void SetRefcount(uint8_t* block, uint32_t order, uint64_t index, uint64_t value);

inline uint64_t LoadBe64(const uint8_t* at) {
  uint64_t value;
  __builtin_memcpy(&value, at, 8);
  return __builtin_bswap64(value);
}
inline void StoreBe64(uint8_t* at, uint64_t value) {
  value = __builtin_bswap64(value);
  __builtin_memcpy(at, &value, 8);
}

}  // namespace kvartz::block::qcow2
