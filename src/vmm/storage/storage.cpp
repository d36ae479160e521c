#include "vmm/storage/storage.h"

#include <fmt/core.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.h"
#include "base/log.h"
#include "block/graph.h"
#include "block/sync_io.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;

const char* OperationName(block::Request::Kind kind) {
  return kind == block::Request::Kind::kRead ? "read" : "write";
}

}  // namespace

Storage::Storage(EventLoop& loop, StorageOwner& owner)
    : loop_(loop),
      owner_(owner),
      registry_(loop),
      jobs_(loop, this),
      exports_(registry_),
      self_(std::make_shared<Storage*>(this)) {
  registry_.env().secret = [this](const std::string& id) { return secrets_.Find(id); };
  registry_.env().tls = [this](const std::string& id) { return FindTls(id); };
  registry_.env().throttle_group = [this](const std::string& id) { return FindThrottleGroup(id); };
  exports_.on_deleted = [this](const std::string& id) {
    owner_.StorageEvent("BLOCK_EXPORT_DELETED", {{"id", id}});
  };
}

Storage::~Storage() {
  *self_ = nullptr;
  VERIFY(drives_.empty());
}

void Storage::EndWork() {
  block::RunInFiber(loop_, [&] {
    jobs_.CancelAll();
    if (!exports_.listening()) return;
    if (Result<> stopped = exports_.Stop(); !stopped) KLOG(kError, "{}", stopped.error().what);
  });
}

void Storage::Close() {
  block::RunInFiber(loop_, [&] {
    for (const auto& drive : drives_) {
      std::string name = drive->Name();
      if (Result<> closed = registry_.Detach(drive->disk()); !closed)
        KLOG(kError, "drive {}: {}", name, closed.error().what);
    }
    if (Result<> closed = registry_.CloseAll(); !closed) KLOG(kError, "{}", closed.error().what);
  });
  drives_.clear();
}

// ---- finding

Drive* Storage::FindDrive(const std::string& name) const {
  if (name.empty()) return nullptr;
  for (const auto& drive : drives_) {
    if (drive->id() == name || drive->device() == name || drive->QdevPath() == name ||
        (!drive->device().empty() && name == "/machine/peripheral/" + drive->device())) {
      return drive.get();
    }
  }
  return nullptr;
}

Drive* Storage::DriveOn(const block::Node& node) const {
  for (const auto& drive : drives_) {
    const block::Node* top = drive->disk().node().get();
    if (top && (top == &node || block::SkipFilters(drive->disk().node().get()) == &node))
      return drive.get();
  }
  return nullptr;
}

Result<block::NodePtr> Storage::RequireNode(const std::string& name) {
  // Changes under way come to their end first.
  block::Registry::Change change(registry_);
  if (Drive* drive = FindDrive(name)) {
    if (drive->disk().node()) return drive->disk().node();
    return Fail(ErrorCode::kState, fmt::format("Device '{}' has no medium", name));
  }
  if (block::NodePtr node = registry_.Find(name)) return node;
  return Fail(ErrorCode::kNotFound,
              fmt::format("Cannot find device='{0}' nor node-name='{0}'", name));
}

// ---- limits

Result<> Storage::AddThrottleGroup(const std::string& name, const block::ThrottleLimits& limits) {
  if (throttle_groups_.contains(name))
    return Fail(ErrorCode::kExists, fmt::format("there is a throttle group '{}' already", name));
  auto group = std::make_shared<block::ThrottleGroup>(name, loop_.clock());
  group->SetLimits(limits);
  throttle_groups_[name] = std::move(group);
  return {};
}

Result<> Storage::RemoveThrottleGroup(const std::string& name) {
  auto it = throttle_groups_.find(name);
  if (it == throttle_groups_.end())
    return Fail(ErrorCode::kNotFound, fmt::format("there is no throttle group '{}'", name));
  if (it->second.use_count() > 1)
    return Fail(ErrorCode::kBusy, fmt::format("throttle group '{}' is in use", name));
  throttle_groups_.erase(it);
  return {};
}

std::shared_ptr<block::ThrottleGroup> Storage::FindThrottleGroup(const std::string& name) {
  auto it = throttle_groups_.find(name);
  return it == throttle_groups_.end() ? nullptr : it->second;
}

void Storage::SetLimits(Drive& drive, const std::string& group_name,
                        const block::ThrottleLimits& limits) {
  std::shared_ptr<block::ThrottleGroup> group;
  if (limits.any()) {
    std::string name = group_name;
    if (name.empty()) {
      std::shared_ptr<block::ThrottleGroup> present = drive.disk().throttle();
      name = present ? present->name() : drive.Name();
    }
    group = FindThrottleGroup(name);
    if (!group) {
      group = std::make_shared<block::ThrottleGroup>(name, loop_.clock());
      throttle_groups_[name] = group;
    }
    group->SetLimits(limits);
  }
  CallOn(loop_, drive.disk().loop(),
         [&] { RunOutsideFibers([&] { drive.disk().SetThrottle(group); }); });
}

void Storage::SetWriteThreshold(const block::NodePtr& node, uint64_t bytes) {
  auto exceeded = [self = self_, &loop = loop_, name = node->node_name(), bytes](uint64_t by) {
    loop.Post([self, name, bytes, by] {
      if (!*self) return;
      (*self)->owner_.StorageEvent(
          "BLOCK_WRITE_THRESHOLD",
          {{"node-name", name}, {"amount-exceeded", by}, {"write-threshold", bytes}});
    });
  };
  registry_.On(*node, [&] { node->SetWriteThreshold(bytes, exceeded); });
}

// ---- events

void Storage::PostFailure(const Drive& drive, const block::DiskFailure& failure) {
  loop_.Post([self = self_, id = drive.id(), failure] {
    if (*self) (*self)->Failed(id, failure);
  });
}

void Storage::Failed(const std::string& drive_id, const block::DiskFailure& failure) {
  json::object data{{"device", drive_id}};
  if (!failure.node_name.empty()) data["node-name"] = failure.node_name;
  data["operation"] = OperationName(failure.kind);
  data["action"] = block::NameOf(failure.action);
  if (failure.errno_value == ENOSPC) data["nospace"] = true;
  data["reason"] = strerror(failure.errno_value);
  owner_.StorageEvent("BLOCK_IO_ERROR", data);
  if (failure.action == block::ErrorAction::kStop) owner_.PauseForIoError();
}

void Storage::JobStatusChanged(const block::JobInfo& job) {
  owner_.StorageEvent("JOB_STATUS_CHANGE", {{"id", job.id}, {"status", block::NameOf(job.status)}});
}

namespace {
json::object JobEventData(const block::JobInfo& job) {
  return {{"type", job.type},
          {"device", job.id},
          {"len", job.total_progress},
          {"offset", job.current_progress},
          {"speed", job.speed}};
}
}  // namespace

void Storage::JobReady(const block::JobInfo& job) {
  owner_.StorageEvent("BLOCK_JOB_READY", JobEventData(job));
}

void Storage::JobPending(const block::JobInfo& job) {
  owner_.StorageEvent("BLOCK_JOB_PENDING", {{"type", job.type}, {"id", job.id}});
}

// Of jobs on disks; others have JOB_STATUS_CHANGE alone.
void Storage::JobEnded(const block::JobInfo& job) {
  if (job.type == "create") return;
  json::object data = JobEventData(job);
  if (!job.cancelled && !job.error.empty()) data["error"] = job.error;
  owner_.StorageEvent(job.cancelled ? "BLOCK_JOB_CANCELLED" : "BLOCK_JOB_COMPLETED", data);
}

void Storage::JobFailedIo(const block::JobInfo& job, const block::JobFailure& failure) {
  owner_.StorageEvent("BLOCK_JOB_ERROR", {{"device", job.id},
                                          {"operation", failure.write ? "write" : "read"},
                                          {"action", block::NameOf(failure.action)}});
}

}  // namespace kvartz::vmm
