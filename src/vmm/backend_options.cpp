// -drive, -blockdev, -netdev, -nic, -net, -object: what devices are connected to.
#include <fmt/core.h>

#include <algorithm>

#include "vmm/command_line.h"
#include "vmm/keyval.h"

namespace kvartz::vmm {
namespace {

std::unexpected<Error> NotYet(std::string what) {
  return Fail(ErrorCode::kUnsupported, "not supported yet: " + std::move(what));
}

// The name of a driver on the machine's own bus.
std::string VirtioDriver(const CommandLine& line, const std::string& device) {
  bool pci = !line.microvm;
  for (const auto& [name, value] : line.config.machine.options) {
    if (name == "pcie") pci = value == "on";
  }
  return fmt::format("virtio-{}-{}", device, pci ? "pci" : "device");
}

Result<> CheckImageFormat(const std::string& format) {
  if (format.empty() || format == "raw" || format == "qcow2") return {};
  return NotYet(
      fmt::format("format={}; convert the image to qcow2 (kvartz img convert -O qcow2)", format));
}

Result<bool> TakeDiscard(Properties* properties) {
  std::string discard = Take(properties, "discard", "unmap");
  if (discard == "unmap" || discard == "on") return true;
  if (discard == "ignore" || discard == "off") return false;
  return Fail(ErrorCode::kInvalid, fmt::format("discard={}: unmap or ignore", discard));
}

Result<block::ImageOptions::Locking> TakeLocking(Properties* properties, const char* name) {
  std::string locking = Take(properties, name, "auto");
  if (locking == "auto" || locking == "on") return block::ImageOptions::Locking::kAuto;
  if (locking == "off") return block::ImageOptions::Locking::kOff;
  return Fail(ErrorCode::kInvalid, fmt::format("{}={}: auto, on or off", name, locking));
}

// Requests go through io_uring however this is set.
Result<> TakeAio(Properties* properties, const char* name) {
  std::string aio = Take(properties, name, "io_uring");
  if (aio == "threads" || aio == "native" || aio == "io_uring") return {};
  return Fail(ErrorCode::kInvalid, fmt::format("{}={}: io_uring, native or threads", name, aio));
}

Result<> AddUniqueDrive(CommandLine& line, DriveConfig drive) {
  for (const DriveConfig& other : line.config.drives) {
    if (other.id == drive.id)
      return Fail(ErrorCode::kExists, fmt::format("id={}: another drive has this id", drive.id));
  }
  line.config.drives.push_back(std::move(drive));
  return {};
}

const BackendConfig* FindBlockdev(const CommandLine& line, const std::string& name) {
  for (const BackendConfig& blockdev : line.blockdevs) {
    if (blockdev.id == name) return &blockdev;
  }
  return nullptr;
}

// One node of -blockdev as an image: raw over file, or file alone. Nodes that it refers to are
// taken along.
Result<block::ImageOptions> ImageOfBlockdev(const CommandLine& line,
                                            const BackendConfig& blockdev) {
  Properties node = blockdev.properties;
  block::ImageOptions image;
  image.format = "raw";
  image.read_only = TRY(TakeBool(&node, "read-only", false));
  image.discard_unmap = TRY(TakeDiscard(&node));
  Take(&node, "auto-read-only");
  std::string driver = Take(&node, "driver");
  std::string prefix;
  bool direct = TRY(TakeBool(&node, "cache.direct", false)),
       no_flush = TRY(TakeBool(&node, "cache.no-flush", false));
  if (driver == "raw") {
    image.raw_offset = TRY(TakeSize(&node, "offset", 0));
    image.raw_size = TRY(TakeSize(&node, "size", UINT64_MAX));
    std::string file = Take(&node, "file");
    if (!file.empty()) {
      const BackendConfig* below = FindBlockdev(line, file);
      if (!below)
        return Fail(ErrorCode::kNotFound,
                    fmt::format("file={}: there is no -blockdev with this node-name", file));
      TRY(RefuseRest(
          node, "driver node-name file offset size read-only discard cache.direct cache.no-flush"));
      node = below->properties;
    } else {
      prefix = "file.";
    }
    direct |= TRY(TakeBool(&node, prefix + "cache.direct", false));
    no_flush |= TRY(TakeBool(&node, prefix + "cache.no-flush", false));
    image.read_only |= TRY(TakeBool(&node, prefix + "read-only", false));
    Take(&node, prefix + "auto-read-only");
    if (prefix.empty()) Take(&node, "discard");
    driver = Take(&node, prefix + "driver", "file");
    Take(&node, prefix + "node-name");
  }
  if (driver != "file" && driver != "host_device")
    return NotYet(fmt::format("driver={} (raw, file, host_device)", driver));
  image.path = Take(&node, prefix + "filename");
  image.locking = TRY(TakeLocking(&node, (prefix + "locking").c_str()));
  TRY(TakeAio(&node, (prefix + "aio").c_str()));
  if (image.path.empty()) return Fail(ErrorCode::kInvalid, prefix + "filename= is missing");
  image.cache = direct     ? block::CacheMode::kNone
                : no_flush ? block::CacheMode::kUnsafe
                           : block::CacheMode::kWriteback;
  TRY(RefuseRest(node, "filename locking aio read-only discard cache.direct cache.no-flush"));
  return image;
}

Result<> AddNicOf(CommandLine& line, Properties card, Properties backend,
                  const std::string& option) {
  std::string model = Take(&card, "model", "virtio");
  std::string id = fmt::format("nic{}", line.config.netdevs.size());
  std::string given = Take(&backend, "id");
  if (!given.empty()) id = given;
  DeviceSpec device;
  device.driver = model == "virtio" || model == "virtio-net" ? VirtioDriver(line, "net") : model;
  if (!FindDeviceType(device.driver)) {
    return NotYet(fmt::format("model={}; use model=virtio-net-pci, or leave it out", model));
  }
  std::string mac = Take(&card, "macaddr", Take(&card, "mac"));
  if (!mac.empty()) device.properties.Set("mac", mac);
  std::string addr = Take(&card, "addr");
  if (!addr.empty()) device.properties.Set("addr", addr);
  device.properties.Set("netdev", id);
  Take(&card, "name");
  TRY(RefuseRest(card, "model mac macaddr addr name"));
  line.config.machine.devices.push_back(std::move(device));
  line.config.netdevs.push_back({option, id, std::move(backend)});
  return {};
}

}  // namespace

Result<> AddDrive(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "file"));
  DriveConfig drive;
  std::string interface = Take(&properties, "if", line.microvm ? "virtio" : "ide");
  drive.id = Take(&properties, "id", fmt::format("{}{}", interface, line.config.drives.size()));
  drive.image.path = Take(&properties, "file", Take(&properties, "file.filename"));
  drive.option = fmt::format("-drive file={}", drive.image.path);
  if (interface != "virtio" && interface != "none") {
    return NotYet(fmt::format("if={} (the default); add if=virtio", interface));
  }
  if (Take(&properties, "media", "disk") != "disk") return NotYet("media=cdrom");
  if (drive.image.path.empty()) return Fail(ErrorCode::kInvalid, "file= is missing");
  drive.image.format = Take(&properties, "format", Take(&properties, "driver"));
  TRY(CheckImageFormat(drive.image.format));
  drive.image.cache = TRY(block::ParseCacheMode(Take(&properties, "cache", "writeback")));
  bool read_only = TRY(TakeBool(&properties, "read-only", false));
  drive.image.read_only = TRY(TakeBool(&properties, "readonly", read_only));
  drive.image.discard_unmap = TRY(TakeDiscard(&properties));
  drive.image.locking = TRY(TakeLocking(&properties, "file.locking"));
  TRY(TakeAio(&properties, "aio"));
  if (TRY(TakeBool(&properties, "snapshot", false))) return NotYet("snapshot=on");
  if (TRY(TakeBool(&properties, "copy-on-read", false))) return NotYet("copy-on-read=on");
  if (Take(&properties, "detect-zeroes", "off") != "off") return NotYet("detect-zeroes=");
  Take(&properties, "index");  // disks are numbered in the order of the command line
  Take(&properties, "file.driver");
  DeviceSpec device;
  for (const char* name : {"serial", "werror", "rerror", "addr"}) {
    if (properties.Find(name)) device.properties.Set(name, Take(&properties, name));
  }
  if (interface == "none" && !device.properties.all().empty()) {
    return Fail(ErrorCode::kInvalid, fmt::format("{}= belongs to the -device that uses the drive",
                                                 device.properties.all()[0].first));
  }
  TRY(RefuseRest(properties,
                 "file if id media format cache readonly read-only discard file.locking aio "
                 "snapshot copy-on-read "
                 "detect-zeroes index serial werror rerror addr"));
  if (interface == "virtio") {
    device.driver = VirtioDriver(line, "blk");
    device.properties.Set("drive", drive.id);
    line.config.machine.devices.push_back(std::move(device));
  }
  return AddUniqueDrive(line, std::move(drive));
}

Result<> AddBlockdev(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "driver"));
  std::string name = Take(&properties, "node-name");
  if (name.empty()) return Fail(ErrorCode::kInvalid, "node-name= is missing");
  if (FindBlockdev(line, name))
    return Fail(ErrorCode::kExists, fmt::format("node-name={}: another node has this name", name));
  line.blockdevs.push_back({fmt::format("-blockdev {}", name), name, std::move(properties)});
  return {};
}

Result<> AddNetdev(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "type"));
  if (AsksForHelp(properties)) {
    line.information =
        "Network backends:\nuser   through a network stack in this process\ntap    a tap interface "
        "of the host\n";
    return {};
  }
  std::string id = Take(&properties, "id");
  if (id.empty()) return Fail(ErrorCode::kInvalid, "id= is missing");
  for (const BackendConfig& other : line.config.netdevs) {
    if (other.id == id)
      return Fail(ErrorCode::kExists, fmt::format("id={}: another netdev has this id", id));
  }
  line.networking_given = true;
  line.config.netdevs.push_back({fmt::format("-netdev {}", argument), id, std::move(properties)});
  return {};
}

Result<> AddNic(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "type"));
  line.networking_given = true;
  if (properties.Find("type") && *properties.Find("type") == "none") return {};
  Properties card;
  for (const char* name : {"model", "mac", "macaddr", "addr"}) {
    if (properties.Find(name)) card.Set(name, Take(&properties, name));
  }
  return AddNicOf(line, std::move(card), std::move(properties), fmt::format("-nic {}", argument));
}

Result<> AddNet(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "type"));
  line.networking_given = true;
  const std::string* type = properties.Find("type");
  if (!type) return Fail(ErrorCode::kInvalid, "must begin with nic, user, tap or none");
  if (*type == "none") return {};
  if (properties.Find("vlan") || properties.Find("netdev"))
    return NotYet("vlan= and netdev= here; use -netdev and -device");
  if (*type == "nic") {
    properties.Remove("type");
    line.net_cards.push_back(std::move(properties));
  } else {
    line.net_backends.push_back(std::move(properties));
  }
  return {};
}

Result<> AddObject(CommandLine& line, std::string_view argument) {
  Properties properties = TRY(ParseKeyval(argument, "qom-type"));
  std::string type = Take(&properties, "qom-type"), id = Take(&properties, "id");
  if (type == "help" || type == "?") {
    line.information = "Objects:\niothread\nmemory-backend-memfd\nmemory-backend-ram\n";
    return {};
  }
  if (id.empty()) return Fail(ErrorCode::kInvalid, "id= is missing");
  if (type == "iothread") {
    for (const char* hint : {"poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"})
      Take(&properties, hint);
    TRY(RefuseRest(properties, "id poll-max-ns poll-grow poll-shrink aio-max-batch"));
    if (std::ranges::find(line.config.iothreads, id) != line.config.iothreads.end()) {
      return Fail(ErrorCode::kExists, fmt::format("id={}: another iothread has this id", id));
    }
    line.config.iothreads.push_back(id);
    return {};
  }
  if (type == "memory-backend-ram" || type == "memory-backend-memfd") {
    line.memory_backends.push_back(
        {fmt::format("-object {}", argument), id, std::move(properties)});
    return {};
  }
  return NotYet(fmt::format("{}; -object help lists what is", type));
}

Result<> FinishBackends(CommandLine& line) {
  if (line.net_cards.size() > 1 || line.net_backends.size() > 1 ||
      line.net_cards.size() != line.net_backends.size()) {
    return Fail(ErrorCode::kUnsupported,
                "-net: not supported yet beyond one 'nic' and one 'user' or 'tap'; use -nic");
  }
  if (!line.net_cards.empty()) {
    Result<> added = AddNicOf(line, line.net_cards[0], line.net_backends[0], "-net");
    if (!added) return Fail(std::move(added).error().In("-net nic"));
  }
  // Other programs' default card, with the driver that there is here.
  if (!line.networking_given && !line.no_defaults && !line.microvm &&
      FindDeviceType(VirtioDriver(line, "net"))) {
    TRY(AddNicOf(line, {}, {{"type", "user"}}, "default network card (-nic user)"));
  }
  TRY(FinishConsoles(line));

  // Nodes that other nodes stand on belong to those.
  auto below_another = [&](const std::string& name) {
    return std::ranges::any_of(line.blockdevs, [&](const BackendConfig& other) {
      const std::string* file = other.properties.Find("file");
      return file && *file == name;
    });
  };
  for (const BackendConfig& blockdev : line.blockdevs) {
    if (below_another(blockdev.id)) continue;
    Result<block::ImageOptions> image = ImageOfBlockdev(line, blockdev);
    if (!image) return Fail(std::move(image).error().In(blockdev.option));
    TRY(AddUniqueDrive(line, {blockdev.option, blockdev.id, std::move(*image), ""}));
  }
  // A disk's requests run where its device runs.
  for (const DeviceSpec& device : line.config.machine.devices) {
    const std::string* drive_id = device.properties.Find("drive");
    const std::string* share = device.properties.Find("share-rw");
    const std::string* iothread = device.properties.Find("iothread");
    for (DriveConfig& drive : line.config.drives) {
      if (!drive_id || drive.id != *drive_id) continue;
      if (share) drive.image.share_write = *share == "on";
      if (iothread) drive.iothread = *iothread;
    }
  }
  return {};
}

}  // namespace kvartz::vmm
