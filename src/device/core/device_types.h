// The devices that a user can name, one row each in devices.def; the factories live beside their
// devices.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device/core/device.h"
#include "device/core/properties.h"

namespace kvartz {

// A device as it was asked for: -device DRIVER,id=ID,name=value,...
struct DeviceSpec {
  std::string driver;
  std::string id;  // empty: the board names it
  Properties properties;
};

enum class DeviceBus {
  kPci,           // the factory returns a PciDevice; the board plugs it (addr=)
  kIsa,           // an MmioDevice; the board maps `ports`
  kVirtioMmio,    // an MmioDevice of 512 bytes; the board maps it into a virtio-mmio slot and gives
                  // `irq`
  kVirtioSerial,  // a port, which finds its bus among `devices` (bus=) and lives on it
};

// What a factory gets (host sides come by env.backends), and what it tells the board.
struct DeviceRequest {
  struct PortRange {
    uint16_t base = 0;
    uint16_t count = 0;
    uint64_t handler_offset = 0;  // the handler's offset of `base`
  };
  const DeviceEnv& env;
  const Properties& properties;
  IrqSink* isa_irqs = nullptr;                            // kIsa: lines 0..15
  IrqLine irq = {};                                       // kVirtioMmio
  std::vector<PortRange> ports = {};                      // kIsa: filled by the factory
  std::vector<Doorbell> doorbells = {};                   // kVirtioMmio: filled by the factory
  std::span<const std::unique_ptr<Device>> devices = {};  // those that are there already
};

using DeviceFactory = Result<std::unique_ptr<Device>> (*)(DeviceRequest& request);

// The lines of the device's properties (DescribeProperties), in any order.
using DeviceProperties = std::vector<std::string> (*)();

struct DeviceType {
  const char* name;
  DeviceFactory make;
  DeviceProperties properties;
  DeviceBus bus;
  const char* description;
};

// The rows of devices.def, in its order.
std::span<const DeviceType> DeviceTypes();
// Errors: unknown; says the nearest name.
Result<const DeviceType*> FindDeviceType(const std::string& name);
// What "-device NAME,help" prints: its own properties and those of its place, sorted by name.
std::string DescribeDevice(const DeviceType& type);

}  // namespace kvartz
