// Stream and commit of a chain below a guest that writes all the time.
#include "block/live_rig.h"

namespace kvartz::block {
namespace {

// base <- mid <- top, each with contents of its own; the disk is on top.
void MakeChain(LiveRig& rig) {
  rig.AttachDisk(rig.Add("base"));
  rig.Fill(1, 40);
  for (const char* name : {"mid", "top"}) {
    NodePtr below = rig.disk.node();
    NodePtr overlay = rig.Add(name,
                              "backing_file=" + below->node_name() +
                                  ",backing_fmt=qcow2,size=" + std::to_string(rig.model.size()),
                              true);
    rig.Run([&] { ASSERT_EQ(rig.Text(rig.registry.Snapshot(below, overlay)), ""); });
    EXPECT_TRUE(below->read_only());
    EXPECT_EQ(rig.disk.node(), overlay);
    rig.Fill(7 + rig.model.size() + name[0], 25);
  }
}

TEST(StreamJobTest, TheDiskStandsAlone) {
  LiveRig rig(4 * kMiB);
  MakeChain(rig);
  Guest guest(rig.disk, rig.model, 5);
  guest.Start();
  rig.Start(rig.JobOfTop<StreamSettings>("s"));
  rig.Turn(60, guest);
  EXPECT_EQ(rig.AwaitEnd("s").error, "");
  EXPECT_EQ(rig.disk.node()->backing(), nullptr);
  rig.Turn(60, guest);
  guest.Stop(*rig.loop);
  rig.Remove("mid");
  rig.Remove("base");
  rig.CloseAndVerify("top");
}

TEST(StreamJobTest, WithABaseAndOfALowerLayer) {
  LiveRig rig(4 * kMiB);
  MakeChain(rig);
  Guest guest(rig.disk, rig.model, 5);
  guest.Start();
  auto settings = rig.JobOfTop<StreamSettings>("s");
  settings.base = rig.registry.Find("base");
  rig.Start(settings);
  rig.Turn(30, guest);
  EXPECT_EQ(rig.AwaitEnd("s").error, "");
  EXPECT_EQ(rig.disk.node()->backing(), settings.base.get());
  rig.Remove("mid");
  // A snapshot on it; then the lower one takes all of the base.
  NodePtr over = rig.Add(
      "over", "size=" + std::to_string(rig.model.size()) + ",backing_file=top,backing_fmt=qcow2",
      true);
  NodePtr top = rig.disk.node();
  rig.Run([&] { ASSERT_EQ(rig.Text(rig.registry.Snapshot(top, over)), ""); });
  settings = {};
  settings.job_id = "t";
  settings.top = top;
  rig.Start(std::move(settings));
  EXPECT_EQ(rig.AwaitEnd("t").error, "");
  EXPECT_EQ(top->backing(), nullptr);
  EXPECT_TRUE(top->read_only());
  rig.Turn(30, guest);
  guest.Stop(*rig.loop);
  top.reset();
  over.reset();
  rig.Remove("base");
  rig.CloseAndVerify("over");
}

TEST(StreamJobTest, CancelledAtAnyMomentLeavesTheDisk) {
  for (uint64_t seed = 1; seed <= 6 && !testing::Test::HasFailure(); seed++) {
    LiveRig rig(4 * kMiB);
    MakeChain(rig);
    Guest guest(rig.disk, rig.model, seed);
    guest.Start();
    auto settings = rig.JobOfTop<StreamSettings>("s");
    settings.speed = 8 * kMiB;
    rig.Start(std::move(settings));
    rig.Turn(seed * 12, guest);
    rig.Run([&] { rig.jobs.CancelAll(); });
    guest.Stop(*rig.loop);
    rig.CloseAndVerify("top");
  }
}

TEST(CommitJobTest, OfTheDiskPivotsToTheBase) {
  LiveRig rig(4 * kMiB);
  MakeChain(rig);
  Guest guest(rig.disk, rig.model, 5);
  guest.Start();
  rig.Start(rig.JobOfTop<CommitSettings>("c"));
  rig.Turn(60, guest);
  guest.Stop(*rig.loop);
  rig.Await("c", JobStatus::kReady);
  guest.Start();
  rig.Turn(60, guest);
  rig.Complete("c");
  EXPECT_EQ(rig.AwaitEnd("c").error, "");
  EXPECT_EQ(rig.disk.node(), rig.registry.Find("base"));
  rig.Turn(60, guest);
  guest.Stop(*rig.loop);
  rig.Remove("top");
  rig.Remove("mid");
  rig.CloseAndVerify("base");
}

TEST(CommitJobTest, CancelledLeavesTheDiskAndTheBaseReadOnly) {
  for (uint64_t seed = 1; seed <= 6 && !testing::Test::HasFailure(); seed++) {
    LiveRig rig(4 * kMiB);
    MakeChain(rig);
    Guest guest(rig.disk, rig.model, seed);
    guest.Start();
    rig.Start(rig.JobOfTop<CommitSettings>("c"));
    rig.Turn(seed * seed * 4, guest);
    rig.Run([&] { rig.jobs.CancelAll(); });
    EXPECT_TRUE(rig.registry.Find("base")->read_only());
    rig.Turn(20, guest);
    guest.Stop(*rig.loop);
    rig.CloseAndVerify("top");
  }
}

TEST(CommitJobTest, OfALowerLayerGoesBelowTheDisk) {
  LiveRig rig(4 * kMiB);
  MakeChain(rig);
  Guest guest(rig.disk, rig.model, 5);
  guest.Start();
  CommitSettings settings;
  settings.job_id = "c";
  settings.top = rig.registry.Find("mid");
  settings.base = rig.registry.Find("base");
  rig.Start(std::move(settings));
  rig.Turn(60, guest);
  EXPECT_EQ(rig.AwaitEnd("c").error, "");
  EXPECT_EQ(rig.disk.node()->backing(), rig.registry.Find("base").get());
  EXPECT_TRUE(rig.registry.Find("base")->read_only());
  rig.Turn(60, guest);
  guest.Stop(*rig.loop);
  rig.Remove("mid");
  rig.CloseAndVerify("top");
}

}  // namespace
}  // namespace kvartz::block
