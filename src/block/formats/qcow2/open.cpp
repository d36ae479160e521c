// Opening, closing and describing qcow2 images.
#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "base/check.h"
#include "base/log.h"
#include "block/backing.h"
#include "block/dirty_bitmap.h"
#include "block/fiber_io.h"
#include "block/formats/qcow2/bitmaps.h"
#include "block/formats/qcow2/create.h"
#include "block/formats/qcow2/editor.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/snapshots.h"
#include "block/graph.h"

namespace kvartz::block::qcow2 {
namespace {

constexpr unsigned kMaxWorkers = 4;

Result<Header> ReadHeader(Node& file) {
  std::vector<uint8_t> start(std::min<uint64_t>(file.size_bytes(), 4096));
  TRY(ReadExactly(file, 0, start));
  uint64_t bytes = std::min(FirstClusterBytes(start), file.size_bytes());
  if (bytes <= start.size()) return ParseHeader(start);
  // Rarely is there anything beyond.
  Result<Header> header = ParseHeader(start);
  if (header) {
    HeaderDisk disk;
    std::copy_n(start.begin(), sizeof(disk), reinterpret_cast<uint8_t*>(&disk));
    if (disk.backing_file_offset != 0 || disk.version == 2 || disk.header_length < 2048)
      return header;
  }
  start.resize(bytes);
  TRY(ReadExactly(file, 0, start));
  return ParseHeader(start);
}

Result<> RefuseUnsupported(const Header& header, const NodeOptions& node, Node& file) {
  if (header.crypt == Crypt::kAes && !node.read_only && !node.no_io && !node.for_check) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("'{}' is encrypted by qcow2's old AES method, which is only read here: "
                            "convert it to encrypt.format=luks",
                            file.name()));
  }
  if ((header.incompatible & kCorrupt) && !node.read_only && !node.for_check) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}' is marked as corrupt: run kvartz img check -r all, or open it "
                            "read-only",
                            file.name()));
  }
  uint64_t unit = file.limits().request_alignment;
  if (uint64_t cluster_size = uint64_t{1} << header.cluster_bits; cluster_size < unit) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("clusters of {} bytes can't be used with direct I/O in units of {}: "
                            "use cache=writeback",
                            cluster_size, unit));
  }
  return {};
}

Result<NodePtr> OpenDataFile(const OpenEnv& env, const Header& header, const NodeOptions& node,
                             Options& options, Node& file) {
  NodeOptions below = node;
  below.grows = true;
  NodePtr data = TRY(OpenChild(env, options, "data-file", below));
  if (!header.has_data_file()) {
    if (data) return Fail(ErrorCode::kInvalid, "'data-file' is given, but the image has none");
    return nullptr;
  }
  if (data || node.no_io) return data;
  if (header.data_file.empty())
    return Fail(ErrorCode::kInvalid, "the image doesn't name its data file: give 'data-file'");
  if (!env.follow_data_file) {
    return Fail(ErrorCode::kPermission,
                fmt::format("'{}' keeps its data in '{}', which isn't followed: give 'data-file'",
                            file.name(), header.data_file));
  }
  Options named;
  named.Set("driver", "file");
  named.Set("filename", header.data_file);  // from the current directory, as QEMU does
  Result<NodePtr> opened = OpenNode(env, std::move(named), below);
  if (!opened) return Fail(std::move(opened).error().In("data file"));
  return opened;
}

int Probe(std::span<const uint8_t> head) {
  if (head.size() < 8) return 0;
  return LoadBe64(head.data()) >> 32 == kMagic && (head[7] == 2 || head[7] == 3) ? 100 : 0;
}

Result<NodePtr> Open(const OpenEnv& env, const NodeOptions& node, Options& options) {
  NodeOptions below = node;
  below.grows = true;
  NodePtr file = TRY(OpenChild(env, options, "file", below));
  if (!file) return Fail(ErrorCode::kInvalid, "qcow2 needs 'file'");
  Result<Header> read = ReadHeader(*file);
  if (!read) return Fail(std::move(read).error().In(fmt::format("'{}'", file->name())));
  Header header = std::move(*read);
  NodeOptions used = node;
  used.read_only |= file->read_only();
  TRY(RefuseUnsupported(header, used, *file));
  NodePtr data = TRY(OpenDataFile(env, header, used, options, *file));
  uint64_t cache = TRY(options.TakeSize("cache-size", kDefaultCacheBytes));
  cache = std::max<uint64_t>(TRY(options.TakeSize("l2-cache-size", cache)), 128 << 10);
  std::unique_ptr<Encryption> encryption = TRY(OpenEncryption(env, header, used, options, *file));
  auto image = std::make_shared<Qcow2Node>(std::move(file), std::move(data), header, used, cache);
  if (encryption) image->SetEncryption(std::move(encryption));
  Backing backing = TRY(
      TakeBacking(env, used, options, image->name(), header.backing_file, header.backing_format));
  if (backing.node) TRY(image->SetBacking(std::move(backing.node)));
  if (backing.wish) image->set_backing_wish(std::move(*backing.wish));
  if (std::optional<std::string> lazy = options.Take("lazy-refcounts")) {
    if (TRY(ParseBool(*lazy)) != ((header.compatible & kLazyRefcounts) != 0)) {
      return Fail(
          ErrorCode::kUnsupported,
          "not supported yet: lazy-refcounts other than the image's own (amend changes it)");
    }
  }
  TRY(options.RefuseRest(
      "qcow2", {"file", "backing", "data-file", "cache-size", "l2-cache-size", "lazy-refcounts"}));
  Result<> loaded = image->Load();
  if (!loaded) return Fail(std::move(loaded).error());
  return image;
}

const char* CompressionName(Compression type) {
  return type == Compression::kZstd ? "zstd" : "zlib";
}

}  // namespace

Qcow2Node::Qcow2Node(NodePtr file, NodePtr data_file, Header header, const NodeOptions& options,
                     uint64_t cache_bytes)
    : Node(file->loop(), file->name()),
      file_(std::move(file)),
      data_file_(std::move(data_file)),
      options_(options),
      workers_(loop(), kMaxWorkers) {
  size_bytes_ = header.size;
  read_only_ = options.read_only;
  limits_.request_alignment = std::max(file_->limits().request_alignment,
                                       data_file_ ? data_file_->limits().request_alignment : 1);
  limits_.write_cache = file_->limits().write_cache;
  meta_ = std::make_unique<Metadata>(*file_, data_file_.get(), std::move(header), cache_bytes);
  limits_.discard_granularity =
      !read_only_ ? static_cast<uint32_t>(meta_->geometry().cluster_size) : 0;
  snapshots_ = std::make_unique<Snapshots>(*this);
  bitmaps_ = std::make_unique<Bitmaps>(*this);
  editor_ = std::make_unique<Editor>(*this);
}

Qcow2Node::~Qcow2Node() = default;

void Qcow2Node::SetEncryption(std::unique_ptr<Encryption> encryption) {
  encryption_ = std::move(encryption);
  if (old_encryption()) return;
  const NodePtr& below = data_file_ ? data_file_ : file_;
  CryptNode::Layout layout = {.size = below->size_bytes(), .grows = below->grows()};
  crypt_ = std::make_unique<CryptNode>(below, encryption_->cipher, layout, read_only_);
  meta_->set_data_node(*crypt_);
}

SnapshotStore* Qcow2Node::snapshots() { return snapshots_.get(); }
BitmapStore* Qcow2Node::bitmaps() { return bitmaps_.get(); }
ImageEditor* Qcow2Node::editor() { return editor_.get(); }

Result<> Qcow2Node::Load() {
  if (!options_.no_io) TRY(meta_->Load(!read_only_));
  TRY(snapshots_->Load());
  if (options_.no_io) return bitmaps_->Load();
  if (read_only_ || options_.for_check) return bitmaps_->Load();
  // What later versions keep in step with the data and we don't know is no longer valid.
  constexpr uint64_t kKnown = kBitmapsValid | kRawExternal;
  if (meta_->header.autoclear & ~kKnown) {
    meta_->header.autoclear &= kKnown;
    if (int rc = meta_->WriteHeader()) return Fail(IoError(*file_, "write", 0, rc));
  }
  if (meta_->header.incompatible & kDirty) {
    KLOG(kWarn, "'{}' wasn't closed: it is repaired now", name());
    CheckResult result = TRY(editor_->Check(Repair::kAll, [](const std::string&) {}));
    if (result.corruptions + result.check_errors > 0) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("'{}' can't be repaired: run kvartz img check", name()));
    }
  }
  return bitmaps_->Load();
}

Result<> Qcow2Node::SetBacking(NodePtr backing) {
  backing_ = std::move(backing);
  if (backing_) {
    limits_.request_alignment =
        std::max(limits_.request_alignment, backing_->limits().request_alignment);
  }
  return {};
}

std::optional<BackingWish> Qcow2Node::TakeBackingWish() { return std::exchange(wish_, {}); }

Result<> Qcow2Node::Close() {
  Result<> result;
  if (!read_only_ && !options_.no_io) {
    result = bitmaps_->StoreAll();
    if (int rc = meta_->CommitAll(!options_.for_check); rc != 0 && result)
      result = Fail(ErrnoError(-rc, fmt::format("cannot write the tables of '{}'", name())));
  }
  Result<> below = Node::Close();
  return result ? below : result;
}

void Qcow2Node::set_size(uint64_t size) {
  size_bytes_ = meta_->header.size = size;
  for (const auto& bitmap : attached_bitmaps()) bitmap->Resize(size);
}

Result<> Qcow2Node::SetReadOnly(bool read_only) {
  if (read_only == read_only_) return {};
  if (read_only) {
    TRY(bitmaps_->StoreAll());
    if (int rc = meta_->CommitAll(true))
      return Fail(ErrnoError(-rc, fmt::format("cannot write the tables of '{}'", name())));
  } else if (meta_->header.incompatible & kCorrupt) {
    return Fail(ErrorCode::kInvalid, fmt::format("'{}' is marked as corrupt", name()));
  }
  if (!read_only && old_encryption()) return Unsupported("writing with its old AES method");
  TRY(file_->SetReadOnly(read_only));
  if (data_file_) TRY(data_file_->SetReadOnly(read_only));
  if (crypt_) TRY(crypt_->SetReadOnly(read_only));
  read_only_ = options_.read_only = read_only;
  limits_.discard_granularity =
      !read_only_ ? static_cast<uint32_t>(meta_->geometry().cluster_size) : 0;
  if (!read_only) {
    meta_->cache().DropAllClean();
    TRY(Load());
  }
  return {};
}

Result<> Qcow2Node::MoveTo(EventLoop& loop) {
  TRY(Node::MoveTo(loop));
  workers_.MoveTo(loop);
  return {};
}

Result<ImageInfo> Qcow2Node::Info() {
  const Header& header = meta_->header;
  ImageInfo info;
  info.format = driver();
  info.virtual_size = size_bytes_;
  info.cluster_size = meta_->geometry().cluster_size;
  info.encrypted = header.crypt != Crypt::kNone;
  info.dirty = (header.incompatible & kDirty) != 0;
  info.corrupt = (header.incompatible & kCorrupt) != 0;
  info.vm_state_offset = vm_state_offset();
  info.backing_filename = header.backing_file;
  if (!header.backing_file.empty())
    info.full_backing_filename = ResolveRelative(name(), header.backing_file);
  info.backing_format = header.backing_format;
  info.snapshots = snapshots_->List();
  auto add = [&](const char* field, InfoValue value) {
    info.specific.push_back({field, std::move(value)});
  };
  add("compat", {std::string(header.version == 2 ? "0.10" : "1.1")});
  add("compression-type", {std::string(CompressionName(header.compression))});
  if (header.version >= 3) {
    add("lazy-refcounts", {(header.compatible & kLazyRefcounts) != 0});
    add("refcount-bits", {uint64_t{1} << header.refcount_order});
    add("corrupt", {info.corrupt});
  } else {
    add("refcount-bits", {uint64_t{16}});
  }
  if (encryption_) add("encrypt", {encryption_->Describe()});
  if (header.version >= 3) {
    std::vector<BitmapInfo> bitmaps = bitmaps_->List();
    InfoValue::Array rows;
    for (const BitmapInfo& bitmap : bitmaps) {
      InfoValue::Array flags;
      if (bitmap.in_use) flags.push_back({std::string("in-use")});
      if (bitmap.enabled) flags.push_back({std::string("auto")});
      rows.push_back({InfoValue::Object{{"flags", {flags}},
                                        {"name", {bitmap.name}},
                                        {"granularity", {uint64_t{bitmap.granularity}}}}});
    }
    if (!rows.empty()) add("bitmaps", {rows});
    if (header.has_data_file()) {
      if (!header.data_file.empty()) add("data-file", {header.data_file});
      add("data-file-raw", {(header.autoclear & kRawExternal) != 0});
    }
    add("extended-l2", {header.extended_l2()});
  }
  return info;
}

}  // namespace kvartz::block::qcow2

namespace kvartz::block {

extern const Driver kQcow2Driver;
const Driver kQcow2Driver = {
    .name = "qcow2",
    .kind = Driver::Kind::kFormat,
    .probe = qcow2::Probe,
    .open = qcow2::Open,
    .create_options = qcow2::kCreateOptions,
    .create = qcow2::Create,
    .has_backing = true,
    .measure = qcow2::Measure,
    .can_compress = true,
    .amend_options = qcow2::kAmendOptions,
};

}  // namespace kvartz::block
