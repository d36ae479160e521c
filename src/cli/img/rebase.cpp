// img commit and img rebase.
#include "block/jobs/rebase.h"

#include <fmt/core.h>

#include "block/fiber_io.h"
#include "cli/img/img.h"

namespace kvartz::cli::img {
namespace {

using block::Node;
using block::NodePtr;

// The layer below `top` that the user calls `name`.
Result<Node*> FindBase(Node* top, const std::string& name) {
  for (Node* node = block::BackingOf(top); node; node = block::BackingOf(node)) {
    if (node->name() == name || node->name() == block::ResolveRelative(top->name(), name))
      return node;
  }
  return Fail(ErrorCode::kNotFound,
              fmt::format("Did not find '{}' in the backing chain of '{}'", name, top->name()));
}

Result<int> RunCommit(Session& session, const Arguments& arguments) {
  ImageName image = TRY(TakeImage(arguments));
  block::NodeOptions options = {.discard_unmap = true};
  TRY(ApplyCache(arguments.Get("t", "writeback"), options));
  NodePtr top = TRY(session.Open(image, options));
  Node* base = block::BackingOf(top.get());
  if (!base) return Fail(ErrorCode::kInvalid, "Image does not have a backing file");
  bool keep = arguments.Has("d");
  if (auto name = arguments.Find("b")) {
    base = TRY(FindBase(top.get(), *name));
    keep = true;  // the layers between stay as they were
  }
  for (Node* layer = block::SkipFilters(top.get()); layer != base; layer = block::BackingOf(layer))
    TRY(block::CheckCommits(*layer));
  using After = block::CommitJob::After;
  block::CommitJob job("commit", top, base, keep ? After::kKeepTop : After::kEmptyTop);
  if (auto rate = arguments.Find("r")) job.SetSpeed(TRY(TakeSize(*rate, "rate limit")));
  {
    Progress progress(ShowProgress(arguments));
    progress.Watch(job);
    TRY(job.Run());
    progress.Update(1, 1);
  }
  TRY(session.Close(top));
  session.Say("Image committed.\n");
  return 0;
}

constexpr OptionSpec kCommitOptions[] = {
    kObject,
    kImageOpts,
    kQuiet,
    kFormat,
    kCache,
    {'b', {}, "BASE", "commit into this layer below, through those between (implies -d)"},
    {'r', {}, "RATE_LIMIT", "bytes a second at most"},
    {'d', {}, {}, "don't empty FILENAME afterwards"},
    kProgress,
};

Result<> Rebase(Session& session, const Arguments& arguments, const NodePtr& node,
                const std::string& backing) {
  NodePtr new_backing;
  if (!backing.empty()) {
    block::NodeOptions options = {.read_only = true, .force_share = arguments.Has("force-share")};
    TRY(ApplyCache(arguments.Get("T", "writeback"), options));
    std::string path = block::ResolveRelative(node->name(), backing);
    Result<NodePtr> opened = session.Open({.name = path, .format = arguments.Get("F")}, options);
    if (!opened) return Fail(std::move(opened).error().In("Could not open new backing file"));
    new_backing = *opened;
    for (Node* below = new_backing.get(); below; below = block::BackingOf(below)) {
      if (below->name() == node->name())
        return Fail(ErrorCode::kInvalid,
                    fmt::format("'{}' stands on '{}' itself", backing, node->name()));
    }
  }
  block::RebaseJob job("rebase", node, new_backing);
  Progress progress(ShowProgress(arguments));
  progress.Watch(job);
  TRY(job.Run());
  progress.Update(1, 1);
  return block::Flush(*node);
}

Result<int> RunRebase(Session& session, const Arguments& arguments) {
  ImageName image = TRY(TakeImage(arguments));
  bool unsafe = arguments.Has("u");
  std::optional<std::string> backing = arguments.Find("b");
  if (!unsafe && !backing) return Misuse("Must specify backing file (-b) or use unsafe mode (-u)");
  std::string backing_format = arguments.Get("F");
  if (!backing_format.empty()) TRY(block::RequireDriver(backing_format, backing.value_or("")));
  block::NodeOptions options = {.no_backing = unsafe};
  TRY(ApplyCache(arguments.Get("t", "writeback"), options));
  NodePtr node = TRY(session.Open(image, options));
  if (!node->editor())
    return Fail(ErrorCode::kUnsupported,
                fmt::format("'{}': format {} has no backing files", image.name, node->driver()));
  if (backing && !backing->empty() && backing_format.empty())
    return Fail(
        ErrorCode::kInvalid,
        fmt::format(
            "Could not change the backing file to '{}': backing format must be specified (-F)",
            *backing));
  if (!unsafe) TRY(Rebase(session, arguments, node, *backing));
  TRY(node->editor()->RecordBacking(backing.value_or(""), backing_format));
  TRY(session.Close(node));
  return 0;
}

constexpr OptionSpec kRebaseOptions[] = {
    kObject,
    kImageOpts,
    kForceShare,
    kQuiet,
    kFormat,
    kCache,
    kSourceCache,
    kProgress,
    {'u', {}, {}, "only record the new name: the contents are the same, says the user"},
    {'b', {}, "BACKING_FILE", "the new backing file; empty: none"},
    {'F', {}, "BACKING_FMT", "its format"},
};

}  // namespace

const Verb kCommit = {"commit", "FILENAME", "writes an overlay's contents into what it stands on",
                      kCommitOptions, RunCommit};
const Verb kRebase = {"rebase", "FILENAME", "puts an overlay on another backing file",
                      kRebaseOptions, RunRebase};

}  // namespace kvartz::cli::img
