// What becomes of a job, and of the guest, when its target fails.
#include "block/live_rig.h"

namespace kvartz::block {
namespace {

// A target that fails once, as `rule` says, below a job with this policy.
NodePtr AddFaulty(LiveRig& rig, const std::string& rule) {
  rig.Add("t");
  return rig.Run([&] {
    Options options =
        Options::Parse("driver=blkdebug,node-name=faulty,image=t,inject-error.0." + rule).value();
    return rig.registry.Add(std::move(options), Registry::Owner::kNamed).value();
  });
}

TEST(JobErrorTest, StopsUntilResumedOrEndsOrTriesAgain) {
  struct Case {
    ErrorPolicy policy;
    const char* rule;
    const char* failure;
    bool stops, ends;
  };
  constexpr Case kCases[] = {
      {ErrorPolicy::kReport, "iotype=write", "report", false, true},
      {ErrorPolicy::kIgnore, "once=on,inject-error.0.iotype=write", "ignore", false, false},
      {ErrorPolicy::kStop, "once=on,inject-error.0.iotype=write", "stop", true, false},
      {ErrorPolicy::kEnospc, "once=on,inject-error.0.iotype=write,inject-error.0.errno=28", "stop",
       true, false},
  };
  for (const Case& each : kCases) {
    for (bool backup : {false, true}) {
      LiveRig rig(2 * kMiB);
      rig.AttachDisk(rig.Add("a"));
      rig.Fill(1);
      NodePtr target = AddFaulty(rig, each.rule);
      Guest guest(rig.disk, rig.model, 2);
      auto start = [&](auto settings) {
        settings.on_target_error = each.policy;
        return rig.Start(std::move(settings));
      };
      std::string then = backup ? start(rig.JobTo<BackupSettings>("j", target))
                                : start(rig.JobTo<MirrorSettings>("j", target));
      if (each.stops) {
        rig.Await("j", JobStatus::kPaused);
        JobInfo info = rig.Run([&] { return rig.jobs.Info("j").value(); });
        EXPECT_TRUE(info.io_failed && info.paused);
        EXPECT_EQ(info.io_no_space, each.policy == ErrorPolicy::kEnospc);
        if (!backup) {  // a backup would break off, were something overwritten now
          guest.Start();
          rig.Turn(30, guest);
          guest.Stop(*rig.loop);
        }
        rig.Run([&] { EXPECT_EQ(rig.Text(rig.jobs.Resume("j")), ""); });
      }
      if (!each.ends && !backup) {
        rig.Await("j", JobStatus::kReady);
        rig.Run([&] { EXPECT_EQ(rig.Text(rig.jobs.Complete("j")), ""); });
      }
      JobInfo end = rig.AwaitEnd("j");
      EXPECT_EQ(end.error.empty(), !each.ends) << end.error;
      if (each.ends) {
        EXPECT_TRUE(end.error.starts_with("cannot write '" + rig.Path("t") + "' at 0x"))
            << end.error;
      }
      ASSERT_FALSE(rig.failures.empty());
      EXPECT_EQ(rig.failures[0], std::string("j write ") + each.failure);
      rig.Verify();
      if (!each.ends && backup) rig.VerifyNode(*target, then);
    }
  }
}

// The guest isn't held up by a backup that can't save what it overwrites.
TEST(JobErrorTest, ABackupBreaksNotTheGuest) {
  LiveRig rig(2 * kMiB);
  rig.AttachDisk(rig.Add("a"));
  rig.Fill(1);
  NodePtr target = AddFaulty(rig, "iotype=write");
  auto settings = rig.JobTo<BackupSettings>("j", target);
  settings.sync = Sync::kNone;
  rig.Start(std::move(settings));
  rig.Fill(2);
  EXPECT_TRUE(
      rig.AwaitEnd("j").error.ends_with("before the guest overwrote it: Input/output error"))
      << rig.ended[0].error;
  rig.Verify();
}

}  // namespace
}  // namespace kvartz::block
