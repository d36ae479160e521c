#include "block/backing.h"

#include <fmt/format.h>

#include "block/graph.h"

namespace kvartz::block {

Result<Backing> TakeBacking(const OpenEnv& env, const NodeOptions& node, Options& options,
                            const std::string& image, const std::string& filename,
                            const std::string& format) {
  if (NodePtr given = options.TakeNode("backing")) return Backing{.node = std::move(given)};
  if (std::optional<std::string> name = options.Take("backing")) {
    if (name->empty()) return Backing();
    Options reference;
    reference.Set("backing", *name);
    return Backing{.node = TRY(OpenChild(env, reference, "backing", node))};
  }
  auto wish = std::make_shared<Options>(options.TakeBelow("backing"));
  if (node.no_backing || node.no_io) return Backing();
  bool named = wish->Has("filename") || wish->HasBelow("file");
  if (!named && filename.empty()) {
    if (wish->empty()) return Backing();
  } else if (!named) {
    if (!env.follow_backing) {
      return Fail(
          ErrorCode::kPermission,
          fmt::format("'{}' has the backing file '{}', which isn't followed", image, filename));
    }
    wish->Set("filename", ResolveRelative(image, filename));
    if (!wish->Has("driver") && !format.empty()) wish->Set("driver", format);
  }
  auto inherit = [&](const char* key, bool value) {
    if (!wish->Has(key)) wish->Set(key, value ? "on" : "off");
  };
  inherit("read-only", true);
  inherit("cache.direct", node.cache_direct);
  inherit("cache.no-flush", node.cache_no_flush);
  inherit("force-share", node.force_share);
  return Backing{.wish =
                     BackingWish{wish, fmt::format("backing file '{}' of '{}'", filename, image)}};
}

}  // namespace kvartz::block
