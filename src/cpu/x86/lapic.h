// The local APIC: xAPIC and x2APIC (SDM vol. 3 ch. 11).
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/x86/cpu.h"
#include "memory/address_space.h"

namespace kvartz::cpu::x86 {

// The board's time and the other APICs, as a local APIC sees them.
class LapicBus {
 public:
  virtual ~LapicBus() = default;
  virtual int64_t NowNs() const = 0;
  // Calls the vCPU thread's attention at guest time `deadline_ns` (or soon after); INT64_MAX:
  // never.
  virtual void ArmTimer(int64_t deadline_ns) = 0;
  virtual void SendIpi(uint64_t icr, bool x2apic_destination) = 0;
  virtual void EndOfInterrupt(uint8_t vector) = 0;  // level-triggered
};

enum class DeliveryMode : uint8_t {
  kFixed,
  kLowestPriority,
  kSmi,
  kReserved,
  kNmi,
  kInit,
  kStartup,
  kExtInt
};

// Owned by its vCPU thread, but for Accept, Matches and priority(), which other threads call while
// it runs: what these touch is accessed atomically. The APIC's clock runs at 1 GHz: one tick a
// nanosecond of guest time.
class Lapic final : public IoHandler {
 public:
  static constexpr uint32_t kHz = 1'000'000'000;

  Lapic(Cpu& cpu, LapicBus& bus, uint32_t apic_id, bool bootstrap);
  void Reset();        // RESET
  void ResetByInit();  // INIT: keeps the id

  // Memory-mapped registers; `offset` within the page.
  uint64_t IoRead(uint64_t offset, unsigned size) override;
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override;
  // x2APIC MSRs 0x800..0x8ff. False: #GP.
  bool ReadMsr(uint32_t index, uint64_t* value);
  bool WriteMsr(uint32_t index, uint64_t value);
  // IA32_APIC_BASE was written: enable, mode.
  void SetBase(uint64_t base);

  // ---- interrupts in: any thread
  void Accept(uint8_t vector, bool level);
  bool Matches(uint32_t destination, bool logical, bool x2apic_destination) const;
  bool accepts_fixed() const { return Load(kSvr) & 0x100; }
  uint32_t priority() const { return Load(kPpr); }
  uint32_t apic_id() const { return apic_id_; }

  // ---- the processor's side: vCPU thread
  // The vector to deliver now, or -1. Acknowledge moves it into service.
  int Pending();
  void Acknowledge(uint8_t vector);
  bool AcceptsPic() const;
  uint64_t cr8() const { return Load(kTpr) >> 4; }
  void SetCr8(uint64_t value);
  // The timer, if its deadline has passed.
  void RunTimer();
  int64_t deadline_ns() const { return deadline_ns_; }
  // TSC-deadline mode, in guest nanoseconds (the engine converts); 0: disarmed.
  bool deadline_mode() const { return (Load(kLvtTimer) >> 17 & 3) == 2; }
  void SetTscDeadline(int64_t at_ns);
  bool x2apic() const { return (base_ & 0xc00) == 0xc00; }
  bool enabled() const { return base_ & 0x800; }

  // ---- state: the register page as KVM_GET_LAPIC gives it
  void Save(uint8_t* page) const;
  void Load(const uint8_t* page);

 private:
  // Register numbers: offset / 16.
  enum Register : uint8_t {
    kId = 0x2,
    kVersion = 0x3,
    kTpr = 0x8,
    kApr = 0x9,
    kPpr = 0xa,
    kEoi = 0xb,
    kRrd = 0xc,
    kLdr = 0xd,
    kDfr = 0xe,
    kSvr = 0xf,
    kIsr = 0x10,
    kTmr = 0x18,
    kIrr = 0x20,
    kEsr = 0x28,
    kLvtCmci = 0x2f,
    kIcrLow = 0x30,
    kIcrHigh = 0x31,
    kLvtTimer = 0x32,
    kLvtThermal = 0x33,
    kLvtPerf = 0x34,
    kLvtLint0 = 0x35,
    kLvtLint1 = 0x36,
    kLvtError = 0x37,
    kInitialCount = 0x38,
    kCurrentCount = 0x39,
    kDivide = 0x3e,
    kSelfIpi = 0x3f,
  };
  uint32_t Load(unsigned reg) const { return __atomic_load_n(&regs_[reg], __ATOMIC_SEQ_CST); }
  void Store(unsigned reg, uint32_t value) {
    __atomic_store_n(&regs_[reg], value, __ATOMIC_SEQ_CST);
  }
  bool ReadRegister(unsigned reg, uint32_t* value);
  bool WriteRegister(unsigned reg, uint32_t value);
  void WriteLvt(unsigned reg, uint32_t value);
  void WriteIcr(uint64_t icr);
  void ReportError(uint32_t bit);
  void EndInterrupt();
  void UpdatePpr();
  int Highest(unsigned first) const;
  void RaiseLvt(unsigned reg);
  void StartTimer();
  uint32_t CurrentCount() const;
  int64_t PeriodNs() const;
  unsigned Divisor() const;
  void SetDeadline(int64_t deadline_ns);
  void ClearRegisters();

  Cpu& cpu_;
  LapicBus& bus_;
  uint32_t apic_id_;
  bool bootstrap_;
  uint64_t base_ = 0;
  uint32_t regs_[64] = {};
  uint32_t pending_esr_ = 0;
  int64_t deadline_ns_ = INT64_MAX;
};

}  // namespace kvartz::cpu::x86
