#include "block/formats/qcow2/layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace kvartz::block::qcow2 {
namespace {

template <typename... Values>
std::unexpected<Error> Bad(fmt::format_string<Values...> format, Values&&... values) {
  return Fail(ErrorCode::kInvalid,
              "broken qcow2 header: " + fmt::format(format, std::forward<Values>(values)...));
}

// A table of `bytes` at `offset`: aligned, and not beyond what entries can address.
bool GoodTable(uint64_t offset, uint64_t bytes, uint64_t cluster_size) {
  return offset % cluster_size == 0 && offset < kMaxImageBytes && bytes <= kMaxImageBytes - offset;
}

Result<> ParseVersion3(const HeaderDisk& disk, Header& header) {
  header.incompatible = disk.incompatible_features;
  header.compatible = disk.compatible_features;
  header.autoclear = disk.autoclear_features;
  header.refcount_order = disk.refcount_order;
  uint32_t length = disk.header_length;
  if (length < kHeaderV3MinBytes) return Bad("its length {} is too small", length);
  if (length % 8 != 0) return Bad("its length {} is no multiple of 8", length);
  if (header.refcount_order > 6) return Bad("refcounts of 2^{} bits", header.refcount_order);
  if (uint64_t unknown = header.incompatible & ~kKnownIncompatible) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("qcow2 image uses incompatible features {:#x}, which are not known "
                            "here",
                            unknown));
  }
  uint8_t compression = length > kHeaderV3MinBytes ? disk.compression_type : 0;
  if (compression > 1) {
    return Fail(
        ErrorCode::kUnsupported,
        fmt::format("qcow2 image uses compression type {}, which is not known here", compression));
  }
  header.compression = static_cast<Compression>(compression);
  if ((compression != 0) != ((header.incompatible & kCompression) != 0))
    return Bad("compression type {} contradicts the incompatible features", compression);
  return {};
}

Result<> CheckTables(const Header& header) {
  uint64_t cluster_size = uint64_t{1} << header.cluster_bits;
  if (!GoodTable(header.reftable_offset, uint64_t{header.reftable_clusters} * cluster_size,
                 cluster_size) ||
      uint64_t{header.reftable_clusters} * cluster_size > kMaxReftableBytes) {
    return Bad("refcount table of {} clusters at {:#x}", header.reftable_clusters,
               header.reftable_offset);
  }
  uint64_t l1_bytes = uint64_t{header.l1_entries} * 8;
  if (l1_bytes > kMaxL1Bytes)
    return Bad("an L1 table of {} entries is too large", header.l1_entries);
  if (!GoodTable(header.l1_offset, l1_bytes, cluster_size))
    return Bad("L1 table at {:#x}", header.l1_offset);
  if (header.snapshot_count > kMaxSnapshots) return Bad("{} snapshots", header.snapshot_count);
  if (header.snapshot_count > 0 &&
      !GoodTable(header.snapshots_offset, header.snapshot_count, cluster_size))
    return Bad("snapshot table at {:#x}", header.snapshots_offset);
  if ((header.crypto_offset != 0) != (header.crypt == Crypt::kLuks))
    return Bad("encryption by LUKS and the place of its header don't go together");
  if (header.crypto_bytes > kMaxCryptoBytes ||
      !GoodTable(header.crypto_offset, header.crypto_bytes, cluster_size))
    return Bad("LUKS header of {} bytes at {:#x}", header.crypto_bytes, header.crypto_offset);
  if (header.size > uint64_t{INT64_MAX} - cluster_size) return Bad("a size of {}", header.size);
  if (Geometry(header).L1Entries(header.size) > header.l1_entries)
    return Bad("an L1 table of {} entries is too small for {} bytes", header.l1_entries,
               header.size);
  return {};
}

Result<> ParseExtension(uint32_t type, std::span<const uint8_t> data, Header& header) {
  std::string text(data.begin(), data.end());
  switch (type) {
    case kBackingFormat:
      if (text.size() > 15) return Bad("a backing format name of {} bytes", text.size());
      header.backing_format = std::move(text);
      return {};
    case kDataFileName:
      if (text.size() > kMaxBackingName) return Bad("a data file name of {} bytes", text.size());
      header.data_file = std::move(text);
      return {};
    case kFeatureNames:
      return {};  // written anew
    case kBitmapsExtension: {
      BitmapsExtensionDisk disk;
      if (data.size() != sizeof(disk)) return Bad("a bitmaps extension of {} bytes", data.size());
      std::memcpy(&disk, data.data(), sizeof(disk));
      if (disk.nb_bitmaps > kMaxBitmaps || disk.directory_size > kMaxBitmapDirectoryBytes) {
        return Bad("{} bitmaps in a directory of {} bytes", uint32_t{disk.nb_bitmaps},
                   uint64_t{disk.directory_size});
      }
      header.bitmap_count = disk.nb_bitmaps;
      header.bitmaps_size = disk.directory_size;
      header.bitmaps_offset = disk.directory_offset;
      return {};
    }
    case kCryptoHeader: {
      CryptoExtensionDisk disk;
      if (data.size() != sizeof(disk)) return Bad("a crypto extension of {} bytes", data.size());
      std::memcpy(&disk, data.data(), sizeof(disk));
      header.crypto_offset = disk.offset;
      header.crypto_bytes = disk.bytes;
      return {};
    }
    default:
      header.others.push_back({type, {data.begin(), data.end()}});
      return {};
  }
}

void Append(std::vector<uint8_t>& out, uint32_t type, std::span<const uint8_t> data) {
  Be32 head[2] = {type, static_cast<uint32_t>(data.size())};
  const auto* bytes = reinterpret_cast<const uint8_t*>(head);
  out.insert(out.end(), bytes, bytes + sizeof(head));
  out.insert(out.end(), data.begin(), data.end());
  out.resize((out.size() + 7) / 8 * 8);
}

std::span<const uint8_t> BytesOf(const std::string& text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

// For programs that don't know a feature: what it is called.
std::vector<uint8_t> FeatureNames() {
  struct Row {
    uint8_t type, bit;
    const char* name;
  };
  constexpr Row kRows[] = {
      {0, 0, "dirty bit"},        {0, 1, "corrupt bit"},         {0, 2, "external data file"},
      {0, 3, "compression type"}, {0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"},
      {2, 0, "bitmaps"},          {2, 1, "raw external data"},
  };
  std::vector<uint8_t> table;
  for (const Row& row : kRows) {
    size_t at = table.size();
    table.resize(at + 48);
    table[at] = row.type;
    table[at + 1] = row.bit;
    std::memcpy(&table[at + 2], row.name, std::strlen(row.name));
  }
  return table;
}

}  // namespace

uint64_t FirstClusterBytes(std::span<const uint8_t> start) {
  if (start.size() < 24) return 0;
  Be32 words[6];
  std::memcpy(words, start.data(), sizeof(words));
  uint32_t cluster_bits = words[5];
  if (words[0] != kMagic || cluster_bits < kMinClusterBits || cluster_bits > kMaxClusterBits)
    return 0;
  return uint64_t{1} << cluster_bits;
}

Result<Header> ParseHeader(std::span<const uint8_t> bytes) {
  HeaderDisk disk = {};
  if (bytes.size() >= kHeaderV2Bytes)
    std::memcpy(&disk, bytes.data(), std::min(bytes.size(), sizeof(disk)));
  if (disk.magic != kMagic) return Fail(ErrorCode::kInvalid, "this is no qcow2 image");
  Header header;
  header.version = disk.version;
  if (header.version != 2 && header.version != 3) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("qcow2 version {} is not known here (2 and 3 are)", header.version));
  }
  header.cluster_bits = disk.cluster_bits;
  if (header.cluster_bits < kMinClusterBits || header.cluster_bits > kMaxClusterBits)
    return Bad("clusters of 2^{} bytes", header.cluster_bits);
  uint64_t cluster_size = uint64_t{1} << header.cluster_bits;
  bytes = bytes.first(std::min<uint64_t>(bytes.size(), cluster_size));
  header.size = disk.size;
  if (disk.crypt_method > 2) return Bad("encryption method {}", uint32_t{disk.crypt_method});
  header.crypt = static_cast<Crypt>(uint32_t{disk.crypt_method});
  header.l1_entries = disk.l1_size;
  header.l1_offset = disk.l1_table_offset;
  header.reftable_offset = disk.refcount_table_offset;
  header.reftable_clusters = disk.refcount_table_clusters;
  header.snapshot_count = disk.nb_snapshots;
  header.snapshots_offset = disk.snapshots_offset;
  uint64_t at = kHeaderV2Bytes;
  if (header.version == 3) {
    if (bytes.size() < kHeaderV3MinBytes) return Bad("it is cut short");
    TRY(ParseVersion3(disk, header));
    at = disk.header_length;
  }
  if (at > bytes.size()) return Bad("it is longer than the first cluster");
  if (header.extended_l2() && header.cluster_bits < 14)
    return Bad("extended L2 entries with clusters of {} bytes", cluster_size);

  uint64_t end = bytes.size();
  if (uint64_t name = disk.backing_file_offset; name != 0) {
    uint32_t length = disk.backing_file_size;
    if (length > kMaxBackingName) return Bad("a backing file name of {} bytes", length);
    if (name < at || name > bytes.size() || length > bytes.size() - name)
      return Bad("the backing file's name is beyond the first cluster");
    header.backing_file.assign(reinterpret_cast<const char*>(bytes.data()) + name, length);
    end = name;
  }
  while (at + 8 <= end) {
    Be32 head[2];
    std::memcpy(head, bytes.data() + at, 8);
    uint32_t type = head[0], length = head[1];
    if (type == kEnd) break;
    at += 8;
    if (length > end - at) return Bad("extension {:#x} of {} bytes is too long", type, length);
    TRY(ParseExtension(type, bytes.subspan(at, length), header));
    at += (uint64_t{length} + 7) / 8 * 8;
  }
  TRY(CheckTables(header));
  return header;
}

Result<std::vector<uint8_t>> SerializeHeader(const Header& header) {
  HeaderDisk disk = {};
  disk.magic = kMagic;
  disk.version = header.version;
  disk.cluster_bits = header.cluster_bits;
  disk.size = header.size;
  disk.crypt_method = static_cast<uint32_t>(header.crypt);
  disk.l1_size = header.l1_entries;
  disk.l1_table_offset = header.l1_offset;
  disk.refcount_table_offset = header.reftable_offset;
  disk.refcount_table_clusters = header.reftable_clusters;
  disk.nb_snapshots = header.snapshot_count;
  disk.snapshots_offset = header.snapshots_offset;
  size_t length = kHeaderV2Bytes;
  if (header.version == 3) {
    disk.incompatible_features = header.incompatible;
    disk.compatible_features = header.compatible;
    disk.autoclear_features = header.autoclear;
    disk.refcount_order = header.refcount_order;
    disk.compression_type = static_cast<uint8_t>(header.compression);
    length = sizeof(disk);
    disk.header_length = static_cast<uint32_t>(length);
  }
  std::vector<uint8_t> out(length);
  if (!header.backing_format.empty()) Append(out, kBackingFormat, BytesOf(header.backing_format));
  if (!header.data_file.empty()) Append(out, kDataFileName, BytesOf(header.data_file));
  if (header.crypto_offset != 0) {
    CryptoExtensionDisk crypto = {};
    crypto.offset = header.crypto_offset;
    crypto.bytes = header.crypto_bytes;
    Append(out, kCryptoHeader, {reinterpret_cast<const uint8_t*>(&crypto), sizeof(crypto)});
  }
  for (const Extension& extension : header.others) Append(out, extension.type, extension.data);
  if (header.bitmap_count > 0) {
    BitmapsExtensionDisk bitmaps = {};
    bitmaps.nb_bitmaps = header.bitmap_count;
    bitmaps.directory_size = header.bitmaps_size;
    bitmaps.directory_offset = header.bitmaps_offset;
    Append(out, kBitmapsExtension, {reinterpret_cast<const uint8_t*>(&bitmaps), sizeof(bitmaps)});
  }
  uint64_t cluster_size = uint64_t{1} << header.cluster_bits;
  uint64_t name_bytes = header.backing_file.size();
  std::vector<uint8_t> names = FeatureNames();
  if (header.version == 3 && out.size() + 8 + names.size() + 8 + name_bytes <= cluster_size)
    Append(out, kFeatureNames, names);
  Append(out, kEnd, {});
  if (name_bytes > 0) {
    disk.backing_file_offset = out.size();
    disk.backing_file_size = static_cast<uint32_t>(name_bytes);
    out.insert(out.end(), header.backing_file.begin(), header.backing_file.end());
  }
  if (out.size() > cluster_size || name_bytes > kMaxBackingName) {
    return Fail(ErrorCode::kNoSpace,
                fmt::format("the names of backing and data file don't fit into the header's {} "
                            "bytes: use shorter ones, or larger clusters",
                            cluster_size));
  }
  std::memcpy(out.data(), &disk, length);
  return out;
}

Geometry::Geometry(const Header& header)
    : cluster_bits(header.cluster_bits),
      cluster_size(uint64_t{1} << header.cluster_bits),
      subclusters(header.extended_l2() ? 32 : 1),
      subcluster_size(cluster_size / subclusters),
      l2_entry_bytes(header.extended_l2() ? 16 : 8),
      l2_entries(cluster_size / l2_entry_bytes),
      l2_covers(l2_entries * cluster_size),
      refcount_order(header.refcount_order),
      refblock_entries((cluster_size * 8) >> header.refcount_order),
      // 64-bit ones are stored as numbers with a sign by some.
      max_refcount(header.refcount_order == 6 ? uint64_t{INT64_MAX}
                                              : (uint64_t{1} << (1u << header.refcount_order)) - 1),
      slice_bytes(std::min<uint64_t>(cluster_size, 4096)),
      csize_shift(62 - (header.cluster_bits - 8)) {}

uint64_t GetRefcount(const uint8_t* block, uint32_t order, uint64_t index) {
  switch (order) {
    case 0:
    case 1:
    case 2: {
      uint32_t bits = 1u << order;
      uint32_t per_byte = 8 / bits;
      return block[index / per_byte] >> (bits * (index % per_byte)) & ((1u << bits) - 1);
    }
    case 3:
      return block[index];
    case 4:
      return uint64_t{block[index * 2]} << 8 | block[index * 2 + 1];
    case 5: {
      uint32_t value;
      std::memcpy(&value, block + index * 4, 4);
      return __builtin_bswap32(value);
    }
    default:
      return LoadBe64(block + index * 8);
  }
}

void SetRefcount(uint8_t* block, uint32_t order, uint64_t index, uint64_t value) {
  switch (order) {
    case 0:
    case 1:
    case 2: {
      uint32_t bits = 1u << order;
      uint32_t per_byte = 8 / bits;
      uint32_t shift = bits * static_cast<uint32_t>(index % per_byte);
      uint32_t mask = ((1u << bits) - 1) << shift;
      uint8_t& byte = block[index / per_byte];
      byte = static_cast<uint8_t>((byte & ~mask) | (static_cast<uint32_t>(value) << shift & mask));
      return;
    }
    case 3:
      block[index] = static_cast<uint8_t>(value);
      return;
    case 4:
      block[index * 2] = static_cast<uint8_t>(value >> 8);
      block[index * 2 + 1] = static_cast<uint8_t>(value);
      return;
    case 5: {
      uint32_t swapped = __builtin_bswap32(static_cast<uint32_t>(value));
      std::memcpy(block + index * 4, &swapped, 4);
      return;
    }
    default:
      StoreBe64(block + index * 8, value);
  }
}

}  // namespace kvartz::block::qcow2
