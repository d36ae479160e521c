// A device's disk: errors, waiting, limits, statistics.
#include "block/disk.h"

#include <cerrno>

#include "block/live_rig.h"

namespace kvartz::block {
namespace {

struct Owner final : DiskOwner {
  void DiskFailed(Disk& disk, const DiskFailure& failure) override {
    failures.push_back(std::string(NameOf(failure.action)) + " " +
                       std::to_string(failure.errno_value));
    if (failure.action == ErrorAction::kStop) disk.Hold();
  }
  void DiskResized(Disk&) override { resized++; }
  std::vector<std::string> failures;
  int resized = 0;
};

struct Outcome {
  bool done = false;
  int result = 0;
};

DiskRequest MakeRequest(Request::Kind kind, uint64_t offset, iovec* iov, Outcome* outcome) {
  DiskRequest request;
  request.kind = kind;
  request.offset = offset;
  request.length = iov->iov_len;
  request.iov = iov;
  request.iov_count = 1;
  request.owner = outcome;
  request.done = [](DiskRequest* done, int result) {
    *static_cast<Outcome*>(done->owner) = {true, result};
  };
  return request;
}

// A disk on a raw file of 1 MiB whose requests fail as `rules` say.
struct FaultyDisk {
  explicit FaultyDisk(const std::string& rules) : loop(MakeLoop()), disk(*loop, "vda", &owner) {
    Options options = Options::Parse("driver=blkdebug,image.driver=file,image.filename=" +
                                     dir.File("a.img", kMiB) + rules)
                          .value();
    OpenEnv env = {.loop = *loop};
    node = RunInFiber(*loop, [&] { return OpenNode(env, std::move(options)); }).value();
    disk.ReplaceNode(node);
  }
  ~FaultyDisk() {
    disk.ReplaceNode(nullptr);
    EXPECT_TRUE(RunInFiber(*loop, [&] { return node->Close(); }));
  }
  Outcome& Begin(Request::Kind kind, uint64_t offset) {
    iov = {data, sizeof data};
    outcome = {};
    request = MakeRequest(kind, offset, &iov, &outcome);
    disk.Start(&request);
    return outcome;
  }
  int Do(Request::Kind kind, uint64_t offset) {
    Begin(kind, offset);
    while (!outcome.done) loop->RunOnce(-1);
    return outcome.result;
  }
  TempDir dir;
  std::unique_ptr<EventLoop> loop;
  Owner owner;
  Disk disk;
  NodePtr node;
  char data[512] = {};
  iovec iov = {};
  DiskRequest request;
  Outcome outcome;
};

TEST(DiskTest, StopKeepsWhatFailedAndDoesItAgain) {
  FaultyDisk faulty(",inject-error.0.iotype=write,inject-error.0.errno=28,inject-error.0.once=on");
  faulty.Begin(Request::Kind::kWrite, 0);  // werror=enospc
  while (faulty.owner.failures.empty()) faulty.loop->RunOnce(-1);
  EXPECT_EQ(faulty.owner.failures[0], "stop 28");
  faulty.disk.Drain();
  EXPECT_FALSE(faulty.outcome.done);
  EXPECT_EQ(faulty.disk.kept(), &faulty.request);
  EXPECT_TRUE(faulty.disk.io_no_space());
  faulty.disk.Release();
  while (!faulty.outcome.done) faulty.loop->RunOnce(-1);
  EXPECT_EQ(faulty.outcome.result, 0);
  EXPECT_FALSE(faulty.disk.io_failed());
  DiskStatistics statistics = faulty.disk.statistics();
  EXPECT_EQ(statistics.write.failed, 1u);
  EXPECT_EQ(statistics.write.operations, 1u);
  EXPECT_EQ(statistics.write.bytes, 512u);
  EXPECT_EQ(statistics.write_highest_offset, 512u);
}

TEST(DiskTest, OtherPolicies) {
  FaultyDisk faulty(
      ",inject-error.0.iotype=read,inject-error.0.sector=4"
      ",inject-error.1.iotype=write,inject-error.1.sector=4,inject-error.1.errno=28");
  EXPECT_EQ(faulty.Do(Request::Kind::kRead, 0), 0);
  EXPECT_EQ(faulty.Do(Request::Kind::kRead, 2048), -EIO);
  faulty.disk.SetErrorPolicies(ErrorPolicy::kIgnore, ErrorPolicy::kReport);
  EXPECT_EQ(faulty.Do(Request::Kind::kRead, 2048), 0);
  EXPECT_EQ(faulty.Do(Request::Kind::kWrite, 2048), -ENOSPC);
  faulty.disk.SetErrorPolicies(ErrorPolicy::kIgnore, ErrorPolicy::kIgnore);
  EXPECT_EQ(faulty.Do(Request::Kind::kWrite, 2048), 0);
  std::vector<std::string> expected = {"report 5", "ignore 5", "report 28", "ignore 28"};
  EXPECT_EQ(faulty.owner.failures, expected);
  // A reset gives up what is kept.
  faulty.disk.SetErrorPolicies(ErrorPolicy::kStop, ErrorPolicy::kStop);
  faulty.Begin(Request::Kind::kWrite, 2048);
  while (faulty.owner.failures.size() < 5) faulty.loop->RunOnce(-1);
  faulty.disk.DropKept();
  EXPECT_EQ(faulty.outcome.result, -ECANCELED);
}

TEST(DiskTest, WithoutANode) {
  auto loop = MakeLoop();
  Disk disk(*loop, "cd");
  char data[512];
  iovec iov = {data, sizeof data};
  Outcome outcome;
  DiskRequest request = MakeRequest(Request::Kind::kRead, 0, &iov, &outcome);
  disk.Start(&request);
  EXPECT_FALSE(outcome.done);
  while (!outcome.done) loop->RunOnce(-1);
  EXPECT_EQ(outcome.result, -ENOMEDIUM);
  EXPECT_EQ(disk.size_bytes(), 0u);
}

// Limits hold for a group as a whole, and what waits goes on by the clock.
TEST(DiskTest, LimitsOfAGroup) {
  ManualClock clock;
  auto loop = EventLoop::Create(EventLoop::Backend::kAuto, clock).value();
  auto group = std::make_shared<ThrottleGroup>("g", clock);
  ThrottleLimits limits;
  limits.buckets[ThrottleLimits::kIopsTotal].average = 100;
  ASSERT_TRUE(limits.Check());
  group->SetLimits(limits);
  struct Asker {
    Asker(const std::shared_ptr<ThrottleGroup>& group, EventLoop& loop)
        : member(group, loop, [this] { Ask(); }) {}
    void Ask() {
      while (member.Admit(ThrottleGroup::Direction::kWrite, 4096)) admitted++;
    }
    int admitted = 0;
    ThrottleGroup::Member member;
  };
  Asker first(group, *loop), second(group, *loop);
  first.Ask();
  EXPECT_EQ(first.admitted, 11);  // a tenth of a second's worth, and the one that fills it
  second.Ask();
  EXPECT_EQ(second.admitted, 0);
  for (int i = 0; i < 1000; i++) {
    clock.Advance(1'000'000);
    for (int turn = 0; turn < 4; turn++) loop->RunOnce(0);
  }
  EXPECT_NEAR(first.admitted + second.admitted, 111, 2);
  EXPECT_NEAR(first.admitted - 11, second.admitted, 3);
  // New ones count at once.
  limits.buckets[ThrottleLimits::kIopsTotal].average = 1000;
  group->SetLimits(limits);
  int before = first.admitted + second.admitted;
  for (int i = 0; i < 1000; i++) {
    clock.Advance(1'000'000);
    for (int turn = 0; turn < 4; turn++) loop->RunOnce(0);
  }
  EXPECT_NEAR(first.admitted + second.admitted - before, 1100, 10);
}

TEST(DiskTest, WithoutLimitsNobodyWaitsAnyMore) {
  ManualClock clock;
  auto loop = EventLoop::Create(EventLoop::Backend::kAuto, clock).value();
  auto group = std::make_shared<ThrottleGroup>("g", clock);
  ThrottleLimits limits;
  limits.buckets[ThrottleLimits::kIopsTotal].average = 1;
  group->SetLimits(limits);
  constexpr int kMembers = 3;
  int left[kMembers];
  std::unique_ptr<ThrottleGroup::Member> members[kMembers];
  auto ask = [&](int i) {
    while (left[i] > 0 && members[i]->Admit(ThrottleGroup::Direction::kWrite, 512)) left[i]--;
  };
  for (int i = 0; i < kMembers; i++) {
    left[i] = 5;
    members[i] = std::make_unique<ThrottleGroup::Member>(group, *loop, [&, i] { ask(i); });
    ask(i);
  }
  EXPECT_GE(left[0] + left[1] + left[2], 13);
  group->SetLimits({});
  for (int turn = 0; turn < 5; turn++) loop->RunOnce(0);
  EXPECT_EQ(left[0] + left[1] + left[2], 0);
}

TEST(DiskTest, BurstsLastAsLongAsTheyMay) {
  ManualClock clock;
  auto loop = EventLoop::Create(EventLoop::Backend::kAuto, clock).value();
  auto group = std::make_shared<ThrottleGroup>("g", clock);
  Options options = Options::Parse(
                        "throttling.bps-read=1000,throttling.bps-read-max=5000,"
                        "throttling.bps-read-max-length=3")
                        .value();
  group->SetLimits(ThrottleLimits::Take(options, "throttling.").value());
  uint64_t bytes = 0;
  ThrottleGroup::Member* asker = nullptr;
  auto ask = [&] {
    while (asker->Admit(ThrottleGroup::Direction::kRead, 100)) bytes += 100;
  };
  ThrottleGroup::Member member(group, *loop, ask);
  asker = &member;
  ask();
  uint64_t at_3s = 0;
  for (int i = 0; i < 10000; i++) {
    clock.Advance(1'000'000);
    loop->RunOnce(0);
    loop->RunOnce(0);
    if (i == 2999) at_3s = bytes;
  }
  EXPECT_NEAR(static_cast<double>(at_3s), 15000, 1000);          // 5000 a second
  EXPECT_NEAR(static_cast<double>(bytes), 15000 + 10000, 1500);  // 1000 a second in all
}

TEST(DiskTest, RefusesLimitsThatContradict) {
  auto error = [](const char* text) {
    Options options = Options::Parse(text).value();
    auto limits = ThrottleLimits::Take(options, "");
    return limits ? "" : limits.error().what;
  };
  EXPECT_EQ(error("bps-total=1,bps-read=1"), "bps-total and bps-read can't be used together");
  EXPECT_EQ(error("iops-read-max=1"), "iops-read-max needs iops-read");
  EXPECT_EQ(error("iops-read=5,iops-read-max=1"), "iops-read-max is less than iops-read");
  EXPECT_EQ(error("iops-read=5,iops-read-max-length=2"),
            "iops-read-max-length needs iops-read-max");
  EXPECT_EQ(error("iops-size=4096"), "iops-size needs a limit of operations");
  EXPECT_EQ(error("bps-total=2000000000000000"), "bps-total: at most 1000000000000000");
}

// A throttled disk ends what waits when the machine stops, and moves with its node.
TEST(DiskTest, DrainDoesNotWaitForLimits) {
  LiveRig rig(kMiB);
  rig.AttachDisk(rig.Add("a"));
  auto group = std::make_shared<ThrottleGroup>("g", rig.loop->clock());
  ThrottleLimits limits;
  limits.buckets[ThrottleLimits::kIopsTotal].average = 1;
  group->SetLimits(limits);
  rig.disk.SetThrottle(group);
  char data[512] = {};
  iovec iov = {data, sizeof data};
  Outcome outcomes[4];
  DiskRequest requests[4];
  for (int i = 0; i < 4; i++) {
    requests[i] = MakeRequest(Request::Kind::kWrite, 0, &iov, &outcomes[i]);
    rig.disk.Start(&requests[i]);
  }
  rig.disk.Drain();
  for (const Outcome& outcome : outcomes) EXPECT_TRUE(outcome.done && outcome.result == 0);
  // Others of the group don't wait for a disk that has nothing to do.
  limits.buckets[ThrottleLimits::kIopsTotal].average = 1000;
  group->SetLimits(limits);
  ThrottleGroup::Member other(group, *rig.loop, [] {});
  EXPECT_TRUE(other.Admit(ThrottleGroup::Direction::kWrite, 512));
  rig.disk.SetThrottle(nullptr);
}

TEST(DiskTest, TheThrottleFilterKeepsToItsGroup) {
  TempDir dir;
  ManualClock clock;
  auto loop = EventLoop::Create(EventLoop::Backend::kAuto, clock).value();
  auto group = std::make_shared<ThrottleGroup>("g", clock);
  ThrottleLimits limits;
  limits.buckets[ThrottleLimits::kIopsWrite].average = 10;
  group->SetLimits(limits);
  OpenEnv env = {.loop = *loop, .throttle_group = [&](const std::string& id) {
                   return id == "g" ? group : nullptr;
                 }};
  auto open = [&](const std::string& id) {
    Options options = Options::Parse("driver=throttle,throttle-group=" + id +
                                     ",file.driver=file,file.filename=" + dir.File("a.img", kMiB))
                          .value();
    return RunInFiber(*loop, [&] { return OpenNode(env, std::move(options)); });
  };
  EXPECT_EQ(open("x").error().what, "throttle-group=x: there is no such -object");
  NodePtr node = open("g").value();
  Disk disk(*loop, "vda");
  disk.ReplaceNode(node);
  char data[512] = {};
  iovec iov = {data, sizeof data};
  constexpr int kRequests = 8;
  Outcome outcomes[kRequests];
  DiskRequest requests[kRequests];
  for (int i = 0; i < kRequests; i++) {
    requests[i] = MakeRequest(Request::Kind::kWrite, 0, &iov, &outcomes[i]);
    disk.Start(&requests[i]);
  }
  auto done = [&] {
    for (int turn = 0; turn < 20; turn++) loop->RunOnce(1'000'000);
    return std::count_if(std::begin(outcomes), std::end(outcomes),
                         [](const Outcome& outcome) { return outcome.done; });
  };
  EXPECT_EQ(done(), 2);
  clock.Advance(200'000'000);
  EXPECT_EQ(done(), 4);
  disk.Drain();
  EXPECT_EQ(done(), kRequests);
  disk.ReplaceNode(nullptr);
  EXPECT_TRUE(RunInFiber(*loop, [&] { return node->Close(); }));
}

TEST(DiskTest, DetectsZeroes) {
  LiveRig rig(kMiB);
  NodePtr a = rig.Add("a");
  NodeOptions options = a->opened_with();
  options.detect_zeroes = DetectZeroes::kUnmap;
  a->set_opened_with(options);
  std::string data(65536, 'x');
  EXPECT_EQ(ReadWrite(*rig.loop, *a, Request::Kind::kWrite, 0, data), 0);
  Extent extent = rig.Run([&] { return a->Status(0, 65536).value(); });
  EXPECT_FALSE(extent.zero);
  data.assign(65536, '\0');
  EXPECT_EQ(ReadWrite(*rig.loop, *a, Request::Kind::kWrite, 0, data), 0);
  extent = rig.Run([&] { return a->Status(0, 65536).value(); });
  EXPECT_TRUE(extent.zero);
}

// A guest mustn't make its raw disk another format's.
TEST(DiskTest, AProbedRawImageStaysRaw) {
  TempDir dir;
  auto loop = MakeLoop();
  for (const char* format : {"", "raw"}) {
    NodePtr node = OpenImage(*loop, {.path = dir.File("a.img", kMiB), .format = format}).value();
    std::string data(1024, '\0');
    data.replace(0, 8, std::string("QFI\xfb\0\0\0\3", 8));
    EXPECT_EQ(ReadWrite(*loop, *node, Request::Kind::kWrite, 0, data), *format ? 0 : -EPERM);
    data[0] = 'x';
    EXPECT_EQ(ReadWrite(*loop, *node, Request::Kind::kWrite, 0, data), 0);
    ASSERT_TRUE(CloseImage(node));
  }
}

TEST(DiskTest, CopyOnReadKeepsWhatWasRead) {
  LiveRig rig(kMiB);
  rig.AttachDisk(rig.Add("base"));
  rig.Fill(1, 30);
  rig.DetachDisk();
  rig.Remove("base");
  NodePtr top = rig.Add("top", "backing_file=base,backing_fmt=qcow2");
  NodePtr filter = rig.Run([&] {
    Options options;
    options.Set("driver", "copy-on-read");
    options.Set("node-name", "cor");
    options.Set("file", "top");
    return rig.registry.Add(std::move(options), Registry::Owner::kNamed).value();
  });
  rig.AttachDisk(filter);
  Guest guest(rig.disk, rig.model, 3);
  guest.Start();
  rig.Turn(100, guest);
  guest.Stop(*rig.loop);
  rig.Verify();
  // All was read by now: the base isn't needed any more.
  rig.Run([&] { ASSERT_TRUE(top->SetBacking(nullptr)); });
  rig.Verify("without the base");
}

}  // namespace
}  // namespace kvartz::block
