// Commands that start jobs: backup, mirror, stream, commit.
#include <fmt/core.h>

#include <array>

#include "block/graph.h"
#include "vmm/qmp/block_commands.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;
using block::NodePtr;
using Kind = QmpType::Kind;
using Value = Result<json::value>;

constexpr const char* const kSyncs[] = {"full", "top", "none", "incremental", "bitmap"};
constexpr QmpType kSync{.kind = Kind::kEnum, .words = kSyncs};
constexpr const char* const kBitmapModes[] = {"on-success", "never", "always"};
constexpr QmpType kBitmapMode{.kind = Kind::kEnum, .words = kBitmapModes};
constexpr const char* const kPolicies[] = {"report", "ignore", "enospc", "stop"};
constexpr QmpType kPolicy{.kind = Kind::kEnum, .words = kPolicies};
constexpr const char* const kCopyModes[] = {"background", "write-blocking"};
constexpr QmpType kCopyMode{.kind = Kind::kEnum, .words = kCopyModes};

constexpr std::array kCommon = {QmpMember{"job-id", kQmpString, kOptional},
                                QmpMember{"device", kQmpString},
                                QmpMember{"speed", kQmpInt, kOptional},
                                QmpMember{"filter-node-name", kQmpString, kOptional},
                                QmpMember{"auto-finalize", kQmpBool, kOptional},
                                QmpMember{"auto-dismiss", kQmpBool, kOptional}};
// Of jobs that copy to a target, and of those that make it.
constexpr std::array kTarget = {QmpMember{"target", kQmpString}, QmpMember{"sync", kSync},
                                QmpMember{"on-source-error", kPolicy, kOptional},
                                QmpMember{"on-target-error", kPolicy, kOptional}};
constexpr std::array kNewTarget = {QmpMember{"format", kQmpString, kOptional},
                                   QmpMember{"mode", kQmpSnapshotMode, kOptional}};
// Of jobs within a chain.
constexpr std::array kWithinChain = {
    QmpMember{"base", kQmpString, kOptional}, QmpMember{"base-node", kQmpString, kOptional},
    QmpMember{"backing-file", kQmpString, kOptional}, QmpMember{"on-error", kPolicy, kOptional}};

constexpr std::array kBlockdevBackup =
    Join(kCommon, kTarget,
         std::array{QmpMember{"bitmap", kQmpString, kOptional},
                    QmpMember{"bitmap-mode", kBitmapMode, kOptional},
                    QmpMember{"compress", kQmpBool, kOptional}});
constexpr std::array kDriveBackup = Join(kBlockdevBackup, kNewTarget);
constexpr std::array kBlockdevMirror = Join(
    kCommon, kTarget,
    std::array{
        QmpMember{"replaces", kQmpString, kOptional}, QmpMember{"granularity", kQmpInt, kOptional},
        QmpMember{"buf-size", kQmpInt, kOptional}, QmpMember{"copy-mode", kCopyMode, kOptional}});
constexpr std::array kDriveMirror = Join(kBlockdevMirror, kNewTarget,
                                         std::array{QmpMember{"node-name", kQmpString, kOptional},
                                                    QmpMember{"unmap", kQmpBool, kOptional}});
constexpr std::array kStream =
    Join(kCommon, kWithinChain, std::array{QmpMember{"bottom", kQmpString, kOptional}});
constexpr std::array kCommit = Join(kCommon, kWithinChain,
                                    std::array{QmpMember{"top", kQmpString, kOptional},
                                               QmpMember{"top-node", kQmpString, kOptional}});

Result<block::ErrorPolicy> PolicyOf(const json::object& arguments, const char* name) {
  return block::ParseErrorPolicy(Text(arguments, name, "report"));
}

// What all jobs take. Without a job-id it is the drive's.
Result<> TakeCommon(Storage& storage, const json::object& arguments, const NodePtr& node,
                    block::CommonSettings* settings) {
  settings->job_id = Text(arguments, "job-id");
  if (settings->job_id.empty()) {
    if (Drive* drive = storage.DriveOn(*node)) settings->job_id = drive->id();
  }
  if (settings->job_id.empty())
    return Fail(ErrorCode::kInvalid, "An explicit job ID is required for this node");
  settings->speed = TRY(Count(arguments, "speed"));
  settings->filter_node_name = Text(arguments, "filter-node-name");
  settings->job.auto_finalize = Flag(arguments, "auto-finalize", true);
  settings->job.auto_dismiss = Flag(arguments, "auto-dismiss", true);
  return {};
}

// ---- backup

Result<std::string> Backup(Storage& storage, const json::object& arguments, const NodePtr& source,
                           const NodePtr& target, const JobGroupPtr& group) {
  block::BackupSettings settings;
  TRY(TakeCommon(storage, arguments, source, &settings));
  settings.job.group = group;
  settings.source = source;
  settings.target = target;
  settings.sync = TRY(block::ParseSync(Text(arguments, "sync")));
  settings.bitmap = Text(arguments, "bitmap");
  settings.bitmap_mode = TRY(block::ParseBitmapMode(Text(arguments, "bitmap-mode", "on-success")));
  settings.compress = Flag(arguments, "compress");
  settings.on_source_error = TRY(PolicyOf(arguments, "on-source-error"));
  settings.on_target_error = TRY(PolicyOf(arguments, "on-target-error"));
  std::string id = settings.job_id;
  TRY(block::StartBackup(storage.live(), std::move(settings)));
  return id;
}

Value BlockdevBackup(Vm& vm, const json::object& arguments) {
  TRY(StartBackupCommand(vm.storage(), arguments, nullptr));
  return Done();
}
Value DriveBackup(Vm& vm, const json::object& arguments) {
  TRY(StartDriveBackup(vm.storage(), arguments, nullptr));
  return Done();
}

// What a new target of `sync` stands on.
NodePtr BackingOfTarget(Storage& storage, const NodePtr& source, const std::string& sync) {
  if (sync == "none") return source;
  block::Node* backing = block::BackingOf(source.get());
  return sync == "top" && backing ? storage.registry().PtrOf(*backing) : nullptr;
}

Result<NodePtr> OpenTarget(Storage& storage, const json::object& arguments, const NodePtr& source,
                           const std::string& node_name) {
  ImageWish wish{.filename = Text(arguments, "target"),
                 .format = Text(arguments, "format"),
                 .node_name = node_name,
                 .existing = Text(arguments, "mode") == "existing",
                 .size = source->size_bytes(),
                 .recorded_backing = nullptr,
                 .backing = BackingOfTarget(storage, source, Text(arguments, "sync")),
                 .like = source};
  if (wish.format.empty() && !wish.existing)
    wish.format = block::SkipFilters(source.get())->driver();
  wish.recorded_backing = wish.backing;
  return OpenWish(storage, wish);
}

// Starts something with a target of its own, which is closed again if that fails.
template <typename Start>
Result<std::string> WithTarget(Storage& storage, NodePtr target, Start start) {
  Result<std::string> id = start(target);
  if (id) return id;
  target.reset();
  storage.registry().CollectUnused();
  return id;
}

// ---- mirror

Result<std::string> Mirror(Storage& storage, const json::object& arguments, const NodePtr& source,
                           const NodePtr& target) {
  block::MirrorSettings settings;
  TRY(TakeCommon(storage, arguments, source, &settings));
  settings.source = source;
  settings.target = target;
  settings.sync = TRY(block::ParseSync(Text(arguments, "sync")));
  if (Text(arguments, "copy-mode") == "write-blocking")
    settings.copy_mode = block::MirrorSettings::CopyMode::kWriteBlocking;
  settings.granularity =
      static_cast<uint32_t>(std::min<uint64_t>(TRY(Count(arguments, "granularity")), UINT32_MAX));
  settings.buffer_bytes = TRY(Count(arguments, "buf-size"));
  settings.unmap = Flag(arguments, "unmap", true);
  settings.on_source_error = TRY(PolicyOf(arguments, "on-source-error"));
  settings.on_target_error = TRY(PolicyOf(arguments, "on-target-error"));
  if (arguments.contains("replaces"))
    settings.replaces = TRY(storage.registry().Require(Text(arguments, "replaces")));
  std::string id = settings.job_id;
  TRY(block::StartMirror(storage.live(), std::move(settings)));
  return id;
}

Value BlockdevMirror(Vm& vm, const json::object& arguments) {
  NodePtr source = TRY(vm.storage().RequireNode(Text(arguments, "device")));
  NodePtr target = TRY(vm.storage().RequireNode(Text(arguments, "target")));
  TRY(Mirror(vm.storage(), arguments, source, target));
  return Done();
}

Value DriveMirror(Vm& vm, const json::object& arguments) {
  Storage& storage = vm.storage();
  NodePtr source = TRY(storage.RequireNode(Text(arguments, "device")));
  NodePtr target = TRY(OpenTarget(storage, arguments, source, Text(arguments, "node-name")));
  TRY(WithTarget(storage, std::move(target), [&](const NodePtr& opened) {
    return Mirror(storage, arguments, source, opened);
  }));
  return Done();
}

// ---- stream, commit

// The image below `top` (or itself) that is meant by a node's name or, as the older spelling has
// it, by its file's.
Result<NodePtr> InChain(Storage& storage, const NodePtr& top, const json::object& arguments,
                        const char* by_node, const char* by_file) {
  if (arguments.contains(by_node) && arguments.contains(by_file)) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("'{}' and '{}' cannot be specified at the same time", by_file, by_node));
  }
  const bool node = arguments.contains(by_node);
  std::string name = Text(arguments, node ? by_node : by_file);
  for (block::Node* at = block::SkipFilters(top.get()); at; at = block::BackingOf(at)) {
    if (node ? at->node_name() == name : at->name() == name) return storage.registry().PtrOf(*at);
  }
  return Fail(ErrorCode::kInvalid, fmt::format("'{}' is not in the backing chain of '{}'", name,
                                               Text(arguments, "device")));
}

Value BlockStream(Vm& vm, const json::object& arguments) {
  Storage& storage = vm.storage();
  NodePtr top = TRY(storage.RequireNode(Text(arguments, "device")));
  block::StreamSettings settings;
  TRY(TakeCommon(storage, arguments, top, &settings));
  settings.top = top;
  if (arguments.contains("bottom")) {
    if (arguments.contains("base") || arguments.contains("base-node")) {
      return Fail(ErrorCode::kInvalid, "'bottom' and 'base' cannot be specified at the same time");
    }
    NodePtr bottom = TRY(InChain(storage, top, arguments, "bottom", "bottom-file"));
    if (block::Node* base = block::BackingOf(bottom.get()))
      settings.base = storage.registry().PtrOf(*base);
  } else if (arguments.contains("base") || arguments.contains("base-node")) {
    settings.base = TRY(InChain(storage, top, arguments, "base-node", "base"));
  }
  settings.backing_file = Text(arguments, "backing-file");
  settings.on_error = TRY(PolicyOf(arguments, "on-error"));
  TRY(block::StartStream(storage.live(), std::move(settings)));
  return Done();
}

Value BlockCommit(Vm& vm, const json::object& arguments) {
  Storage& storage = vm.storage();
  NodePtr device = TRY(storage.RequireNode(Text(arguments, "device")));
  block::CommitSettings settings;
  TRY(TakeCommon(storage, arguments, device, &settings));
  settings.top = device;
  if (arguments.contains("top") || arguments.contains("top-node"))
    settings.top = TRY(InChain(storage, device, arguments, "top-node", "top"));
  if (arguments.contains("base") || arguments.contains("base-node"))
    settings.base = TRY(InChain(storage, device, arguments, "base-node", "base"));
  settings.backing_file = Text(arguments, "backing-file");
  settings.on_error = TRY(PolicyOf(arguments, "on-error"));
  TRY(block::StartCommit(storage.live(), std::move(settings)));
  return Done();
}

constexpr auto kFiber = QmpCommand::Where::kFiber;
constexpr QmpCommand kCommands[] = {
    {"block-commit", kCommit, BlockCommit, kFiber},
    {"block-stream", kStream, BlockStream, kFiber},
    {"blockdev-backup", kBlockdevBackup, BlockdevBackup, kFiber},
    {"blockdev-mirror", kBlockdevMirror, BlockdevMirror, kFiber},
    {"drive-backup", kDriveBackup, DriveBackup, kFiber},
    {"drive-mirror", kDriveMirror, DriveMirror, kFiber},
};

}  // namespace

const std::span<const QmpMember> kBlockdevBackupMembers = kBlockdevBackup;
const std::span<const QmpMember> kDriveBackupMembers = kDriveBackup;

std::span<const QmpCommand> BlockJobCommands() { return kCommands; }

Result<std::string> StartBackupCommand(Storage& storage, const json::object& arguments,
                                       const JobGroupPtr& group) {
  NodePtr source = TRY(storage.RequireNode(Text(arguments, "device")));
  NodePtr target = TRY(storage.RequireNode(Text(arguments, "target")));
  return Backup(storage, arguments, source, target, group);
}

Result<std::string> StartDriveBackup(Storage& storage, const json::object& arguments,
                                     const JobGroupPtr& group) {
  NodePtr source = TRY(storage.RequireNode(Text(arguments, "device")));
  NodePtr target = TRY(OpenTarget(storage, arguments, source, ""));
  return WithTarget(storage, std::move(target), [&](const NodePtr& opened) {
    return Backup(storage, arguments, source, opened, group);
  });
}

}  // namespace kvartz::vmm
