// img verify: the check, and then the proof by reading all of it. Exit codes as those of check.
#include <fmt/core.h>

#include <algorithm>
#include <memory>

#include "base/print.h"
#include "block/fiber_io.h"
#include "cli/img/img.h"

namespace kvartz::cli::img {
namespace {

constexpr uint64_t kPieceBytes = 2 << 20;
constexpr int kUnreadable = 2;

Result<int> Run(Session& session, const Arguments& arguments) {
  ImageName image = TRY(TakeImage(arguments));
  block::NodeOptions options = {.read_only = true, .force_share = arguments.Has("force-share")};
  options.for_check = true;
  block::NodePtr node = TRY(session.Open(image, options));
  int code = 0;
  if (node->editor()) {
    auto report = [&](const std::string& line) {
      if (!session.quiet) Print(stderr, "{}\n", line);
    };
    Result<block::CheckResult> checked = node->editor()->Check(block::Repair::kNone, report);
    if (checked) {
      session.Say("metadata: {} errors, {} leaked clusters\n", checked->corruptions,
                  checked->leaks);
      code = checked->corruptions ? 2 : checked->leaks ? 3 : 0;
    } else if (checked.error().code != ErrorCode::kUnsupported) {
      return std::unexpected(checked.error());
    }
  }
  std::unique_ptr<uint8_t[]> buffer(new uint8_t[kPieceBytes]);
  uint64_t data = 0, unreadable = 0;
  {
    Progress progress(ShowProgress(arguments));
    for (uint64_t at = 0; at < node->size_bytes();) {
      block::ChainExtent found =
          TRY(block::StatusAbove(*node, nullptr, at, node->size_bytes() - at));
      if (found.extent.length == 0) break;
      uint64_t length = found.extent.length;
      if (!found.reads_as_zeros()) {
        length = std::min(length, kPieceBytes);
        if (int rc = block::ReadAt(*node, at, {buffer.get(), length})) {
          session.Complain(block::IoError(*node, "read", at, rc).what);
          unreadable += length;
        }
        data += length;
      }
      at += length;
      progress.Update(at, node->size_bytes());
    }
  }
  session.Say("contents: {} bytes of data read, {} of them unreadable\n", data, unreadable);
  return unreadable ? kUnreadable : code;
}

constexpr OptionSpec kOptions[] = {kObject, kImageOpts, kQuiet, kFormat, kProgress, kForceShare};

}  // namespace

const Verb kVerify = {"verify", "FILENAME", "checks an image, then reads all of it", kOptions, Run};

}  // namespace kvartz::cli::img
