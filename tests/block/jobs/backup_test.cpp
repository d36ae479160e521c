// Backups of a disk that a guest writes to all the time.
#include "block/graph.h"
#include "block/live_rig.h"
#include "block/memory_node.h"

namespace kvartz::block {
namespace {

TEST(BackupJobTest, IsTheDiskAtTheMomentItBegan) {
  for (bool compress : {false, true}) {
    LiveRig rig;
    rig.AttachDisk(rig.Add("a"));
    NodePtr target = rig.Add("b");
    rig.Fill(1);
    Guest guest(rig.disk, rig.model, 2);
    guest.Start();
    rig.Turn(20, guest);
    auto settings = rig.JobTo<BackupSettings>("b", target);
    settings.compress = compress;
    settings.speed = 16 * kMiB;
    std::string then = rig.Start(std::move(settings));
    rig.Turn(200, guest);
    EXPECT_EQ(rig.AwaitEnd("b").error, "");
    guest.Stop(*rig.loop);
    rig.Verify();
    EXPECT_EQ(rig.disk.node()->node_name(), "a");
    rig.VerifyNode(*target, then);
    target.reset();
    rig.Remove("b");
    rig.VerifyFile("b", then);
  }
}

// true: each stands on the one before only when it is read.
class IncrementalBackupTest : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(WithoutBacking, IncrementalBackupTest, testing::Bool());

TEST_P(IncrementalBackupTest, AddUp) {
  LiveRig rig(4 * kMiB);
  NodePtr a = rig.Add("a");
  rig.AttachDisk(a);
  rig.Fill(1);
  rig.Run([&] { ASSERT_EQ(rig.Text(a->bitmaps()->Add({.name = "bm"})), ""); });
  Guest guest(rig.disk, rig.model, 2);
  guest.Start();
  std::string then;
  for (int i = 0; i < 4 && !testing::Test::HasFailure(); i++) {
    std::string name = "inc" + std::to_string(i);
    NodePtr target =
        i == 0 ? rig.Add(name)
               : rig.Add(name, "backing_file=inc" + std::to_string(i - 1) + ",backing_fmt=qcow2",
                         GetParam());
    auto settings = rig.JobTo<BackupSettings>(name, target);
    settings.sync = i == 0 ? Sync::kFull : Sync::kIncremental;
    settings.bitmap = "bm";
    if (i == 2) settings.speed = 1;
    then = rig.Start(std::move(settings));
    rig.Turn(20, guest);
    if (i == 2) {  // a failed one loses nothing
      rig.Run([&] { rig.jobs.CancelAll(); });
      ASSERT_TRUE(rig.AwaitEnd(name).cancelled);
      target.reset();
      rig.Remove(name);
      NodePtr again = rig.Add(name, "backing_file=inc1,backing_fmt=qcow2");
      settings = rig.JobTo<BackupSettings>("again", again);
      settings.sync = Sync::kIncremental;
      settings.bitmap = "bm";
      then = rig.Start(std::move(settings));
      EXPECT_EQ(rig.AwaitEnd("again").error, "");
    } else {
      EXPECT_EQ(rig.AwaitEnd(name).error, "");
    }
    target.reset();
    rig.Remove(name);
    rig.VerifyFile(name, then);
    rig.Turn(10, guest);
    guest.Stop(*rig.loop);
    rig.ZeroOut((1 + i) * kMiB / 2, kMiB);  // what the one before has
    guest.Start();
  }
  guest.Stop(*rig.loop);
}

// Where the node says that it is zeros, `expected` is.
void VerifyZeros(LiveRig& rig, Node& node, const std::string& expected) {
  rig.Run([&] {
    for (uint64_t at = 0; at < expected.size();) {
      Result<ChainExtent> found = StatusAbove(node, nullptr, at, expected.size() - at);
      ASSERT_EQ(LiveRig::Text(found), "");
      const Extent& extent = found->extent;
      ASSERT_GT(extent.length, 0u);
      if (extent.zero || !extent.allocated) {
        EXPECT_EQ(expected.find_first_not_of('\0', at) < at + extent.length, false)
            << "not zeros: " << at << " +" << extent.length;
      }
      at += extent.length;
    }
  });
}

// An overlay of the disk shows it as it was while the guest goes on (fleecing).
void ReadPointInTime(LiveRig& rig, const NodePtr& source, const NodePtr& target, int rounds) {
  rig.AttachDisk(source);
  rig.Fill(1);
  std::string then;
  rig.Run([&] {
    ASSERT_EQ(rig.Text(target->SetBacking(source)), "");
    BackupSettings settings;
    settings.job_id = "f";
    settings.source = source;
    settings.target = target;
    settings.sync = Sync::kNone;
    Registry::Quiesced quiet(rig.registry);
    then = rig.model;
    ASSERT_EQ(rig.Text(StartBackup(rig.live(), settings)), "");
  });
  Guest guest(rig.disk, rig.model, 2);
  guest.Start();
  for (int i = 0; i < rounds && !testing::Test::HasFailure(); i++) {
    rig.Turn(3, guest);
    rig.VerifyNode(*target, then, "while the guest writes");
    VerifyZeros(rig, *target, then);
  }
  rig.disk.Hold();
  rig.disk.Drain();
  rig.disk.Release();
  guest.Stop(*rig.loop);
  rig.VerifyNode(*target, then);
  rig.Run([&] { rig.jobs.CancelAll(); });
  EXPECT_TRUE(rig.AwaitEnd("f").cancelled);
  rig.Run([&] { ASSERT_EQ(rig.Text(target->SetBacking(nullptr)), ""); });
}

TEST(BackupJobTest, OfNothingSavesWhatIsOverwritten) {
  LiveRig rig(4 * kMiB);
  ReadPointInTime(rig, rig.Add("a"), rig.Add("f", "", true), 30);
}

// On files that do what they are asked in any order: writes overtake reads that came before them.
TEST(BackupJobTest, OfNothingWhereWritesOvertakeReads) {
  for (uint64_t seed = 1; seed <= 8 && !testing::Test::HasFailure(); seed++) {
    SCOPED_TRACE(seed);
    LiveRig rig(4 * kMiB);
    NodePtr nodes[2];
    for (std::string name : {"a", "f"}) {
      rig.Add(name);
      rig.Remove(name);
      Options options = Options::Parse("driver=qcow2,backing=,node-name=" + name).value();
      options.SetNode("file",
                      std::make_shared<MemoryNode>(*rig.loop, ReadFile(rig.Path(name)), seed));
      nodes[name == "f"] = rig.Run(
          [&] { return rig.registry.Add(std::move(options), Registry::Owner::kNamed).value(); });
    }
    ReadPointInTime(rig, nodes[0], nodes[1], 15);
  }
}

}  // namespace
}  // namespace kvartz::block
