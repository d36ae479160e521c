// -netdev, -nic, -net, -object: what devices are connected to.
#include <fmt/core.h>

#include <algorithm>

#include "block/tls_object.h"
#include "vmm/command_line.h"
#include "vmm/keyval.h"

namespace kvartz::vmm {
namespace {

std::unexpected<Error> NotYet(std::string what) {
  return Fail(ErrorCode::kUnsupported, "not supported yet: " + std::move(what));
}

Result<> AddNicOf(CommandLine& line, Properties card, Properties backend,
                  const std::string& option) {
  std::string model = Take(&card, "model", "virtio");
  std::string id = fmt::format("nic{}", line.config.netdevs.size());
  std::string given = Take(&backend, "id");
  if (!given.empty()) id = given;
  DeviceSpec device;
  device.driver = model == "virtio" || model == "virtio-net" ? line.VirtioDriver("net") : model;
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

std::string CommandLine::VirtioDriver(const std::string& device) const {
  bool pci = !microvm;
  for (const auto& [name, value] : config.machine.options) {
    if (name == "pcie") pci = value == "on";
  }
  return fmt::format("virtio-{}-{}", device, pci ? "pci" : "device");
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
    line.information =
        "Objects:\niothread\nmemory-backend-memfd\nmemory-backend-ram\nsecret\nthrottle-group\ntls-"
        "creds-psk\n"
        "tls-creds-x509\n";
    return {};
  }
  if (id.empty()) return Fail(ErrorCode::kInvalid, "id= is missing");
  if (type == "iothread") {
    IoThreadConfig config = {.id = id};
    config.poll_max_ns =
        TRY(TakeNumber(&properties, "poll-max-ns", config.poll_max_ns, 0, INT64_MAX));
    // How the time to poll is found from what happens: here there is nothing to tune.
    for (const char* hint : {"poll-grow", "poll-shrink", "aio-max-batch"}) Take(&properties, hint);
    TRY(RefuseRest(properties, "id poll-max-ns poll-grow poll-shrink aio-max-batch"));
    if (std::ranges::find(line.config.iothreads, id, &IoThreadConfig::id) !=
        line.config.iothreads.end()) {
      return Fail(ErrorCode::kExists, fmt::format("id={}: another iothread has this id", id));
    }
    line.config.iothreads.push_back(std::move(config));
    return {};
  }
  if (type == "memory-backend-ram" || type == "memory-backend-memfd") {
    line.memory_backends.push_back(
        {fmt::format("-object {}", argument), id, std::move(properties)});
    return {};
  }
  if (type == "secret" || type == "throttle-group" || block::IsTlsObject(type)) {
    // Not with the option's text: that may be the secret.
    return AddStorageObject(line, type, id, properties, fmt::format("-object {},id={}", type, id));
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
      FindDeviceType(line.VirtioDriver("net"))) {
    TRY(AddNicOf(line, {}, {{"type", "user"}}, "default network card (-nic user)"));
  }
  TRY(FinishConsoles(line));

  FinishDrives(line);
  return {};
}

}  // namespace kvartz::vmm
