// img dd: if=, of=, bs=, count=, skip=.
#include <fmt/core.h>

#include <algorithm>

#include "block/jobs/convert.h"
#include "cli/img/img.h"

namespace kvartz::cli::img {
namespace {

struct Operands {
  std::string input, output;
  uint64_t block = 512;
  uint64_t count = UINT64_MAX;  // blocks
  uint64_t skip = 0;            // blocks
};

Result<Operands> TakeOperands(const Arguments& arguments) {
  Operands result;
  for (const std::string& word : arguments.operands) {
    size_t equals = word.find('=');
    std::string key = word.substr(0, equals);
    std::string value = equals == std::string::npos ? "" : word.substr(equals + 1);
    if (equals == std::string::npos) return Misuse(fmt::format("unrecognized operand {}", word));
    if (key == "if") {
      result.input = value;
    } else if (key == "of") {
      result.output = value;
    } else if (key == "bs") {
      result.block = TRY(TakeSize(value, "bs"));
    } else if (key == "count") {
      result.count = TRY(TakeSize(value, "count"));
    } else if (key == "skip") {
      result.skip = TRY(TakeSize(value, "skip"));
    } else {
      return Misuse(fmt::format("unrecognized operand {}", word));
    }
  }
  if (result.block == 0 || result.block > INT32_MAX)
    return Fail(ErrorCode::kInvalid, "Invalid bs specified. Must be between 1 and 2147483647.");
  if (result.input.empty() || result.output.empty())
    return Fail(ErrorCode::kInvalid, "Must specify both input and output files");
  return result;
}

Result<int> Run(Session& session, const Arguments& arguments) {
  Operands operands = TRY(TakeOperands(arguments));
  std::string format = arguments.Get("O", "raw");
  ImageName image = {operands.input, arguments.Get("format"), arguments.Has("image-opts")};
  block::NodePtr source =
      TRY(session.Open(image, {.read_only = true, .force_share = arguments.Has("force-share")}));
  uint64_t from = 0, most = 0;
  if (__builtin_mul_overflow(operands.skip, operands.block, &from)) from = UINT64_MAX;
  if (__builtin_mul_overflow(operands.count, operands.block, &most)) most = UINT64_MAX;
  most = std::min(most, source->size_bytes());  // counts from the start, skip included
  if (from > source->size_bytes()) {
    session.Complain(fmt::format("{}: cannot skip to specified offset", operands.input));
    from = source->size_bytes();
  }
  uint64_t length = most - std::min(most, from);
  block::Options options;
  options.Set("size", std::to_string(length));
  TRY(block::CreateImage(session.env(), format, operands.output, std::move(options)));
  block::NodePtr target =
      TRY(session.Open({.name = operands.output, .format = format}, {.discard_unmap = true}));
  block::ConvertJob job(session.loop(), "dd",
                        {.sources = {source},
                         .target = target,
                         .source_offset = from,
                         .length = length,
                         // As dd does, all is written.
                         .sparse_bytes = 0});
  TRY(job.Run());
  TRY(session.Close(target));
  return 0;
}

constexpr OptionSpec kOptions[] = {
    kObject,
    kImageOpts,
    kForceShare,
    kFormat,
    {'O', {}, "OUTPUT_FMT", "format of the output (default raw)"},
};

}  // namespace

const Verb kDd = {"dd", "[bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
                  "copies a part of an image", kOptions, Run};

}  // namespace kvartz::cli::img
