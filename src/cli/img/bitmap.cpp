// img bitmap and img amend.
#include <fmt/core.h>

#include <bit>

#include "block/dirty_bitmap.h"
#include "cli/img/img.h"

namespace kvartz::cli::img {
namespace {

using block::BitmapStore;
using block::NodePtr;

constexpr uint64_t kSmallestGranularity = 512;
constexpr uint64_t kLargestGranularity = uint64_t{1} << 31;

Result<BitmapStore*> StoreOf(const NodePtr& node) {
  BitmapStore* store = node->bitmaps();
  if (store) return store;
  return Fail(ErrorCode::kUnsupported, fmt::format("'{}': format {} has no persistent bitmaps",
                                                   node->name(), node->driver()));
}

Result<> Merge(Session& session, const Arguments& arguments, BitmapStore& store,
               const std::string& name, const std::string& from) {
  BitmapStore* source = &store;
  if (auto file = arguments.Find("source-file")) {
    NodePtr node = TRY(session.Open({.name = *file, .format = arguments.Get("source-format")},
                                    {.read_only = true, .no_backing = true}));
    source = TRY(StoreOf(node));
  }
  auto bitmap = source->Find(from);
  if (!bitmap)
    return Fail(ErrorCode::kNotFound,
                fmt::format("there is no bitmap '{}' (or it is inconsistent)", from));
  return store.Merge(name, *bitmap);
}

Result<> Act(Session& session, const Arguments& arguments, BitmapStore& store,
             const std::string& name, const Arguments::Given& action) {
  std::string_view verb = action.spec->name;
  if (verb == "add") {
    block::BitmapInfo bitmap = {.name = name};
    if (auto text = arguments.Find("granularity")) {
      uint64_t granularity = TRY(TakeSize(*text, "granularity"));
      if (!std::has_single_bit(granularity) || granularity < kSmallestGranularity ||
          granularity > kLargestGranularity)
        return Fail(ErrorCode::kInvalid, "granularity must be a power of two from 512 to 2G");
      bitmap.granularity = static_cast<uint32_t>(granularity);
    }
    bitmap.enabled = !arguments.Has("disable");
    return store.Add(bitmap);
  }
  if (verb == "remove") return store.Remove(name);
  if (verb == "clear") return store.Clear(name);
  if (verb == "enable") return store.Enable(name, true);
  if (verb == "disable") return store.Enable(name, false);
  return Merge(session, arguments, store, name, action.value);
}

bool IsAction(std::string_view name) {
  for (std::string_view action : {"add", "remove", "clear", "enable", "disable", "merge"}) {
    if (name == action) return true;
  }
  return false;
}

Result<int> RunBitmap(Session& session, const Arguments& arguments) {
  bool any = false;
  for (const Arguments::Given& given : arguments.given) any = any || IsAction(given.spec->name);
  if (!any)
    return Fail(ErrorCode::kInvalid,
                "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge");
  if (arguments.operands.size() != 2) return Misuse("Expecting filename and bitmap name");
  if (arguments.Has("granularity") && !arguments.Has("add"))
    return Fail(ErrorCode::kInvalid, "granularity only supported with --add");
  if (arguments.Has("source-format") && !arguments.Has("source-file"))
    return Fail(ErrorCode::kInvalid, "-F requires -b");
  if (arguments.Has("source-file") && !arguments.Has("merge"))
    return Fail(ErrorCode::kInvalid, "Merge bitmap source file only supported with --merge");
  ImageName image = {arguments.operands[0], arguments.Get("format"), arguments.Has("image-opts")};
  NodePtr node = TRY(session.Open(image, {.no_backing = true}));
  BitmapStore* store = TRY(StoreOf(node));
  const std::string& name = arguments.operands[1];
  for (const Arguments::Given& given : arguments.given) {
    if (!IsAction(given.spec->name)) continue;
    Result<> done = Act(session, arguments, *store, name, given);
    if (!done)
      return Fail(std::move(done).error().In(
          fmt::format("Operation {} on bitmap {} failed", given.spec->name, name)));
  }
  TRY(session.Close(node));
  return 0;
}

constexpr OptionSpec kBitmapOptions[] = {
    {0, "add", {}, "make a bitmap"},
    {0, "remove", {}, "remove it"},
    {0, "clear", {}, "make it all clean"},
    {0, "enable", {}, "it records writes"},
    {0, "disable", {}, "it doesn't"},
    {0, "merge", "SOURCE", "add what bitmap SOURCE has"},
    {'b', "source-file", "SOURCE_FILE", "SOURCE is in this image"},
    {'F', "source-format", "SOURCE_FMT", "format of SOURCE_FILE"},
    {'g', "granularity", "BYTES", "of --add: bytes that a bit stands for (default 64k)"},
    kObject,
    kImageOpts,
    kFormat,
};

Result<int> RunAmend(Session& session, const Arguments& arguments) {
  CreateOptions given = TRY(TakeCreateOptions(arguments));
  if (given.help) {
    std::string format = arguments.Get("format");
    if (format.empty() && arguments.operands.size() == 1) {
      ImageName image = TRY(TakeImage(arguments));
      format = TRY(session.Open(image, {.read_only = true, .no_backing = true}))->driver();
    }
    PrintCreateHelp(*TRY(block::RequireDriver(format.empty() ? "raw" : format, "")),
                    HelpOf::kAmend);
    return 0;
  }
  if (!arguments.Has("o")) return Misuse("Must specify options (-o)");
  ImageName image = TRY(TakeImage(arguments));
  block::NodeOptions options;
  TRY(ApplyCache(arguments.Get("t", "writeback"), options));
  NodePtr node = TRY(session.Open(image, options));
  if (!node->editor())
    return Fail(
        ErrorCode::kUnsupported,
        fmt::format("Format driver '{}' does not support option amendment", node->driver()));
  if (arguments.Has("force")) {
    if (!TRY(node->Info()).encrypted)
      return Fail(ErrorCode::kUnsupported, "--force is for key slots of encrypted images");
    given.options.Set("force", "on");
  }
  {
    Progress progress(ShowProgress(arguments));
    TRY(node->editor()->Amend(
        given.options, [&](uint64_t done, uint64_t total) { progress.Update(done, total); }));
    progress.Update(1, 1);
  }
  TRY(session.Close(node));
  return 0;
}

constexpr OptionSpec kAmendOptions[] = {
    kObject,
    kImageOpts,
    kProgress,
    kQuiet,
    kFormat,
    kCache,
    {0, "force", {}, "also what makes an encrypted image unreadable"},
    {'o', {}, "OPTIONS", "what to change; 'help' lists it"},
};

}  // namespace

const Verb kBitmap = {"bitmap", "FILENAME BITMAP", "changes persistent bitmaps", kBitmapOptions,
                      RunBitmap};
const Verb kAmend = {"amend", "FILENAME", "changes options of an image", kAmendOptions, RunAmend};

}  // namespace kvartz::cli::img
