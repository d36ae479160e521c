// img compare. Exit codes: 0 identical, 1 different, 2 an image can't be opened, 3 its allocation
// can't be examined, 4 its contents can't be read.
#include "block/jobs/compare.h"

#include <fmt/core.h>

#include <algorithm>

#include "cli/img/img.h"

namespace kvartz::cli::img {
namespace {

using block::CompareJob;
using block::NodePtr;

constexpr int kDifferent = 1;
constexpr int kMisused = 1;
constexpr int kCannotOpen = 2;
constexpr int kCannotExamine = 3;
constexpr int kCannotRead = 4;

Result<int> Compare(Session& session, const Arguments& arguments, const NodePtr& a,
                    const NodePtr& b) {
  bool strict = arguments.Has("s");
  if (a->size_bytes() != b->size_bytes()) {
    if (strict) {
      session.Say("Strict mode: Image size mismatch!\n");
      return kDifferent;
    }
  }
  CompareJob job("compare", a, b, strict ? CompareJob::Mode::kStrict : CompareJob::Mode::kContents);
  Progress progress(ShowProgress(arguments), 2);
  progress.Watch(job);
  if (Result<> done = job.Run(); !done) {
    session.Complain(done.error().what);
    return job.failed_to_examine() ? kCannotExamine : kCannotRead;
  }
  if (job.result().status_differs_at) {
    session.Say("Strict mode: Offset {} block status mismatch!\n", *job.result().status_differs_at);
    return kDifferent;
  }
  uint64_t common = std::min(a->size_bytes(), b->size_bytes());
  bool common_differs = job.result().differs_at && *job.result().differs_at < common;
  if (a->size_bytes() != b->size_bytes() && !common_differs)
    session.Say("Warning: Image size mismatch!\n");
  if (job.result().differs_at) {
    session.Say("Content mismatch at offset {}!\n", *job.result().differs_at);
    return kDifferent;
  }
  session.Say("Images are identical.\n");
  return 0;
}

Result<int> Run(Session& session, const Arguments& arguments) {
  if (arguments.operands.size() != 2) {
    session.Complain(Misuse("Expecting two image file names").error().what);
    return kMisused;
  }
  bool is_options = arguments.Has("image-opts");
  block::NodeOptions options = {.read_only = true, .force_share = arguments.Has("force-share")};
  TRY(ApplyCache(arguments.Get("T", "writeback"), options));
  NodePtr a = TRY(session.Open({arguments.operands[0], arguments.Get("f"), is_options}, options));
  NodePtr b = TRY(session.Open({arguments.operands[1], arguments.Get("F"), is_options}, options));
  return Compare(session, arguments, a, b);
}

constexpr OptionSpec kOptions[] = {
    kObject,
    kImageOpts,
    {'f', {}, "FMT", "format of FILENAME1"},
    {'F', {}, "FMT", "format of FILENAME2"},
    kSourceCache,
    kProgress,
    kQuiet,
    {'s', {}, {}, "sizes and allocation must be the same, too"},
    kForceShare,
};

}  // namespace

const Verb kCompare = {
    "compare",  "FILENAME1 FILENAME2", "tells whether two images read the same", kOptions, Run,
    kCannotOpen};

}  // namespace kvartz::cli::img
