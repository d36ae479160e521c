// -drive, -blockdev, and -object of the kinds that disks need: from the user's words to the options
// that nodes are opened with. What only the image's driver knows is refused by that, when it opens.
#include <fmt/core.h>

#include <algorithm>

#include "block/node.h"
#include "vmm/command_line.h"
#include "vmm/keyval.h"

namespace kvartz::vmm {
namespace {

std::unexpected<Error> NotYet(std::string what) {
  return Fail(ErrorCode::kUnsupported, "not supported yet: " + std::move(what));
}

block::Options ToOptions(const Properties& properties) {
  block::Options options;
  for (const auto& [name, value] : properties.all()) options.Set(name, value);
  return options;
}

// The spellings of -drive that came before throttling.*.
constexpr std::pair<const char*, const char*> kOldLimits[] = {
    {"bps", "bps-total"},
    {"bps_rd", "bps-read"},
    {"bps_wr", "bps-write"},
    {"bps_max", "bps-total-max"},
    {"bps_rd_max", "bps-read-max"},
    {"bps_wr_max", "bps-write-max"},
    {"iops", "iops-total"},
    {"iops_rd", "iops-read"},
    {"iops_wr", "iops-write"},
    {"iops_max", "iops-total-max"},
    {"iops_rd_max", "iops-read-max"},
    {"iops_wr_max", "iops-write-max"},
    {"iops_size", "iops-size"},
    {"group", "group"},
};

Result<> TakeLimits(block::Options& options, DriveConfig& drive) {
  for (auto [old, name] : kOldLimits) {
    if (std::optional<std::string> value = options.Take(old))
      options.Set(fmt::format("throttling.{}", name), *value);
  }
  drive.throttle_group = options.Take("throttling.group", "");
  drive.limits = TRY(block::ThrottleLimits::Take(options, "throttling."));
  return {};
}

Result<> TakeCache(block::Options& options, DriveConfig& drive) {
  if (std::optional<std::string> name = options.Take("cache")) {
    block::CacheMode mode = TRY(block::ParseCacheMode(*name));
    bool direct = mode == block::CacheMode::kNone || mode == block::CacheMode::kDirectSync;
    drive.writethrough =
        mode == block::CacheMode::kWritethrough || mode == block::CacheMode::kDirectSync;
    if (!options.Has("cache.direct")) options.Set("cache.direct", direct ? "on" : "off");
    if (!options.Has("cache.no-flush"))
      options.Set("cache.no-flush", mode == block::CacheMode::kUnsafe ? "on" : "off");
  }
  drive.writethrough = !TRY(options.TakeBool("cache.writeback", !drive.writethrough));
  return {};
}

// aio= belongs to the file; requests go through io_uring however it is set.
Result<> TakeAio(block::Options& options) {
  return block::CheckAio(options.Take("aio", "io_uring"));
}

// What says which image it is, in the words of -blockdev.
Result<> TakeImage(block::Options& options) {
  std::optional<std::string> file = options.Take("file");
  std::optional<std::string> format = options.Take("format");
  if (format && !format->empty()) options.Set("driver", *format);
  if (std::optional<std::string> read_only = options.Take("readonly"))
    options.Set("read-only", *read_only);
  bool protocol = options.Has("file.driver");
  if (file && !file->empty()) options.Set(protocol ? "file.filename" : "filename", *file);
  // driver= may be a protocol, which has other keys.
  if ((format || !options.Has("driver")) && !options.Has("filename") && !options.HasBelow("file"))
    return Fail(ErrorCode::kInvalid, "file= is missing");
  return {};
}

}  // namespace

Result<> AddDrive(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "file"));
  DriveConfig drive;
  std::string interface = Take(&properties, "if", line.microvm ? "virtio" : "ide");
  drive.id = Take(&properties, "id", fmt::format("{}{}", interface, line.config.drives.size()));
  const std::string* file = properties.Find("file");
  drive.option = file ? fmt::format("-drive file={}", *file)
                      : fmt::format("-drive {}", argument.substr(0, 200));
  if (interface != "virtio" && interface != "none")
    return NotYet(fmt::format("if={} (the default); add if=virtio", interface));
  if (Take(&properties, "media", "disk") != "disk") return NotYet("media=cdrom");
  Take(&properties, "index");  // disks are numbered in the order of the command line
  drive.snapshot = TRY(TakeBool(&properties, "snapshot", false));
  drive.copy_on_read = TRY(TakeBool(&properties, "copy-on-read", false));
  drive.rerror = Take(&properties, "rerror", "auto");
  drive.werror = Take(&properties, "werror", "auto");
  DeviceSpec device;
  for (const char* name : {"serial", "addr"}) {
    if (properties.Find(name)) device.properties.Set(name, Take(&properties, name));
  }
  if (interface == "none" && !device.properties.all().empty()) {
    return Fail(ErrorCode::kInvalid, fmt::format("{}= belongs to the -device that uses the drive",
                                                 device.properties.all()[0].first));
  }
  drive.options = ToOptions(properties);
  TRY(TakeImage(drive.options));
  TRY(TakeCache(drive.options, drive));
  TRY(TakeAio(drive.options));
  TRY(TakeLimits(drive.options, drive));
  if (interface == "virtio") {
    device.driver = line.VirtioDriver("blk");
    device.properties.Set("drive", drive.id);
    line.config.machine.devices.push_back(std::move(device));
  }
  for (const DriveConfig& other : line.config.drives) {
    if (other.id == drive.id)
      return Fail(ErrorCode::kExists, fmt::format("id={}: another drive has this id", drive.id));
  }
  line.config.drives.push_back(std::move(drive));
  return {};
}

Result<> AddBlockdev(CommandLine& line, std::string_view argument) {
  block::Options options;
  if (argument.starts_with('{')) {
    options = TRY(block::Options::ParseJson(argument));
  } else {
    options = ToOptions(TRY(ParseKeyval(argument, "driver")));
  }
  if (!options.Has("node-name") || options.all().at("node-name").text.empty())
    return Fail(ErrorCode::kInvalid, "node-name= is missing");
  std::string name = options.all().at("node-name").text;
  if (!options.Has("driver")) return Fail(ErrorCode::kInvalid, "driver= is missing");
  line.config.nodes.push_back({fmt::format("-blockdev {}", name), std::move(options)});
  return {};
}

// The node of `name`, and those that it stands on by name.
static void ShareWrites(VmConfig& config, const std::string& name) {
  for (NodeConfig& node : config.nodes) {
    const auto& options = node.options.all();
    if (options.at("node-name").text != name || node.share_write) continue;
    node.share_write = true;
    if (options.contains("file")) ShareWrites(config, options.at("file").text);
  }
}

void FinishDrives(CommandLine& line) {
  for (const DeviceSpec& device : line.config.machine.devices) {
    const std::string* drive_id = device.properties.Find("drive");
    const std::string* share = device.properties.Find("share-rw");
    const std::string* iothread = device.properties.Find("iothread");
    if (!drive_id) continue;
    bool shared = share && (*share == "on" || *share == "true");
    if (shared) ShareWrites(line.config, *drive_id);
    // A disk's requests run where its device runs.
    for (DriveConfig& drive : line.config.drives) {
      if (drive.id != *drive_id) continue;
      drive.share_write = shared;
      if (iothread) drive.iothread = *iothread;
    }
  }
}

Result<> AddStorageObject(CommandLine& line, const std::string& type, const std::string& id,
                          const Properties& properties, const std::string& option) {
  line.config.objects.push_back({option, type, id, ToOptions(properties)});
  return {};
}

}  // namespace kvartz::vmm
