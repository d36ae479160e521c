// Format vmdk: VMware's images. Sparse and stream-optimized ones in one file, and flat or sparse
// extents that a descriptor file names.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "block/backing.h"
#include "block/fiber_io.h"
#include "block/formats/concat_node.h"
#include "block/formats/random_id.h"
#include "block/formats/vmdk/sparse.h"
#include "block/graph.h"

namespace kvartz::block {
namespace vmdk {
namespace {

constexpr uint64_t kGrainSectors = 128;
constexpr uint64_t kTableSectors = kEntriesPerTable * sizeof(Le32) / kSector;
constexpr uint64_t kDescriptorSectors = 20;
constexpr std::string_view kDescriptorStart = "# Disk DescriptorFile";

uint64_t RoundUp(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

int Probe(std::span<const uint8_t> head) {
  std::string_view text(reinterpret_cast<const char*>(head.data()), head.size());
  return text.starts_with("KDMV") || text.starts_with(kDescriptorStart) ? 100 : 0;
}

// An image may name files beside itself, and no others, unless its user says that it may.
Result<std::string> ExtentPath(const Node& file, const std::string& name, bool anywhere) {
  if (name.empty() || name == "." || name == "..")
    return Fail(ErrorCode::kInvalid, "VMDK: an extent has no file name");
  if (!anywhere && name.find('/') != std::string::npos) {
    return Fail(ErrorCode::kPermission,
                fmt::format("VMDK: extent '{}' is outside of the descriptor's directory; if you "
                            "trust the image, open it with follow-extents=on",
                            name));
  }
  if (name.starts_with('/')) return name;
  size_t slash = file.name().rfind('/');
  return slash == std::string::npos ? name : file.name().substr(0, slash + 1) + name;
}

Result<ConcatNode::Part> OpenExtent(const OpenEnv& env, const NodeOptions& node, const Node& file,
                                    const ExtentLine& line, bool anywhere) {
  bool flat = line.type == "FLAT" || line.type == "VMFS";
  if (line.access == "NOACCESS" || (!flat && line.type != "SPARSE"))
    return Fail(
        ErrorCode::kUnsupported,
        fmt::format("not supported yet: VMDK extents of type {} {}", line.access, line.type));
  NodeOptions below = node;
  below.grows = !flat;
  below.read_only = node.read_only || line.access == "RDONLY";
  Options options;
  options.Set("driver", "file");
  options.Set("filename", TRY(ExtentPath(file, line.filename, anywhere)));
  ConcatNode::Part part = {TRY(OpenNode(env, std::move(options), below)), 0,
                           line.sectors * kSector};
  if (flat) {
    part.base = line.offset * kSector;
  } else {
    part.node = TRY(SparseNode::Open(std::move(part.node), below));
  }
  if (part.base > part.node->size_bytes() || part.length > part.node->size_bytes() - part.base) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("VMDK: extent '{}' has fewer than the {} bytes that the descriptor says",
                    line.filename, part.length));
  }
  return part;
}

Result<NodePtr> OpenDescriptor(const OpenEnv& env, const NodeOptions& node, NodePtr file,
                               bool anywhere) {
  std::string text(std::min<uint64_t>(file->size_bytes(), kLargestDescriptor + 1), '\0');
  TRY(ReadExactly(*file, 0, {reinterpret_cast<uint8_t*>(text.data()), text.size()}));
  Descriptor descriptor = TRY(ParseDescriptor(text));
  if (descriptor.parent_cid != kNoParent) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: VMDK of several files with a parent ('{}')",
                            descriptor.parent_hint));
  }
  if (!env.follow_data_file && !anywhere)
    return Fail(ErrorCode::kPermission,
                "VMDK: it is in files of other names, which are not opened for an untrusted image");
  std::vector<ConcatNode::Part> parts;
  InfoValue::Array extents;
  for (const ExtentLine& line : descriptor.extents) {
    if (line.sectors == 0) continue;
    parts.push_back(TRY(OpenExtent(env, node, *file, line, anywhere)));
    const NodePtr& part = parts.back().node;
    InfoValue::Object extent = {{"filename", {part->name()}},
                                {"format", {line.type}},
                                {"virtual-size", {parts.back().length}}};
    if (line.type == "SPARSE") extent.push_back({"cluster-size", {TRY(part->Info()).cluster_size}});
    extents.push_back({std::move(extent)});
  }
  if (parts.empty()) return Fail(ErrorCode::kInvalid, "VMDK: the descriptor names no extent");
  ImageInfo info = {.format = "vmdk"};
  for (const auto& part : parts) info.virtual_size += part.length;
  info.specific = {{"create-type", {descriptor.create_type}},
                   {"cid", {uint64_t{descriptor.cid}}},
                   {"parent-cid", {uint64_t{descriptor.parent_cid}}},
                   {"extents", {std::move(extents)}}};
  return std::make_shared<ConcatNode>(std::move(file), "vmdk", std::move(parts), std::move(info),
                                      node.read_only);
}

// In one file, which may stand on others.
Result<NodePtr> OpenSparse(const OpenEnv& env, const NodeOptions& node, Options& options,
                           NodePtr file) {
  auto image = TRY(SparseNode::Open(std::move(file), node));
  std::string parent = image->has_parent() ? image->parent_hint() : "";
  Backing backing = TRY(TakeBacking(env, node, options, image->name(), parent, "vmdk"));
  const bool wanted = image->has_parent() && !node.no_backing && !node.no_io;
  if (wanted && parent.empty() && !backing.node && !backing.wish)
    return Fail(ErrorCode::kInvalid, "VMDK: it stands on another image, but doesn't say which");
  if (backing.node) TRY(image->SetBacking(std::move(backing.node)));
  if (backing.wish) image->set_backing_wish(std::move(*backing.wish));
  return image;
}

Result<NodePtr> Open(const OpenEnv& env, const NodeOptions& node, Options& options) {
  bool anywhere = TRY(options.TakeBool("follow-extents", false));
  NodePtr file = TRY(MappedNode::OpenFile(env, node, options, "vmdk", MappedNode::Others::kLeave));
  std::string head(std::min<uint64_t>(kDescriptorStart.size(), file->size_bytes()), '\0');
  TRY(ReadExactly(*file, 0, {reinterpret_cast<uint8_t*>(head.data()), head.size()}));
  std::string name = file->name();
  Result<NodePtr> opened = head == kDescriptorStart
                               ? OpenDescriptor(env, node, std::move(file), anywhere)
                               : OpenSparse(env, node, options, std::move(file));
  if (!opened) return Fail(std::move(opened).error().In(fmt::format("disk image '{}'", name)));
  TRY(options.RefuseRest("vmdk", {"file", "backing", "follow-extents"}));
  return opened;
}

struct Wishes {
  uint64_t size = 0;
  std::string subformat, adapter, hardware_version;
  bool zeroed_grain = false;
  std::string parent;  // empty: none
  uint32_t parent_cid = kNoParent;
};

std::string DescriptorText(const Wishes& wishes, const std::string& extent_lines) {
  auto id = RandomId();
  uint32_t cid;
  std::memcpy(&cid, id.data(), sizeof cid);
  bool is_ide = wishes.adapter == "ide";
  uint64_t heads = is_ide ? 16 : 255;
  return fmt::format(
      "{}\nversion=1\nCID={:08x}\nparentCID={:08x}\ncreateType=\"{}\"\n{}\n# Extent "
      "description\n{}\n"
      "# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = "
      "\"{}\"\n"
      "ddb.geometry.heads = \"{}\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\n",
      kDescriptorStart, cid & 0xfffffffe, wishes.parent_cid, wishes.subformat,
      wishes.parent.empty() ? "" : fmt::format("parentFileNameHint=\"{}\"\n", wishes.parent),
      extent_lines, wishes.hardware_version, wishes.size / (63 * heads * kSector), heads,
      wishes.adapter);
}

std::string BaseName(const std::string& filename) {
  return filename.substr(filename.rfind('/') + 1);
}

// Header, descriptor, redundant tables, tables, data.
Result<> CreateSparse(const OpenEnv& env, const std::string& filename, const Wishes& wishes) {
  bool stream = wishes.subformat == "streamOptimized";
  SparseHeader header = {};
  header.magic = kMagic;
  header.version = stream ? 3 : wishes.zeroed_grain ? 2 : 1;
  header.flags = kNewlineTest | kRedundantTable | (stream ? kCompressed | kMarkers : 0) |
                 (wishes.zeroed_grain ? kZeroedGrains : 0);
  header.compression = stream ? 1 : 0;
  header.capacity = wishes.size / kSector;
  header.grain_size = kGrainSectors;
  header.entries_per_table = kEntriesPerTable;
  header.line_ends = {'\n', ' ', '\r', '\n'};
  header.descriptor_offset = 1;
  header.descriptor_size = kDescriptorSectors;
  uint64_t grains = (header.capacity + kGrainSectors - 1) / kGrainSectors;
  uint64_t tables = (grains + kEntriesPerTable - 1) / kEntriesPerTable;
  uint64_t directory_sectors = RoundUp(tables * sizeof(Le32), kSector) / kSector;
  header.rgd_offset = header.descriptor_offset + header.descriptor_size;
  header.gd_offset = header.rgd_offset + directory_sectors + tables * kTableSectors;
  header.overhead =
      RoundUp(header.gd_offset + directory_sectors + tables * kTableSectors, kGrainSectors);
  std::string text = DescriptorText(
      wishes, fmt::format("RW {} SPARSE \"{}\"\n", uint64_t{header.capacity}, BaseName(filename)));
  if (text.size() > kDescriptorSectors * kSector)
    return Fail(ErrorCode::kInvalid, "the image's name is too long for a VMDK");
  NodePtr file = TRY(CreateFile(env, filename));
  TRY(file->Resize({.size = header.overhead * kSector, .exact = false}));
  for (uint64_t at : {uint64_t{header.rgd_offset}, uint64_t{header.gd_offset}}) {
    std::vector<Le32> directory(directory_sectors * kSector / sizeof(Le32));
    for (uint64_t i = 0; i < tables; i++)
      directory[i] = static_cast<uint32_t>(at + directory_sectors + i * kTableSectors);
    if (!directory.empty())
      TRY(WriteExactly(
          *file, at * kSector,
          {reinterpret_cast<const uint8_t*>(directory.data()), directory.size() * sizeof(Le32)}));
  }
  TRY(WriteExactly(*file, kSector, {reinterpret_cast<const uint8_t*>(text.data()), text.size()}));
  TRY(WriteExactly(*file, 0, {reinterpret_cast<const uint8_t*>(&header), sizeof header}));
  return file->Close();
}

Result<> CreateFlat(const OpenEnv& env, const std::string& filename, const Wishes& wishes) {
  std::string stem =
      filename.ends_with(".vmdk") ? filename.substr(0, filename.size() - 5) : filename;
  std::string flat = stem + "-flat.vmdk";
  NodePtr data = TRY(CreateFile(env, flat));
  TRY(data->Resize({.size = wishes.size}));
  TRY(data->Close());
  std::string text = DescriptorText(
      wishes, fmt::format("RW {} FLAT \"{}\" 0\n", wishes.size / kSector, BaseName(flat)));
  NodePtr file = TRY(CreateFile(env, filename));
  TRY(WriteExactly(*file, 0, {reinterpret_cast<const uint8_t*>(text.data()), text.size()}));
  return file->Close();
}

Result<> TakeParent(const OpenEnv& env, const std::string& filename, Options& options,
                    Wishes& wishes) {
  wishes.parent = options.Take("backing_file", "");
  std::string format = options.Take("backing_fmt", "vmdk");
  if (wishes.parent.empty()) return {};
  if (format != "vmdk")
    return Fail(ErrorCode::kInvalid,
                fmt::format("a VMDK's backing file is a VMDK, not {}", format));
  if (wishes.subformat != "monolithicSparse")
    return Fail(ErrorCode::kInvalid,
                fmt::format("subformat {} can't have a backing file", wishes.subformat));
  if (wishes.parent.find_first_of("\"\n\r") != std::string::npos)
    return Fail(ErrorCode::kInvalid, "a VMDK can't name a backing file with quotes or line ends");
  NodePtr parent = TRY(OpenFilename(env, ResolveRelative(filename, wishes.parent), "vmdk",
                                    {.read_only = true, .no_backing = true}));
  Result<uint32_t> cid = CidOf(*parent);
  TRY(parent->Close());
  wishes.parent_cid = TRY(std::move(cid));
  return {};
}

Result<> Create(const OpenEnv& env, const std::string& filename, Options& options) {
  Wishes wishes;
  wishes.size = RoundUp(TRY(options.TakeSize("size", 0)), kSector);
  wishes.subformat = options.Take("subformat", "monolithicSparse");
  wishes.adapter = options.Take("adapter_type", "ide");
  bool compat6 = TRY(options.TakeBool("compat6", false));
  wishes.hardware_version = options.Take("hwversion", "undefined");
  wishes.zeroed_grain = TRY(options.TakeBool("zeroed_grain", false));
  if (compat6 && wishes.hardware_version != "undefined")
    return Fail(ErrorCode::kInvalid, "compat6 cannot be enabled with hwversion set");
  if (wishes.hardware_version == "undefined")
    wishes.hardware_version = std::string(1, compat6 ? '6' : '4');
  TRY(TakeParent(env, filename, options, wishes));
  constexpr std::string_view kAdapters[] = {"ide", "buslogic", "lsilogic", "legacyESX"};
  if (std::find(std::begin(kAdapters), std::end(kAdapters), wishes.adapter) == std::end(kAdapters))
    return Fail(ErrorCode::kInvalid,
                fmt::format("unknown adapter type '{}': it is ide, buslogic, lsilogic or legacyESX",
                            wishes.adapter));
  if (wishes.hardware_version.find_first_not_of("0123456789") != std::string::npos)
    return Fail(ErrorCode::kInvalid,
                fmt::format("hwversion '{}' is no number", wishes.hardware_version));
  // Places are 32-bit numbers of sectors, and tables and data share them.
  constexpr uint64_t kMostBytes = uint64_t{2} << 40;
  if (wishes.subformat == "monolithicFlat") return CreateFlat(env, filename, wishes);
  if (wishes.size > kMostBytes)
    return Fail(ErrorCode::kInvalid,
                fmt::format("format vmdk: a sparse disk has at most {} bytes", kMostBytes));
  if (wishes.subformat == "monolithicSparse" || wishes.subformat == "streamOptimized")
    return CreateSparse(env, filename, wishes);
  if (wishes.subformat == "twoGbMaxExtentSparse" || wishes.subformat == "twoGbMaxExtentFlat")
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: making VMDK of subformat {}", wishes.subformat));
  return Fail(ErrorCode::kInvalid,
              fmt::format("unknown subformat '{}' of format vmdk", wishes.subformat));
}

constexpr OptionRow kCreateOptions[] = {
    {"adapter_type", OptionRow::Type::kString,
     "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX"},
    {"compat6", OptionRow::Type::kBool, "VMDK version 6 image", "off"},
    {"hwversion", OptionRow::Type::kString, "VMDK hardware version", "undefined"},
    {"subformat", OptionRow::Type::kString,
     "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | "
     "streamOptimized} "},
    {"zeroed_grain", OptionRow::Type::kBool,
     "Enable efficient zero writes using the zeroed-grain GTE feature"},
};

}  // namespace
}  // namespace vmdk

extern const Driver kVmdkDriver;
const Driver kVmdkDriver = {
    .name = "vmdk",
    .kind = Driver::Kind::kFormat,
    .probe = vmdk::Probe,
    .open = vmdk::Open,
    .create_options = vmdk::kCreateOptions,
    .create = vmdk::Create,
    .has_backing = true,
    .can_compress = true,
};

}  // namespace kvartz::block
