// The pair of 8259A interrupt controllers of a PC, with the ELCR.     Threads: guarded by its slot;
// SetIrq and Acknowledge take the lock themselves. Spec: Intel 8259A datasheet (231468),
// "Programming the 8259A"; PIIX3 datasheet 2.6 (ELCR). Modelled: cascade, all EOI and rotation
// commands, automatic EOI, special mask, special fully nested, polling, level mode by ELCR.
// Missing: single mode, 8085 mode.
#pragma once

#include <array>
#include <cstdint>

#include "device/core/device.h"

namespace kvartz {

class PicPair final : public MmioDevice, public IrqSink {
 public:
  // Its ports; the handler's offset is the port number.
  static constexpr uint16_t kMaster = 0x20, kSlave = 0xa0, kElcr = 0x4d0;

  // `intr`: the INTR output.
  PicPair(const DeviceEnv& env, IrqLine intr) : MmioDevice(env), intr_(intr) {}

  void SetIrq(unsigned line, bool level) override;  // 0..15
  // The INTA cycle: the vector of the most urgent request, or the spurious one (line 7).
  uint8_t Acknowledge();

  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;
  uint64_t IoRead(uint64_t port, unsigned size) override;
  void IoWrite(uint64_t port, unsigned size, uint64_t value) override;

 private:
  struct Chip {
    uint8_t lines = 0, irr = 0, isr = 0, imr = 0, elcr = 0;
    uint8_t vector_base = 0;
    uint8_t lowest = 7;     // the line of lowest priority
    uint8_t init_step = 0;  // the ICW that is expected next; 0: none
    bool needs_icw4 = false;
    bool auto_eoi = false, rotate_on_auto_eoi = false, special_mask = false, fully_nested = false;
    bool read_isr = false, poll = false;

    int Highest(uint8_t mask) const;  // -1: none
    void VisitState(StateVisitor& visitor);
  };
  int Pending(unsigned chip) const;
  uint8_t TakeInterrupt(unsigned chip, int line);
  void SetLine(unsigned chip, unsigned line, bool level);
  void WriteCommand(unsigned chip, uint8_t value);
  void WriteOcw2(unsigned chip, uint8_t value);
  void WriteData(unsigned chip, uint8_t value);
  uint8_t ReadChip(unsigned chip, bool data);
  void Update();

  IrqLine intr_;
  std::array<Chip, 2> chips_;
  bool output_ = false;
};

}  // namespace kvartz
