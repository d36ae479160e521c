// img info.
#include <fmt/core.h>

#include <cstdlib>
#include <memory>
#include <set>

#include "base/print.h"
#include "cli/img/img.h"
#include "cli/img/output.h"

namespace kvartz::cli::img {
namespace {

using block::ImageInfo;
using block::InfoValue;

struct Layer {
  std::string filename;
  ImageInfo info;
  std::optional<uint64_t> allocated = {};
};

Result<Layer> Examine(Session& session, const ImageName& image, bool force_share) {
  block::NodeOptions node = {.read_only = true, .force_share = force_share, .no_backing = true};
  Result<block::NodePtr> first = session.Open(image, node);
  bool contents_only = !first && (first.error().code == ErrorCode::kUnsupported ||
                                  first.error().code == ErrorCode::kNotFound);
  if (!first && !contents_only) return std::unexpected(first.error());
  if (!first) {
    // Perhaps only its contents can't be got at, for lack of a key or a data file.
    node.no_io = true;
    Result<block::NodePtr> second = session.Open(image, node);
    if (!second) return std::unexpected(first.error());
    first = std::move(second);
  }
  const block::NodePtr& opened = *first;
  const bool described =
      image.is_options || image.name.starts_with("json:") || image.name.starts_with("file:");
  Layer layer = {described ? opened->name() : image.name, TRY(opened->Info())};
  Result<uint64_t> allocated = opened->AllocatedBytes();
  if (allocated) layer.allocated = *allocated;
  TRY(session.Close(opened));
  return layer;
}

InfoValue ToValue(const Layer& layer) {
  const ImageInfo& info = layer.info;
  InfoValue::Object object = {Field("virtual-size", info.virtual_size),
                              Field("filename", layer.filename), Field("format", info.format),
                              Field("dirty-flag", info.dirty)};
  if (layer.allocated) object.push_back(Field("actual-size", *layer.allocated));
  if (info.cluster_size) object.push_back(Field("cluster-size", info.cluster_size));
  if (info.encrypted) object.push_back(Field("encrypted", true));
  if (!info.backing_filename.empty()) {
    object.push_back(Field("backing-filename", info.backing_filename));
    object.push_back(Field("full-backing-filename", info.full_backing_filename));
    if (!info.backing_format.empty())
      object.push_back(Field("backing-filename-format", info.backing_format));
  }
  if (!info.snapshots.empty()) {
    InfoValue::Array snapshots;
    for (const auto& snapshot : info.snapshots) snapshots.push_back(SnapshotValue(snapshot));
    object.push_back({"snapshots", {std::move(snapshots)}});
  }
  if (!info.specific.empty()) {
    InfoValue::Object specific = {Field("type", info.format), {"data", {info.specific}}};
    object.push_back({"format-specific", {std::move(specific)}});
  }
  return {std::move(object)};
}

void PrintHuman(const Layer& layer) {
  const ImageInfo& info = layer.info;
  Print("image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\ndisk size: {}\n", layer.filename,
        info.format, SizeText(info.virtual_size), info.virtual_size,
        layer.allocated ? SizeText(*layer.allocated) : "unavailable");
  if (info.encrypted) Print("encrypted: yes\n");
  if (info.cluster_size) Print("cluster_size: {}\n", info.cluster_size);
  if (info.dirty) Print("cleanly shut down: no\n");
  if (!info.backing_filename.empty()) {
    Print("backing file: {}", info.backing_filename);
    if (info.full_backing_filename.empty()) {
      Print(" (cannot determine actual path)");
    } else if (info.full_backing_filename != info.backing_filename) {
      Print(" (actual path: {})", info.full_backing_filename);
    }
    Print("\n");
    if (!info.backing_format.empty()) Print("backing file format: {}\n", info.backing_format);
  }
  if (!info.snapshots.empty()) Print("Snapshot list:\n{}", SnapshotTable(info.snapshots));
  if (!info.specific.empty())
    Print("Format specific information:\n{}", HumanText(info.specific, 1));
}

// One name for a file, whatever it is called.
std::string Identity(const std::string& name) {
  std::unique_ptr<char, decltype(&free)> path(realpath(name.c_str(), nullptr), &free);
  return path ? path.get() : name;
}

Result<int> Run(Session& session, const Arguments& arguments) {
  Output output = TRY(TakeOutput(arguments));
  ImageName image = TRY(TakeImage(arguments));
  bool chain = arguments.Has("backing-chain");
  std::vector<Layer> layers;
  std::set<std::string> seen;
  while (true) {
    if (!seen.insert(Identity(image.name)).second) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("Backing file '{}' creates an infinite loop", image.name));
    }
    layers.push_back(TRY(Examine(session, image, arguments.Has("force-share"))));
    const ImageInfo& info = layers.back().info;
    if (!chain || info.backing_filename.empty()) break;
    if (!session.env().follow_backing)
      return Fail(ErrorCode::kPermission,
                  fmt::format("'{}' has the backing file '{}', which isn't followed", image.name,
                              info.backing_filename));
    image = {.name = info.full_backing_filename, .format = info.backing_format};
  }
  if (output == Output::kHuman) {
    for (size_t i = 0; i < layers.size(); i++) {
      if (i > 0) Print("\n");
      PrintHuman(layers[i]);
    }
    return 0;
  }
  if (!chain) {
    Print("{}\n", JsonText(ToValue(layers[0])));
    return 0;
  }
  InfoValue::Array all;
  for (const Layer& layer : layers) all.push_back(ToValue(layer));
  Print("{}\n", JsonText({std::move(all)}));
  return 0;
}

constexpr OptionSpec kOptions[] = {
    kObject,
    kImageOpts,
    kFormat,
    kOutput,
    {0, "backing-chain", {}, "the image and all that it stands on"},
    kForceShare,
};

}  // namespace

const Verb kInfo = {"info", "FILENAME", "tells what an image is", kOptions, Run};

}  // namespace kvartz::cli::img
