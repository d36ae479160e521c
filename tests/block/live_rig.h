// A disk in use: a registry, jobs, and a guest that writes and reads all the time, beside a disk in
// memory that says what it should find.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/call_on.h"
#include "block/disk.h"
#include "block/jobs/live.h"
#include "block/registry.h"
#include "block/test_disk.h"

namespace kvartz::block {

// Loop-owned. Its requests touch the same clusters, but never the same bytes at once.
class Guest {
 public:
  Guest(Disk& disk, std::string& model, uint64_t seed)
      : disk_(disk), model_(model), random_(seed), slots_(kSlots) {
    for (size_t i = 0; i < kSlots; i++) {
      slots_[i].guest = this;
      slots_[i].index = i;
    }
  }
  ~Guest() { EXPECT_EQ(busy_, 0u); }
  void Start() {
    running_ = true;
    for (Slot& slot : slots_) Next(slot);
  }
  void Stop(EventLoop& loop) {
    running_ = false;
    while (busy_ > 0) loop.RunOnce(-1);
  }
  // On the disk's loop, from another thread: `finished` is called there.
  void Finish(std::function<void()> finished) {
    running_ = false;
    finished_ = std::move(finished);
    if (busy_ == 0) finished_();
  }
  uint64_t done() const { return done_; }
  uint64_t failed() const { return failed_; }
  void tolerate_errors() { tolerant_ = true; }

 private:
  static constexpr size_t kSlots = 8;
  static constexpr uint64_t kBlock = 32 << 10;
  struct Slot {
    DiskRequest request;
    std::string data;
    iovec iov;
    Guest* guest = nullptr;
    size_t index = 0;
  };

  void Next(Slot& slot) {
    if (!running_) return;
    uint64_t blocks = model_.size() / kBlock;
    uint64_t block = random_() % (blocks / kSlots) * kSlots + slot.index;
    uint64_t sector = random_() % (kBlock / 512);
    uint64_t sectors = 1 + random_() % (kBlock / 512 - sector);
    DiskRequest& request = slot.request;
    request = {};
    uint64_t kind = random_() % 16;
    request.kind = kind < 10   ? Request::Kind::kWrite
                   : kind < 12 ? Request::Kind::kWriteZeroes
                   : kind < 15 ? Request::Kind::kRead
                               : Request::Kind::kFlush;
    request.unmap = random_() % 2 == 0;
    request.fua = random_() % 16 == 0 && request.kind == Request::Kind::kWrite;
    request.offset = block * kBlock + sector * 512;
    request.length = request.kind == Request::Kind::kFlush ? 0 : sectors * 512;
    slot.data.assign(request.length, static_cast<char>(random_()));
    slot.iov = {slot.data.data(), slot.data.size()};
    request.iov = &slot.iov;
    request.iov_count = 1;
    request.owner = &slot;
    request.done = [](DiskRequest* done, int result) {
      Slot& finished = *static_cast<Slot*>(done->owner);
      finished.guest->Done(finished, result);
    };
    busy_++;
    disk_.Start(&request);
  }

  void Done(Slot& slot, int result) {
    busy_--;
    done_++;
    const DiskRequest& request = slot.request;
    if (result != 0) {
      failed_++;
      if (!tolerant_) ADD_FAILURE() << "request failed: " << strerror(-result);
    } else if (request.kind == Request::Kind::kRead) {
      if (slot.data != model_.substr(request.offset, request.length)) {
        ADD_FAILURE() << "read of " << request.offset << " differs";
        running_ = false;
      }
    } else if (request.kind != Request::Kind::kFlush) {
      if (request.kind == Request::Kind::kWriteZeroes) slot.data.assign(request.length, '\0');
      model_.replace(request.offset, request.length, slot.data);
    }
    Next(slot);
    if (busy_ == 0 && finished_) finished_();
  }

  Disk& disk_;
  std::string& model_;
  std::mt19937_64 random_;
  std::vector<Slot> slots_;
  bool running_ = false, tolerant_ = false;
  std::function<void()> finished_;
  size_t busy_ = 0;
  uint64_t done_ = 0, failed_ = 0;
};

class LiveRig : public JobObserver {
 public:
  explicit LiveRig(uint64_t size = 8 * kMiB)
      : loop(MakeLoop()), registry(*loop), jobs(*loop, this), disk(*loop, "vda") {
    model.assign(size, '\0');
  }
  template <typename Body>
  auto Run(Body body) {
    return RunInFiber(*loop, body);
  }
  template <typename Value>
  static std::string Text(const Result<Value>& result) {
    return result ? "" : result.error().what;
  }

  virtual ~LiveRig() {
    Run([&] {
      jobs.CancelAll();
      if (disk.node()) {
        EXPECT_EQ(Text(registry.Detach(disk)), "");
      }
      EXPECT_EQ(Text(registry.CloseAll()), "");
    });
  }

  std::string Path(const std::string& name) const { return dir.path() + "/" + name; }
  // Makes an image and opens it under its own name.
  NodePtr Add(const std::string& name, const std::string& create = "", bool no_backing = false) {
    return Run([&]() -> NodePtr {
      Options made =
          Options::Parse(create.empty() ? "size=" + std::to_string(model.size()) : create).value();
      Result<> created = CreateImage(registry.env(), "qcow2", Path(name), std::move(made));
      EXPECT_EQ(Text(created), "");
      return Open(name, no_backing);
    });
  }
  // Fiber.
  NodePtr Open(const std::string& name, bool no_backing = false) {
    Options options;
    options.Set("driver", "qcow2");
    options.Set("node-name", name);
    options.Set("file.filename", Path(name));
    options.Set("file.driver", "file");
    if (no_backing) options.Set("backing", "");
    Result<NodePtr> node =
        registry.Add(std::move(options), Registry::Owner::kNamed, {.discard_unmap = true});
    EXPECT_EQ(Text(node), "");
    return node ? *node : nullptr;
  }
  // Each a node's options, as text. Answers the error.
  std::string Reopen(const std::vector<std::string>& all) {
    std::vector<Options> options;
    for (const std::string& one : all) options.push_back(Options::Parse(one).value());
    return Run([&] { return Text(registry.Reopen(std::move(options))); });
  }
  void AttachDisk(const NodePtr& node) {
    Run([&] { EXPECT_EQ(Text(registry.Attach(disk, node, *loop)), ""); });
  }
  // Some contents, by the disk.
  void Fill(uint64_t seed, uint64_t turns = 100) {
    Guest guest(disk, model, seed);
    guest.Start();
    while (guest.done() < turns) loop->RunOnce(-1);
    guest.Stop(*loop);
  }
  // By the disk, while no guest runs.
  void ZeroOut(uint64_t offset, uint64_t length) {
    DiskRequest request;
    request.kind = Request::Kind::kWriteZeroes;
    request.offset = offset;
    request.length = length;
    int result = 1;
    request.owner = &result;
    request.done = [](DiskRequest* done, int rc) { *static_cast<int*>(done->owner) = rc; };
    disk.Start(&request);
    while (result > 0) loop->RunOnce(-1);
    EXPECT_EQ(result, 0);
    model.replace(offset, length, std::string(length, '\0'));
  }
  void Turn(uint64_t operations, Guest& guest) {
    uint64_t until = guest.done() + operations;
    while (guest.done() < until && !testing::Test::HasFailure()) loop->RunOnce(-1);
  }
  bool Reached(const std::string& id, JobStatus status) const {
    return std::find(statuses.begin(), statuses.end(), id + " " + NameOf(status)) != statuses.end();
  }
  void Await(const std::string& id, JobStatus status) {
    while (!Reached(id, status) && !Reached(id, JobStatus::kNull)) loop->RunOnce(-1);
  }
  JobInfo AwaitEnd(const std::string& id) {
    Await(id, JobStatus::kNull);
    auto it = std::find_if(ended.begin(), ended.end(), [&](auto& job) { return job.id == id; });
    EXPECT_NE(it, ended.end());
    return it == ended.end() ? JobInfo{} : *it;
  }

  // What a job of the disk as it is takes: to a target, or within its chain.
  template <typename Settings>
  Settings JobTo(const std::string& id, const NodePtr& target) {
    Settings settings;
    settings.job_id = id;
    settings.source = disk.node();
    settings.target = target;
    return settings;
  }
  template <typename Settings>
  Settings JobOfTop(const std::string& id) {
    Settings settings;
    settings.job_id = id;
    settings.top = disk.node();
    return settings;
  }
  // Starts it between two of the guest's requests; answers what the disk held then.
  template <typename Settings>
  std::string Start(Settings settings) {
    std::string then;
    Run([&] {
      Registry::Quiesced quiet(registry);
      then = model;
      EXPECT_EQ(Text(Begin(std::move(settings))), "");
    });
    return then;
  }
  void Complete(const std::string& id) {
    Run([&] { EXPECT_EQ(Text(jobs.Complete(id)), ""); });
  }

  // What the disk shows is the model.
  void Verify(const char* when = "") { VerifyNode(*disk.node(), model, when); }
  void VerifyNode(Node& node, const std::string& expected, const char* when = "") {
    std::string data(expected.size(), '?');
    EXPECT_EQ(ReadWrite(*loop, node, Request::Kind::kRead, 0, data), 0) << when;
    auto at = std::mismatch(data.begin(), data.end(), expected.begin()).first;
    EXPECT_EQ(at, data.end()) << when << ": differs at " << at - data.begin();
  }
  // By the peer, once the image is closed.
  void VerifyFile(const std::string& name, const std::string& expected) {
    if (!HavePeer()) return;
    CommandResult check = RunCommand("qemu-img check " + Path(name));
    EXPECT_EQ(check.status, 0) << check.output;
    WriteFile(Path("model.raw"), expected);
    CommandResult compare =
        RunCommand("qemu-img compare -f qcow2 -F raw " + Path(name) + " " + Path("model.raw"));
    EXPECT_EQ(compare.status, 0) << compare.output;
  }
  void DetachDisk() {
    Run([&] { EXPECT_EQ(Text(registry.Detach(disk)), ""); });
  }
  void CloseAndVerify(const std::string& name) {
    Verify();
    DetachDisk();
    Run([&] { EXPECT_EQ(Text(registry.CloseAll()), ""); });
    VerifyFile(name, model);
  }
  void Remove(const std::string& name) {
    Run([&] { EXPECT_EQ(Text(registry.Remove(name)), ""); });
  }

  void JobStatusChanged(const JobInfo& job) override {
    statuses.push_back(job.id + " " + NameOf(job.status));
  }
  void JobReady(const JobInfo& job) override { ready.push_back(job.id); }
  void JobPending(const JobInfo& job) override { pending.push_back(job.id); }
  void JobEnded(const JobInfo& job) override { ended.push_back(job); }
  void JobFailedIo(const JobInfo& job, const JobFailure& failure) override {
    failures.push_back(job.id + (failure.write ? " write " : " read ") + NameOf(failure.action));
  }

  TempDir dir{TempDir::Place::kMemory};
  std::unique_ptr<EventLoop> loop;
  Registry registry;
  JobList jobs;
  Disk disk;
  std::string model;
  std::vector<std::string> statuses, ready, pending, failures;
  std::vector<JobInfo> ended;
  LiveJobs live() { return {registry, jobs}; }

 private:
  Result<> Begin(MirrorSettings settings) { return StartMirror(live(), std::move(settings)); }
  Result<> Begin(BackupSettings settings) { return StartBackup(live(), std::move(settings)); }
  Result<> Begin(StreamSettings settings) { return StartStream(live(), std::move(settings)); }
  Result<> Begin(CommitSettings settings) { return StartCommit(live(), std::move(settings)); }
};

}  // namespace kvartz::block
