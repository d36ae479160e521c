// 8254 programmable interval timer and the speaker port 0x61 of a PC.     Threads: guarded by its
// slot; its timer runs on the main loop. Spec: Intel 8254 datasheet (231164), "Operational
// description"; PIIX3 datasheet 2.5.5 (NMI status and control, port 61h). Modelled: all modes and
// access forms, BCD, latches, read-back, gate of counter 2. Missing: sound. Counter 0 interrupts as
// often as the main loop comes by: periods that passed meanwhile are not made up for.
#pragma once

#include <array>
#include <cstdint>

#include "device/core/device.h"

namespace kvartz {

class Pit8254 final : public MmioDevice {
 public:
  static constexpr uint64_t kFrequency = 1193182;
  // Its ports; the handler's offset is the port number.
  static constexpr uint16_t kBase = 0x40, kSpeaker = 0x61;

  Pit8254(const DeviceEnv& env, IrqLine irq);

  // While the HPET replaces counter 0 its interrupt is disconnected. Any thread.
  void SetIrqConnected(bool connected);

  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;
  uint64_t IoRead(uint64_t port, unsigned size) override;
  void IoWrite(uint64_t port, unsigned size, uint64_t value) override;

 private:
  struct Counter {
    uint8_t mode = 0;
    bool bcd = false;
    uint8_t access = 3;   // 1: low byte, 2: high byte, 3: both in turn
    bool loaded = false;  // a count was written since the mode
    uint32_t count = 65536;
    uint8_t write_low = 0;
    bool write_high_next = false, read_high_next = false;
    uint16_t latched_count = 0;
    uint8_t latched_bytes = 0;  // of the count that are still to be read
    uint8_t latched_status = 0;
    bool status_latched = false;
    bool gate = true;
    int64_t start_ns = 0;     // when the count was loaded
    uint64_t held_ticks = 0;  // ticks before the gate stopped counting

    void VisitState(StateVisitor& visitor);
  };
  uint64_t TicksSince(const Counter& c) const;
  uint16_t CountNow(const Counter& c) const;
  bool Output(const Counter& c) const;
  void WriteControl(uint8_t value);
  void WriteCount(unsigned index, uint8_t value);
  uint8_t ReadCount(unsigned index);
  void Load(unsigned index, uint16_t value);
  void SetGate(unsigned index, bool level);
  void LatchCount(Counter& c);
  void LatchStatus(Counter& c);
  void TimerFired();
  void ArmTimer();
  void SetIrq(bool level);

  IrqLine irq_;
  Timer timer_;
  std::array<Counter, 3> counters_;
  uint64_t next_event_ = 0;  // ticks of counter 0 since its start
  bool speaker_data_ = false;
  bool irq_connected_ = true;
  bool irq_level_ = false;
};

}  // namespace kvartz
