// Names, users and changes of nodes in use.
#include <map>

#include "block/live_rig.h"
#include "block/throttle.h"

namespace kvartz::block {
namespace {

std::string NamesOf(const LiveRig& rig) {
  std::string names;
  for (const NodePtr& node : rig.registry.nodes()) {
    if (rig.registry.IsNamed(*node)) names += node->node_name() + " ";
  }
  return names;
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
  rig.CloseAndVerify("a");
}

TEST(RegistryTest, ReopensWhatMayChange) {
  LiveRig rig(kMiB);
  NodePtr a = rig.Add("a");
  NodePtr b = rig.Add("b", "", true);
  auto reopen = [&](const std::string& options) { return rig.Reopen({"node-name=b," + options}); };
  EXPECT_EQ(reopen("driver=qcow2,backing=a,read-only=on"), "");
  EXPECT_EQ(b->backing(), a.get());
  EXPECT_TRUE(b->read_only());
  EXPECT_EQ(reopen("driver=qcow2,read-only=on,backing="), "");
  EXPECT_EQ(b->backing(), nullptr);
  EXPECT_EQ(reopen("driver=qcow2"), "");
  EXPECT_FALSE(b->read_only());
  EXPECT_EQ(reopen("driver=raw"), "Cannot change the option 'driver' of 'b'");
  EXPECT_EQ(reopen("driver=qcow2,cluster-size=1"),
            "Cannot change the option 'cluster-size' of 'b'");
  EXPECT_EQ(reopen("driver=qcow2,backing=x"), "Cannot find device='' nor node-name='x'");
  // Of several all or none.
  EXPECT_EQ(rig.Reopen({"node-name=b,backing=a", "node-name=a,read-only=x"}),
            "read-only: 'x' is neither on nor off");
  EXPECT_EQ(b->backing(), nullptr);
  EXPECT_EQ(rig.Reopen({"node-name=a,read-only=on", "node-name=b,backing=a"}), "");
  EXPECT_EQ(b->backing(), a.get());
  EXPECT_TRUE(a->read_only());
  EXPECT_EQ(reopen("driver=qcow2,backing="), "");
  rig.AttachDisk(b);
  EXPECT_EQ(reopen("driver=qcow2,read-only=on"), "device 'vda' writes to 'b'");
}

TEST(RegistryTest, AFilterGetsAnotherFile) {
  LiveRig rig(kMiB);
  std::map<std::string, std::shared_ptr<ThrottleGroup>> groups;
  for (const char* name : {"g", "h"})
    groups[name] = std::make_shared<ThrottleGroup>(name, rig.loop->clock());
  rig.registry.env().throttle_group = [&](const std::string& id) {
    return groups.contains(id) ? groups[id] : nullptr;
  };
  rig.Add("a");
  rig.Add("b");
  rig.Add("small", "size=64k");
  auto reopen = [&](const std::string& name, const std::string& options) {
    return rig.Reopen({"node-name=" + name + "," + options});
  };
  NodePtr filter = rig.Run([&] {
    return rig.registry
        .Add(Options::Parse("driver=throttle,node-name=t,throttle-group=g,file=a").value(),
             Registry::Owner::kNamed)
        .value();
  });
  rig.AttachDisk(filter);
  rig.Fill(1, 30);
  std::string before = rig.model;
  ASSERT_EQ(reopen("t", "driver=throttle,throttle-group=h,file=b"), "");
  EXPECT_EQ(filter->file()->node_name(), "b");
  EXPECT_EQ(groups["g"].use_count(), 1);
  EXPECT_GT(groups["h"].use_count(), 1);
  rig.model.assign(kMiB, '\0');
  rig.Fill(2, 30);
  rig.Verify();
  EXPECT_EQ(reopen("t", "driver=throttle,throttle-group=h,file=small"),
            "'small' has 65536 bytes, but 'b' has 1048576");
  EXPECT_EQ(reopen("t", "driver=throttle,throttle-group=h,file=t"), "'t' stands on 't' already");
  EXPECT_EQ(reopen("t", "driver=throttle,throttle-group=x,file=a"),
            "throttle-group=x: there is no such -object");
  EXPECT_EQ(reopen("t", "driver=throttle,file=a"), "throttle needs 'throttle-group'");
  EXPECT_EQ(reopen("b", "driver=qcow2,file=a"), "not supported yet: another 'file' of 'b'");
  EXPECT_EQ(filter->file()->node_name(), "b");
  rig.Verify();
  ASSERT_EQ(reopen("t", "driver=throttle,throttle-group=h,file=a"), "");
  std::swap(rig.model, before);
  rig.Verify();
  // Options as they were are none that change.
  std::string own = "driver=qcow2,file.driver=file,file.filename=" + rig.Path("b");
  EXPECT_EQ(reopen("b", own), "");
  EXPECT_EQ(reopen("b", "driver=qcow2,file.driver=file,file.filename=c"),
            "Cannot change the option 'file.filename' of 'b'");
  filter.reset();
  rig.DetachDisk();
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
  rig.CloseAndVerify("a");
}

}  // namespace
}  // namespace kvartz::block
