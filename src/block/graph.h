// Opening and creating images as trees of nodes, and questions about a chain of them. Fiber: all
// that returns a Result.
#pragma once

#include <functional>
#include <string>

#include "block/driver.h"

namespace kvartz::block {

// Opens what `options` describe: "driver" with its own keys, or "filename" (a path, "file:path",
// "json:{...}", "nbd://...") whose format is found out. `inherited`: from the parent, or what the
// caller wants; keys of NodeOptions in `options` go first.
Result<NodePtr> OpenNode(const OpenEnv& env, Options options, const NodeOptions& inherited = {});
Result<NodePtr> OpenFilename(const OpenEnv& env, const std::string& filename,
                             const std::string& format, const NodeOptions& inherited = {});

// Key "discard", as NodeOptions::discard_unmap; `unmap`: without it.
Result<bool> TakeDiscard(Options& options, bool unmap);

// The child at `key` of a driver's options ("file", "backing"): a node there already, a node's
// name, or options below "key.". Null if nothing is given for it.
Result<NodePtr> OpenChild(const OpenEnv& env, Options& options, const std::string& key,
                          const NodeOptions& inherited);

// Creates an image, its file included. `options`: "size", "backing_file", "backing_fmt" and the
// driver's own. Errors name unknown options.
Result<> CreateImage(const OpenEnv& env, const std::string& format, const std::string& filename,
                     Options options);

// The protocol node below an image that is being made: a file (made or emptied), a device.
// Writable, growing, and locked against everybody else.
Result<NodePtr> CreateFile(const OpenEnv& env, const std::string& filename);

// The path that `filename`, as recorded in the image `of`, means. Protocols and absolute paths
// stay.
std::string ResolveRelative(const std::string& of, const std::string& filename);

// Without filters above.
Node* SkipFilters(Node* node);
// The next image below `node`'s own, filters skipped; null: none.
Node* BackingOf(Node* node);

// An image may be committed into what it stands on. Errors: it records that as it was (VMDK).
Result<> CheckCommits(const Node& image);

// As Node::Status, with what the layers below add: ranges beyond a short backing node and holes of
// the file read as zeros.
// kOfRaw: holes of the file are told of raw images alone, as qemu-img map does.
enum class Holes : uint8_t { kTell, kOfRaw };
Result<Extent> StatusOf(Node& node, uint64_t offset, uint64_t length, Holes holes = Holes::kTell);

// What the guest sees at `offset` of the chain from `top` down to `base` (exclusive; null: all).
// `depth`: how many layers below `top` the extent comes from; extent.allocated is false if none of
// them has it.
struct ChainExtent {
  Extent extent;
  int depth = 0;
  Node* node = nullptr;  // of the chain, where it was found; null if nowhere

  // Where `base` is null.
  bool reads_as_zeros() const { return extent.zero || !extent.allocated; }
};
Result<ChainExtent> StatusAbove(Node& top, Node* base, uint64_t offset, uint64_t length);

}  // namespace kvartz::block
