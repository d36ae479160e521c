// What changes an image as a whole without touching what the guest sees.
#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "block/driver.h"
#include "block/fiber_io.h"
#include "block/formats/qcow2/create.h"
#include "block/formats/qcow2/editor.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/snapshots.h"

namespace kvartz::block::qcow2 {
namespace {

Result<> Written(const Node& node, int rc) {
  if (rc == 0) return {};
  return Fail(ErrnoError(-rc, fmt::format("cannot write the tables of '{}'", node.name())));
}

Result<> CheckWritable(const Node& node) {
  if (!node.read_only()) return {};
  return Fail(ErrnoError(EROFS, fmt::format("cannot write '{}'", node.name())));
}

// Version 2 has no clusters that are zeros without being written.
Result<> ExpandZeros(Qcow2Node& node, const ProgressFn& progress) {
  uint64_t size = node.size_bytes();
  for (uint64_t at = 0; at < size;) {
    Extent extent = TRY(node.Status(at, size - at));
    uint64_t length = std::min(extent.length, uint64_t{16} << 20);
    if (extent.allocated && extent.zero) TRY(Written(node, node.ExpandZeroClusters(at, length)));
    at += length;
    if (progress) progress(at, size);
  }
  return {};
}

Result<> Downgrade(Qcow2Node& node, const ProgressFn& progress) {
  Metadata& meta = node.metadata();
  const Header& header = meta.header;
  auto refuse = [&](const char* what) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("'{}': compat=0.10 has no {}", node.name(), what));
  };
  if (header.refcount_order != 4) return refuse("refcount_bits other than 16");
  if (header.has_data_file()) return refuse("external data file");
  if (header.extended_l2()) return refuse("extended L2 entries");
  if (header.compression != Compression::kZlib) return refuse("compression type zstd");
  if (header.bitmap_count > 0 || !node.bitmaps()->List().empty()) return refuse("bitmaps");
  if (!node.snapshots()->List().empty()) {
    return Fail(ErrorCode::kUnsupported,
                "not supported yet: compat=0.10 while there are snapshots");
  }
  TRY(ExpandZeros(node, progress));
  meta.header.compatible &= ~kLazyRefcounts;
  TRY(Written(node, meta.CommitAll(true)));
  Header old = meta.header;
  meta.header.version = 2;
  meta.header.incompatible = meta.header.compatible = meta.header.autoclear = 0;
  int rc = meta.WriteHeader();
  if (rc != 0) meta.header = old;
  return Written(node, rc);
}

}  // namespace

// Within [offset, offset + length), which are clusters that read as zeros: written out, or given up
// where nothing is below.
int Qcow2Node::ExpandZeroClusters(uint64_t offset, uint64_t length) {
  const Geometry& geo = meta_->geometry();
  uint64_t first = offset >> geo.cluster_bits, end = geo.Clusters(offset + length);
  for (uint64_t cluster = first; cluster < end; cluster++) {
    uint64_t guest = cluster << geo.cluster_bits;
    if (StandsOnAnother()) {
      if (int rc = WriteZerosOut(guest, std::min(geo.cluster_size, size_bytes_ - guest))) return rc;
    } else if (int rc = DropClusters(cluster, cluster + 1)) {
      return rc;
    }
  }
  return 0;
}

Result<> Editor::ChangeHeader(const std::function<void(Header&)>& change) {
  Metadata& meta = node_.metadata();
  Header old = meta.header;
  change(meta.header);
  Result<std::vector<uint8_t>> fits = SerializeHeader(meta.header);
  int rc = fits ? meta.WriteHeader() : 0;
  if (!fits || rc != 0) meta.header = std::move(old);
  if (!fits) return Fail(std::move(fits).error());
  return Written(node_, rc);
}

Result<> Editor::RecordBacking(const std::string& filename, const std::string& format) {
  TRY(CheckWritable(node_));
  if (filename.size() > kMaxBackingName)
    return Fail(ErrorCode::kInvalid, "the backing file's name is longer than 1023 bytes");
  if (!filename.empty() && (node_.metadata().header.autoclear & kRawExternal))
    return Fail(ErrorCode::kInvalid, "backing_file and data_file_raw can't be used together");
  return ChangeHeader([&](Header& header) {
    header.backing_file = filename;
    header.backing_format = filename.empty() ? "" : format;
  });
}

Result<> Editor::MakeEmpty() {
  TRY(CheckWritable(node_));
  Metadata& meta = node_.metadata();
  const Geometry& geo = meta.geometry();
  uint64_t clusters = geo.Clusters(node_.size_bytes());
  TRY(Written(node_, node_.DropClusters(0, clusters)));
  TRY(Written(node_, meta.Commit()));
  for (uint64_t index = 0; index < geo.L1Entries(node_.size_bytes()); index++) {
    uint64_t table = meta.l1()[index] & kOffsetMask;
    if (table == 0) continue;
    meta.FreeLater(table, 1);
    meta.l1()[index] = 0;
    meta.MarkL1Dirty(index);
  }
  if (Node* data = node_.data_file()) {
    TRY(data->Resize({.size = 0}));
    TRY(data->Resize({.size = node_.size_bytes()}));
  }
  TRY(Written(node_, meta.CommitAll(false)));
  return Written(node_, meta.TrimEnd());
}

Result<> Editor::Amend(Options& options, const ProgressFn& progress) {
  TRY(CheckWritable(node_));
  Metadata& meta = node_.metadata();
  Header& header = meta.header;
  for (const char* fixed : {"cluster_size", "extended_l2", "preallocation", "compression_type",
                            "encrypt.format", "encrypt.key-secret"}) {
    if (options.Has(fixed)) {
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("{} can't be changed: convert to a new image", fixed));
    }
  }
  bool force = TRY(options.TakeBool("force", false));
  if (options.HasBelow("encrypt")) {
    Options keys = options.TakeBelow("encrypt");
    if (!options.empty())
      return Fail(ErrorCode::kInvalid, "key slots are changed alone, without other options");
    if (!node_.encryption()) return Fail(ErrorCode::kInvalid, "the image isn't encrypted");
    TRY(node_.encryption()->Amend(*node_.file(), keys, force));
    if (progress) progress(1, 1);
    return {};
  }
  std::string compat = options.Take("compat", header.version == 2 ? "0.10" : "1.1");
  if (compat != "0.10" && compat != "v2" && compat != "1.1" && compat != "v3")
    return Fail(ErrorCode::kInvalid, fmt::format("compat={}: it is 0.10 or 1.1", compat));
  uint32_t version = compat == "0.10" || compat == "v2" ? 2 : 3;
  bool was_lazy = (header.compatible & kLazyRefcounts) != 0;
  bool lazy = TRY(options.TakeBool("lazy_refcounts", was_lazy && version == 3));
  uint64_t bits = TRY(options.TakeNumber("refcount_bits", uint64_t{1} << header.refcount_order));
  if (!std::has_single_bit(bits) || bits > 64) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("refcount_bits={}: it is a power of two from 1 to 64", bits));
  }
  if (version == 2 && (lazy || bits != 16))
    return Fail(ErrorCode::kInvalid, "lazy_refcounts and refcount_bits need compat=1.1");
  if (options.Take("backing_file", header.backing_file) != header.backing_file ||
      options.Take("backing_fmt", header.backing_format) != header.backing_format)
    return Fail(ErrorCode::kUnsupported, "amend can't change the backing file: use rebase");
  std::string data_file = options.Take("data_file", header.data_file);
  if (data_file != header.data_file && (!header.has_data_file() || data_file.empty()))
    return Fail(ErrorCode::kUnsupported,
                "an image has an external data file from its start, or not");
  bool was_raw = (header.autoclear & kRawExternal) != 0;
  bool raw = TRY(options.TakeBool("data_file_raw", was_raw));
  if (raw && !was_raw)
    return Fail(ErrorCode::kUnsupported, "data_file_raw can't be set for an image that is there");
  uint64_t size = TRY(options.TakeSize("size", node_.size_bytes()));
  TRY(options.RefuseRest("amend of qcow2", {"compat", "data_file", "data_file_raw",
                                            "lazy_refcounts", "refcount_bits", "size"}));
  if (version == 3 && header.version == 2) {
    TRY(Written(node_, meta.CommitAll(false)));
    header.version = 3;
    if (int rc = meta.WriteHeader()) {
      header.version = 2;
      return Written(node_, rc);
    }
  }
  auto order = static_cast<uint32_t>(std::countr_zero(bits));
  if (order != header.refcount_order) TRY(ChangeRefcountOrder(order));
  if (lazy != was_lazy) {
    TRY(Written(node_, meta.CommitAll(true)));
    header.compatible ^= kLazyRefcounts;
    TRY(Written(node_, meta.WriteHeader()));
  }
  if (data_file != header.data_file || raw != was_raw) {
    TRY(ChangeHeader([&](Header& changed) {
      changed.data_file = data_file;
      if (!raw) changed.autoclear &= ~kRawExternal;
    }));
  }
  if (size != node_.size_bytes()) TRY(node_.Resize({.size = (size + 511) / 512 * 512}));
  if (version == 2 && header.version == 3) TRY(Downgrade(node_, progress));
  if (progress) progress(1, 1);
  return {};
}

}  // namespace kvartz::block::qcow2
