// Random jobs, snapshots and resizes of a disk that a guest uses, steered at random moments.
//
//   KVARTZ_LIVE_CASES   how many disks (each with some 12 changes)
//   KVARTZ_LIVE_SEED    the first one's seed
#include "block/live_rig.h"

namespace kvartz::block {
namespace {

class LiveModel {
 public:
  explicit LiveModel(uint64_t seed)
      : random_(seed), rig_((1 + random_() % 8) * 512 << 10), guest_(rig_.disk, rig_.model, seed) {}

  void Run() {
    rig_.AttachDisk(rig_.Add("base", ImageOptions()));
    guest_.Start();
    for (int i = 0; i < 12 && !testing::Test::HasFailure(); i++) {
      Step();
      if (OneIn(3)) Compare();
    }
    Compare();
    guest_.Stop(*rig_.loop);
    std::string top = TopLayer()->node_name();
    rig_.DetachDisk();
    rig_.Run([&] { EXPECT_EQ(rig_.Text(rig_.registry.CloseAll()), ""); });
    if (!testing::Test::HasFailure()) rig_.VerifyFile(top, rig_.model);
  }
  std::string trace;

 private:
  uint64_t Below(uint64_t limit) { return random_() % limit; }
  bool OneIn(uint64_t n) { return Below(n) == 0; }

  std::string ImageOptions() {
    constexpr const char* kShapes[] = {"cluster_size=512", "cluster_size=4096",
                                       "cluster_size=65536", "cluster_size=65536,extended_l2=on",
                                       "cluster_size=65536,lazy_refcounts=on"};
    return "size=" + std::to_string(rig_.model.size()) + "," + kShapes[Below(5)];
  }
  NodePtr TopLayer() { return rig_.registry.PtrOf(*SkipFilters(rig_.disk.node().get())); }
  NodePtr NewImage(const NodePtr& below = nullptr) {
    std::string name = "n" + std::to_string(names_++);
    std::string options = ImageOptions();
    if (below) options += ",backing_file=" + below->node_name() + ",backing_fmt=qcow2";
    return rig_.Add(name, options, true);
  }
  std::vector<NodePtr> Layers() {
    std::vector<NodePtr> layers;
    for (Node* node = TopLayer().get(); node; node = BackingOf(node))
      layers.push_back(rig_.registry.PtrOf(*node));
    return layers;
  }

  void Step() {
    switch (Below(8)) {
      case 0:
      case 1:
        return Snapshot();
      case 2:
        return Stream();
      case 3:
        return Commit();
      case 4:
      case 5:
        return Mirror();
      case 6:
        return Backup();
      default:
        return Resize();
    }
  }

  void Compare() {
    guest_.Stop(*rig_.loop);
    rig_.Verify();
    guest_.Start();
  }

  void Snapshot() {
    if (Layers().size() > 4) return;
    NodePtr below = rig_.disk.node();
    NodePtr overlay = NewImage(below);
    trace += "snapshot " + overlay->node_name() + "\n";
    rig_.Run([&] { EXPECT_EQ(rig_.Text(rig_.registry.Snapshot(below, overlay)), ""); });
    rig_.Turn(Below(40), guest_);
  }

  void Resize() {
    uint64_t size = rig_.model.size() + (1 + Below(2)) * (256 << 10);
    trace += "resize " + std::to_string(size) + "\n";
    rig_.Run([&] {
      EXPECT_EQ(rig_.Text(rig_.registry.Resize(rig_.disk.node(), size)), "");
      rig_.model.resize(size, '\0');
    });
  }

  void Stream() {
    std::vector<NodePtr> layers = Layers();
    if (layers.size() < 2) return;
    StreamSettings settings;
    size_t top = Below(layers.size() - 1);
    settings.top = layers[top];
    size_t base = top + 2 + Below(layers.size() - top - 1);
    if (base < layers.size()) settings.base = layers[base];
    layers.clear();
    Common(settings);
    trace += settings.job_id + " stream " + settings.top->node_name() + "\n";
    rig_.Run([&] { EXPECT_EQ(rig_.Text(StartStream(rig_.live(), settings)), ""); });
    std::string id = settings.job_id;
    settings = {};
    Steer(id, false);
  }

  void Commit() {
    std::vector<NodePtr> layers = Layers();
    if (layers.size() < 2) return;
    CommitSettings settings;
    size_t top = Below(layers.size() - 1);
    settings.top = layers[top];
    settings.base = layers[top + 1 + Below(layers.size() - top - 1)];
    if (settings.base->size_bytes() > settings.top->size_bytes()) return;
    layers.clear();
    Common(settings);
    trace += settings.job_id + " commit " + settings.top->node_name() + " to " +
             settings.base->node_name() + "\n";
    rig_.Run([&] { EXPECT_EQ(rig_.Text(StartCommit(rig_.live(), settings)), ""); });
    std::string id = settings.job_id;
    settings = {};
    Steer(id, top == 0);
  }

  void Mirror() {
    MirrorSettings settings;
    settings.source = rig_.disk.node();
    settings.target = NewImage();
    settings.copy_mode =
        OneIn(2) ? MirrorSettings::CopyMode::kWriteBlocking : MirrorSettings::CopyMode::kBackground;
    settings.granularity = 512 << Below(9);
    Common(settings);
    trace += settings.job_id + " mirror to " + settings.target->node_name() + "\n";
    rig_.Run([&] { EXPECT_EQ(rig_.Text(StartMirror(rig_.live(), settings)), ""); });
    std::string id = settings.job_id;
    settings = {};
    Steer(id, true);
    RemoveUnused();
  }

  void Backup() {
    BackupSettings settings;
    settings.source = rig_.disk.node();
    settings.target = NewImage();
    settings.compress = OneIn(3) && settings.target->Info()->cluster_size >= 4096;
    Common(settings);
    NodePtr target = settings.target;
    trace += settings.job_id + " backup to " + target->node_name() + "\n";
    std::string then;
    rig_.Run([&] {
      Registry::Quiesced quiet(rig_.registry);
      then = rig_.model;
      EXPECT_EQ(rig_.Text(StartBackup(rig_.live(), settings)), "");
    });
    std::string id = settings.job_id;
    settings = {};
    if (Steer(id, false)) rig_.VerifyNode(*target, then, "backup");
    target.reset();
    RemoveUnused();
  }

  void Common(CommonSettings& settings) {
    settings.job_id = "j" + std::to_string(names_++);
    if (OneIn(2)) settings.speed = 4 * kMiB;
    settings.job.auto_finalize = !OneIn(4);
  }

  // True: it has succeeded.
  bool Steer(const std::string& id, bool becomes_ready) {
    for (uint64_t i = Below(4); i > 0; i--) {
      rig_.Turn(Below(30), guest_);
      uint64_t what = Below(6);
      if (what <= 1) {
        rig_.disk.Hold();
        rig_.disk.Drain();
        for (int turn = 0; what == 1 && turn < 5; turn++) rig_.loop->RunOnce(0);
        rig_.disk.Release();
      }
      rig_.Run([&] {
        // Whether it still runs is a matter of luck.
        if (what == 2 && rig_.jobs.Pause(id)) {
          FiberSleepUntil(*rig_.loop, rig_.loop->clock().NowNs() + 1'000'000);
          (void)rig_.jobs.Resume(id);
        }
        if (what == 3) (void)rig_.jobs.SetSpeed(id, OneIn(2) ? 0 : 8 * kMiB);
        if (what == 4 && OneIn(3)) (void)rig_.jobs.Cancel(id, true);
      });
    }
    rig_.Run([&] { (void)rig_.jobs.SetSpeed(id, 0); });
    if (becomes_ready) {
      guest_.Stop(*rig_.loop);
      rig_.Await(id, JobStatus::kReady);
      guest_.Start();
      rig_.Turn(Below(30), guest_);
      bool soft = OneIn(4);
      trace += soft ? " cancel\n" : " complete\n";
      rig_.Run([&] { (void)(soft ? rig_.jobs.Cancel(id, false) : rig_.jobs.Complete(id)); });
    }
    // Unless it was cancelled it is pending now.
    while (!rig_.Reached(id, JobStatus::kPending) && !rig_.Reached(id, JobStatus::kNull))
      rig_.loop->RunOnce(-1);
    rig_.Run([&] { (void)rig_.jobs.Finalize(id); });
    JobInfo end = rig_.AwaitEnd(id);
    trace += "  " + end.error + (end.cancelled ? " cancelled" : "") + "\n";
    EXPECT_EQ(end.error, "");
    RemoveUnused();
    return end.error.empty() && !end.cancelled;
  }

  void RemoveUnused() {
    rig_.Run([&] {
      bool found = true;
      while (found) {
        found = false;
        for (const NodePtr& node : rig_.registry.nodes()) {
          if (!rig_.registry.IsNamed(*node) || !rig_.registry.UsersOf(*node).empty()) continue;
          EXPECT_EQ(rig_.Text(rig_.registry.Remove(node->node_name())), "");
          found = true;
          break;
        }
      }
    });
  }

  std::mt19937_64 random_;
  LiveRig rig_;
  Guest guest_;
  int names_ = 0;
};

TEST(LiveModelTest, RandomChangesLeaveWhatTheGuestWrote) {
  uint64_t seed = FromEnvironment("KVARTZ_LIVE_SEED", 1);
  uint64_t cases = FromEnvironment("KVARTZ_LIVE_CASES", 6);
  for (uint64_t i = 0; i < cases; i++) {
    LiveModel model(seed + i);
    model.Run();
    if (testing::Test::HasFailure()) FAIL() << "seed " << seed + i << "\n" << model.trace;
  }
}

}  // namespace
}  // namespace kvartz::block
