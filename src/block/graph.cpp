#include "block/graph.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "block/fiber_io.h"

namespace kvartz::block {
namespace {

constexpr size_t kProbeBytes = 512;
constexpr size_t kMaxChain = 200;  // layers: reads go down through them on a fiber's stack

// Keys of NodeOptions.
Result<NodeOptions> TakeNodeOptions(Options& options, NodeOptions node) {
  node.node_name = options.Take("node-name", "");
  node.probed = false;
  node.read_only = TRY(options.TakeBool("read-only", node.read_only));
  node.auto_read_only = TRY(options.TakeBool("auto-read-only", node.auto_read_only));
  node.cache_direct = TRY(options.TakeBool("cache.direct", node.cache_direct));
  node.cache_no_flush = TRY(options.TakeBool("cache.no-flush", node.cache_no_flush));
  node.force_share = TRY(options.TakeBool("force-share", node.force_share));
  if (node.force_share && !node.read_only) {
    return Fail(ErrorCode::kInvalid, "force-share=on can only be used with read-only=on");
  }
  node.discard_unmap = TRY(TakeDiscard(options, node.discard_unmap));
  node.detect_zeroes = TRY(ParseDetectZeroes(options.Take("detect-zeroes", "off")));
  if (node.detect_zeroes == DetectZeroes::kUnmap && !node.discard_unmap)
    return Fail(ErrorCode::kInvalid, "detect-zeroes=unmap needs discard=unmap");
  return node;
}

// "nbd" of "nbd://...": what stands before a colon that comes before any slash.
std::string_view ProtocolOf(std::string_view filename) {
  size_t end = filename.find_first_of(":/");
  if (end == std::string_view::npos || end == 0 || filename[end] != ':') return {};
  return filename.substr(0, end);
}

// Opens the protocol node that `filename` means.
Result<NodePtr> OpenProtocol(const OpenEnv& env, std::string filename, Options options,
                             const NodeOptions& node) {
  std::string_view protocol = ProtocolOf(filename);
  std::string driver = "file";
  if (protocol == "file") {
    filename.erase(0, 5);
  } else if (!protocol.empty()) {
    std::string_view name = protocol.substr(0, protocol.find('+'));
    const Driver* found = FindDriver(name);
    if (!found || found->kind != Driver::Kind::kProtocol) {
      return Fail(
          ErrorCode::kUnsupported,
          fmt::format("unknown protocol '{}' (a file of this name: './{}')", protocol, filename));
    }
    driver = name;
  } else if (filename.starts_with("/dev/")) {
    driver = "host_device";  // of a file there it makes a file
  }
  options.Set("filename", filename);
  return FindDriver(driver)->open(env, node, options);
}

Result<NodePtr> OpenOne(const OpenEnv& env, Options options, const NodeOptions& inherited);

// What a file below a format inherits. Whether space is given back is for the format to say.
NodeOptions BelowOf(const NodeOptions& node) {
  NodeOptions below = node;
  below.grows = below.discard_unmap = true;
  return below;
}

// The file below a format that has only a name.
Result<NodePtr> OpenFileOf(const OpenEnv& env, const std::string& filename, Options& options,
                           const NodeOptions& node) {
  NodeOptions below = BelowOf(node);
  Options file = options.TakeBelow("file");
  file.Set("filename", filename);
  return OpenOne(env, std::move(file), below);
}

Result<NodePtr> OpenProbed(const OpenEnv& env, const std::string& filename, Options options,
                           NodeOptions node) {
  NodePtr file;
  if (options.HasBelow("file")) {
    if (!filename.empty()) return Fail(ErrorCode::kInvalid, "both 'file' and 'filename' are given");
    file = TRY(OpenChild(env, options, "file", BelowOf(node)));
  } else if (filename.empty()) {
    return Fail(ErrorCode::kInvalid, "a node needs 'driver' or 'filename'");
  } else {
    file = TRY(OpenFileOf(env, filename, options, node));
  }
  std::vector<uint8_t> head(std::min<uint64_t>(kProbeBytes, file->size_bytes()));
  TRY(ReadExactly(*file, 0, head));
  const Driver* driver = TRY(ProbeFormat(head, file->name()));
  options.SetNode("file", std::move(file));
  node.probed = true;
  return driver->open(env, node, options);
}

// Without backing nodes.
Result<NodePtr> OpenByOptions(const OpenEnv& env, Options options, const NodeOptions& node,
                              const std::string& filename) {
  std::string name = options.Take("driver", "");
  // What is below a format is what it is named as, whatever it may contain.
  if (name.empty() && node.grows) return OpenProtocol(env, filename, std::move(options), node);
  if (name.empty()) return OpenProbed(env, filename, std::move(options), node);
  const Driver* driver = TRY(RequireDriver(name, filename));
  if (driver->kind == Driver::Kind::kProtocol) {
    if (!filename.empty()) options.Set("filename", filename);
  } else if (!filename.empty()) {
    options.SetNode("file", TRY(OpenFileOf(env, filename, options, node)));
  }
  return driver->open(env, node, options);
}

// As they were given: what is a node already isn't an option of its parent's any more.
std::shared_ptr<const Options> TextsOf(const Options& options, const std::string& filename) {
  auto texts = std::make_shared<Options>();
  for (const auto& [key, value] : options.all()) {
    if (!value.node && key != "driver") texts->Set(key, value.text);
  }
  if (!filename.empty()) texts->Set("filename", filename);
  return texts;
}

Result<NodePtr> OpenOne(const OpenEnv& env, Options options, const NodeOptions& inherited) {
  std::string filename = options.Take("filename", "");
  if (filename.starts_with("json:")) {
    Options given = TRY(Options::ParseJson(std::string_view(filename).substr(5)));
    for (const auto& [key, value] : options.all()) given.Set(key, value.text);
    filename = given.Take("filename", "");
    if (filename.starts_with("json:"))
      return Fail(ErrorCode::kInvalid, "json: within json: is not allowed");
    options = std::move(given);
  }
  NodeOptions node = TRY(TakeNodeOptions(options, inherited));
  std::shared_ptr<const Options> own = TextsOf(options, filename);
  NodePtr opened = TRY(OpenByOptions(env, std::move(options), node, filename));
  opened->set_node_name(node.node_name);
  opened->set_opened_with(node);
  opened->set_own_options(std::move(own));
  return opened;
}

// The file that a node's contents are in, however it was named.
std::string Identity(const Node& node) {
  const Node* bottom = &node;
  while (bottom->file()) bottom = bottom->file();
  std::unique_ptr<char, decltype(&free)> path(realpath(bottom->name().c_str(), nullptr), &free);
  return path ? path.get() : bottom->name();
}

}  // namespace

Result<bool> TakeDiscard(Options& options, bool unmap) {
  std::string discard = options.Take("discard", unmap ? "unmap" : "ignore");
  if (discard != "unmap" && discard != "on" && discard != "ignore" && discard != "off") {
    return Fail(ErrorCode::kInvalid, fmt::format("discard={}: it is ignore or unmap", discard));
  }
  return discard == "unmap" || discard == "on";
}

Result<NodePtr> OpenNode(const OpenEnv& env, Options options, const NodeOptions& inherited) {
  NodePtr top = TRY(OpenOne(env, std::move(options), inherited));
  std::vector<std::string> chain;
  NodeOptions below = inherited;
  below.read_only = below.discard_unmap = true;
  below.auto_read_only = below.for_check = below.grows = false;
  Node* node = top.get();
  while (std::optional<BackingWish> wish = node->TakeBackingWish()) {
    chain.push_back(Identity(*node));
    Result<NodePtr> opened = OpenOne(env, *wish->options, below);
    if (!opened) return Fail(std::move(opened).error().In(wish->what));
    std::string identity = Identity(**opened);
    if (std::find(chain.begin(), chain.end(), identity) != chain.end()) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("{}: the backing files form a loop", wish->what));
    }
    if (chain.size() >= kMaxChain) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("{}: more than {} backing files", wish->what, kMaxChain));
    }
    TRY(node->SetBacking(*opened));
    node = opened->get();
  }
  return top;
}

Result<NodePtr> OpenFilename(const OpenEnv& env, const std::string& filename,
                             const std::string& format, const NodeOptions& inherited) {
  Options options;
  options.Set("filename", filename);
  if (!format.empty()) options.Set("driver", format);
  return OpenNode(env, std::move(options), inherited);
}

Result<NodePtr> OpenChild(const OpenEnv& env, Options& options, const std::string& key,
                          const NodeOptions& inherited) {
  if (NodePtr node = options.TakeNode(key)) return node;
  if (std::optional<std::string> reference = options.Take(key)) {
    if (reference->empty()) return nullptr;
    NodePtr node = env.find_node ? env.find_node(*reference) : nullptr;
    if (!node) {
      return Fail(ErrorCode::kNotFound,
                  fmt::format("{}={}: there is no node of this name", key, *reference));
    }
    if (inherited.grows) node->LetGrow();
    return node;
  }
  Options below = options.TakeBelow(key);
  if (below.empty()) return nullptr;
  NodeOptions child = inherited;
  child.discard_unmap = true;
  Result<NodePtr> node = OpenNode(env, std::move(below), child);
  if (!node) return Fail(std::move(node).error().In(key));
  return node;
}

Result<> CreateImage(const OpenEnv& env, const std::string& format, const std::string& filename,
                     Options options) {
  const Driver* driver = TRY(RequireDriver(format, filename));
  if (!driver->create) {
    return Fail(ErrorCode::kUnsupported, fmt::format("format {} can't be created", driver->name));
  }
  std::vector<std::string_view> known = {"size"};
  if (driver->has_backing) known.insert(known.end(), {"backing_file", "backing_fmt"});
  for (const OptionRow& row : driver->create_options) known.push_back(row.name);
  OpenEnv with_files = env;
  with_files.new_files.nocow = TRY(options.TakeBool("nocow", false));
  with_files.new_files.extent_size_hint = TRY(options.TakeSize("extent_size_hint", 0));
  Options unknown;
  for (const auto& [key, value] : options.all()) {
    if (std::find(known.begin(), known.end(), key) == known.end()) unknown.Set(key, value.text);
  }
  TRY(unknown.RefuseRest(fmt::format("format {}", driver->name), known));
  if (driver->has_backing && options.Has("backing_file") && !options.Has("size")) {
    // As large as what is below.
    Options copy = options;
    std::string backing = ResolveRelative(filename, copy.Take("backing_file", ""));
    NodePtr below =
        TRY(OpenFilename(env, backing, copy.Take("backing_fmt", ""), {.read_only = true}));
    options.Set("size", std::to_string(below->size_bytes()));
    TRY(below->Close());
  }
  if (!options.Has("size")) return Fail(ErrorCode::kInvalid, "an image needs a size");
  return driver->create(with_files, filename, options);
}

std::string ResolveRelative(const std::string& of, const std::string& filename) {
  if (filename.empty() || filename[0] == '/' || !ProtocolOf(filename).empty()) return filename;
  std::string base = of.starts_with("file:") ? of.substr(5) : of;
  size_t slash = base.rfind('/');
  return slash == std::string::npos ? filename : base.substr(0, slash + 1) + filename;
}

Node* SkipFilters(Node* node) {
  while (node && node->is_filter()) node = node->file();
  return node;
}

Node* BackingOf(Node* node) {
  node = SkipFilters(node);
  return node ? SkipFilters(node->backing()) : nullptr;
}

Result<> CheckCommits(const Node& image) {
  if (image.driver() != std::string_view("vmdk")) return {};
  return Fail(ErrorCode::kUnsupported,
              fmt::format("not supported yet: committing '{}': a VMDK's parent may not change",
                          image.name()));
}

Result<Extent> StatusOf(Node& node, uint64_t offset, uint64_t length, Holes holes) {
  if (offset >= node.size_bytes() || length == 0) return Extent{};
  length = std::min(length, node.size_bytes() - offset);
  Node* real = SkipFilters(&node);
  Extent extent = TRY(real->Status(offset, length));
  Node* backing = BackingOf(real);
  if (!extent.allocated && (!backing || offset >= backing->size_bytes())) {
    extent.zero = true;
  } else if (!extent.allocated) {
    extent.length = std::min(extent.length, backing->size_bytes() - offset);
  }
  if (holes == Holes::kOfRaw && real->driver() != std::string_view("raw")) return extent;
  // Holes of the file.
  if (extent.data && !extent.zero && extent.has_offset && extent.file != real &&
      extent.offset < extent.file->size_bytes()) {
    uint64_t held = std::min(extent.length, extent.file->size_bytes() - extent.offset);
    Extent below = TRY(extent.file->Status(extent.offset, held));
    if (below.zero) {
      extent.zero = true;
      extent.length = below.length;
    } else {
      extent.length = std::min(extent.length, below.length);
    }
  }
  return extent;
}

namespace {

Result<ChainExtent> LookAbove(Node& top, Node* base, uint64_t offset, uint64_t length) {
  ChainExtent found;
  for (Node* node = SkipFilters(&top); node && node != base;
       node = BackingOf(node), found.depth++) {
    if (offset >= node->size_bytes()) {  // a short layer: zeros, which are its own
      found.extent = {.length = length, .allocated = true, .zero = true};
      found.node = node;
      return found;
    }
    found.extent = TRY(StatusOf(*node, offset, length));
    length = std::min(length, found.extent.length);
    found.extent.length = length;
    if (found.extent.allocated) {
      found.node = node;
      return found;
    }
    bool last = !BackingOf(node);
    if (last) return found;
  }
  found.extent.length = length;
  return found;
}

}  // namespace

Result<ChainExtent> StatusAbove(Node& top, Node* base, uint64_t offset, uint64_t length) {
  base = SkipFilters(base);
  for (;;) {
    ChainExtent found = TRY(LookAbove(top, base, offset, length));
    bool stands = true;
    for (Node* node = SkipFilters(&top); node && node != base && node != found.node;
         node = BackingOf(node)) {
      if (!node->fleecing()) continue;
      Extent now = TRY(node->Status(offset, found.extent.length));
      stands &= !now.allocated;
      found.extent.length = std::min(found.extent.length, now.length);
    }
    if (stands) return found;
  }
}

}  // namespace kvartz::block
