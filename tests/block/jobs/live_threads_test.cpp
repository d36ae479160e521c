// A disk that an I/O thread serves, steered from the main loop.
#include <atomic>

#include "base/sync.h"
#include "block/live_rig.h"

namespace kvartz::block {
namespace {

class IoThreadRig {
 public:
  explicit IoThreadRig(LiveRig& rig) : rig_(rig), loop_(MakeLoop()) {
    thread_ = Thread("io", [this] { loop_->Run(); });
  }
  ~IoThreadRig() {
    loop_->Stop();
    thread_.Join();
  }
  // Runs there, and returns when it has.
  template <typename Body>
  void On(Body body) {
    rig_.Run([&] { CallOn(*rig_.loop, *loop_, body); });
  }
  EventLoop& loop() { return *loop_; }

 private:
  LiveRig& rig_;
  std::unique_ptr<EventLoop> loop_;
  Thread thread_;
};

TEST(LiveThreadsTest, JobsFollowTheDiskToItsThread) {
  LiveRig rig(4 * kMiB);
  IoThreadRig io(rig);
  NodePtr a = rig.Add("a");
  NodePtr b = rig.Add("b");
  NodePtr c = rig.Add("c");
  NodePtr d = rig.Add("d", "", true);
  Disk disk(*rig.loop, "vdb");
  rig.Run([&] { ASSERT_EQ(rig.Text(rig.registry.Attach(disk, a, io.loop())), ""); });
  EXPECT_EQ(&a->loop(), &io.loop());
  EXPECT_EQ(&a->file()->loop(), &io.loop());
  Guest guest(disk, rig.model, 1);
  io.On([&] { guest.Start(); });

  std::string then;
  rig.Run([&] {
    BackupSettings settings;
    settings.job_id = "b";
    settings.source = a;
    settings.target = c;
    Registry::Quiesced quiet(rig.registry);
    then = rig.model;
    ASSERT_EQ(rig.Text(StartBackup(rig.live(), settings)), "");
  });
  EXPECT_EQ(rig.AwaitEnd("b").error, "");
  io.On([&] { EXPECT_EQ(disk.node(), a); });

  rig.Run([&] {
    MirrorSettings settings;
    settings.job_id = "m";
    settings.source = a;
    settings.target = b;
    settings.copy_mode = MirrorSettings::CopyMode::kWriteBlocking;
    ASSERT_EQ(rig.Text(StartMirror(rig.live(), settings)), "");
  });
  rig.Await("m", JobStatus::kReady);
  rig.Run([&] {
    EXPECT_EQ(rig.jobs.List().size(), 1u);
    ASSERT_EQ(rig.Text(rig.jobs.Complete("m")), "");
  });
  EXPECT_EQ(rig.AwaitEnd("m").error, "");
  io.On([&] { EXPECT_EQ(disk.node(), b); });

  rig.Run([&] { ASSERT_EQ(rig.Text(rig.registry.Snapshot(b, d)), ""); });
  uint64_t done = 0;
  do {
    io.On([&] { done = guest.done(); });
  } while (done < 500);
  rig.Run([&] {
    StreamSettings settings;
    settings.job_id = "s";
    settings.top = d;
    ASSERT_EQ(rig.Text(StartStream(rig.live(), settings)), "");
  });
  EXPECT_EQ(rig.AwaitEnd("s").error, "");
  EXPECT_EQ(d->backing(), nullptr);

  std::atomic<bool> stopped{false};
  io.On([&] { guest.Finish([&] { stopped = true; }); });
  while (!stopped) rig.loop->RunOnce(1'000'000);
  rig.Run([&] { ASSERT_EQ(rig.Text(rig.registry.Detach(disk)), ""); });
  EXPECT_EQ(&d->loop(), rig.loop.get());
  rig.VerifyNode(*d, rig.model);
  // So is what only jobs needed there.
  for (const NodePtr& node : {a, b, c}) EXPECT_EQ(&node->loop(), rig.loop.get());
  rig.VerifyNode(*c, then);
}

}  // namespace
}  // namespace kvartz::block
