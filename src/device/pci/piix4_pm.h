// PIIX4 power management function (PCI 8086:7113): ACPI PM1 and GPE blocks, PM timer, APM ports, an
// empty SMBus. Threads: guarded by its slot; its timer runs on the main loop. Spec: Intel 82371AB
// datasheet (290562), ch. 7 (power management); ACPI 6.4, 4.8. Modelled: power button, soft off, PM
// timer with overflow, SCI, two-byte GPE block. ACPI mode is always on (there is no SMM to leave
// to). Missing: S1 to S4, SMI, SMBus devices.
#pragma once

#include <cstdint>

#include "device/core/acpi_pm.h"
#include "device/pci/pci_device.h"

namespace kvartz {

class Piix4Pm final : public PciDevice {
 public:
  static constexpr uint16_t kApm = 0xb2;  // two ports; handler apm()

  Piix4Pm(const DeviceEnv& env, IrqLine sci);

  // As firmware does: the register blocks at these ports.
  void Enable(uint16_t pm_base, uint16_t smbus_base);
  void PressPowerButton();
  // Raises a general-purpose event 0..15.
  void RaiseGpe(unsigned event);
  IoHandler& apm() { return apm_; }

  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;

 private:
  // Where a block of ports is now.
  struct Block {
    AddressSpace::RegionId region = 0;
    uint16_t base = 0;  // 0: not mapped
  };
  struct Smbus final : public IoHandler {
    uint64_t IoRead(uint64_t offset, unsigned size) override;
    void IoWrite(uint64_t offset, unsigned size, uint64_t value) override;
    uint8_t registers[16] = {};
  };
  struct Apm final : public IoHandler {
    uint64_t IoRead(uint64_t offset, unsigned size) override { return registers[offset & 1]; }
    void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
      registers[offset & 1] = value;
    }
    uint8_t registers[2] = {};
  };
  void ConfigWritten(unsigned offset, unsigned size) override;
  void MapBlock(Block& block, const char* name, uint16_t base, uint16_t size, IoHandler& handler);
  void UpdateBlocks();

  AcpiPm pm_;
  Smbus smbus_;
  Apm apm_;
  Block pm_block_, smbus_block_;
};

}  // namespace kvartz
