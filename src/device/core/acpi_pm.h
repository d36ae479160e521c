// The fixed ACPI registers: PM1 events and control, the PM timer, one GPE block.
// Threads: guarded by its owner's lock (a device that places the block in its ports); the timer
// takes it on the main loop. Spec: ACPI 6.4, 4.8.3 (fixed hardware), 4.8.3.3 (power management
// timer, 3.579545 MHz, 24 bits), 4.8.4.1 (GPE).
#pragma once

#include <cstdint>

#include "device/core/device.h"

namespace kvartz {

class AcpiPm final : public IoHandler {
 public:
  // Offsets in the block; widths in bytes. As in the PIIX4.
  static constexpr unsigned kPm1Status = 0x00, kPm1Enable = 0x02, kPm1Control = 0x04, kTimer = 0x08,
                            kGpeStatus = 0x0c, kGpeEnable = 0x0e;
  static constexpr uint64_t kTimerFrequency = 3579545;
  static constexpr unsigned kSleepTypeOff = 0;  // SLP_TYP of S5

  AcpiPm(const DeviceEnv& env, Mutex& lock, IrqLine sci);

  void PressPowerButton();
  void RaiseGpe(unsigned event);

  void Reset(ResetPhase phase);
  void VisitState(StateVisitor& visitor);
  uint64_t IoRead(uint64_t offset, unsigned size) override;
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override;

 private:
  uint64_t Ticks() const;
  void CatchUp();
  void Update();
  uint8_t ReadByte(unsigned offset);
  void WriteByte(unsigned offset, uint8_t value);

  const DeviceEnv env_;
  Mutex& lock_;
  IrqLine sci_;
  Timer timer_;
  uint16_t pm1_status_ = 0, pm1_enable_ = 0, pm1_control_ = 0;
  uint16_t gpe_status_ = 0, gpe_enable_ = 0;
  uint64_t seen_half_ = 0;  // half periods of the timer up to which its status bit is accounted for
};

}  // namespace kvartz
