// The disks of a machine and all that stands below them: nodes, jobs, exports, secrets, limits.
// What QMP, HMP and the command line do to disks goes through here.
#pragma once

#include <boost/json/object.hpp>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "block/crypto/secret.h"
#include "block/jobs/job_list.h"
#include "block/jobs/live.h"
#include "block/registry.h"
#include "vmm/config.h"
#include "vmm/storage/drive.h"
#include "vmm/storage/exports.h"

namespace kvartz::vmm {

// What storage needs of the machine. Called on the main loop.
class StorageOwner {
 public:
  virtual void StorageEvent(std::string_view name, const boost::json::object& data) = 0;
  // A disk's error policy says so: the machine stops until the user lets it go on.
  virtual void PauseForIoError() = 0;
  // Null: there is none.
  virtual EventLoop* FindIoThread(const std::string& id) = 0;

 protected:
  ~StorageOwner() = default;
};

// Loop-owned by the main loop.
class Storage final : private block::JobObserver {
 public:
  Storage(EventLoop& loop, StorageOwner& owner);
  // After Close.
  ~Storage();

  // Before the loop runs. Errors: what the command line asks for can't be had; it names the option.
  Result<> Open(const VmConfig& config);
  // When the loop runs no more, I/O threads do still: ends jobs and exports; then, when devices are
  // gone, closes images. Log what fails.
  void EndWork();
  void Close();
  // What a device's drive= means. Before the loop runs.
  Result<DiskPort*> Connect(const DiskWish& wish);
  // -object, object-add of the kinds that concern storage. Errors: another kind, an id that is
  // taken, its options.
  Result<> AddObject(const std::string& type, const std::string& id, block::Options options);
  Result<> RemoveObject(const std::string& id);
  // Of the objects tls-creds-*.
  Result<std::shared_ptr<const TlsCredentials>> FindTls(const std::string& id) const;

  EventLoop& loop() { return loop_; }
  block::Registry& registry() { return registry_; }
  block::JobList& jobs() { return jobs_; }
  block::LiveJobs live() { return {registry_, jobs_}; }
  block::SecretStore& secrets() { return secrets_; }
  Exports& exports() { return exports_; }
  StorageOwner& owner() { return owner_; }
  const std::vector<std::unique_ptr<Drive>>& drives() const { return drives_; }

  // By the id of a -drive or of a device, or a device's QOM path. Null: there is none.
  Drive* FindDrive(const std::string& name) const;
  // The drive whose disk stands on `node`; null: none.
  Drive* DriveOn(const block::Node& node) const;
  // What `name` means where QMP takes a device or a node: the top node of a drive, else a node.
  // Fiber. Errors: kNotFound; the drive has no medium.
  Result<block::NodePtr> RequireNode(const std::string& name);

  // Limits. A group is made when first named; Fiber: SetLimits, which gives the drive the group
  // (empty: its own) and the group the limits; none at all take the drive out of it.
  Result<> AddThrottleGroup(const std::string& name, const block::ThrottleLimits& limits);
  Result<> RemoveThrottleGroup(const std::string& name);
  std::shared_ptr<block::ThrottleGroup> FindThrottleGroup(const std::string& name);
  void SetLimits(Drive& drive, const std::string& group, const block::ThrottleLimits& limits);
  // Event BLOCK_WRITE_THRESHOLD when the node is written to beyond; 0: no more. Fiber.
  void SetWriteThreshold(const block::NodePtr& node, uint64_t bytes);

  // Of Drive, on any thread.
  void PostFailure(const Drive& drive, const block::DiskFailure& failure);

 private:
  // JobObserver.
  void JobStatusChanged(const block::JobInfo& job) override;
  void JobReady(const block::JobInfo& job) override;
  void JobPending(const block::JobInfo& job) override;
  void JobEnded(const block::JobInfo& job) override;
  void JobFailedIo(const block::JobInfo& job, const block::JobFailure& failure) override;

  Result<> OpenAll(const VmConfig& config);
  Result<> OpenDrive(const DriveConfig& config);
  Result<block::NodePtr> OpenDriveNode(const DriveConfig& config);
  Result<EventLoop*> LoopOf(const std::string& iothread);
  void Failed(const std::string& drive_id, const block::DiskFailure& failure);

  EventLoop& loop_;
  StorageOwner& owner_;
  block::Registry registry_;
  block::JobList jobs_;
  block::SecretStore secrets_;
  Exports exports_;
  std::map<std::string, std::shared_ptr<block::ThrottleGroup>> throttle_groups_;
  std::map<std::string, std::shared_ptr<const TlsCredentials>> tls_;
  std::vector<std::unique_ptr<Drive>> drives_;
  // Outlives the storage in tasks that were posted to the loop.
  std::shared_ptr<Storage*> self_;
};

}  // namespace kvartz::vmm
