// High precision event timer, 3 comparators.     Threads: guarded by its slot; its timers run on
// the main loop. Spec: IA-PC HPET specification 1.0a, 2.3. Modelled: 64-bit counter at 100 MHz,
// one-shot and periodic, 32-bit mode, edge and level, legacy replacement (where the board says so),
// delivery by message. Periods that passed meanwhile are one interrupt.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>

#include "device/core/device.h"

namespace kvartz {

class Hpet final : public MmioDevice {
 public:
  static constexpr uint64_t kBase = 0xfed00000, kSize = 0x400;
  static constexpr uint64_t kFrequency = 100'000'000;  // a tick is 10 ns
  static constexpr unsigned kTimers = 3;

  struct Wiring {
    IrqSink* gsis = nullptr;
    uint32_t routes = 0;  // GSIs that a timer may be routed to
    // Legacy replacement: timer 0 takes the place of the PIT at GSI 0, timer 1 that of the RTC at
    // 8; `replaced` is told. Null: not offered.
    std::function<void(bool legacy)> replaced;
  };
  Hpet(const DeviceEnv& env, Wiring wiring);

  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;
  uint64_t IoRead(uint64_t offset, unsigned size) override;
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override;

 private:
  struct Comparator {
    uint64_t config = 0;
    uint64_t compare = 0;
    uint64_t period = 0;
    uint64_t fsb = 0;
    bool driven = false;  // level of its line
    std::unique_ptr<Timer> timer;
  };
  uint64_t Counter() const;
  uint64_t ReadRegister(uint64_t offset) const;
  void WriteRegister(uint64_t offset, uint64_t value, uint64_t mask);
  void WriteConfig(uint64_t value);
  void WriteComparator(unsigned index, uint64_t reg, uint64_t value, uint64_t mask);
  bool Legacy() const;
  unsigned Line(unsigned index) const;
  void Fired(unsigned index);
  void Drive(unsigned index, bool level);
  void Arm(unsigned index);
  void ArmAll();

  const Wiring wiring_;
  uint64_t config_ = 0;
  uint64_t status_ = 0;
  uint64_t counter_ = 0;  // when stopped; else its value at start_ns_
  int64_t start_ns_ = 0;
  std::array<Comparator, kTimers> comparators_;
};

}  // namespace kvartz
