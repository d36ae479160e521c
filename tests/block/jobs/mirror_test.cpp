// Mirrors of a disk that a guest writes to all the time.
#include "block/live_rig.h"

namespace kvartz::block {
namespace {

class MirrorTest : public testing::TestWithParam<MirrorSettings::CopyMode> {};

TEST_P(MirrorTest, PivotsToAnEqualCopy) {
  LiveRig rig;
  rig.AttachDisk(rig.Add("a"));
  NodePtr target = rig.Add("b");
  rig.Fill(1);
  Guest guest(rig.disk, rig.model, 2);
  guest.Start();
  auto settings = rig.JobTo<MirrorSettings>("m", target);
  settings.copy_mode = GetParam();
  rig.Start(std::move(settings));
  EXPECT_STREQ(rig.disk.node()->driver(), "mirror_top");
  rig.Turn(300, guest);
  rig.Await("m", JobStatus::kReady);
  EXPECT_EQ(rig.ready, std::vector<std::string>{"m"});
  rig.Turn(300, guest);
  rig.Complete("m");
  JobInfo end = rig.AwaitEnd("m");
  EXPECT_EQ(end.error, "");
  EXPECT_EQ(rig.disk.node(), target);
  rig.Turn(200, guest);
  guest.Stop(*rig.loop);
  rig.Verify("after");
  rig.Remove("a");
  rig.DetachDisk();
  target.reset();
  rig.Remove("b");
  rig.VerifyFile("b", rig.model);
}

TEST_P(MirrorTest, CancelledAtAnyMomentLeavesTheSource) {
  for (uint64_t seed = 1; seed <= 8 && !testing::Test::HasFailure(); seed++) {
    LiveRig rig(4 * kMiB);
    rig.AttachDisk(rig.Add("a"));
    NodePtr target = rig.Add("b");
    rig.Fill(seed, 50);
    Guest guest(rig.disk, rig.model, seed);
    guest.Start();
    auto settings = rig.JobTo<MirrorSettings>("m", target);
    settings.copy_mode = GetParam();
    rig.Start(std::move(settings));
    rig.Turn(seed * seed * 5, guest);
    rig.Run([&] { rig.jobs.CancelAll(); });
    EXPECT_TRUE(rig.AwaitEnd("m").cancelled);
    EXPECT_EQ(rig.disk.node()->node_name(), "a");
    rig.Turn(50, guest);
    guest.Stop(*rig.loop);
    rig.Verify();
    target.reset();
    rig.Remove("b");
    rig.DetachDisk();
    rig.Remove("a");
    rig.VerifyFile("a", rig.model);
  }
}

INSTANTIATE_TEST_SUITE_P(CopyModes, MirrorTest,
                         testing::Values(MirrorSettings::CopyMode::kBackground,
                                         MirrorSettings::CopyMode::kWriteBlocking),
                         [](const auto& test) {
                           return test.param == MirrorSettings::CopyMode::kBackground
                                      ? "Background"
                                      : "WriteBlocking";
                         });

// A ready mirror that is cancelled without force is a consistent copy.
TEST(MirrorJobTest, SoftCancelLeavesAConsistentTarget) {
  LiveRig rig(4 * kMiB);
  rig.AttachDisk(rig.Add("a"));
  NodePtr target = rig.Add("b");
  rig.Fill(1);
  rig.Start(rig.JobTo<MirrorSettings>("m", target));
  rig.Await("m", JobStatus::kReady);
  rig.Fill(2);
  rig.Run([&] { ASSERT_EQ(rig.Text(rig.jobs.Cancel("m", false)), ""); });
  JobInfo end = rig.AwaitEnd("m");
  EXPECT_FALSE(end.cancelled);
  EXPECT_EQ(end.error, "");
  EXPECT_EQ(rig.disk.node()->node_name(), "a");
  rig.VerifyNode(*target, rig.model);
}

// The target's clusters are smaller than the source's, as large, or larger.
class TopLayerTest
    : public testing::TestWithParam<std::tuple<MirrorSettings::CopyMode, std::string>> {
 protected:
  // The disk is "a" on "base"; answers "b", which is to be its copy.
  NodePtr MakeImages(bool no_backing = false) {
    rig.AttachDisk(rig.Add("base"));
    rig.Fill(1);
    rig.DetachDisk();
    rig.Remove("base");
    std::string overlay = "backing_file=base,backing_fmt=qcow2";
    rig.AttachDisk(rig.Add("a", overlay));
    rig.Fill(2, 30);
    rig.ZeroOut(kMiB, kMiB);
    return rig.Add("b", overlay + std::get<1>(GetParam()), no_backing);
  }
  MirrorSettings Settings(const NodePtr& target) {
    auto settings = rig.JobTo<MirrorSettings>("m", target);
    settings.copy_mode = std::get<0>(GetParam());
    settings.sync = Sync::kTop;
    return settings;
  }
  LiveRig rig{4 * kMiB};
};

TEST_P(TopLayerTest, OntoTheSameBase) {
  NodePtr target = MakeImages();
  rig.Start(Settings(target));
  Guest guest(rig.disk, rig.model, 3);
  guest.Start();
  rig.Turn(50, guest);
  guest.Stop(*rig.loop);
  rig.Await("m", JobStatus::kReady);
  rig.Complete("m");
  EXPECT_EQ(rig.AwaitEnd("m").error, "");
  EXPECT_EQ(rig.disk.node(), target);
  rig.Verify();
}

// The target isn't on its base while it is written to, and then it is.
TEST_P(TopLayerTest, BeforeTheTargetIsOnItsBase) {
  NodePtr target = MakeImages(/*no_backing=*/true);
  Guest guest(rig.disk, rig.model, 3);
  guest.Start();
  rig.Start(Settings(target));
  rig.Turn(20, guest);
  rig.Await("m", JobStatus::kReady);
  rig.Turn(30, guest);
  guest.Stop(*rig.loop);
  rig.Complete("m");
  EXPECT_EQ(rig.AwaitEnd("m").error, "");
  rig.DetachDisk();
  target.reset();
  rig.Remove("b");
  rig.VerifyFile("b", rig.model);
}

INSTANTIATE_TEST_SUITE_P(
    Targets, TopLayerTest,
    testing::Combine(testing::Values(MirrorSettings::CopyMode::kBackground,
                                     MirrorSettings::CopyMode::kWriteBlocking),
                     testing::Values<std::string>(",cluster_size=4096", "", ",cluster_size=256k",
                                                  ",extended_l2=on", ",compat=0.10")));

TEST(MirrorJobTest, StatesAreThePeers) {
  LiveRig rig(1 * kMiB);
  rig.AttachDisk(rig.Add("a"));
  NodePtr target = rig.Add("b");
  auto settings = rig.JobTo<MirrorSettings>("m", target);
  settings.job = {.auto_finalize = false, .auto_dismiss = false};
  rig.Run([&] {
    ASSERT_EQ(rig.Text(StartMirror(rig.live(), settings)), "");
    EXPECT_EQ(rig.Text(rig.jobs.Complete("m")),
              "Job 'm' in state 'created' cannot accept command verb 'complete'");
    EXPECT_EQ(rig.Text(rig.jobs.Complete("x")), "Job not found");
    EXPECT_EQ(rig.Text(StartMirror(rig.live(), settings)), "Job ID 'm' already in use");
  });
  rig.Await("m", JobStatus::kReady);
  rig.Run([&] { EXPECT_EQ(rig.Text(rig.jobs.Pause("m")), ""); });
  rig.Await("m", JobStatus::kStandby);
  rig.Run([&] {
    EXPECT_EQ(rig.Text(rig.jobs.Resume("m")), "");
    EXPECT_EQ(rig.Text(rig.jobs.Resume("m")), "Can't resume a job that was not paused");
  });
  while (rig.statuses.back() != "m ready") rig.loop->RunOnce(-1);
  rig.Run([&] { EXPECT_EQ(rig.Text(rig.jobs.Complete("m")), ""); });
  rig.Await("m", JobStatus::kPending);
  EXPECT_NE(rig.disk.node(), target);
  rig.Run([&] { EXPECT_EQ(rig.Text(rig.jobs.Finalize("m")), ""); });
  rig.Await("m", JobStatus::kConcluded);
  EXPECT_EQ(rig.disk.node(), target);
  rig.Run([&] { EXPECT_EQ(rig.Text(rig.jobs.Dismiss("m")), ""); });
  rig.Await("m", JobStatus::kNull);
  std::vector<std::string> expected = {"m created", "m running",   "m ready",
                                       "m standby", "m ready",     "m waiting",
                                       "m pending", "m concluded", "m null"};
  EXPECT_EQ(rig.statuses, expected);
}

TEST(MirrorJobTest, RefusesWhatIsInUse) {
  LiveRig rig(1 * kMiB);
  rig.AttachDisk(rig.Add("a"));
  NodePtr target = rig.Add("b");
  Disk other(*rig.loop, "vdb");
  auto settings = rig.JobTo<MirrorSettings>("m", target);
  rig.Run([&] {
    ASSERT_EQ(rig.Text(rig.registry.Attach(other, target, *rig.loop)), "");
    EXPECT_EQ(rig.Text(StartMirror(rig.live(), settings)),
              "Node 'b' is busy: it is in use by device 'vdb'");
    ASSERT_EQ(rig.Text(rig.registry.Detach(other)), "");
    ASSERT_EQ(rig.Text(StartMirror(rig.live(), settings)), "");
    EXPECT_EQ(rig.Text(rig.registry.Remove("b")), "Block device b is in use by job 'm'");
    EXPECT_EQ(rig.Text(rig.registry.Resize(settings.source, 2 * kMiB)),
              "Node 'a' is busy: it is in use by job 'm'");
    settings.job_id = "n";
    EXPECT_EQ(rig.Text(StartMirror(rig.live(), settings)),
              "Node 'a' is busy: it is in use by job 'm'");
  });
}

}  // namespace
}  // namespace kvartz::block
