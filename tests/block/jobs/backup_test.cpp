// Backups of a disk that a guest writes to all the time.
#include "block/live_rig.h"

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

TEST(BackupJobTest, IncrementalOnesAddUp) {
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
               : rig.Add(name, "backing_file=inc" + std::to_string(i - 1) + ",backing_fmt=qcow2");
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
  }
  guest.Stop(*rig.loop);
}

// An overlay of the disk shows it as it was while the guest goes on (fleecing).
TEST(BackupJobTest, OfNothingSavesWhatIsOverwritten) {
  LiveRig rig(4 * kMiB);
  NodePtr a = rig.Add("a");
  rig.AttachDisk(a);
  rig.Fill(1);
  NodePtr target = rig.Add("f", "", true);
  std::string then;
  rig.Run([&] {
    ASSERT_EQ(rig.Text(target->SetBacking(a)), "");
    BackupSettings settings;
    settings.job_id = "f";
    settings.source = a;
    settings.target = target;
    settings.sync = Sync::kNone;
    Registry::Quiesced quiet(rig.registry);
    then = rig.model;
    ASSERT_EQ(rig.Text(StartBackup(rig.live(), settings)), "");
  });
  Guest guest(rig.disk, rig.model, 2);
  guest.Start();
  for (int i = 0; i < 20; i++) {
    rig.Turn(10, guest);
    // Not while it writes: docs/live-disks.md, what is missing.
    guest.Stop(*rig.loop);
    rig.VerifyNode(*target, then, "between the guest's writes");
    guest.Start();
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

}  // namespace
}  // namespace kvartz::block
