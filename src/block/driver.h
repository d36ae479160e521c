// Drivers: one row a format, protocol or filter, with how it is recognised, opened and created.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <string_view>

#include "base/tls.h"
#include "block/node.h"
#include "block/options.h"

namespace kvartz::block {

class ThrottleGroup;

// How files are made, where the host's file system can.
struct NewFileOptions {
  bool nocow = false;             // written in place (btrfs)
  uint64_t extent_size_hint = 0;  // bytes (XFS); 0: none
};

// Who opens, and what that may reach. Kept by what goes on opening (backing files).
struct OpenEnv {
  EventLoop& loop;
  // The contents of --object secret,id=...; may be null.
  std::function<Result<std::string>(const std::string& id)> secret = {};
  // The credentials of --object tls-creds-...,id=...; may be null.
  std::function<Result<std::shared_ptr<const TlsCredentials>>(const std::string& id)> tls = {};
  // Nodes that options name ("backing": "node3"); may be null.
  std::function<NodePtr(const std::string& node_name)> find_node = {};
  // -object throttle-group by its id; may be null.
  std::function<std::shared_ptr<ThrottleGroup>(const std::string& id)> throttle_group = {};
  // What CreateFile gives instead of making a file (blockdev-create); may be null.
  NodePtr create_on = {};
  NewFileOptions new_files = {};
  // Files that an image names may be opened. false: an image that needs one is refused.
  bool follow_backing = true;
  bool follow_data_file = true;
};

struct OptionRow {
  enum class Type : uint8_t { kString, kBool, kSize, kNumber };
  std::string_view name = {};
  Type type;
  std::string_view help = {};
  std::string_view fallback = {};  // as text; empty: none
  bool amendable = false;
};

struct MeasureResult {
  uint64_t required = 0, fully_allocated = 0;
  uint64_t bitmaps = 0;
  bool has_bitmaps = false;
};

struct Driver {
  enum class Kind : uint8_t { kProtocol, kFormat, kFilter };
  std::string_view name = {};
  Kind kind;
  // How sure a format is that an image beginning with `head` is its own, 0 (not) to 100.
  int (*probe)(std::span<const uint8_t> head) = nullptr;
  // Fiber. Takes its options.
  Result<NodePtr> (*open)(const OpenEnv& env, const NodeOptions& node, Options& options) = nullptr;
  // What create takes besides "size" and (formats with backing) "backing_file", "backing_fmt".
  std::span<const OptionRow> create_options = {};
  // Fiber. Makes the image `filename`, its file included (CreateFile in graph.h). Null: can't.
  Result<> (*create)(const OpenEnv& env, const std::string& filename, Options& options) = nullptr;
  bool has_backing = false;
  // Fiber. How large a file an image of `options` ("size" is set) gets, with the contents of
  // `source` (may be null).
  Result<MeasureResult> (*measure)(Options& options, Node* source) = nullptr;
  bool can_compress = false;  // takes compressed writes
  // What amend takes besides the rows of create_options that are amendable.
  std::span<const OptionRow> amend_options = {};
  bool new_is_zero = true;  // what was just made reads as zeros
};

// What CreateImage takes of files besides create_options.
std::span<const OptionRow> FileCreateOptions();

// Null: there is none.
const Driver* FindDriver(std::string_view name);
// Errors: unknown, or not supported yet; `image` is named.
Result<const Driver*> RequireDriver(const std::string& name, const std::string& image);
std::span<const Driver* const> AllDrivers();
// The format of an image that begins with `head` (512 bytes, or all there is): raw if it is no
// other. Errors: a format that isn't supported yet.
Result<const Driver*> ProbeFormat(std::span<const uint8_t> head, const std::string& image);

}  // namespace kvartz::block
