#include "block/jobs/job_list.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/call_on.h"
#include "base/check.h"

namespace kvartz::block {
namespace {

// In which states a verb is taken (QEMU's job.c says the same of qapi/job.json).
bool Takes(JobStatus status, JobVerb verb) {
  bool works = status == JobStatus::kCreated || status == JobStatus::kRunning ||
               status == JobStatus::kPaused || status == JobStatus::kReady ||
               status == JobStatus::kStandby;
  switch (verb) {
    case JobVerb::kCancel:
      return works || status == JobStatus::kWaiting || status == JobStatus::kPending;
    case JobVerb::kPause:
    case JobVerb::kResume:
    case JobVerb::kSetSpeed:
      return works;
    case JobVerb::kComplete:
      return status == JobStatus::kReady;
    case JobVerb::kFinalize:
      return status == JobStatus::kPending;
    case JobVerb::kDismiss:
      break;
  }
  return status == JobStatus::kConcluded;
}

}  // namespace

struct JobList::Entry {
  std::shared_ptr<Job> job;
  JobStatus status = JobStatus::kCreated;  // as of its last event
  bool auto_dismiss = true;
  bool auto_finalize = true;
  std::shared_ptr<JobGroup> group = nullptr;
  bool ended = false;  // its fiber has
  Result<> result = {};
};

JobList::JobList(EventLoop& loop, JobObserver* observer) : loop_(loop), observer_(observer) {}

JobList::~JobList() {
  for (const auto& entry : entries_) VERIFY(entry->ended);
}

Result<> JobList::CheckId(const std::string& id) const {
  auto good = [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' ||
           c == '.' || c == '_';
  };
  bool letter = !id.empty() && ((id[0] >= 'a' && id[0] <= 'z') || (id[0] >= 'A' && id[0] <= 'Z'));
  if (!letter || !std::all_of(id.begin(), id.end(), good))
    return Fail(ErrorCode::kInvalid, fmt::format("Invalid job ID '{}'", id));
  for (const auto& entry : entries_) {
    if (entry->job->id() == id)
      return Fail(ErrorCode::kExists, fmt::format("Job ID '{}' already in use", id));
  }
  return {};
}

Result<> JobList::Start(const std::shared_ptr<Job>& job, const JobSettings& settings) {
  TRY(CheckId(job->id()));
  auto entry = std::make_shared<Entry>();
  entry->job = job;
  entry->auto_dismiss = settings.auto_dismiss;
  entry->auto_finalize = settings.auto_finalize;
  entry->group = settings.group;
  if (entry->group) job->set_grouped();
  entries_.push_back(entry);
  job->set_auto_finalize(settings.auto_finalize);
  job->set_auto_dismiss(settings.auto_dismiss);
  // Events come on the job's loop, in order, and stay so.
  std::weak_ptr<Entry> weak = entry;
  job->on_event = [this, weak](const Job::Event& event) {
    loop_.Post([this, weak, event] {
      if (std::shared_ptr<Entry> known = weak.lock()) OnEvent(known, event);
    });
  };
  Tell(job->info());
  job->loop().Post([this, entry] {
    Fiber::Start([entry] { entry->result = entry->job->Run(); },
                 [this, entry] { loop_.Post([this, entry] { Ended(entry); }); });
  });
  return {};
}

void JobList::OnEvent(const std::shared_ptr<Entry>& entry, const Job::Event& event) {
  entry->status = event.info.status;
  if (entry->group) {
    if (event.kind == Job::Event::Kind::kEnded)
      entry->group->failed |= event.info.cancelled || !event.info.error.empty();
    LookAtGroup(entry->group);
  }
  if (!observer_) return;
  switch (event.kind) {
    case Job::Event::Kind::kStatus:
      return observer_->JobStatusChanged(event.info);
    case Job::Event::Kind::kReady:
      return observer_->JobReady(event.info);
    case Job::Event::Kind::kPending:
      return observer_->JobPending(event.info);
    case Job::Event::Kind::kEnded:
      return observer_->JobEnded(event.info);
    case Job::Event::Kind::kFailure:
      return observer_->JobFailedIo(event.info, event.failure);
  }
}

void JobList::ForGroup(const std::shared_ptr<JobGroup>& group,
                       const std::function<void(Job&)>& body) {
  for (const auto& entry : entries_) {
    if (entry->group != group || entry->ended) continue;
    entry->job->loop().Post([job = entry->job, body] { body(*job); });
  }
}

void JobList::LookAtGroup(const std::shared_ptr<JobGroup>& group) {
  if (group->failed) return ForGroup(group, [](Job& job) { job.Cancel(Job::Force::kYes); });
  bool manual = false;
  for (const auto& entry : entries_) {
    if (entry->group != group) continue;
    if (entry->status != JobStatus::kWaiting) return;
    manual = manual || !entry->auto_finalize;
  }
  if (group->complete) ForGroup(group, [manual](Job& job) { job.Release(manual); });
}

void JobList::CloseGroup(const std::shared_ptr<JobGroup>& group) {
  group->complete = true;
  LookAtGroup(group);
}

void JobList::Ended(const std::shared_ptr<Entry>& entry) {
  entry->ended = true;
  if (entry->auto_dismiss) Forget(entry);
  ended_.WakeAll();
}

void JobList::Forget(const std::shared_ptr<Entry>& entry) {
  JobInfo info = entry->job->info();
  info.status = JobStatus::kNull;
  std::erase(entries_, entry);
  Tell(info);
}

// In its turn, behind the events that are on their way.
void JobList::Tell(const JobInfo& info) {
  if (!observer_) return;
  loop_.Post([this, info] { observer_->JobStatusChanged(info); });
}

Result<std::shared_ptr<JobList::Entry>> JobList::Get(const std::string& id, JobVerb verb) {
  for (const auto& entry : entries_) {
    if (entry->job->id() != id) continue;
    JobStatus status = CallOn(loop_, entry->job->loop(), [&] { return entry->job->status(); });
    if (Takes(status, verb)) return entry;
    return Fail(ErrorCode::kState,
                fmt::format("Job '{}' in state '{}' cannot accept command verb '{}'", id,
                            NameOf(status), NameOf(verb)));
  }
  return Fail(ErrorCode::kNotFound, "Job not found");
}

template <typename Body>
Result<> JobList::Steer(const std::string& id, JobVerb verb, Body body) {
  std::shared_ptr<Entry> entry = TRY(Get(id, verb));
  return CallOn(loop_, entry->job->loop(), [&] { return body(*entry->job); });
}

Result<> JobList::Pause(const std::string& id) {
  return Steer(id, JobVerb::kPause, [&](Job& job) -> Result<> {
    if (job.pause_wished()) return Fail(ErrorCode::kState, "Job is already paused");
    job.Pause();
    return {};
  });
}

Result<> JobList::Resume(const std::string& id) {
  return Steer(id, JobVerb::kResume, [&](Job& job) -> Result<> {
    if (!job.pause_wished())
      return Fail(ErrorCode::kState, "Can't resume a job that was not paused");
    job.Resume();
    return {};
  });
}

Result<> JobList::Cancel(const std::string& id, bool force) {
  return Steer(id, JobVerb::kCancel, [&](Job& job) -> Result<> {
    job.Cancel(force ? Job::Force::kYes : Job::Force::kNo);
    return {};
  });
}

Result<> JobList::Complete(const std::string& id) {
  return Steer(id, JobVerb::kComplete, [&](Job& job) -> Result<> {
    if (job.pause_wished() || job.cancelled()) {
      return Fail(ErrorCode::kState,
                  fmt::format("The active block job '{}' cannot be completed", id));
    }
    job.Complete();
    return {};
  });
}

Result<> JobList::Finalize(const std::string& id) {
  std::shared_ptr<Entry> entry = TRY(Get(id, JobVerb::kFinalize));
  CallOn(loop_, entry->job->loop(), [&] { entry->job->Finalize(); });
  if (entry->group) ForGroup(entry->group, [](Job& job) { job.Finalize(); });
  return {};
}

Result<> JobList::Dismiss(const std::string& id) {
  std::shared_ptr<Entry> entry = TRY(Get(id, JobVerb::kDismiss));
  while (!entry->ended) ended_.Wait();
  if (std::find(entries_.begin(), entries_.end(), entry) != entries_.end()) Forget(entry);
  return {};
}

Result<> JobList::SetSpeed(const std::string& id, uint64_t bytes_per_sec) {
  return Steer(id, JobVerb::kSetSpeed, [&](Job& job) -> Result<> {
    job.SetSpeed(bytes_per_sec);
    return {};
  });
}

std::vector<JobInfo> JobList::List() {
  std::vector<JobInfo> list;
  std::vector<std::shared_ptr<Entry>> entries = entries_;
  list.reserve(entries.size());
  for (const auto& entry : entries)
    list.push_back(CallOn(loop_, entry->job->loop(), [&] { return entry->job->info(); }));
  return list;
}

Result<JobInfo> JobList::Info(const std::string& id) {
  for (const auto& entry : std::vector(entries_)) {
    if (entry->job->id() == id)
      return CallOn(loop_, entry->job->loop(), [&] { return entry->job->info(); });
  }
  return Fail(ErrorCode::kNotFound, "Job not found");
}

void JobList::CancelAll() {
  for (const auto& entry : std::vector(entries_)) {
    if (entry->ended) continue;
    CallOn(loop_, entry->job->loop(), [&] { entry->job->Cancel(Job::Force::kYes); });
  }
  auto running = [&] {
    return std::any_of(entries_.begin(), entries_.end(),
                       [](const auto& entry) { return !entry->ended; });
  };
  while (running()) ended_.Wait();
}

Result<> JobList::Wait(const std::string& id) {
  for (const auto& entry : std::vector(entries_)) {
    if (entry->job->id() != id) continue;
    while (!entry->ended) ended_.Wait();
    return entry->result;
  }
  return Fail(ErrorCode::kNotFound, "Job not found");
}

}  // namespace kvartz::block
