// MC146818 real-time clock and the 128 bytes of CMOS memory of a PC.     Threads: guarded by its
// slot; its timer runs on the main loop. Spec: Motorola MC146818A datasheet (1984). Modelled: time
// in all formats, SET, UIP, alarm with wildcards, periodic and update-ended interrupts, the century
// byte. Missing: daylight saving, the square wave, the divider's test settings. The time of day
// follows the given wall clock; interrupts follow guest time. Ticks that passed unread are one
// interrupt.
#pragma once

#include <array>
#include <cstdint>

#include "device/core/device.h"

namespace kvartz {

class Rtc final : public MmioDevice {
 public:
  static constexpr uint16_t kBase = 0x70;  // index, data; the handler's offsets are 0 and 1
  static constexpr uint8_t kCentury = 0x32;

  // `wall`: nanoseconds since 1970. `offset_s` is added to it (local time, or a start date).
  Rtc(const DeviceEnv& env, IrqLine irq, const Clock& wall, int64_t offset_s);

  // Bytes 0x0e and up, as firmware expects to find them. Also for the shutdown status (0x0f).
  void SetByte(uint8_t index, uint8_t value);
  uint8_t byte(uint8_t index) const { return ram_[index & 0x7f]; }

  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;
  uint64_t IoRead(uint64_t offset, unsigned size) override;
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override;

 private:
  int64_t NowS() const;  // time of day, in seconds since 1970
  int64_t FractionNs() const;
  bool Updating() const;
  bool Halted() const;
  uint8_t Encode(unsigned value) const;
  unsigned Decode(uint8_t value) const;
  uint8_t EncodeHour(unsigned hour) const;
  unsigned DecodeHour(uint8_t value) const;
  void StoreTime(int64_t seconds);
  int64_t LoadTime() const;
  int64_t NextAlarm(int64_t after_s) const;
  uint64_t PeriodTicks() const;
  void CatchUp();
  void UpdateIrq();
  void ArmTimer();
  void TimerFired();
  uint8_t ReadData();
  void WriteData(uint8_t value);

  IrqLine irq_;
  const Clock& wall_;
  Timer timer_;
  uint8_t index_ = 0;
  std::array<uint8_t, 128> ram_{};
  int64_t offset_s_ = 0;    // time of day less wall clock
  int64_t seen_s_ = 0;      // seconds up to which update and alarm flags are accounted for
  uint64_t seen_tick_ = 0;  // ticks of 32768 Hz up to which the periodic flag is
  bool level_ = false;
};

}  // namespace kvartz
