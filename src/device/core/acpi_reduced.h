// Sleep and reset registers of hardware-reduced ACPI.     Threads: guarded by its slot.
// Spec: ACPI 6.4, 4.8.3.7 (sleep control and status), 4.8.3.6 (reset register).
#pragma once

#include <cstdint>

#include "device/core/device.h"

namespace kvartz {

class AcpiReduced final : public MmioDevice {
 public:
  static constexpr uint16_t kControl = 0, kStatus = 1, kReset = 2, kSize = 4;  // offsets, bytes
  static constexpr uint8_t kSleepTypeOff = 5;                                  // SLP_TYP of S5
  static constexpr uint8_t kResetValue = 0x42;

  using MmioDevice::MmioDevice;
  void Reset(ResetPhase) override {}
  void VisitState(StateVisitor& visitor) override { visitor.Version(1); }
  uint64_t IoRead(uint64_t, unsigned) override { return 0; }
  void IoWrite(uint64_t offset, unsigned, uint64_t value) override {
    constexpr uint8_t kSleepEnable = 1 << 5;
    if (offset == kControl && (value & kSleepEnable) && (value >> 2 & 7) == kSleepTypeOff) {
      env_.machine.Ask(MachineControl::Request::kPowerOff, "acpi");
    }
    if (offset == kReset && value == kResetValue)
      env_.machine.Ask(MachineControl::Request::kReset, "acpi");
  }
};

}  // namespace kvartz
