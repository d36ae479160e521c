#include "vmm/hmp/hmp_block.h"

#include <fmt/core.h>

#include <boost/json/object.hpp>
#include <vector>

#include "block/graph.h"
#include "vmm/keyval.h"
#include "vmm/qmp/qmp_commands.h"
#include "vmm/storage/describe.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;

std::vector<std::string> Words(std::string_view text) {
  std::vector<std::string> words;
  while (true) {
    text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
    if (text.empty()) return words;
    size_t end = std::min(text.find_first_of(" \t"), text.size());
    words.emplace_back(text.substr(0, end));
    text.remove_prefix(end);
  }
}

// Takes the words that are flags ("-f") out of `words`.
std::string TakeFlags(std::vector<std::string>* words) {
  std::string flags;
  std::erase_if(*words, [&](const std::string& word) {
    bool flag = word.size() > 1 && word[0] == '-';
    if (flag) flags += word.substr(1);
    return flag;
  });
  return flags;
}

std::string Qmp(HmpContext& context, const char* name, const json::object& arguments) {
  const QmpCommand* command = FindQmpCommand(name);
  Result<> checked = CheckQmpMembers(command->arguments, arguments);
  if (!checked) return "Error: " + checked.error().what + "\n";
  Result<json::value> result = command->run(context.vm, arguments);
  return result ? "" : "Error: " + result.error().what + "\n";
}

std::string Usage(const char* usage) { return fmt::format("usage: {}\n", usage); }

// ---- info

std::string CacheName(const block::NodeOptions& options) {
  if (options.cache_no_flush) return "unsafe";
  return std::string(options.writethrough ? "writethrough" : "writeback") +
         (options.cache_direct ? ", direct" : "");
}

std::string InfoBlock(HmpContext& context, std::string_view) {
  std::string text;
  for (const auto& drive : context.vm.storage().drives()) {
    block::Node* node = block::SkipFilters(drive->disk().node().get());
    text += drive->id();
    if (!node) {
      text += ": [not inserted]\n";
      continue;
    }
    text += fmt::format("{}({}): {} ({}{})\n", drive->id().empty() ? "" : " ", node->node_name(),
                        node->name(), node->driver(), node->read_only() ? ", read-only" : "");
    if (!drive->device().empty())
      text += fmt::format("    Attached to:      {}\n", drive->QdevPath());
    text += fmt::format("    Cache mode:       {}\n", CacheName(node->opened_with()));
    if (block::Node* backing = block::BackingOf(node))
      text += fmt::format("    Backing file:     {}\n", backing->name());
    text += fmt::format("    Size:             {} bytes\n", node->size_bytes());
  }
  return text;
}

std::string InfoBlockJobs(HmpContext& context, std::string_view) {
  std::string text;
  for (const block::JobInfo& job : context.vm.storage().jobs().List()) {
    text += fmt::format(
        "Type {}, device {}: Completed {} of {} bytes, speed limit {} bytes/s ({})\n", job.type,
        job.id, job.current_progress, job.total_progress, job.speed, block::NameOf(job.status));
  }
  return text.empty() ? "No active jobs\n" : text;
}

std::string InfoBlockstats(HmpContext& context, std::string_view) {
  std::string text;
  for (const auto& drive : context.vm.storage().drives()) {
    json::object row = DescribeStatistics(context.vm.storage(), *drive);
    const json::object& stats = row.at("stats").as_object();
    text += drive->Name() + ":";
    for (const char* name : {"rd_bytes", "wr_bytes", "rd_operations", "wr_operations",
                             "flush_operations", "wr_total_time_ns", "rd_total_time_ns",
                             "flush_total_time_ns", "rd_merged", "wr_merged"}) {
      text += fmt::format(" {}={}", name, stats.at(name).to_number<uint64_t>());
    }
    text += "\n";
  }
  return text;
}

// ---- commands

std::string Resize(HmpContext& context, std::string_view arguments) {
  std::vector<std::string> words = Words(arguments);
  if (words.size() != 2) return Usage("block_resize DEVICE SIZE");
  Result<uint64_t> size = ParseSize(words[1], 'M');
  if (!size) return "Error: " + size.error().what + "\n";
  return Qmp(context, "block_resize",
             {{"device", words[0]}, {"size", static_cast<int64_t>(*size)}});
}

std::string DriveMirror(HmpContext& context, std::string_view arguments) {
  std::vector<std::string> words = Words(arguments);
  std::string flags = TakeFlags(&words);
  if (words.size() < 2 || words.size() > 3)
    return Usage("drive_mirror [-n] [-f] DEVICE FILE [FORMAT]");
  json::object request{{"device", words[0]},
                       {"target", words[1]},
                       {"sync", flags.find('f') != flags.npos ? "full" : "top"},
                       {"mode", flags.find('n') != flags.npos ? "existing" : "absolute-paths"}};
  if (words.size() == 3) request["format"] = words[2];
  return Qmp(context, "drive-mirror", request);
}

std::string DriveBackup(HmpContext& context, std::string_view arguments) {
  std::vector<std::string> words = Words(arguments);
  std::string flags = TakeFlags(&words);
  if (words.size() < 2 || words.size() > 3)
    return Usage("drive_backup [-n] [-f] [-c] DEVICE FILE [FORMAT]");
  json::object request{{"device", words[0]},
                       {"target", words[1]},
                       {"sync", flags.find('f') != flags.npos ? "full" : "top"},
                       {"mode", flags.find('n') != flags.npos ? "existing" : "absolute-paths"},
                       {"compress", flags.find('c') != flags.npos}};
  if (words.size() == 3) request["format"] = words[2];
  return Qmp(context, "drive-backup", request);
}

std::string Snapshot(HmpContext& context, std::string_view arguments) {
  std::vector<std::string> words = Words(arguments);
  std::string flags = TakeFlags(&words);
  if (words.size() < 2 || words.size() > 3)
    return Usage("snapshot_blkdev [-n] DEVICE FILE [FORMAT]");
  json::object request{{"device", words[0]},
                       {"snapshot-file", words[1]},
                       {"mode", flags.find('n') != flags.npos ? "existing" : "absolute-paths"}};
  if (words.size() == 3) request["format"] = words[2];
  return Qmp(context, "blockdev-snapshot-sync", request);
}

std::string CommitDrive(Storage& storage, Drive& drive) {
  Result<> done = block::CommitAtOnce(storage.registry(), drive.disk().node());
  if (done) return "";
  return fmt::format("Error: 'commit' error for '{}': {}\n", drive.Name(), done.error().what);
}

std::string Commit(HmpContext& context, std::string_view arguments) {
  std::vector<std::string> words = Words(arguments);
  if (words.size() != 1) return Usage("commit DEVICE|all");
  Storage& storage = context.vm.storage();
  block::Registry::Change change(storage.registry());
  if (words[0] != "all") {
    Drive* drive = storage.FindDrive(words[0]);
    if (!drive) return fmt::format("Device '{}' not found\n", words[0]);
    if (!drive->disk().node()) return fmt::format("Device '{}' has no medium\n", words[0]);
    return CommitDrive(storage, *drive);
  }
  std::string failures;
  for (const auto& drive : storage.drives()) {
    if (!drive->disk().node() || !block::BackingOf(drive->disk().node().get())) continue;
    failures += CommitDrive(storage, *drive);
  }
  return failures;
}

std::string Stream(HmpContext& context, std::string_view arguments) {
  std::vector<std::string> words = Words(arguments);
  if (words.empty() || words.size() > 3) return Usage("block_stream DEVICE [SPEED [BASE]]");
  json::object request{{"device", words[0]}};
  if (words.size() > 1) {
    Result<uint64_t> speed = ParseSize(words[1]);
    if (!speed) return "Error: " + speed.error().what + "\n";
    request["speed"] = static_cast<int64_t>(*speed);
  }
  if (words.size() > 2) request["base"] = words[2];
  return Qmp(context, "block-stream", request);
}

template <const char* kCommand>
std::string OnJob(HmpContext& context, std::string_view arguments) {
  std::vector<std::string> words = Words(arguments);
  std::string flags = TakeFlags(&words);
  if (words.size() != 1) return "Error: the job's id is expected\n";
  json::object request{{"device", words[0]}};
  if (!flags.empty()) request["force"] = true;
  return Qmp(context, kCommand, request);
}
constexpr char kCancel[] = "block-job-cancel", kComplete[] = "block-job-complete",
               kPause[] = "block-job-pause", kResume[] = "block-job-resume";

std::string SetSpeed(HmpContext& context, std::string_view arguments) {
  std::vector<std::string> words = Words(arguments);
  if (words.size() != 2) return Usage("block_job_set_speed ID BYTES");
  Result<uint64_t> speed = ParseSize(words[1]);
  if (!speed) return "Error: " + speed.error().what + "\n";
  return Qmp(context, "block-job-set-speed",
             {{"device", words[0]}, {"speed", static_cast<int64_t>(*speed)}});
}

constexpr auto kFiber = HmpCommand::Where::kFiber;
constexpr HmpCommand kInfos[] = {
    {"block", nullptr, "", "disks", InfoBlock, kFiber},
    {"block-jobs", nullptr, "", "jobs on disks", InfoBlockJobs, kFiber},
    {"blockstats", nullptr, "", "what disks have done", InfoBlockstats, kFiber},
};
constexpr HmpCommand kCommands[] = {
    {"block_job_cancel", nullptr, "[-f] ID", "end a job", OnJob<kCancel>, kFiber},
    {"block_job_complete", nullptr, "ID", "let a job that is ready end", OnJob<kComplete>, kFiber},
    {"block_job_pause", nullptr, "ID", "let a job wait", OnJob<kPause>, kFiber},
    {"block_job_resume", nullptr, "ID", "let it go on", OnJob<kResume>, kFiber},
    {"block_job_set_speed", nullptr, "ID BYTES", "limit a job (bytes a second)", SetSpeed, kFiber},
    {"block_resize", nullptr, "DEVICE SIZE", "give a disk another size (MiB, or with a suffix)",
     Resize, kFiber},
    {"block_stream", nullptr, "DEVICE [SPEED [BASE]]", "copy what is below a disk's image into it",
     Stream, kFiber},
    {"commit", nullptr, "DEVICE|all",
     "move what a disk's image has into the one below it; the guest waits", Commit, kFiber},
    {"drive_backup", nullptr, "[-n] [-f] [-c] DEVICE FILE [FORMAT]",
     "copy a disk as it is now (-n: the file is there, -f: all of the chain, -c: compressed)",
     DriveBackup, kFiber},
    {"drive_mirror", nullptr, "[-n] [-f] DEVICE FILE [FORMAT]",
     "copy a disk and keep the copy in step, until block_job_complete", DriveMirror, kFiber},
    {"snapshot_blkdev", nullptr, "[-n] DEVICE FILE [FORMAT]",
     "go on in a new image that stands on the present one", Snapshot, kFiber},
};

}  // namespace

std::span<const HmpCommand> BlockInfos() { return kInfos; }
std::span<const HmpCommand> BlockHmpCommands() { return kCommands; }

}  // namespace kvartz::vmm
