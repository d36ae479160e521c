#include "block/formats/qcow2/create.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "block/fiber_io.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/graph.h"

namespace kvartz::block::qcow2 {
namespace {

Result<> CheckCombinations(const Header& header) {
  auto bad = [](const std::string& what) { return Fail(ErrorCode::kInvalid, what); };
  if (header.version < 3) {
    if (header.refcount_order != 4) return bad("refcount_bits other than 16 need compat=1.1");
    if (header.compatible & kLazyRefcounts) return bad("lazy_refcounts needs compat=1.1");
    if (header.has_data_file()) return bad("data_file needs compat=1.1");
    if (header.extended_l2()) return bad("extended_l2 needs compat=1.1");
    if (header.compression != Compression::kZlib)
      return bad("compression_type other than zlib needs compat=1.1");
  }
  if (header.extended_l2() && header.cluster_bits < 14)
    return bad("extended_l2 needs a cluster_size of 16384 or more");
  if ((header.autoclear & kRawExternal) && !header.has_data_file())
    return bad("data_file_raw needs data_file");
  if ((header.autoclear & kRawExternal) && !header.backing_file.empty())
    return bad("backing_file and data_file_raw can't be used together");
  Geometry geo(header);
  if (geo.L1Entries(header.size) * 8 > kMaxL1Bytes) {
    return bad(fmt::format("a size of {} bytes is too large for clusters of {} bytes", header.size,
                           geo.cluster_size));
  }
  return {};
}

// Header, refcount table and one refcount block: an image of size 0.
Result<> WriteEmptyImage(Node& file, Header& header) {
  uint64_t cluster_size = uint64_t{1} << header.cluster_bits;
  header.reftable_offset = cluster_size;
  header.reftable_clusters = 1;
  Header empty = header;
  empty.size = 0;
  std::vector<uint8_t> bytes = TRY(SerializeHeader(empty));
  bytes.resize(3 * cluster_size);
  StoreBe64(&bytes[cluster_size], 2 * cluster_size);
  for (uint64_t cluster = 0; cluster < 3; cluster++)
    SetRefcount(&bytes[2 * cluster_size], header.refcount_order, cluster, 1);
  return WriteExactly(file, 0, bytes);
}

}  // namespace

Result<Header> HeaderOf(Options& options) {
  Header header;
  uint64_t cluster_size = TRY(options.TakeSize("cluster_size", 65536));
  if (!std::has_single_bit(cluster_size) || cluster_size < (1u << kMinClusterBits) ||
      cluster_size > (1u << kMaxClusterBits)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("cluster_size={}: it is a power of two from 512 to 2M", cluster_size));
  }
  header.cluster_bits = static_cast<uint32_t>(std::countr_zero(cluster_size));
  std::string compat = options.Take("compat", "1.1");
  if (compat != "0.10" && compat != "v2" && compat != "1.1" && compat != "v3")
    return Fail(ErrorCode::kInvalid, fmt::format("compat={}: it is 0.10 or 1.1", compat));
  header.version = compat == "0.10" || compat == "v2" ? 2 : 3;
  std::string compression = options.Take("compression_type", "zlib");
  if (compression != "zlib" && compression != "zstd") {
    return Fail(ErrorCode::kInvalid,
                fmt::format("compression_type={}: it is zlib or zstd", compression));
  }
  if (compression == "zstd") {
    header.compression = Compression::kZstd;
    header.incompatible |= kCompression;
  }
  header.data_file = options.Take("data_file", "");
  if (!header.data_file.empty()) header.incompatible |= kDataFile;
  if (TRY(options.TakeBool("data_file_raw", false))) header.autoclear |= kRawExternal;
  if (TRY(options.TakeBool("extended_l2", false))) header.incompatible |= kExtendedL2;
  if (TRY(options.TakeBool("lazy_refcounts", false))) header.compatible |= kLazyRefcounts;
  uint64_t bits = TRY(options.TakeNumber("refcount_bits", 16));
  if (!std::has_single_bit(bits) || bits > 64) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("refcount_bits={}: it is a power of two from 1 to 64", bits));
  }
  header.refcount_order = static_cast<uint32_t>(std::countr_zero(bits));
  header.backing_file = options.Take("backing_file", "");
  header.backing_format = options.Take("backing_fmt", "");
  header.size = (TRY(options.TakeSize("size", 0)) + 511) / 512 * 512;
  TRY(CheckCombinations(header));
  return header;
}

Result<> Create(const OpenEnv& env, const std::string& filename, Options& options) {
  std::optional<NewEncryption> encrypt = TRY(TakeNewEncryption(env, options));
  Preallocation preallocation = TRY(ParsePreallocation(options.Take("preallocation", "off")));
  Header header = TRY(HeaderOf(options));
  if (preallocation != Preallocation::kOff && !header.backing_file.empty() &&
      !header.extended_l2()) {
    return Fail(ErrorCode::kInvalid,
                "backing_file and preallocation can only be used together with extended_l2=on");
  }
  if (encrypt) {
    if (header.autoclear & kRawExternal)
      return Fail(ErrorCode::kInvalid, "data_file_raw and encryption can't be used together");
    if (preallocation != Preallocation::kOff && header.version < 3)
      return Fail(ErrorCode::kInvalid, "preallocation of encrypted images needs compat=1.1");
  }
  uint64_t size = header.size;
  NodePtr data;
  if (header.has_data_file()) {
    data = TRY(CreateFile(env, header.data_file));
    if (header.autoclear & kRawExternal) TRY(data->Resize({.size = size}));
  }
  NodePtr file = TRY(CreateFile(env, filename));
  TRY(WriteEmptyImage(*file, header));
  header.size = 0;
  auto image = std::make_shared<Qcow2Node>(file, data, header, NodeOptions{}, kDefaultCacheBytes);
  TRY(image->Load());
  if (encrypt) {
    Result<> encrypted = Encrypt(*image, *encrypt);
    if (!encrypted) {
      (void)image->Close();
      return encrypted;
    }
  }
  Result<> sized = image->Resize({.size = size, .preallocation = preallocation});
  Result<> closed = image->Close();
  return sized ? closed : sized;
}

// Of the source's persistent bitmaps, with their tables and directory.
static uint64_t BitmapsSize(const Geometry& geo, Node& source) {
  constexpr uint64_t kDirectoryEntryBytes = 24;
  uint64_t bytes = 0, directory = 0;
  for (const BitmapInfo& bitmap : source.bitmaps()->List()) {
    if (!bitmap.persistent || bitmap.in_use) continue;
    uint64_t bits = (source.size_bytes() + bitmap.granularity - 1) / bitmap.granularity;
    uint64_t data = geo.RoundUp((bits + 7) / 8);
    bytes += data + geo.RoundUp((data >> geo.cluster_bits) * 8);
    directory += (kDirectoryEntryBytes + bitmap.name.size() + 7) / 8 * 8;
  }
  return bytes + geo.RoundUp(directory);
}

Result<MeasureResult> Measure(Options& options, Node* source) {
  uint64_t encrypt_bytes = TRY(MeasureEncryption(options));
  Preallocation preallocation = TRY(ParsePreallocation(options.Take("preallocation", "off")));
  if (source && !options.Has("size")) options.Set("size", std::to_string(source->size_bytes()));
  Header header = TRY(HeaderOf(options));
  Geometry geo(header);
  uint64_t data = geo.RoundUp(header.size);
  // Clusters of the guest that have contents of their own.
  bool in_advance =
      preallocation == Preallocation::kFalloc || preallocation == Preallocation::kFull;
  uint64_t used = in_advance ? data : 0;
  for (uint64_t at = 0; source && used < data && at < source->size_bytes();) {
    ChainExtent extent = TRY(StatusAbove(*source, nullptr, at, source->size_bytes() - at));
    uint64_t end = at + extent.extent.length;
    if (extent.extent.data && !extent.extent.zero)
      used += geo.RoundUp(end) - (at & ~(geo.cluster_size - 1));
    at = extent.extent.data && !extent.extent.zero ? std::max(end, geo.RoundUp(end)) : end;
  }
  auto metadata = [&](uint64_t in_file) {
    uint64_t l1 = geo.RoundUp(geo.L1Entries(data) * 8);
    uint64_t l2 = geo.L1Entries(data) * geo.cluster_size;
    uint64_t base = geo.cluster_size + l1 + l2 + in_file;
    // Refcount blocks and their table count themselves.
    uint64_t blocks = 0, table = 1;
    for (int round = 0; round < 8; round++) {
      uint64_t clusters = (base >> geo.cluster_bits) + blocks + table;
      blocks = (clusters + geo.refblock_entries - 1) / geo.refblock_entries;
      table = geo.Clusters(blocks * 8);
    }
    return base - in_file + ((blocks + table) << geo.cluster_bits);
  };
  uint64_t full = header.has_data_file() ? 0 : data;
  used = header.has_data_file() ? 0 : std::min(used, data);
  encrypt_bytes = geo.RoundUp(encrypt_bytes);
  MeasureResult result = {.required = metadata(full) + used + encrypt_bytes,
                          .fully_allocated = metadata(full) + full + encrypt_bytes};
  if (source && source->bitmaps()) {
    result.has_bitmaps = true;
    result.bitmaps = BitmapsSize(geo, *source);
  }
  return result;
}

}  // namespace kvartz::block::qcow2
