// img convert.
#include "block/jobs/convert.h"

#include <fmt/core.h>

#include <algorithm>

#include "cli/img/img.h"

namespace kvartz::cli::img {
namespace {

using block::Driver;
using block::NodePtr;

constexpr uint64_t kSector = 512;
constexpr uint64_t kMostWorkers = 16;

class Conversion {
 public:
  Conversion(Session& session, const Arguments& arguments)
      : session_(session), arguments_(arguments) {}

  Result<int> Run() {
    TRY(ReadOptions());
    if (create_.help) {
      PrintCreateHelp(*driver_,
                      arguments_.operands.size() < 2 ? HelpOf::kCreate : HelpOf::kCreateFile);
      return 0;
    }
    TRY(OpenSources());
    if (!arguments_.Has("n")) TRY(CreateTarget());
    TRY(OpenTarget());
    TRY(CheckTarget());
    block::ConvertJob job(session_.loop(), "convert", copy_);
    if (auto rate = arguments_.Find("r")) job.SetSpeed(TRY(TakeSize(*rate, "rate limit")));
    {
      Progress progress(ShowProgress(arguments_));
      progress.Watch(job);
      TRY(job.Run());
      if (arguments_.Has("bitmaps")) TRY(CopyBitmaps());
      progress.Update(1, 1);
    }
    TRY(session_.Close(copy_.target));
    return 0;
  }

 private:
  Result<> ReadOptions() {
    create_ = TRY(TakeCreateOptions(arguments_));
    format_ = arguments_.Get("O", "raw");
    driver_ = TRY(block::RequireDriver(format_, ""));
    if (create_.help) return {};
    if (arguments_.operands.size() < 2)
      return Fail(ErrorCode::kInvalid, "Must specify image file name");
    target_name_ = arguments_.operands.back();
    if (auto text = arguments_.Find("S")) {
      copy_.sparse_bytes = TRY(TakeSize(*text, "buffer size for sparse output"));
      if (copy_.sparse_bytes % kSector != 0)
        return Fail(
            ErrorCode::kInvalid,
            "Invalid buffer size for sparse output specified: it must be a multiple of 512");
    }
    uint64_t workers = copy_.workers;
    if (auto text = arguments_.Find("m")) workers = TRY(TakeCount(*text, "number of coroutines"));
    if (workers < 1 || workers > kMostWorkers)
      return Fail(ErrorCode::kInvalid,
                  "Invalid number of coroutines. Allowed number of coroutines is between 1 and 16");
    copy_.workers = static_cast<unsigned>(workers);
    copy_.out_of_order = arguments_.Has("W");
    copy_.compressed = arguments_.Has("c");
    copy_.salvage = arguments_.Has("salvage");
    copy_.on_unreadable = [this](const std::string& message) {
      session_.Complain("warning: " + message);
    };
    return CheckCombinations();
  }

  Result<> CheckCombinations() {
    copy_.host_copy = arguments_.Has("C");
    if (copy_.host_copy && copy_.compressed)
      return Fail(ErrorCode::kInvalid, "Cannot enable copy offloading when -c is used");
    if (copy_.host_copy && arguments_.Has("S"))
      return Fail(ErrorCode::kInvalid, "Cannot enable copy offloading when -S is used");
    if (copy_.host_copy && copy_.salvage)
      return Fail(ErrorCode::kInvalid, "Cannot use copy offloading in salvaging mode");
    if (arguments_.Has("target-image-opts") && !arguments_.Has("n"))
      return Fail(ErrorCode::kInvalid, "--target-image-opts requires use of -n flag");
    if (arguments_.Has("target-is-zero") && !arguments_.Has("n"))
      return Fail(ErrorCode::kInvalid, "--target-is-zero requires use of -n flag");
    if (arguments_.Has("n") && !create_.options.empty())
      session_.Complain("warning: -o has no effect when skipping image creation");
    if (auto backing = arguments_.Find("B")) create_.options.Set("backing_file", *backing);
    if (auto format = arguments_.Find("F")) create_.options.Set("backing_fmt", *format);
    if (arguments_.Has("c") && create_.options.Has("encrypt.format"))
      return Fail(ErrorCode::kInvalid, "Compression and encryption not supported at the same time");
    bool has_backing = create_.options.Has("backing_file");
    if (create_.options.Has("backing_fmt") && !has_backing)
      return Fail(ErrorCode::kInvalid, "-F requires -B");
    if (has_backing && arguments_.operands.size() > 2) {
      return Fail(ErrorCode::kInvalid,
                  "Having a backing file for the target makes no sense when concatenating multiple "
                  "input images");
    }
    if (has_backing && !arguments_.Has("n")) {
      if (!driver_->has_backing)
        return Fail(ErrorCode::kInvalid,
                    fmt::format("Backing file not supported for file format '{}'", format_));
      if (!create_.options.Has("backing_fmt"))
        return Fail(ErrorCode::kInvalid, "Backing file specified without backing format; say -F");
    }
    if (create_.options.Has("preallocation"))
      preallocated_ = create_.options.all().at("preallocation").text != "off";
    if (copy_.compressed && preallocated_ && !arguments_.Has("n"))
      return Fail(ErrorCode::kInvalid,
                  "Compression and preallocation not supported at the same time");
    if (arguments_.Has("skip-broken-bitmaps") && !arguments_.Has("bitmaps"))
      return Fail(ErrorCode::kInvalid, "Use of --skip-broken-bitmaps requires --bitmaps");
    if (arguments_.Has("bitmaps") && arguments_.operands.size() > 2)
      return Fail(ErrorCode::kInvalid, "Copying bitmaps only possible with single source");
    return {};
  }

  Result<> OpenSources() {
    ImageName image = {.format = arguments_.Get("format"),
                       .is_options = arguments_.Has("image-opts")};
    if (image.is_options && !image.format.empty())
      return Fail(ErrorCode::kInvalid, "--image-opts and --format are mutually exclusive");
    block::NodeOptions options = {.read_only = true, .force_share = arguments_.Has("force-share")};
    TRY(ApplyCache(arguments_.Get("T", "writeback"), options));
    for (size_t i = 0; i + 1 < arguments_.operands.size(); i++) {
      image.name = arguments_.operands[i];
      copy_.sources.push_back(TRY(session_.Open(image, options)));
      total_ += copy_.sources.back()->size_bytes();
    }
    if (auto snapshot = arguments_.Find("l")) return ShowSnapshot(*snapshot);
    return {};
  }

  Result<> ShowSnapshot(std::string name) {
    if (copy_.sources.size() > 1)
      return Fail(ErrorCode::kInvalid, "No support for concatenating multiple snapshot");
    for (const char* prefix : {"snapshot.id=", "snapshot.name="}) {
      if (name.starts_with(prefix)) name = name.substr(std::string_view(prefix).size());
    }
    block::SnapshotStore* snapshots = copy_.sources[0]->snapshots();
    if (!snapshots)
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("format {} has no snapshots", copy_.sources[0]->driver()));
    Result<> shown = snapshots->ShowReadOnly(name);
    if (!shown) return Fail(std::move(shown).error().In("Failed to load snapshot"));
    total_ = copy_.sources[0]->size_bytes();
    return {};
  }

  Result<> CreateTarget() {
    if (!driver_->create)
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("Format driver '{}' does not support image creation", format_));
    if (copy_.compressed && !driver_->can_compress)
      return Fail(ErrorCode::kUnsupported, "Compression not supported for this file format");
    // A source that is emptied before it is read would be lost; locks see to it where they can.
    for (size_t i = 0; i + 1 < arguments_.operands.size(); i++) {
      if (arguments_.operands[i] == target_name_)
        return Fail(ErrorCode::kInvalid,
                    fmt::format("'{}' is both source and target", target_name_));
    }
    if (!create_.options.Has("size")) create_.options.Set("size", std::to_string(total_));
    if (create_.options.Has("backing_file"))
      backing_ = TRY(OpenBacking(session_, target_name_, create_.options));
    Result<> created = block::CreateImage(session_.env(), format_, target_name_, create_.options);
    if (!created)
      return Fail(std::move(created).error().In(
          fmt::format("{}: error while converting {}", target_name_, format_)));
    return {};
  }

  Result<> OpenTarget() {
    ImageName image = {
        .name = target_name_, .format = format_, .is_options = arguments_.Has("target-image-opts")};
    if (image.is_options) image.format.clear();
    for (const auto& [key, value] : create_.options.all()) {
      if (key.ends_with("key-secret") && !arguments_.Has("n")) image.keys[key] = value.text;
    }
    block::NodeOptions options = {.discard_unmap = true};
    // What is unfinished is worth nothing, so there is nothing to flush before the end.
    bool skip_create = arguments_.Has("n");
    TRY(ApplyCache(arguments_.Get("t", skip_create ? "writeback" : "unsafe"), options));
    options.no_backing = backing_ != nullptr;
    copy_.target = TRY(session_.Open(image, options));
    return backing_ ? copy_.target->SetBacking(backing_) : Result<>();
  }

  Result<> CheckTarget() {
    Node* bottom = copy_.target.get();
    while (bottom->file()) bottom = bottom->file();
    bool is_device = bottom->driver() == std::string_view("host_device");
    bool raw = copy_.target->driver() == std::string_view("raw") || bottom == copy_.target.get();
    if (arguments_.Has("n")) {
      copy_.target_is_zero = arguments_.Has("target-is-zero");
    } else {
      copy_.target_is_zero = (!is_device || (!raw && !preallocated_)) && driver_->new_is_zero;
    }
    if (create_.options.Has("backing_file") || (arguments_.Has("n") && copy_.target->backing())) {
      copy_.only_allocated = create_.options.Has("backing_file");
      copy_.target_is_zero = false;
    }
    if (copy_.target->size_bytes() < total_) {
      if (!arguments_.Has("n") && copy_.target->size_bytes() / kSector >= total_ / kSector)
        return {};
      return Fail(ErrorCode::kInvalid, "output file is smaller than input file");
    }
    block::ImageInfo info = TRY(copy_.target->Info());
    if (info.compressed) copy_.compressed = true;  // it takes nothing else
    if (copy_.compressed &&
        (info.cluster_size == 0 || !block::FindDriver(copy_.target->driver())->can_compress))
      return Fail(ErrorCode::kUnsupported, "Compression not supported for this file format");
    return {};
  }

  Result<> CopyBitmaps() {
    block::BitmapStore* from = copy_.sources[0]->bitmaps();
    block::BitmapStore* to = copy_.target->bitmaps();
    if (!from || !to)
      return Fail(ErrorCode::kUnsupported,
                  "--bitmaps: source and target must both be of a format that has bitmaps");
    for (const block::BitmapInfo& bitmap : from->List()) {
      if (bitmap.in_use) {
        if (arguments_.Has("skip-broken-bitmaps")) {
          session_.Complain(fmt::format("warning: Skipping inconsistent bitmap '{}'", bitmap.name));
          continue;
        }
        return Fail(ErrorCode::kState, fmt::format("Cannot copy inconsistent bitmap '{}': use "
                                                   "--skip-broken-bitmaps, or 'bitmap --remove'",
                                                   bitmap.name));
      }
      block::BitmapInfo copy = bitmap;
      copy.enabled = false;
      TRY(to->Add(copy));
      TRY(to->Merge(bitmap.name, *from->Find(bitmap.name)));
      if (bitmap.enabled) TRY(to->Enable(bitmap.name, true));
    }
    return {};
  }

  using Node = block::Node;
  Session& session_;
  const Arguments& arguments_;
  CreateOptions create_;
  std::string format_, target_name_;
  const Driver* driver_ = nullptr;
  bool preallocated_ = false;
  block::NodePtr backing_;  // of a target that is made
  uint64_t total_ = 0;
  block::ConvertOptions copy_;
};

Result<int> Run(Session& session, const Arguments& arguments) {
  return Conversion(session, arguments).Run();
}

constexpr OptionSpec kOptions[] = {
    kObject,
    kImageOpts,
    {0, "target-image-opts", {}, "OUTPUT is a list of options (with -n)"},
    {0, "target-is-zero", {}, "OUTPUT reads as zeros already (with -n)"},
    {0, "bitmaps", {}, "copy the persistent bitmaps, too"},
    {0, "skip-broken-bitmaps", {}, "but not those that are inconsistent"},
    kForceShare,
    {'C', {}, {}, "let the host copy data where it can (raw OUTPUT)"},
    {'c', {}, {}, "compress OUTPUT"},
    kProgress,
    kQuiet,
    {'n', {}, {}, "OUTPUT is there already: don't make it"},
    kFormat,
    {'t', {}, "CACHE", "cache mode of OUTPUT (default unsafe; with -n writeback)"},
    kSourceCache,
    {'O', {}, "OUTPUT_FMT", "format of OUTPUT (default raw)"},
    {'B', {}, "BACKING_FILE", "OUTPUT stands on this image"},
    {'F', {}, "BACKING_FMT", "format of BACKING_FILE"},
    {'o', {}, "OPTIONS", "options of OUTPUT's format; 'help' lists them"},
    {'l',
     {},
     "SNAPSHOT",
     "take the contents of an internal snapshot (snapshot.id=, snapshot.name=)"},
    {'S', {}, "SPARSE_SIZE", "zeros of this length leave holes (default 4k); 0: copy all"},
    {'r', {}, "RATE_LIMIT", "bytes a second at most"},
    {'m', {}, "NUM_COROUTINES", "pieces under way at once (1 to 16, default 8)"},
    {'W', {}, {}, "write in any order"},
    {0, "salvage", {}, "what can't be read becomes zeros"},
};

}  // namespace

const Verb kConvert = {"convert", "FILENAME... OUTPUT", "copies images into a new one", kOptions,
                       Run};

}  // namespace kvartz::cli::img
