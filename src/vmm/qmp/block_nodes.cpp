// blockdev-add and what changes nodes: snapshots, sizes, limits.
#include <fmt/core.h>
#include <stdlib.h>

#include <algorithm>
#include <boost/json/array.hpp>
#include <boost/json/serialize.hpp>
#include <memory>

#include "block/graph.h"
#include "vmm/qmp/block_commands.h"
#include "vmm/storage/create_job.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;
using block::NodePtr;
using Value = Result<json::value>;

constexpr QmpMember kSnapshot[] = {{"node", kQmpString}, {"overlay", kQmpString}};
constexpr QmpMember kSnapshotSync[] = {
    {"device", kQmpString, kOptional}, {"node-name", kQmpString, kOptional},
    {"snapshot-file", kQmpString},     {"snapshot-node-name", kQmpString, kOptional},
    {"format", kQmpString, kOptional}, {"mode", kQmpSnapshotMode, kOptional}};

// The name under which an image records `node`: one that is right from any directory.
std::string RecordedName(const block::Node& node) {
  std::unique_ptr<char, decltype(&free)> path(realpath(node.name().c_str(), nullptr), &free);
  return path ? path.get() : node.name();
}

Value BlockdevAdd(Vm& vm, const json::object& arguments) {
  block::Options options = TRY(OptionsOf(arguments));
  if (!arguments.contains("driver"))
    return Fail(ErrorCode::kInvalid, "argument 'driver' is missing");
  if (!arguments.contains("node-name"))
    return Fail(ErrorCode::kInvalid, "'node-name' must be specified for the root node");
  TRY(vm.storage().registry().Add(std::move(options), block::Registry::Owner::kNamed));
  return Done();
}

// Options that formats are made with, from QMP's names to those of tools.
block::Options CreateOptions(const block::Options& given, const std::string& driver) {
  block::Options options;
  for (const auto& [key, value] : given.all()) {
    std::string name = key;
    if (driver != "luks" && !name.starts_with("encrypt.")) std::ranges::replace(name, '-', '_');
    if (name == "version" && (value.text == "v2" || value.text == "v3")) {
      options.Set("compat", value.text == "v2" ? "0.10" : "1.1");
    } else {
      options.Set(name, value.text);
    }
  }
  return options;
}

constexpr QmpMember kCreateArguments[] = {{"job-id", kQmpString}, {"options", kQmpOptions}};
Value BlockdevCreate(Vm& vm, const json::object& arguments) {
  Storage& storage = vm.storage();
  block::Options given = TRY(OptionsOf(arguments.at("options").as_object()));
  CreateSettings settings;
  settings.driver = given.Take("driver", "");
  if (settings.driver.empty())
    return Fail(ErrorCode::kInvalid, "argument 'options.driver' is missing");
  if (settings.driver == "file") {
    settings.filename = given.Take("filename", "");
    if (settings.filename.empty())
      return Fail(ErrorCode::kInvalid, "argument 'options.filename' is missing");
  } else {
    if (given.HasBelow("data-file"))
      return Fail(ErrorCode::kUnsupported, "not supported yet: data-file");
    std::optional<std::string> file = given.Take("file");
    if (!file)
      return Fail(ErrorCode::kUnsupported,
                  "argument 'options.file' must be the name of a node (blockdev-add makes it)");
    settings.on = TRY(storage.registry().Require(*file));
  }
  settings.options = CreateOptions(given, settings.driver);
  TRY(storage.jobs().Start(std::make_shared<CreateJob>(
                               storage.registry(), Text(arguments, "job-id"), std::move(settings)),
                           {.auto_dismiss = false}));
  return Done();
}

constexpr QmpMember kNodeNameArguments[] = {{"node-name", kQmpString}};
Value BlockdevDel(Vm& vm, const json::object& arguments) {
  TRY(vm.storage().registry().Remove(Text(arguments, "node-name")));
  return Done();
}

constexpr QmpMember kThresholdArguments[] = {{"node-name", kQmpString},
                                             {"write-threshold", kQmpInt}};
Value SetWriteThreshold(Vm& vm, const json::object& arguments) {
  NodePtr node = TRY(vm.storage().registry().Require(Text(arguments, "node-name")));
  vm.storage().SetWriteThreshold(node, TRY(Count(arguments, "write-threshold")));
  return Done();
}

constexpr QmpType kOptionsList{.kind = QmpType::Kind::kArray, .element = &kQmpOptions};
constexpr QmpMember kReopenArguments[] = {{"options", kOptionsList}};
Value BlockdevReopen(Vm& vm, const json::object& arguments) {
  std::vector<block::Options> all;
  for (const json::value& one : arguments.at("options").as_array())
    all.push_back(TRY(OptionsOf(one.as_object())));
  TRY(vm.storage().registry().Reopen(std::move(all)));
  return Done();
}

constexpr QmpMember kResizeArguments[] = {
    {"device", kQmpString, kOptional}, {"node-name", kQmpString, kOptional}, {"size", kQmpInt}};
Value BlockResize(Vm& vm, const json::object& arguments) {
  NodePtr node = TRY(DeviceOrNode(vm.storage(), arguments));
  uint64_t size = TRY(Count(arguments, "size"));
  if (size == 0) return Fail(ErrorCode::kInvalid, "a disk needs a size");
  TRY(vm.storage().registry().Resize(node, size));
  return Done();
}

Value BlockdevSnapshot(Vm& vm, const json::object& arguments) {
  TRY(TakeSnapshot(vm.storage(), arguments));
  return Done();
}

Value BlockdevSnapshotSync(Vm& vm, const json::object& arguments) {
  TRY(TakeSnapshotSync(vm.storage(), arguments));
  return Done();
}

constexpr QmpMember kChangeBackingArguments[] = {
    {"device", kQmpString}, {"image-node-name", kQmpString}, {"backing-file", kQmpString}};
Value ChangeBackingFile(Vm& vm, const json::object& arguments) {
  Storage& storage = vm.storage();
  NodePtr top = TRY(storage.RequireNode(Text(arguments, "device")));
  NodePtr image = TRY(storage.registry().Require(Text(arguments, "image-node-name")));
  block::Node* at = block::SkipFilters(top.get());
  while (at && at != image.get()) at = block::BackingOf(at);
  if (!at) {
    return Fail(ErrorCode::kInvalid, fmt::format("'{}' and image file are not in the same chain",
                                                 Text(arguments, "device")));
  }
  block::Node* backing = block::BackingOf(image.get());
  if (!backing)
    return Fail(ErrorCode::kInvalid,
                "not allowing backing file change on an image without a backing file");
  TRY(storage.registry().SetBackingAs(image, storage.registry().PtrOf(*backing),
                                      Text(arguments, "backing-file"), backing->driver()));
  return Done();
}

// ---- limits

#define LIMIT_MEMBERS(name) \
  {#name, kQmpInt}, {#name "_max", kQmpInt, kOptional}, { #name "_max_length", kQmpInt, kOptional }
constexpr QmpMember kThrottleArguments[] = {{"device", kQmpString, kOptional},
                                            {"id", kQmpString, kOptional},
                                            LIMIT_MEMBERS(bps),
                                            LIMIT_MEMBERS(bps_rd),
                                            LIMIT_MEMBERS(bps_wr),
                                            LIMIT_MEMBERS(iops),
                                            LIMIT_MEMBERS(iops_rd),
                                            LIMIT_MEMBERS(iops_wr),
                                            {"iops_size", kQmpInt, kOptional},
                                            {"group", kQmpString, kOptional}};
#undef LIMIT_MEMBERS

Result<block::ThrottleLimits> LimitsOf(const json::object& arguments) {
  using Limits = block::ThrottleLimits;
  static constexpr std::pair<const char*, Limits::Index> kNames[] = {
      {"bps", Limits::kBpsTotal},   {"bps_rd", Limits::kBpsRead},   {"bps_wr", Limits::kBpsWrite},
      {"iops", Limits::kIopsTotal}, {"iops_rd", Limits::kIopsRead}, {"iops_wr", Limits::kIopsWrite},
  };
  Limits limits;
  for (auto [name, index] : kNames) {
    block::ThrottleBucket& bucket = limits.buckets[index];
    bucket.average = TRY(Count(arguments, name));
    bucket.max = TRY(Count(arguments, std::string(name) + "_max"));
    bucket.max_length = TRY(Count(arguments, std::string(name) + "_max_length", 1));
  }
  limits.iops_size = TRY(Count(arguments, "iops_size"));
  TRY(limits.Check());
  return limits;
}

Value SetIoThrottle(Vm& vm, const json::object& arguments) {
  std::string name = Text(arguments, "id", Text(arguments, "device"));
  if (arguments.contains("id") == arguments.contains("device"))
    return Fail(ErrorCode::kInvalid, "Need exactly one of 'device' and 'id'");
  Drive* drive = vm.storage().FindDrive(name);
  if (!drive) return Fail(ErrorCode::kNotFound, fmt::format("Device '{}' not found", name));
  vm.storage().SetLimits(*drive, Text(arguments, "group"), TRY(LimitsOf(arguments)));
  return Done();
}

// ---- objects

constexpr QmpMember kObjectDelArguments[] = {{"id", kQmpString}};
Value ObjectAdd(Vm& vm, const json::object& arguments) {
  block::Options options = TRY(OptionsOf(arguments));
  std::optional<std::string> type = options.Take("qom-type"), id = options.Take("id");
  if (!type || !id)
    return Fail(ErrorCode::kInvalid,
                fmt::format("argument '{}' is missing", type ? "id" : "qom-type"));
  TRY(vm.storage().AddObject(*type, *id, std::move(options)));
  return Done();
}
Value ObjectDel(Vm& vm, const json::object& arguments) {
  TRY(vm.storage().RemoveObject(Text(arguments, "id")));
  return Done();
}

constexpr auto kFiber = QmpCommand::Where::kFiber;
constexpr QmpCommand kCommands[] = {
    {"block-set-write-threshold", kThresholdArguments, SetWriteThreshold, kFiber},
    {"block_resize", kResizeArguments, BlockResize, kFiber},
    {"block_set_io_throttle", kThrottleArguments, SetIoThrottle, kFiber, "DeviceNotFound"},
    {"blockdev-add", kQmpAnyMembers, BlockdevAdd, kFiber},
    {"blockdev-create", kCreateArguments, BlockdevCreate, kFiber},
    {"blockdev-del", kNodeNameArguments, BlockdevDel, kFiber},
    {"blockdev-reopen", kReopenArguments, BlockdevReopen, kFiber},
    {"blockdev-snapshot", kSnapshot, BlockdevSnapshot, kFiber},
    {"blockdev-snapshot-sync", kSnapshotSync, BlockdevSnapshotSync, kFiber},
    {"change-backing-file", kChangeBackingArguments, ChangeBackingFile, kFiber},
    {"object-add", kQmpAnyMembers, ObjectAdd, kFiber},
    {"object-del", kObjectDelArguments, ObjectDel, kFiber},
};

}  // namespace

const std::span<const QmpMember> kSnapshotMembers = kSnapshot;
const std::span<const QmpMember> kSnapshotSyncMembers = kSnapshotSync;

std::span<const QmpCommand> BlockNodeCommands() { return kCommands; }

Result<block::Options> OptionsOf(const json::object& object) {
  return block::Options::ParseJson(json::serialize(object));
}

Result<NodePtr> DeviceOrNode(Storage& storage, const json::object& arguments) {
  if (arguments.contains("device") == arguments.contains("node-name"))
    return Fail(ErrorCode::kInvalid, "Need exactly one of 'device' and 'node-name'");
  if (arguments.contains("device")) return storage.RequireNode(Text(arguments, "device"));
  return storage.registry().Require(Text(arguments, "node-name"));
}

Result<NodePtr> OpenWish(Storage& storage, const ImageWish& wish) {
  block::Registry& registry = storage.registry();
  if (!wish.existing) {
    block::Options create;
    create.Set("size", std::to_string(wish.size));
    if (wish.recorded_backing) {
      const block::Node& recorded = *block::SkipFilters(wish.recorded_backing.get());
      create.Set("backing_file", RecordedName(recorded));
      create.Set("backing_fmt", recorded.driver());
    }
    TRY(block::CreateImage(registry.env(), wish.format, wish.filename, std::move(create)));
  }
  block::Options options;
  options.Set("filename", wish.filename);
  if (!wish.format.empty()) options.Set("driver", wish.format);
  if (!wish.node_name.empty()) options.Set("node-name", wish.node_name);
  block::NodeOptions inherited;
  if (wish.like) inherited = wish.like->opened_with();
  inherited.node_name.clear();
  inherited.read_only = inherited.auto_read_only = inherited.force_share = false;
  inherited.detect_zeroes = block::DetectZeroes::kOff;
  inherited.grows = inherited.no_io = inherited.for_check = false;
  inherited.no_backing = true;
  NodePtr node = TRY(registry.Add(std::move(options), block::Registry::Owner::kUsed, inherited));
  if (!wish.backing) return node;
  Result<> set = registry.SetBacking(node, wish.backing, block::Registry::Record::kMemory);
  if (set) return node;
  node.reset();
  registry.CollectUnused();
  return Fail(std::move(set).error());
}

Result<TakenSnapshot> TakeSnapshot(Storage& storage, const json::object& arguments) {
  NodePtr node = TRY(storage.RequireNode(Text(arguments, "node")));
  NodePtr overlay = TRY(storage.registry().Require(Text(arguments, "overlay")));
  TRY(storage.registry().Snapshot(node, overlay));
  return TakenSnapshot{std::move(node), std::move(overlay)};
}

Result<TakenSnapshot> TakeSnapshotSync(Storage& storage, const json::object& arguments) {
  block::Registry& registry = storage.registry();
  NodePtr node = TRY(DeviceOrNode(storage, arguments));
  std::string name = Text(arguments, "snapshot-node-name");
  if (!name.empty() && registry.Find(name))
    return Fail(ErrorCode::kExists, "New overlay node-name already in use");
  NodePtr overlay = TRY(OpenWish(storage, {.filename = Text(arguments, "snapshot-file"),
                                           .format = Text(arguments, "format", "qcow2"),
                                           .node_name = name,
                                           .existing = Text(arguments, "mode") == "existing",
                                           .size = node->size_bytes(),
                                           .recorded_backing = node,
                                           .backing = nullptr,
                                           .like = node}));
  Result<> taken = registry.Snapshot(node, overlay);
  if (taken) return TakenSnapshot{std::move(node), std::move(overlay)};
  overlay.reset();
  registry.CollectUnused();
  return Fail(std::move(taken).error());
}

}  // namespace kvartz::vmm
