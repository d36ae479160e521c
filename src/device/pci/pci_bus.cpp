#include "base/check.h"
#include "device/pci/pci_config.h"
#include "device/pci/pci_device.h"

namespace kvartz {

// A guest looks at functions 1 to 7 only where function 0 is of a multifunction device.
Result<> PciBus::CheckFunctions(const PciDevice& device, int devfn) const {
  const unsigned slot = static_cast<unsigned>(devfn) & ~7u;
  const PciDevice* hidden = devfn & 7 ? &device : nullptr;
  const PciDevice* first = devfn & 7 ? functions_[slot] : &device;
  for (unsigned function = 1; function < 8 && !hidden; function++)
    hidden = functions_[slot | function];
  if (!hidden || !first || first->multifunction()) return {};
  return Fail(ErrorCode::kInvalid, "'" + hidden->id() + "' would be hidden behind '" + first->id() +
                                       "', function 0 of its PCI slot: give that "
                                       "multifunction=on");
}

Result<uint8_t> PciBus::Plug(PciDevice& device, int devfn) {
  LockGuard guard(mutex_);
  if (devfn < 0) {
    for (unsigned slot = 1; slot < 32 && devfn < 0; slot++) {
      bool free = true;
      for (unsigned function = 0; function < 8; function++)
        free = free && !functions_[slot * 8 + function];
      if (free) devfn = slot * 8;
    }
    if (devfn < 0) {
      return Fail(ErrorCode::kNoSpace,
                  "no free PCI slot for '" + device.id() + "': all 32 of the bus are in use");
    }
  }
  if (devfn > 255)
    return Fail(ErrorCode::kInvalid,
                "PCI slot " + std::to_string(devfn >> 3) + " does not exist: 0 to 31 do");
  if (functions_[devfn]) {
    return Fail(ErrorCode::kExists, "PCI slot " + std::to_string(devfn >> 3) + " function " +
                                        std::to_string(devfn & 7) + " is in use by '" +
                                        functions_[devfn]->id() + "'; choose another addr=");
  }
  TRY(CheckFunctions(device, devfn));
  functions_[devfn] = &device;
  device.Attach(*this, devfn);
  return devfn;
}

void PciBus::Unplug(PciDevice& device) {
  LockGuard guard(mutex_);
  if (functions_[device.devfn()] != &device) return;
  LockGuard device_guard(device.lock());
  device.Detach();
  functions_[device.devfn()] = nullptr;
}

PciDevice* PciBus::Find(uint8_t devfn) {
  LockGuard guard(mutex_);
  return functions_[devfn];
}

uint32_t PciBus::ConfigRead(uint8_t devfn, unsigned offset, unsigned size) {
  LockGuard guard(mutex_);
  PciDevice* device = functions_[devfn];
  if (!device || offset + size > PciConfigSpace::kSize) return ~0u >> (32 - 8 * size);
  LockGuard device_guard(device->lock());
  return device->ConfigRead(offset, size);
}

void PciBus::ConfigWrite(uint8_t devfn, unsigned offset, unsigned size, uint32_t value) {
  LockGuard guard(mutex_);
  PciDevice* device = functions_[devfn];
  if (!device || offset + size > PciConfigSpace::kSize) return;
  LockGuard device_guard(device->lock());
  device->ConfigWrite(offset, size, value);
}

void PciBus::SetIntx(uint8_t devfn, unsigned pin, bool level) {
  if (pin == 0 || pin > 4) return;
  unsigned line = (pin - 1 + (devfn >> 3)) & 3;
  LockGuard guard(intx_mutex_);
  int before = asserted_[line];
  asserted_[line] += level ? 1 : -1;
  VERIFY(asserted_[line] >= 0);
  if ((before > 0) != (asserted_[line] > 0)) intx_.SetIrq(line, asserted_[line] > 0);
}

}  // namespace kvartz
