// I/O APIC.     Threads: guarded by its slot; SetIrq and EndOfInterrupt take the lock themselves.
// Spec: Intel 82093AA datasheet (290566), ch. 3; the EOI register as in the ICH family (version
// 0x20). Modelled: 24 entries, edge and level, remote IRR. Interrupts leave as messages. Missing:
// ExtINT entries (the 8259 reaches the processor by LINT0), the serial bus and its arbitration.
#pragma once

#include <array>
#include <cstdint>

#include "device/core/device.h"

namespace kvartz {

class IoApic final : public MmioDevice, public IrqSink {
 public:
  static constexpr uint64_t kBase = 0xfec00000, kSize = 0x1000;
  static constexpr unsigned kPins = 24;

  explicit IoApic(const DeviceEnv& env) : MmioDevice(env) { ResetRegisters(); }

  void SetIrq(unsigned pin, bool level) override;
  // A local APIC ended level-triggered `vector`. Not to be called with a lock that SendMsi takes.
  void EndOfInterrupt(uint8_t vector);

  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;
  uint64_t IoRead(uint64_t offset, unsigned size) override;
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override;

 private:
  void ResetRegisters();
  uint32_t ReadRegister() const;
  void WriteRegister(uint32_t value);
  void Service(unsigned pin);
  void EndLocked(uint8_t vector);

  uint8_t select_ = 0;
  uint8_t id_ = 0;
  uint32_t lines_ = 0;    // input levels
  uint32_t pending_ = 0;  // edges that wait, and levels that are asserted
  std::array<uint64_t, kPins> entries_{};
};

}  // namespace kvartz
