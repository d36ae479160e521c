// OpenImage: from what the user wrote to a chain of nodes.
#include <fmt/format.h>

#include "base/log.h"
#include "block/graph.h"
#include "block/node.h"
#include "block/sync_io.h"

namespace kvartz::block {

Result<CacheMode> ParseCacheMode(const std::string& name) {
  if (name == "writeback") return CacheMode::kWriteback;
  if (name == "none" || name == "off") return CacheMode::kNone;
  if (name == "writethrough") return CacheMode::kWritethrough;
  if (name == "directsync") return CacheMode::kDirectSync;
  if (name == "unsafe") return CacheMode::kUnsafe;
  return Fail(
      ErrorCode::kInvalid,
      fmt::format(
          "unknown cache mode '{}': it is one of writeback, none, writethrough, directsync, unsafe",
          name));
}

Result<NodePtr> OpenImage(EventLoop& loop, const ImageOptions& options) {
  NodeOptions node = {
      .read_only = options.read_only,
      .cache_direct = options.cache == CacheMode::kNone || options.cache == CacheMode::kDirectSync,
      .cache_no_flush = options.cache == CacheMode::kUnsafe,
      .writethrough =
          options.cache == CacheMode::kWritethrough || options.cache == CacheMode::kDirectSync,
      .discard_unmap = options.discard_unmap,
      .share_write = options.share_write,
      .locking = options.locking == ImageOptions::Locking::kAuto};
  Options tree;
  if (!options.format.empty()) tree.Set("driver", options.format);
  tree.Set("filename", options.path);
  if (options.raw_offset != 0) tree.Set("offset", std::to_string(options.raw_offset));
  if (options.raw_size != UINT64_MAX) tree.Set("size", std::to_string(options.raw_size));
  OpenEnv env = {.loop = loop};
  NodePtr image = TRY(RunInFiber(loop, [&] { return OpenNode(env, std::move(tree), node); }));
  if (image->size_bytes() == 0) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("disk image '{0}' is empty: give it a size (truncate -s 10G '{0}')",
                            options.path));
  }
  if (options.format.empty() && image->driver() == std::string_view("raw"))
    KLOG(kWarn, "disk image '{}' looks like a raw one; say format=raw to be sure", options.path);
  return image;
}

Result<> CloseImage(const NodePtr& node) {
  return RunInFiber(node->loop(), [&] { return node->Close(); });
}

}  // namespace kvartz::block
