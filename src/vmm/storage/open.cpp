// Storage as the command line asks for it.
#include <fmt/core.h>
#include <unistd.h>

#include <cstdlib>

#include "base/log.h"
#include "block/graph.h"
#include "block/sync_io.h"
#include "block/tls_object.h"
#include "vmm/storage/storage.h"

namespace kvartz::vmm {
namespace {

using block::NodePtr;
using block::Options;

std::unexpected<Error> Empty(const block::Node& node) {
  return Fail(ErrorCode::kInvalid,
              fmt::format("disk image '{0}' is empty: give it a size (truncate -s 10G '{0}')",
                          node.name()));
}

// A qcow2 image over `base` that has no name any more when it is open.
Result<NodePtr> OpenTemporaryOverlay(const block::OpenEnv& env, const NodePtr& base) {
  const char* directory = getenv("TMPDIR");
  std::string path = fmt::format("{}/kvartz-snapshot-XXXXXX", directory ? directory : "/var/tmp");
  int fd = mkstemp(path.data());
  if (fd < 0) return Fail(ErrnoError(errno, "snapshot=on: cannot make a file in " + path));
  close(fd);
  auto open = [&]() -> Result<NodePtr> {
    Options create;
    create.Set("size", std::to_string(base->size_bytes()));
    TRY(block::CreateImage(env, "qcow2", path, std::move(create)));
    Options overlay;
    overlay.Set("driver", "qcow2");
    overlay.Set("file.driver", "file");
    overlay.Set("file.filename", path);
    overlay.SetNode("backing", base);
    return block::OpenNode(
        env, std::move(overlay),
        {.cache_no_flush = true, .discard_unmap = base->opened_with().discard_unmap});
  };
  Result<NodePtr> node = open();
  unlink(path.c_str());
  return node;
}

Result<NodePtr> OpenCopyOnRead(const block::OpenEnv& env, const NodePtr& node) {
  Options filter;
  filter.Set("driver", "copy-on-read");
  filter.SetNode("file", node);
  return block::OpenNode(env, std::move(filter),
                         {.discard_unmap = node->opened_with().discard_unmap});
}

}  // namespace

Result<> Storage::Open(const VmConfig& config) {
  return block::RunInFiber(loop_, [&] { return OpenAll(config); });
}

Result<> Storage::OpenAll(const VmConfig& config) {
  for (const ObjectConfig& object : config.objects) {
    Result<> added = AddObject(object.type, object.id, object.options);
    if (!added) return Fail(std::move(added).error().In(object.option));
  }
  for (const NodeConfig& node : config.nodes) {
    Result<NodePtr> added = registry_.Add(node.options, block::Registry::Owner::kNamed,
                                          {.share_write = node.share_write});
    if (!added) return Fail(std::move(added).error().In(node.option));
  }
  for (const DriveConfig& drive : config.drives) {
    Result<> opened = OpenDrive(drive);
    if (!opened) return Fail(std::move(opened).error().In(drive.option));
  }
  return {};
}

Result<EventLoop*> Storage::LoopOf(const std::string& iothread) {
  EventLoop* loop = iothread.empty() ? &loop_ : owner_.FindIoThread(iothread);
  if (!loop) {
    return Fail(ErrorCode::kNotFound,
                fmt::format("iothread={0}: there is no such iothread; add -object iothread,id={0}",
                            iothread));
  }
  return loop;
}

Result<NodePtr> Storage::OpenDriveNode(const DriveConfig& config) {
  const block::OpenEnv& env = registry_.env();
  block::NodeOptions inherited{.writethrough = config.writethrough,
                               .share_write = config.share_write};
  Options options = config.options;
  bool probed = !options.Has("driver");
  if (config.snapshot) options.Set("read-only", "on");
  NodePtr node = TRY(block::OpenNode(env, std::move(options), inherited));
  if (probed && node->driver() == std::string_view("raw"))
    KLOG(kWarn, "disk image '{}' looks like a raw one; say format=raw to be sure", node->name());
  auto add = [&](Result<NodePtr> above) -> Result<> {
    if (!above) {
      (void)node->Close();
      return Fail(std::move(above).error());
    }
    node = std::move(*above);
    return {};
  };
  if (config.snapshot) TRY(add(OpenTemporaryOverlay(env, node)));
  if (config.copy_on_read) TRY(add(OpenCopyOnRead(env, node)));
  if (node->size_bytes() == 0) {
    (void)node->Close();
    return Empty(*node);
  }
  TRY(registry_.Adopt(node, block::Registry::Owner::kUsed));
  return node;
}

Result<> Storage::OpenDrive(const DriveConfig& config) {
  EventLoop* loop = TRY(LoopOf(config.iothread));
  NodePtr node = TRY(OpenDriveNode(config));
  auto drive = std::make_unique<Drive>(*this, config.id, "", *loop);
  drive->disk().set_writes(!node->read_only());
  TRY(drive->SetPolicies(config.rerror, config.werror));
  TRY(registry_.Attach(drive->disk(), std::move(node), *loop, config.share_write));
  drives_.push_back(std::move(drive));
  if (config.limits.any()) {
    SetLimits(*drives_.back(), config.throttle_group, config.limits);
  } else if (!config.throttle_group.empty()) {
    std::shared_ptr<block::ThrottleGroup> group = FindThrottleGroup(config.throttle_group);
    if (!group) {
      return Fail(ErrorCode::kNotFound, fmt::format("throttling.group={}: there is no such group",
                                                    config.throttle_group));
    }
    SetLimits(*drives_.back(), config.throttle_group, group->limits());
  }
  return {};
}

Result<DiskPort*> Storage::Connect(const DiskWish& wish) {
  EventLoop* loop = TRY(LoopOf(wish.iothread));
  for (const auto& drive : drives_) {
    if (drive->id().empty() || drive->id() != wish.drive) continue;
    if (&drive->disk().loop() != loop) {
      return Fail(ErrorCode::kState,
                  fmt::format("iothread={}: drive '{}' is served by another thread", wish.iothread,
                              wish.drive));
    }
    TRY(drive->Connect(wish.device_id));
    TRY(drive->SetPolicies(wish.rerror, wish.werror));
    return &drive->port();
  }
  NodePtr node = registry_.Find(wish.drive);
  if (!node) {
    return Fail(ErrorCode::kNotFound,
                fmt::format("drive={}: there is no such -drive or -blockdev", wish.drive));
  }
  if (node->size_bytes() == 0) return Empty(*node);
  auto drive = std::make_unique<Drive>(*this, "", wish.device_id, *loop);
  drive->disk().set_writes(!node->read_only());
  TRY(drive->SetPolicies(wish.rerror, wish.werror));
  TRY(block::RunInFiber(loop_, [&] {
    return registry_.Attach(drive->disk(), std::move(node), *loop, wish.share_write);
  }));
  drives_.push_back(std::move(drive));
  return &drives_.back()->port();
}

Result<> Storage::AddObject(const std::string& type, const std::string& id, Options options) {
  if (id.empty()) return Fail(ErrorCode::kInvalid, "id= is missing");
  if (FindThrottleGroup(id) || secrets_.Find(id) || tls_.contains(id))
    return Fail(ErrorCode::kExists, fmt::format("id={}: another object has this id", id));
  if (type == "secret") {
    options.Set("id", id);
    return secrets_.Add(std::move(options));
  }
  if (block::IsTlsObject(type)) {
    tls_[id] = TRY(block::MakeTlsObject(
        type, std::move(options), [this](const std::string& name) { return secrets_.Find(name); }));
    return {};
  }
  if (type != "throttle-group") {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: {} (secret, throttle-group, tls-creds-x509, "
                            "tls-creds-psk)",
                            type));
  }
  // Limits by the names of limits (JSON), or x-NAME (option lists).
  bool plain = options.HasBelow("limits");
  block::ThrottleLimits limits =
      TRY(block::ThrottleLimits::Take(options, plain ? "limits." : "x-"));
  TRY(options.RefuseRest("throttle-group"));
  return AddThrottleGroup(id, limits);
}

Result<> Storage::RemoveObject(const std::string& id) {
  if (FindThrottleGroup(id)) return RemoveThrottleGroup(id);
  // Who uses credentials keeps them.
  if (tls_.erase(id) > 0) return {};
  return secrets_.Remove(id);
}

Result<std::shared_ptr<const TlsCredentials>> Storage::FindTls(const std::string& id) const {
  auto it = tls_.find(id);
  if (it != tls_.end()) return it->second;
  return Fail(ErrorCode::kNotFound, fmt::format("No TLS credentials with id '{}'", id));
}

}  // namespace kvartz::vmm
