// The jobs of a process: QEMU's job-* and block-job-* commands, and their events.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "block/jobs/job.h"

namespace kvartz::block {

// Told on the main loop, in order, outside of fibers.
class JobObserver {
 public:
  virtual void JobStatusChanged(const JobInfo& job) = 0;  // JOB_STATUS_CHANGE
  virtual void JobReady(const JobInfo& job) = 0;          // BLOCK_JOB_READY
  virtual void JobPending(const JobInfo& job) = 0;        // BLOCK_JOB_PENDING
  virtual void JobEnded(const JobInfo& job) = 0;          // BLOCK_JOB_COMPLETED, _CANCELLED
  virtual void JobFailedIo(const JobInfo&, const JobFailure&) = 0;  // BLOCK_JOB_ERROR

 protected:
  ~JobObserver() = default;
};

// Jobs that end together: none is finalized before the work of all is done, and if one fails or is
// cancelled, so are the others (but for what can't be undone any more). Owned by the main loop.
struct JobGroup {
  bool complete = false;  // no more will join: JobList::CloseGroup
  bool failed = false;
};

struct JobSettings {
  bool auto_finalize = true;  // false: waits for Finalize before it changes the graph
  bool auto_dismiss = true;   // false: stays as concluded until Dismiss
  std::shared_ptr<JobGroup> group = nullptr;
};

// Owned by the main loop. Fiber: all but what is const. Errors: kNotFound ("Job not found"),
// kState ("Job 'a' in state 'b' cannot accept command verb 'c'").
class JobList {
 public:
  explicit JobList(EventLoop& loop, JobObserver* observer = nullptr);
  ~JobList();  // after CancelAll
  JobList(const JobList&) = delete;
  JobList& operator=(const JobList&) = delete;

  // Errors: the id is taken or isn't one.
  Result<> CheckId(const std::string& id) const;
  // The job runs in a fiber of its loop.
  Result<> Start(const std::shared_ptr<Job>& job, const JobSettings& settings);

  Result<> Pause(const std::string& id);
  Result<> Resume(const std::string& id);
  // A ready mirror ends as completed, its target consistent, unless `force`.
  Result<> Cancel(const std::string& id, bool force);
  Result<> Complete(const std::string& id);
  Result<> Finalize(const std::string& id);  // and the others of its group
  Result<> Dismiss(const std::string& id);
  Result<> SetSpeed(const std::string& id, uint64_t bytes_per_sec);
  std::vector<JobInfo> List();
  Result<JobInfo> Info(const std::string& id);

  void CloseGroup(const std::shared_ptr<JobGroup>& group);

  // Returns when none is left that runs.
  void CancelAll();
  // Waits until it has concluded; its error. For tests and tools.
  Result<> Wait(const std::string& id);

 private:
  struct Entry;
  Result<std::shared_ptr<Entry>> Get(const std::string& id, JobVerb verb);
  template <typename Body>
  Result<> Steer(const std::string& id, JobVerb verb, Body body);
  void OnEvent(const std::shared_ptr<Entry>& entry, const Job::Event& event);
  void Ended(const std::shared_ptr<Entry>& entry);
  // Later, on their loops: to each job of a group that hasn't ended.
  void ForGroup(const std::shared_ptr<JobGroup>& group, const std::function<void(Job&)>& body);
  void LookAtGroup(const std::shared_ptr<JobGroup>& group);
  void Forget(const std::shared_ptr<Entry>& entry);
  void Tell(const JobInfo& info);

  EventLoop& loop_;
  JobObserver* const observer_;
  std::vector<std::shared_ptr<Entry>> entries_;
  FiberQueue ended_;
};

}  // namespace kvartz::block
