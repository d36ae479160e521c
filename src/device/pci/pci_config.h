// Offsets and bits of the type 0 configuration header. PCI Local Bus 3.0, ch. 6.
#pragma once

#include <cstdint>

namespace kvartz::pci {

constexpr unsigned kVendorId = 0x00, kDeviceId = 0x02, kCommand = 0x04, kStatus = 0x06,
                   kRevision = 0x08, kClass = 0x09, kCacheLine = 0x0c, kLatency = 0x0d,
                   kHeaderType = 0x0e, kBar0 = 0x10, kSubsystemVendor = 0x2c, kSubsystem = 0x2e,
                   kExpansionRom = 0x30, kCapabilities = 0x34, kInterruptLine = 0x3c,
                   kInterruptPin = 0x3d;

constexpr uint16_t kCommandIo = 1 << 0, kCommandMemory = 1 << 1, kCommandMaster = 1 << 2,
                   kCommandParity = 1 << 6, kCommandSerr = 1 << 8, kCommandIntxDisable = 1 << 10;
constexpr uint16_t kStatusInterrupt = 1 << 3, kStatusCapabilities = 1 << 4;

constexpr uint8_t kMultifunction = 0x80;  // in kHeaderType
constexpr uint8_t kCapMsi = 0x05, kCapVendor = 0x09, kCapMsix = 0x11;

}  // namespace kvartz::pci
