// PIIX3 ISA bridge (PCI 8086:7000): routing of PCI interrupts to ISA lines.
// Threads: guarded by its slot; its interrupt input has a lock of its own.
// Spec: Intel 82371SB datasheet (290550), 2.2 (configuration: PIRQRC 60h-63h). Modelled: PIRQ
// routing. The reset control register is with the configuration ports (i440fx.h), the ELCR with the
// 8259 pair. Missing: X-bus, DMA, IDE and USB functions.
#pragma once

#include <array>
#include <cstdint>

#include "device/pci/pci_device.h"

namespace kvartz {

class Piix3 final : public PciDevice, public IrqSink {
 public:
  // `isa`: lines 0..15.
  Piix3(const DeviceEnv& env, IrqSink& isa);

  // Lines 0..3 of PciBus. PIRQ A is what INTA of slot 1 pulls.
  void SetIrq(unsigned line, bool level) override;
  // As firmware does: PIRQ A and B to `ab`, C and D to `cd`. Those are level-triggered lines.
  void SetRoutes(uint8_t ab, uint8_t cd);
  // The ISA line that INTA of `slot` arrives at; 0: none.
  uint8_t LineOf(unsigned slot, unsigned pin) const;

  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;

 private:
  void ConfigWritten(unsigned offset, unsigned size) override;
  void UpdateRoutes();
  void Drive() REQUIRES(route_mutex_);

  IrqSink& isa_;
  Mutex route_mutex_;  // a leaf
  std::array<bool, 4> levels_{};
  std::array<uint8_t, 4> routes_{};  // ISA line, 0: none
  uint16_t driven_ = 0;              // ISA lines that are pulled
};

}  // namespace kvartz
