// Format vmdk: VMware's images. Sparse and stream-optimized ones in one file, and flat or sparse
// extents that a descriptor file names.
#include <fmt/format.h>

#include <algorithm>

#include "block/backing.h"
#include "block/fiber_io.h"
#include "block/formats/vmdk/parent.h"
#include "block/formats/vmdk/sparse.h"
#include "block/formats/vmdk/split.h"
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

Result<SplitNode::Part> OpenExtent(const OpenEnv& env, const NodeOptions& node, const Node& file,
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
  SplitNode::Part part = {TRY(OpenNode(env, std::move(options), below)), 0, line.sectors * kSector,
                          line.type};
  if (flat) {
    part.base = line.offset * kSector;
  } else {
    part.sparse = TRY(SparseNode::Open(std::move(part.node), below));
    part.node = part.sparse;
  }
  if (part.base > part.node->size_bytes() || part.length > part.node->size_bytes() - part.base) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("VMDK: extent '{}' has fewer than the {} bytes that the descriptor says",
                    line.filename, part.length));
  }
  return part;
}

Result<std::shared_ptr<SplitNode>> OpenSplit(const OpenEnv& env, const NodeOptions& node,
                                             NodePtr file, bool anywhere) {
  std::string text(std::min<uint64_t>(file->size_bytes(), kLargestDescriptor + 1), '\0');
  TRY(ReadExactly(*file, 0, {reinterpret_cast<uint8_t*>(text.data()), text.size()}));
  Descriptor descriptor = TRY(ParseDescriptor(text));
  if (!env.follow_data_file && !anywhere)
    return Fail(ErrorCode::kPermission,
                "VMDK: it is in files of other names, which are not opened for an untrusted image");
  std::vector<SplitNode::Part> parts;
  for (const ExtentLine& line : descriptor.extents) {
    if (line.sectors == 0) continue;
    parts.push_back(TRY(OpenExtent(env, node, *file, line, anywhere)));
  }
  if (parts.empty()) return Fail(ErrorCode::kInvalid, "VMDK: the descriptor names no extent");
  return std::make_shared<SplitNode>(std::move(file), std::move(descriptor), std::move(text),
                                     std::move(parts), node.read_only);
}

// It may stand on others.
template <typename Image>
Result<NodePtr> WithParent(const OpenEnv& env, const NodeOptions& node, Options& options,
                           std::shared_ptr<Image> image) {
  const bool has_parent = image->descriptor().parent_cid != kNoParent;
  std::string parent = has_parent ? image->descriptor().parent_hint : "";
  Backing backing = TRY(TakeBacking(env, node, options, image->name(), parent, "vmdk"));
  const bool wanted = has_parent && !node.no_backing && !node.no_io;
  if (wanted && parent.empty() && !backing.node && !backing.wish)
    return Fail(ErrorCode::kInvalid, "VMDK: it stands on another image, but doesn't say which");
  if (backing.node) TRY(image->SetBacking(std::move(backing.node)));
  if (backing.wish) image->set_backing_wish(std::move(*backing.wish));
  return image;
}

Result<NodePtr> OpenWithParent(const OpenEnv& env, const NodeOptions& node, Options& options,
                               NodePtr file, bool anywhere) {
  std::string head(std::min<uint64_t>(kDescriptorStart.size(), file->size_bytes()), '\0');
  TRY(ReadExactly(*file, 0, {reinterpret_cast<uint8_t*>(head.data()), head.size()}));
  if (head == kDescriptorStart)
    return WithParent(env, node, options, TRY(OpenSplit(env, node, std::move(file), anywhere)));
  return WithParent(env, node, options, TRY(SparseNode::Open(std::move(file), node)));
}

Result<NodePtr> Open(const OpenEnv& env, const NodeOptions& node, Options& options) {
  bool anywhere = TRY(options.TakeBool("follow-extents", false));
  NodePtr file = TRY(MappedNode::OpenFile(env, node, options, "vmdk", MappedNode::Others::kLeave));
  std::string name = file->name();
  Result<NodePtr> opened = OpenWithParent(env, node, options, std::move(file), anywhere);
  if (!opened) return Fail(std::move(opened).error().In(fmt::format("disk image '{}'", name)));
  TRY(options.RefuseRest("vmdk", {"file", "backing", "follow-extents"}));
  return opened;
}

struct Wishes {
  uint64_t size = 0;
  std::string subformat, adapter, hardware_version, tools_version;
  bool zeroed_grain = false;
  std::string parent;  // empty: none
  uint32_t parent_cid = kNoParent;

  bool is_flat() const {
    return subformat == "monolithicFlat" || subformat == "twoGbMaxExtentFlat";
  }
};

std::string DescriptorText(const Wishes& wishes, const std::string& extent_lines) {
  bool is_ide = wishes.adapter == "ide";
  uint64_t heads = is_ide ? 16 : 255;
  return fmt::format(
      "{}\nversion=1\nCID={:08x}\nparentCID={:08x}\ncreateType=\"{}\"\n{}\n# Extent "
      "description\n{}\n"
      "# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = "
      "\"{}\"\n"
      "ddb.geometry.heads = \"{}\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\n"
      "ddb.toolsVersion = \"{}\"\n",
      kDescriptorStart, NewCid(), wishes.parent_cid, wishes.subformat,
      wishes.parent.empty() ? "" : fmt::format("parentFileNameHint=\"{}\"\n", wishes.parent),
      extent_lines, wishes.hardware_version, wishes.size / (63 * heads * kSector), heads,
      wishes.adapter, wishes.tools_version);
}

std::string BaseName(const std::string& filename) {
  return filename.substr(filename.rfind('/') + 1);
}

// Header, descriptor (empty: none), redundant tables, tables, data.
Result<> CreateSparse(const OpenEnv& env, const std::string& filename, const Wishes& wishes,
                      uint64_t size, const std::string& descriptor) {
  bool stream = wishes.subformat == "streamOptimized";
  SparseHeader header = {};
  header.magic = kMagic;
  header.version = stream ? 3 : wishes.zeroed_grain ? 2 : 1;
  header.flags = kNewlineTest | kRedundantTable | (stream ? kCompressed | kMarkers : 0) |
                 (wishes.zeroed_grain ? kZeroedGrains : 0);
  header.compression = stream ? 1 : 0;
  header.capacity = size / kSector;
  header.grain_size = kGrainSectors;
  header.entries_per_table = kEntriesPerTable;
  header.line_ends = {'\n', ' ', '\r', '\n'};
  if (!descriptor.empty()) {
    header.descriptor_offset = 1;
    header.descriptor_size = kDescriptorSectors;
  }
  header.rgd_offset = 1 + header.descriptor_size;
  uint64_t grains = (header.capacity + kGrainSectors - 1) / kGrainSectors;
  uint64_t tables = (grains + kEntriesPerTable - 1) / kEntriesPerTable;
  uint64_t directory_sectors = RoundUp(tables * sizeof(Le32), kSector) / kSector;
  header.gd_offset = header.rgd_offset + directory_sectors + tables * kTableSectors;
  header.overhead =
      RoundUp(header.gd_offset + directory_sectors + tables * kTableSectors, kGrainSectors);
  if (descriptor.size() > kDescriptorSectors * kSector)
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
  if (!descriptor.empty())
    TRY(WriteExactly(*file, kSector,
                     {reinterpret_cast<const uint8_t*>(descriptor.data()), descriptor.size()}));
  TRY(WriteExactly(*file, 0, {reinterpret_cast<const uint8_t*>(&header), sizeof header}));
  return file->Close();
}

// Extents of up to 2 GiB, or one of any size, beside a descriptor.
Result<> CreateSplit(const OpenEnv& env, const std::string& filename, const Wishes& wishes) {
  constexpr uint64_t kExtentBytes = uint64_t{2} << 30;
  const bool flat = wishes.is_flat(), one = wishes.subformat == "monolithicFlat";
  const size_t dot = filename.size() - BaseName(filename).size() +
                     std::min(BaseName(filename).rfind('.'), BaseName(filename).size());
  const std::string stem = filename.substr(0, dot), suffix = filename.substr(dot);
  std::string lines;
  uint64_t done = 0;
  for (int number = 1; done < wishes.size || number == 1; number++) {
    uint64_t size = one ? wishes.size : std::min(wishes.size - done, kExtentBytes);
    std::string extent = one ? fmt::format("{}-flat{}", stem, suffix)
                             : fmt::format("{}-{}{:03}{}", stem, flat ? 'f' : 's', number, suffix);
    if (flat) {
      NodePtr data = TRY(CreateFile(env, extent));
      TRY(data->Resize({.size = size}));
      TRY(data->Close());
    } else {
      TRY(CreateSparse(env, extent, wishes, size, ""));
    }
    lines += fmt::format("RW {} {} \"{}\"{}\n", size / kSector, flat ? "FLAT" : "SPARSE",
                         BaseName(extent), flat ? " 0" : "");
    done += size;
  }
  std::string text = DescriptorText(wishes, lines);
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
  if (wishes.is_flat())
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
  wishes.tools_version = options.Take("toolsversion", "2147483647");
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
  for (auto [name, value] : {std::pair{"hwversion", &wishes.hardware_version},
                             std::pair{"toolsversion", &wishes.tools_version}}) {
    if (value->empty() || value->find_first_not_of("0123456789") != std::string::npos)
      return Fail(ErrorCode::kInvalid, fmt::format("{} '{}' is no number", name, *value));
  }
  if (wishes.is_flat() && wishes.zeroed_grain)
    return Fail(ErrorCode::kInvalid,
                fmt::format("subformat {} has no grains: zeroed_grain=on", wishes.subformat));
  if (wishes.is_flat() || wishes.subformat == "twoGbMaxExtentSparse")
    return CreateSplit(env, filename, wishes);
  if (wishes.subformat != "monolithicSparse" && wishes.subformat != "streamOptimized")
    return Fail(ErrorCode::kInvalid,
                fmt::format("unknown subformat '{}' of format vmdk", wishes.subformat));
  // Places are 32-bit numbers of sectors, and tables and data share them.
  constexpr uint64_t kMostBytes = uint64_t{2} << 40;
  if (wishes.size > kMostBytes)
    return Fail(ErrorCode::kInvalid,
                fmt::format("format vmdk: a sparse disk has at most {} bytes", kMostBytes));
  std::string extent =
      fmt::format("RW {} SPARSE \"{}\"\n", wishes.size / kSector, BaseName(filename));
  return CreateSparse(env, filename, wishes, wishes.size, DescriptorText(wishes, extent));
}

constexpr OptionRow kCreateOptions[] = {
    {"adapter_type", OptionRow::Type::kString,
     "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX"},
    {"compat6", OptionRow::Type::kBool, "VMDK version 6 image", "off"},
    {"hwversion", OptionRow::Type::kString, "VMDK hardware version", "undefined"},
    {"toolsversion", OptionRow::Type::kString, "VMware guest tools version"},
    {"subformat", OptionRow::Type::kString,
     "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | "
     "twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} "},
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
