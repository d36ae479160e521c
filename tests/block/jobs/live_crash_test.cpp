// The process is killed while a job runs: what is in the files then, opened anew, shows all that
// the guest has flushed.
#include "block/live_rig.h"

namespace kvartz::block {
namespace {

enum class Work { kStream, kStreamBase, kCommit, kCommitActive, kMirror, kMirrorBlocking, kBackup };

class LiveCrashTest : public testing::TestWithParam<Work> {};

class CrashRun {
 public:
  CrashRun(Work work, uint64_t seed) : work_(work), seed_(seed), rig_(2 * kMiB) {}

  void Run() {
    rig_.AttachDisk(rig_.Add("base", Size()));
    rig_.Fill(seed_, 40);
    for (const char* name : {"mid", "top"}) {
      NodePtr below = rig_.disk.node();
      NodePtr overlay =
          rig_.Add(name, Size() + ",backing_fmt=qcow2,backing_file=" + below->node_name(), true);
      rig_.Run([&] { ASSERT_EQ(rig_.Text(rig_.registry.Snapshot(below, overlay)), ""); });
      rig_.Fill(seed_ + 100, 20);
    }
    rig_.Run([&] { ASSERT_EQ(rig_.Text(Begin()), ""); });
    Guest guest(rig_.disk, rig_.model, seed_);
    bool asked = false;
    for (int i = 0; i < 12 && !testing::Test::HasFailure(); i++) {
      guest.Start();
      rig_.Turn(6, guest);
      guest.Stop(*rig_.loop);
      ASSERT_EQ(Do(*rig_.loop, *rig_.disk.node(), {.kind = Request::Kind::kFlush}), 0);
      for (uint64_t turn = 0; turn < (seed_ + static_cast<uint64_t>(i)) % 7; turn++)
        rig_.loop->RunOnce(1'000'000);
      Crash();
      if (!rig_.ready.empty() && !std::exchange(asked, true))
        rig_.Run([&] { (void)rig_.jobs.Complete("j"); });
    }
    rig_.Run([&] { rig_.jobs.CancelAll(); });
  }

 private:
  std::string Size() const { return "cluster_size=4096,size=" + std::to_string(rig_.model.size()); }

  Result<> Begin() {
    CommonSettings common;
    common.job_id = "j";
    common.speed = 2 * kMiB;
    const NodePtr& disk = rig_.disk.node();
    if (work_ == Work::kStream || work_ == Work::kStreamBase) {
      StreamSettings settings{common};
      settings.top = disk;
      if (work_ == Work::kStreamBase) settings.base = rig_.registry.Find("base");
      return StartStream(rig_.live(), settings);
    }
    if (work_ == Work::kCommit || work_ == Work::kCommitActive) {
      CommitSettings settings{common};
      settings.top = work_ == Work::kCommit ? rig_.registry.Find("mid") : disk;
      settings.base = rig_.registry.Find("base");
      return StartCommit(rig_.live(), settings);
    }
    MakeTarget();
    if (work_ == Work::kBackup) {
      BackupSettings settings{common};
      settings.source = disk;
      settings.target = rig_.registry.Find("new");
      return StartBackup(rig_.live(), settings);
    }
    MirrorSettings settings{common};
    settings.source = disk;
    settings.target = rig_.registry.Find("new");
    if (work_ == Work::kMirrorBlocking)
      settings.copy_mode = MirrorSettings::CopyMode::kWriteBlocking;
    return StartMirror(rig_.live(), settings);
  }

  void MakeTarget() {
    ASSERT_TRUE(CreateImage(rig_.registry.env(), "qcow2", rig_.Path("new"),
                            Options::Parse(Size()).value()));
    rig_.Open("new");
  }

  // The files as they are now, elsewhere.
  void Crash() {
    TempDir copy(TempDir::Place::kMemory);
    ASSERT_EQ(RunCommand("cp " + rig_.dir.path() + "/* " + copy.path()).status, 0);
    std::string top = SkipFilters(rig_.disk.node().get())->node_name();
    TestDisk disk(*rig_.loop);
    ASSERT_EQ(disk.Open(copy.path() + "/" + top), "");
    std::string data = disk.Read(0, rig_.model.size());
    auto at = std::mismatch(data.begin(), data.end(), rig_.model.begin()).first;
    EXPECT_EQ(at, data.end()) << top << " differs at " << at - data.begin();
    for (Node* node = disk.node.get(); node; node = BackingOf(node))
      EXPECT_TRUE(node->name().starts_with(copy.path())) << node->name();
    CheckResult found;
    disk.Check(Repair::kNone, &found);
    EXPECT_EQ(found.corruptions, 0u);
  }

  const Work work_;
  const uint64_t seed_;
  LiveRig rig_;
};

TEST_P(LiveCrashTest, NothingFlushedIsLost) {
  uint64_t cases = FromEnvironment("KVARTZ_LIVE_CASES", 2);
  for (uint64_t seed = 1; seed <= cases; seed++) {
    CrashRun(GetParam(), seed).Run();
    if (testing::Test::HasFailure()) FAIL() << "seed " << seed;
  }
}

INSTANTIATE_TEST_SUITE_P(Jobs, LiveCrashTest,
                         testing::Values(Work::kStream, Work::kStreamBase, Work::kCommit,
                                         Work::kCommitActive, Work::kMirror, Work::kMirrorBlocking,
                                         Work::kBackup));

}  // namespace
}  // namespace kvartz::block
