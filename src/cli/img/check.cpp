// img check. Exit codes: 0 no errors, 1 the check failed, 2 corruptions, 3 leaks alone, 63 the
// format has no checks.
#include <fmt/core.h>

#include "base/print.h"
#include "cli/img/img.h"
#include "cli/img/output.h"

namespace kvartz::cli::img {
namespace {

using block::CheckResult;
using block::Repair;

constexpr int kNoChecks = 63;

void PrintHuman(Session& session, const CheckResult& check) {
  if (check.corruptions == 0 && check.leaks == 0 && check.check_errors == 0) {
    session.Say("No errors were found on the image.\n");
  } else {
    if (check.corruptions) {
      session.Say(
          "\n{} errors were found on the image.\nData may be corrupted, or further writes to the "
          "image may corrupt it.\n",
          check.corruptions);
    }
    if (check.leaks) {
      session.Say(
          "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no "
          "harm to data.\n",
          check.leaks);
    }
    if (check.check_errors)
      session.Say("\n{} internal errors have occurred during the check.\n", check.check_errors);
  }
  if (check.total_clusters && check.allocated_clusters) {
    auto percent = [](uint64_t part, uint64_t whole) {
      return 100.0 * static_cast<double>(part) / static_cast<double>(whole);
    };
    session.Say("{}/{} = {:.2f}% allocated, {:.2f}% fragmented, {:.2f}% compressed clusters\n",
                check.allocated_clusters, check.total_clusters,
                percent(check.allocated_clusters, check.total_clusters),
                percent(check.fragmented_clusters, check.allocated_clusters),
                percent(check.compressed_clusters, check.allocated_clusters));
  }
  if (check.image_end_offset) session.Say("Image end offset: {}\n", check.image_end_offset);
}

void PrintJson(const std::string& filename, const std::string& format, const CheckResult& check) {
  block::InfoValue::Object object = {Field("filename", filename), Field("format", format),
                                     Field("check-errors", check.check_errors)};
  auto add = [&](const char* name, uint64_t value) {
    if (value) object.push_back(Field(name, value));
  };
  add("image-end-offset", check.image_end_offset);
  add("corruptions", check.corruptions);
  add("leaks", check.leaks);
  add("corruptions-fixed", check.corruptions_fixed);
  add("leaks-fixed", check.leaks_fixed);
  add("total-clusters", check.total_clusters);
  add("allocated-clusters", check.allocated_clusters);
  add("fragmented-clusters", check.fragmented_clusters);
  add("compressed-clusters", check.compressed_clusters);
  Print("{}\n", JsonText({std::move(object)}));
}

Result<Repair> TakeRepair(const Arguments& arguments) {
  if (!arguments.Has("repair")) return Repair::kNone;
  std::string name = arguments.Get("repair");
  if (name == "leaks") return Repair::kLeaks;
  if (name == "all") return Repair::kAll;
  return Misuse(fmt::format("Unknown option value for -r (expecting 'leaks' or 'all'): {}", name));
}

Result<int> Run(Session& session, const Arguments& arguments) {
  Output output = TRY(TakeOutput(arguments));
  Repair repair = TRY(TakeRepair(arguments));
  ImageName image = TRY(TakeImage(arguments));
  block::NodeOptions options = {.read_only = repair == Repair::kNone};
  options.force_share = arguments.Has("force-share");
  options.no_backing = true;
  options.for_check = true;
  TRY(ApplyCache(arguments.Get("T", "writeback"), options));
  block::NodePtr node = TRY(session.Open(image, options));
  block::ImageEditor* editor = node->editor();
  Result<CheckResult> check = Fail(ErrorCode::kUnsupported, "");
  auto report = [&](const std::string& line) {
    if (!session.quiet && output == Output::kHuman) Print(stderr, "{}\n", line);
  };
  if (editor) check = editor->Check(repair, report);
  if (!check && check.error().code == ErrorCode::kUnsupported) {
    session.Complain("This image format does not support checks");
    return kNoChecks;
  }
  CheckResult found = TRY(std::move(check));
  uint64_t corruptions_fixed = found.corruptions_fixed, leaks_fixed = found.leaks_fixed;
  if (corruptions_fixed || leaks_fixed) {
    if (output == Output::kHuman) {
      session.Say(
          "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    "
          "{} corruptions\n\nDouble checking the fixed image now...\n",
          leaks_fixed, corruptions_fixed);
    }
    found = TRY(editor->Check(Repair::kNone, report));
    found.corruptions_fixed = corruptions_fixed;
    found.leaks_fixed = leaks_fixed;
  }
  if (output == Output::kHuman) {
    PrintHuman(session, found);
  } else {
    PrintJson(image.is_options ? node->name() : image.name, node->driver(), found);
  }
  if (found.check_errors) {
    session.Complain("the check itself met errors");
    return 1;
  }
  return found.corruptions ? 2 : found.leaks ? 3 : 0;
}

constexpr OptionSpec kOptions[] = {
    kObject,      kImageOpts,  kQuiet,
    kFormat,      kOutput,     {'r', "repair", "WHAT", "repair: leaks, or all"},
    kSourceCache, kForceShare,
};

}  // namespace

const Verb kCheck = {"check", "FILENAME", "checks an image's metadata", kOptions, Run};

}  // namespace kvartz::cli::img
