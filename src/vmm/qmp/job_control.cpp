// Commands on jobs that are there: by QMP's job-* and, older, block-job-* names.
#include <boost/json/array.hpp>

#include "vmm/qmp/block_commands.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;
using Value = Result<json::value>;
using block::JobInfo;
using block::JobList;

// A command that does one thing to the job named by argument `key`.
template <auto kMethod>
Value OnJob(Vm& vm, const json::object& arguments) {
  const char* key = arguments.contains("id") ? "id" : "device";
  TRY((vm.storage().jobs().*kMethod)(Text(arguments, key)));
  return Done();
}

Value BlockJobCancel(Vm& vm, const json::object& arguments) {
  TRY(vm.storage().jobs().Cancel(Text(arguments, "device"), Flag(arguments, "force")));
  return Done();
}
Value JobCancel(Vm& vm, const json::object& arguments) {
  TRY(vm.storage().jobs().Cancel(Text(arguments, "id"), true));
  return Done();
}
Value SetSpeed(Vm& vm, const json::object& arguments) {
  uint64_t speed = TRY(Count(arguments, "speed"));
  TRY(vm.storage().jobs().SetSpeed(Text(arguments, "device"), speed));
  return Done();
}

Value QueryJobs(Vm& vm, const json::object&) {
  json::array rows;
  for (const JobInfo& job : vm.storage().jobs().List()) {
    json::object row{{"id", job.id},
                     {"type", job.type},
                     {"status", block::NameOf(job.status)},
                     {"current-progress", job.current_progress},
                     {"total-progress", job.total_progress}};
    if (!job.error.empty()) row["error"] = job.error;
    rows.push_back(std::move(row));
  }
  return rows;
}

Value QueryBlockJobs(Vm& vm, const json::object&) {
  json::array rows;
  for (const JobInfo& job : vm.storage().jobs().List()) {
    if (job.type == "create") continue;
    json::object row{{"type", job.type},
                     {"device", job.id},
                     {"status", block::NameOf(job.status)},
                     {"len", job.total_progress},
                     {"offset", job.current_progress},
                     {"speed", job.speed},
                     {"busy", job.busy},
                     {"paused", job.paused},
                     {"ready", job.ready},
                     {"io-status", !job.io_failed    ? "ok"
                                   : job.io_no_space ? "nospace"
                                                     : "failed"},
                     {"auto-finalize", job.auto_finalize},
                     {"auto-dismiss", job.auto_dismiss}};
    if (!job.error.empty()) row["error"] = job.error;
    rows.push_back(std::move(row));
  }
  return rows;
}

constexpr QmpMember kId[] = {{"id", kQmpString}};
constexpr QmpMember kDevice[] = {{"device", kQmpString}};
constexpr QmpMember kCancel[] = {{"device", kQmpString}, {"force", kQmpBool, kOptional}};
constexpr QmpMember kSpeed[] = {{"device", kQmpString}, {"speed", kQmpInt}};

constexpr auto kFiber = QmpCommand::Where::kFiber;
constexpr const char* kNotActive = "DeviceNotActive";
constexpr QmpCommand kCommands[] = {
    {"block-job-cancel", kCancel, BlockJobCancel, kFiber, kNotActive},
    {"block-job-complete", kDevice, OnJob<&JobList::Complete>, kFiber, kNotActive},
    {"block-job-dismiss", kId, OnJob<&JobList::Dismiss>, kFiber, kNotActive},
    {"block-job-finalize", kId, OnJob<&JobList::Finalize>, kFiber, kNotActive},
    {"block-job-pause", kDevice, OnJob<&JobList::Pause>, kFiber, kNotActive},
    {"block-job-resume", kDevice, OnJob<&JobList::Resume>, kFiber, kNotActive},
    {"block-job-set-speed", kSpeed, SetSpeed, kFiber, kNotActive},
    {"job-cancel", kId, JobCancel, kFiber},
    {"job-complete", kId, OnJob<&JobList::Complete>, kFiber},
    {"job-dismiss", kId, OnJob<&JobList::Dismiss>, kFiber},
    {"job-finalize", kId, OnJob<&JobList::Finalize>, kFiber},
    {"job-pause", kId, OnJob<&JobList::Pause>, kFiber},
    {"job-resume", kId, OnJob<&JobList::Resume>, kFiber},
    {"query-block-jobs", {}, QueryBlockJobs, kFiber},
    {"query-jobs", {}, QueryJobs, kFiber},
};

}  // namespace

std::span<const QmpCommand> JobControlCommands() { return kCommands; }

}  // namespace kvartz::vmm
