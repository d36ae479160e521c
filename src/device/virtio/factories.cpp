// What -device makes: each virtio device on each transport.
#include <fmt/core.h>
#include <linux/virtio_ids.h>

#include "device/core/backends.h"
#include "device/core/device_types.h"
#include "device/virtio/virtio_balloon.h"
#include "device/virtio/virtio_blk.h"
#include "device/virtio/virtio_console.h"
#include "device/virtio/virtio_mmio.h"
#include "device/virtio/virtio_net.h"
#include "device/virtio/virtio_pci.h"
#include "device/virtio/virtio_rng.h"

namespace kvartz {
namespace {

template <typename Config>
Result<Config> ConfigOf(const DeviceRequest& request, std::span<const PropertySpec> table,
                        const char* driver) {
  Config config;
  TRY(ApplyProperties(table, request.properties, driver, &config));
  if (config.virtio.iommu_platform) {
    return Fail(ErrorCode::kUnsupported,
                "not supported yet: iommu_platform=on (there is no virtual IOMMU)");
  }
  if (!config.virtio.romfile.empty()) {
    return Fail(ErrorCode::kUnsupported,
                "not supported yet: option ROMs (say romfile= without a name)");
  }
  return config;
}

using DevicePtr = std::unique_ptr<VirtioDevice>;

Result<DevicePtr> CreateBlk(const DeviceRequest& request, const char* driver) {
  auto config = TRY(ConfigOf<BlkConfig>(request, kBlkProperties, driver));
  if (config.drive.empty())
    return Fail(ErrorCode::kInvalid, "drive= is missing: name a -drive or -blockdev by its id");
  if (!request.env.backends)
    return Fail(ErrorCode::kNotFound, fmt::format("drive={}: there is no disk", config.drive));
  DiskPort* port = TRY(request.env.backends->ConnectDisk({.drive = config.drive,
                                                          .device_id = request.env.id,
                                                          .iothread = config.iothread,
                                                          .share_write = config.share_rw,
                                                          .rerror = config.rerror,
                                                          .werror = config.werror}));
  return TRY(VirtioBlk::Create(request.env, std::move(config), *port));
}

Result<DevicePtr> CreateNet(const DeviceRequest& request, const char* driver) {
  auto config = TRY(ConfigOf<NetConfig>(request, kNetProperties, driver));
  host::NetBackend* backend = nullptr;
  if (!config.netdev.empty()) {
    backend = request.env.backends ? request.env.backends->FindNetdev(config.netdev) : nullptr;
    if (!backend)
      return Fail(ErrorCode::kNotFound,
                  fmt::format("netdev={}: there is no such -netdev", config.netdev));
    if (backend->connected())
      return Fail(ErrorCode::kBusy,
                  fmt::format("netdev={}: another card is connected to it", config.netdev));
  }
  if (config.mac == MacAddress{}) {
    // In the space for virtual machines; one number a card.
    config.mac = {{0x52, 0x54, 0x00, 0x12, 0x34, 0x56}};
    for (const auto& device : request.devices) {
      const VirtioDevice* other = VirtioDeviceOf(*device);
      if (other && other->device_id() == VIRTIO_ID_NET) ++config.mac.bytes[5];
    }
  }
  return TRY(VirtioNet::Create(request.env, config, backend));
}

Result<DevicePtr> CreateRng(const DeviceRequest& request, const char* driver) {
  auto config = TRY(ConfigOf<RngConfig>(request, kRngProperties, driver));
  if (config.period_ms == 0) return Fail(ErrorCode::kInvalid, "period: at least 1 millisecond");
  return std::make_unique<VirtioRng>(request.env, config);
}

Result<DevicePtr> CreateBalloon(const DeviceRequest& request, const char* driver) {
  auto config = TRY(ConfigOf<BalloonConfig>(request, kBalloonProperties, driver));
  return std::make_unique<VirtioBalloon>(request.env, config);
}

Result<DevicePtr> CreateSerial(const DeviceRequest& request, const char* driver) {
  auto config = TRY(ConfigOf<ConsoleConfig>(request, kConsoleProperties, driver));
  if (config.max_ports < 1 || config.max_ports > 31) {
    return Fail(ErrorCode::kInvalid, "max_ports: from 1 to 31");
  }
  return std::make_unique<VirtioConsole>(request.env, config);
}

enum class Variant { kDefault, kTransitional, kNonTransitional };

// What disable-legacy, disable-modern and the name together ask for.
Result<VirtioPci::Interfaces> InterfacesOf(const VirtioConfig& config, Variant variant) {
  bool legacy = config.disable_legacy != OnOffAuto::kOn && variant != Variant::kNonTransitional;
  bool modern = !config.disable_modern;
  if (variant == Variant::kTransitional && (!legacy || !modern)) {
    return Fail(
        ErrorCode::kInvalid,
        "a transitional device has both interfaces: leave out disable-legacy and disable-modern");
  }
  if (!legacy && !modern)
    return Fail(ErrorCode::kInvalid,
                "without legacy and modern interface nothing is left of the device");
  return !legacy  ? VirtioPci::Interfaces::kModernOnly
         : modern ? VirtioPci::Interfaces::kTransitional
                  : VirtioPci::Interfaces::kLegacyOnly;
}

template <Result<DevicePtr> (*kCreate)(const DeviceRequest&, const char*), Variant kVariant>
Result<std::unique_ptr<Device>> MakeOnPci(DeviceRequest& request, const char* driver) {
  DevicePtr device = TRY(kCreate(request, driver));
  VirtioPci::Interfaces interfaces = TRY(InterfacesOf(device->options(), kVariant));
  return TRY(VirtioPci::Create(request.env, std::move(device), interfaces));
}

template <Result<DevicePtr> (*kCreate)(const DeviceRequest&, const char*)>
Result<std::unique_ptr<Device>> MakeOnMmio(DeviceRequest& request, const char* driver) {
  DevicePtr device = TRY(kCreate(request, driver));
  auto mmio = TRY(VirtioMmio::Create(request.env, std::move(device), request.irq));
  request.doorbells = mmio->Doorbells();
  return mmio;
}

}  // namespace

// What devices.def's rows name of one kind of device.
#define VIRTIO_FACTORIES(Name, name, Config, table)                                              \
  std::vector<std::string> DescribeVirtio##Name() { return DescribeProperties<Config>(table); }  \
  Result<std::unique_ptr<Device>> MakeVirtio##Name##Mmio(DeviceRequest& request) {               \
    return MakeOnMmio<Create##Name>(request, "virtio-" name "-device");                          \
  }                                                                                              \
  Result<std::unique_ptr<Device>> MakeVirtio##Name##Pci(DeviceRequest& request) {                \
    return MakeOnPci<Create##Name, Variant::kDefault>(request, "virtio-" name "-pci");           \
  }                                                                                              \
  Result<std::unique_ptr<Device>> MakeVirtio##Name##PciTransitional(DeviceRequest& request) {    \
    return MakeOnPci<Create##Name, Variant::kTransitional>(request,                              \
                                                           "virtio-" name "-pci-transitional");  \
  }                                                                                              \
  Result<std::unique_ptr<Device>> MakeVirtio##Name##PciNonTransitional(DeviceRequest& request) { \
    return MakeOnPci<Create##Name, Variant::kNonTransitional>(                                   \
        request, "virtio-" name "-pci-non-transitional");                                        \
  }

VIRTIO_FACTORIES(Balloon, "balloon", BalloonConfig, kBalloonProperties)
VIRTIO_FACTORIES(Blk, "blk", BlkConfig, kBlkProperties)
VIRTIO_FACTORIES(Net, "net", NetConfig, kNetProperties)
VIRTIO_FACTORIES(Rng, "rng", RngConfig, kRngProperties)
VIRTIO_FACTORIES(Serial, "serial", ConsoleConfig, kConsoleProperties)

}  // namespace kvartz
