// img measure.
#include <fmt/core.h>

#include "base/print.h"
#include "cli/img/img.h"
#include "cli/img/output.h"

namespace kvartz::cli::img {
namespace {

Result<int> Run(Session& session, const Arguments& arguments) {
  Output output = TRY(TakeOutput(arguments));
  std::string format = arguments.Get("O", "raw");
  const block::Driver* driver = TRY(block::RequireDriver(format, ""));
  CreateOptions given = TRY(TakeCreateOptions(arguments));
  std::optional<std::string> size = arguments.Find("size");
  if (size.has_value() == !arguments.operands.empty() || arguments.operands.size() > 1)
    return Fail(ErrorCode::kInvalid, "Either --size N or one filename must be specified.");
  if (!driver->measure)
    return Fail(ErrorCode::kUnsupported,
                fmt::format("Block driver '{}' does not support size measurement", format));
  block::NodePtr source;
  if (size) {
    given.options.Set("size", std::to_string(TRY(TakeSize(*size, "image size"))));
  } else {
    ImageName image = TRY(TakeImage(arguments));
    source =
        TRY(session.Open(image, {.read_only = true, .force_share = arguments.Has("force-share")}));
    if (auto snapshot = arguments.Find("l")) {
      if (!source->snapshots())
        return Fail(ErrorCode::kUnsupported,
                    fmt::format("format {} has no snapshots", source->driver()));
      std::string name = *snapshot;
      for (std::string_view prefix : {"snapshot.id=", "snapshot.name="}) {
        if (name.starts_with(prefix)) name = name.substr(prefix.size());
      }
      TRY(source->snapshots()->ShowReadOnly(name));
    }
    given.options.Set("size", std::to_string(source->size_bytes()));
  }
  block::MeasureResult result = TRY(driver->measure(given.options, source.get()));
  if (output == Output::kHuman) {
    Print("required size: {}\nfully allocated size: {}\n", result.required, result.fully_allocated);
    if (result.has_bitmaps) Print("bitmaps size: {}\n", result.bitmaps);
    return 0;
  }
  block::InfoValue::Object object = {Field("required", result.required),
                                     Field("fully-allocated", result.fully_allocated)};
  if (result.has_bitmaps) object.push_back(Field("bitmaps", result.bitmaps));
  Print("{}\n", JsonText({std::move(object)}));
  return 0;
}

constexpr OptionSpec kOptions[] = {
    kObject,
    kImageOpts,
    kFormat,
    kOutput,
    {'O', {}, "OUTPUT_FMT", "the format that the file would be in (default raw)"},
    {'o', {}, "OPTIONS", "options that it would be made with"},
    {0, "size", "N", "measure an empty image of N bytes"},
    {'l', {}, "SNAPSHOT", "measure the contents of an internal snapshot"},
    kForceShare,
};

}  // namespace

const Verb kMeasure = {"measure", "[FILENAME]", "tells how large a file an image would need",
                       kOptions, Run};

}  // namespace kvartz::cli::img
