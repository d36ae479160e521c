// Jobs on a disk that a guest writes to all the time.
#include "block/jobs/live.h"

#include "block/graph.h"
#include "block/live_rig.h"
#include "block/memory_node.h"

namespace kvartz::block {
namespace {

std::string NamesOf(const LiveRig& rig) {
  std::string names;
  for (const NodePtr& node : rig.registry.nodes()) {
    if (rig.registry.IsNamed(*node)) names += node->node_name() + " ";
  }
  return names;
}

class MirrorTest : public testing::TestWithParam<MirrorSettings::CopyMode> {};

TEST_P(MirrorTest, PivotsToAnEqualCopy) {
  LiveRig rig;
  rig.AttachDisk(rig.Add("a"));
  NodePtr target = rig.Add("b");
  rig.Fill(1);
  Guest guest(rig.disk, rig.model, 2);
  guest.Start();
  MirrorSettings settings;
  settings.job_id = "m";
  settings.source = rig.disk.node();
  settings.target = target;
  settings.copy_mode = GetParam();
  rig.Run([&] { ASSERT_EQ(rig.Text(StartMirror(rig.live(), settings)), ""); });
  settings.source.reset();
  EXPECT_STREQ(rig.disk.node()->driver(), "mirror_top");
  rig.Turn(300, guest);
  rig.Await("m", JobStatus::kReady);
  EXPECT_EQ(rig.ready, std::vector<std::string>{"m"});
  rig.Turn(300, guest);
  rig.Run([&] { ASSERT_EQ(rig.Text(rig.jobs.Complete("m")), ""); });
  JobInfo end = rig.AwaitEnd("m");
  EXPECT_EQ(end.error, "");
  EXPECT_EQ(rig.disk.node(), target);
  rig.Turn(200, guest);
  guest.Stop(*rig.loop);
  settings = {};
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
    MirrorSettings settings;
    settings.job_id = "m";
    settings.source = rig.disk.node();
    settings.target = target;
    settings.copy_mode = GetParam();
    rig.Run([&] { ASSERT_EQ(rig.Text(StartMirror(rig.live(), settings)), ""); });
    rig.Turn(seed * seed * 5, guest);
    rig.Run([&] { rig.jobs.CancelAll(); });
    EXPECT_TRUE(rig.AwaitEnd("m").cancelled);
    EXPECT_EQ(rig.disk.node(), settings.source);
    settings = {};
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
  MirrorSettings settings;
  settings.job_id = "m";
  settings.source = rig.disk.node();
  settings.target = target;
  rig.Run([&] { ASSERT_EQ(rig.Text(StartMirror(rig.live(), settings)), ""); });
  rig.Await("m", JobStatus::kReady);
  rig.Fill(2);
  rig.Run([&] { ASSERT_EQ(rig.Text(rig.jobs.Cancel("m", false)), ""); });
  JobInfo end = rig.AwaitEnd("m");
  EXPECT_FALSE(end.cancelled);
  EXPECT_EQ(end.error, "");
  EXPECT_EQ(rig.disk.node(), settings.source);
  rig.VerifyNode(*target, rig.model);
}

TEST(MirrorJobTest, OfTheTopLayerOntoTheSameBase) {
  LiveRig rig(4 * kMiB);
  rig.AttachDisk(rig.Add("base"));
  rig.Fill(1);
  rig.DetachDisk();
  rig.Remove("base");
  std::string overlay = "backing_file=base,backing_fmt=qcow2";
  rig.AttachDisk(rig.Add("a", overlay));
  rig.Fill(2, 30);
  NodePtr target = rig.Add("b", overlay);
  MirrorSettings settings;
  settings.job_id = "m";
  settings.source = rig.disk.node();
  settings.target = target;
  settings.sync = Sync::kTop;
  rig.Run([&] { ASSERT_EQ(rig.Text(StartMirror(rig.live(), settings)), ""); });
  Guest guest(rig.disk, rig.model, 3);
  guest.Start();
  rig.Turn(50, guest);
  guest.Stop(*rig.loop);
  rig.Await("m", JobStatus::kReady);
  rig.Run([&] { ASSERT_EQ(rig.Text(rig.jobs.Complete("m")), ""); });
  EXPECT_EQ(rig.AwaitEnd("m").error, "");
  EXPECT_EQ(rig.disk.node(), target);
  rig.Verify();
}

TEST(MirrorJobTest, StatesAreThePeers) {
  LiveRig rig(1 * kMiB);
  rig.AttachDisk(rig.Add("a"));
  NodePtr target = rig.Add("b");
  MirrorSettings settings;
  settings.job_id = "m";
  settings.job = {.auto_finalize = false, .auto_dismiss = false};
  settings.source = rig.disk.node();
  settings.target = target;
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
  MirrorSettings settings;
  settings.job_id = "m";
  settings.source = rig.disk.node();
  settings.target = target;
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

// ---- errors ----

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
      std::string then;
      rig.Run([&] {
        Registry::Quiesced quiet(rig.registry);
        then = rig.model;
        if (backup) {
          BackupSettings settings;
          settings.job_id = "j";
          settings.source = rig.disk.node();
          settings.target = target;
          settings.on_target_error = each.policy;
          ASSERT_EQ(rig.Text(StartBackup(rig.live(), settings)), "");
        } else {
          MirrorSettings settings;
          settings.job_id = "j";
          settings.source = rig.disk.node();
          settings.target = target;
          settings.on_target_error = each.policy;
          ASSERT_EQ(rig.Text(StartMirror(rig.live(), settings)), "");
        }
      });
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
  rig.Run([&] {
    BackupSettings settings;
    settings.job_id = "j";
    settings.source = rig.disk.node();
    settings.target = target;
    settings.sync = Sync::kNone;
    ASSERT_EQ(rig.Text(StartBackup(rig.live(), settings)), "");
  });
  rig.Fill(2);
  EXPECT_TRUE(
      rig.AwaitEnd("j").error.ends_with("before the guest overwrote it: Input/output error"))
      << rig.ended[0].error;
  rig.Verify();
}

// ---- backup ----

TEST(BackupJobTest, IsTheDiskAtTheMomentItBegan) {
  for (bool compress : {false, true}) {
    LiveRig rig;
    rig.AttachDisk(rig.Add("a"));
    NodePtr target = rig.Add("b");
    rig.Fill(1);
    Guest guest(rig.disk, rig.model, 2);
    guest.Start();
    rig.Turn(20, guest);
    BackupSettings settings;
    settings.job_id = "b";
    settings.source = rig.disk.node();
    settings.target = target;
    settings.compress = compress;
    settings.speed = 16 * kMiB;
    std::string then;
    rig.Run([&] {
      Registry::Quiesced quiet(rig.registry);
      then = rig.model;
      ASSERT_EQ(rig.Text(StartBackup(rig.live(), settings)), "");
    });
    rig.Turn(200, guest);
    EXPECT_EQ(rig.AwaitEnd("b").error, "");
    guest.Stop(*rig.loop);
    rig.Verify();
    EXPECT_EQ(rig.disk.node(), settings.source);
    settings = {};
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
    BackupSettings settings;
    settings.job_id = name;
    settings.source = rig.disk.node();
    settings.target = target;
    settings.sync = i == 0 ? Sync::kFull : Sync::kIncremental;
    settings.bitmap = "bm";
    if (i == 2) settings.speed = 1;
    rig.Run([&] {
      Registry::Quiesced quiet(rig.registry);
      then = rig.model;
      ASSERT_EQ(rig.Text(StartBackup(rig.live(), settings)), "");
    });
    settings = {};
    rig.Turn(20, guest);
    if (i == 2) {  // a failed one loses nothing
      rig.Run([&] { rig.jobs.CancelAll(); });
      ASSERT_TRUE(rig.AwaitEnd(name).cancelled);
      target.reset();
      rig.Remove(name);
      NodePtr again = rig.Add(name, "backing_file=inc1,backing_fmt=qcow2");
      settings.job_id = "again";
      settings.source = rig.disk.node();
      settings.target = again;
      settings.sync = Sync::kIncremental;
      settings.bitmap = "bm";
      rig.Run([&] {
        Registry::Quiesced quiet(rig.registry);
        then = rig.model;
        ASSERT_EQ(rig.Text(StartBackup(rig.live(), settings)), "");
      });
      settings = {};
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

// ---- stream, commit, snapshots ----

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

void CloseAndVerify(LiveRig& rig, const std::string& name) {
  rig.Verify();
  rig.DetachDisk();
  rig.Run([&] { EXPECT_EQ(rig.Text(rig.registry.CloseAll()), ""); });
  rig.VerifyFile(name, rig.model);
}

TEST(StreamJobTest, TheDiskStandsAlone) {
  LiveRig rig(4 * kMiB);
  MakeChain(rig);
  Guest guest(rig.disk, rig.model, 5);
  guest.Start();
  StreamSettings settings;
  settings.job_id = "s";
  settings.top = rig.disk.node();
  rig.Run([&] { ASSERT_EQ(rig.Text(StartStream(rig.live(), settings)), ""); });
  settings = {};
  rig.Turn(60, guest);
  EXPECT_EQ(rig.AwaitEnd("s").error, "");
  EXPECT_EQ(rig.disk.node()->backing(), nullptr);
  rig.Turn(60, guest);
  guest.Stop(*rig.loop);
  rig.Remove("mid");
  rig.Remove("base");
  CloseAndVerify(rig, "top");
}

TEST(StreamJobTest, WithABaseAndOfALowerLayer) {
  LiveRig rig(4 * kMiB);
  MakeChain(rig);
  Guest guest(rig.disk, rig.model, 5);
  guest.Start();
  StreamSettings settings;
  settings.job_id = "s";
  settings.top = rig.disk.node();
  settings.base = rig.registry.Find("base");
  rig.Run([&] { ASSERT_EQ(rig.Text(StartStream(rig.live(), settings)), ""); });
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
  rig.Run([&] { ASSERT_EQ(rig.Text(StartStream(rig.live(), settings)), ""); });
  settings = {};
  EXPECT_EQ(rig.AwaitEnd("t").error, "");
  EXPECT_EQ(top->backing(), nullptr);
  EXPECT_TRUE(top->read_only());
  rig.Turn(30, guest);
  guest.Stop(*rig.loop);
  top.reset();
  over.reset();
  rig.Remove("base");
  CloseAndVerify(rig, "over");
}

TEST(StreamJobTest, CancelledAtAnyMomentLeavesTheDisk) {
  for (uint64_t seed = 1; seed <= 6 && !testing::Test::HasFailure(); seed++) {
    LiveRig rig(4 * kMiB);
    MakeChain(rig);
    Guest guest(rig.disk, rig.model, seed);
    guest.Start();
    StreamSettings settings;
    settings.job_id = "s";
    settings.top = rig.disk.node();
    settings.speed = 8 * kMiB;
    rig.Run([&] { ASSERT_EQ(rig.Text(StartStream(rig.live(), settings)), ""); });
    settings = {};
    rig.Turn(seed * 12, guest);
    rig.Run([&] { rig.jobs.CancelAll(); });
    guest.Stop(*rig.loop);
    CloseAndVerify(rig, "top");
  }
}

TEST(CommitJobTest, OfTheDiskPivotsToTheBase) {
  LiveRig rig(4 * kMiB);
  MakeChain(rig);
  Guest guest(rig.disk, rig.model, 5);
  guest.Start();
  CommitSettings settings;
  settings.job_id = "c";
  settings.top = rig.disk.node();
  rig.Run([&] { ASSERT_EQ(rig.Text(StartCommit(rig.live(), settings)), ""); });
  settings = {};
  rig.Turn(60, guest);
  guest.Stop(*rig.loop);
  rig.Await("c", JobStatus::kReady);
  guest.Start();
  rig.Turn(60, guest);
  rig.Run([&] { ASSERT_EQ(rig.Text(rig.jobs.Complete("c")), ""); });
  EXPECT_EQ(rig.AwaitEnd("c").error, "");
  EXPECT_EQ(rig.disk.node(), rig.registry.Find("base"));
  rig.Turn(60, guest);
  guest.Stop(*rig.loop);
  rig.Remove("top");
  rig.Remove("mid");
  CloseAndVerify(rig, "base");
}

TEST(CommitJobTest, CancelledLeavesTheDiskAndTheBaseReadOnly) {
  for (uint64_t seed = 1; seed <= 6 && !testing::Test::HasFailure(); seed++) {
    LiveRig rig(4 * kMiB);
    MakeChain(rig);
    Guest guest(rig.disk, rig.model, seed);
    guest.Start();
    CommitSettings settings;
    settings.job_id = "c";
    settings.top = rig.disk.node();
    rig.Run([&] { ASSERT_EQ(rig.Text(StartCommit(rig.live(), settings)), ""); });
    settings = {};
    rig.Turn(seed * seed * 4, guest);
    rig.Run([&] { rig.jobs.CancelAll(); });
    EXPECT_TRUE(rig.registry.Find("base")->read_only());
    rig.Turn(20, guest);
    guest.Stop(*rig.loop);
    CloseAndVerify(rig, "top");
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
  rig.Run([&] { ASSERT_EQ(rig.Text(StartCommit(rig.live(), settings)), ""); });
  settings = {};
  rig.Turn(60, guest);
  EXPECT_EQ(rig.AwaitEnd("c").error, "");
  EXPECT_EQ(rig.disk.node()->backing(), rig.registry.Find("base").get());
  EXPECT_TRUE(rig.registry.Find("base")->read_only());
  rig.Turn(60, guest);
  guest.Stop(*rig.loop);
  rig.Remove("mid");
  CloseAndVerify(rig, "top");
}

TEST(RegistryTest, NamesUsersAndReferences) {
  LiveRig rig(1 * kMiB);
  NodePtr a = rig.Add("a");
  rig.AttachDisk(a);
  EXPECT_EQ(NamesOf(rig), "a ");
  EXPECT_EQ(rig.registry.nodes().size(), 2u);
  EXPECT_TRUE(a->file()->node_name().starts_with("#block"));
  Disk other(*rig.loop, "vdb");
  rig.Run([&] {
    EXPECT_EQ(rig.Text(rig.registry.Remove("a")), "Block device a is in use by device 'vda'");
    EXPECT_EQ(rig.Text(rig.registry.Remove("x")), "Failed to find node with node-name='x'");
    EXPECT_EQ(rig.Text(rig.registry.Remove(a->file()->node_name())),
              "Node '" + a->file()->node_name() + "' is not owned by the monitor");
    EXPECT_EQ(rig.Text(rig.registry.Attach(other, a, *rig.loop)),
              "node 'a' can't be written to: it is in use by device 'vda'");
    Options twice;
    twice.Set("driver", "file");
    twice.Set("filename", rig.Path("a"));
    twice.Set("node-name", "a");
    EXPECT_EQ(rig.Text(rig.registry.Add(twice, Registry::Owner::kNamed)),
              "Duplicate nodes with node-name='a'");
  });
}

TEST(RegistryTest, ResizesUnderTheGuest) {
  LiveRig rig(2 * kMiB);
  rig.AttachDisk(rig.Add("a"));
  Guest guest(rig.disk, rig.model, 5);
  guest.Start();
  rig.Turn(50, guest);
  rig.Run([&] { ASSERT_EQ(rig.Text(rig.registry.Resize(rig.disk.node(), 4 * kMiB)), ""); });
  EXPECT_EQ(rig.disk.size_bytes(), 4 * kMiB);
  rig.model.resize(4 * kMiB, '\0');
  rig.Turn(50, guest);
  guest.Stop(*rig.loop);
  CloseAndVerify(rig, "a");
}

TEST(RegistryTest, ReopensWhatMayChange) {
  LiveRig rig(kMiB);
  NodePtr a = rig.Add("a");
  NodePtr b = rig.Add("b", "", true);
  auto reopen = [&](const char* options) {
    return rig.Run(
        [&] { return rig.Text(rig.registry.Reopen("b", Options::Parse(options).value())); });
  };
  EXPECT_EQ(reopen("driver=qcow2,node-name=b,backing=a,read-only=on"), "");
  EXPECT_EQ(b->backing(), a.get());
  EXPECT_TRUE(b->read_only());
  EXPECT_EQ(reopen("driver=qcow2,read-only=on,backing="), "");
  EXPECT_EQ(b->backing(), nullptr);
  EXPECT_EQ(reopen("driver=qcow2"), "");
  EXPECT_FALSE(b->read_only());
  EXPECT_EQ(reopen("driver=raw"), "Cannot change the option 'driver' of 'b'");
  EXPECT_EQ(reopen("driver=qcow2,cluster-size=1"), "blockdev-reopen has no option 'cluster-size'");
  EXPECT_EQ(reopen("driver=qcow2,backing=x"), "Cannot find device='' nor node-name='x'");
  rig.AttachDisk(b);
  EXPECT_EQ(reopen("driver=qcow2,read-only=on"), "device 'vda' writes to 'b'");
}

TEST(RegistryTest, UndoesASnapshot) {
  LiveRig rig(2 * kMiB);
  NodePtr a = rig.Add("a");
  rig.AttachDisk(a);
  rig.Fill(1, 30);
  NodePtr b = rig.Add("b", "", true);
  rig.Run([&] {
    ASSERT_EQ(rig.Text(rig.registry.Snapshot(a, b)), "");
    EXPECT_EQ(rig.Text(rig.registry.Snapshot(a, b)), "The overlay already has a backing image");
    ASSERT_EQ(rig.Text(rig.registry.UndoSnapshot(a, b)), "");
  });
  EXPECT_EQ(rig.disk.node(), a);
  b.reset();
  rig.Remove("b");
  rig.Fill(2, 30);
  a.reset();
  CloseAndVerify(rig, "a");
}

}  // namespace
}  // namespace kvartz::block
