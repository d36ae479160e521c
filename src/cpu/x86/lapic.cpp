#include "cpu/x86/lapic.h"

#include <algorithm>
#include <bit>

#include "cpu/x86/engine.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr uint32_t kMasked = 1 << 16,
                   kVersionValue = 0x1050014;  // 6 LVT entries, EOI-broadcast suppression
constexpr uint32_t kSuppressBroadcast = 1 << 12, kSoftwareEnable = 1 << 8;
constexpr uint32_t kEsrIllegalSend = 1 << 5, kEsrIllegalReceive = 1 << 6,
                   kEsrIllegalRegister = 1 << 7;

}  // namespace

Lapic::Lapic(Cpu& cpu, LapicBus& bus, uint32_t apic_id, bool bootstrap)
    : cpu_(cpu), bus_(bus), apic_id_(apic_id), bootstrap_(bootstrap) {
  Reset();
}

void Lapic::ClearRegisters() {
  for (unsigned i = 0; i < 64; i++) Store(i, 0);
  Store(kId, x2apic() ? apic_id_ : apic_id_ << 24);
  Store(kVersion, kVersionValue);
  Store(kDfr, 0xffffffff);
  Store(kSvr, 0xff);
  for (unsigned lvt = kLvtTimer; lvt <= kLvtError; lvt++) Store(lvt, kMasked);
  // Virtual wire from the start: what firmware would set up for the PIC.
  if (bootstrap_) Store(kLvtLint0, 0x700);
  if (x2apic()) Store(kLdr, (apic_id_ >> 4) << 16 | 1u << (apic_id_ & 15));
  pending_esr_ = 0;
  SetDeadline(INT64_MAX);
}

void Lapic::Reset() {
  base_ = 0xfee00800 | (bootstrap_ ? 0x100 : 0);
  cpu_.apic_base = base_;
  ClearRegisters();
}

void Lapic::ResetByInit() { ClearRegisters(); }

void Lapic::SetBase(uint64_t base) {
  uint64_t changed = base_ ^ base;
  base_ = base;
  cpu_.apic_base = base;
  if (!(changed & 0xc00)) return;
  if (!enabled()) {
    ClearRegisters();
  } else if (x2apic()) {
    Store(kId, apic_id_);
    Store(kLdr, (apic_id_ >> 4) << 16 | 1u << (apic_id_ & 15));
  } else {
    Store(kId, apic_id_ << 24);
  }
}

// ---- interrupts in

void Lapic::Accept(uint8_t vector, bool level) {
  if (vector < 16) return;
  uint32_t bit = 1u << (vector % 32);
  if (level) {
    __atomic_fetch_or(&regs_[kTmr + vector / 32], bit, __ATOMIC_SEQ_CST);
  } else {
    __atomic_fetch_and(&regs_[kTmr + vector / 32], ~bit, __ATOMIC_SEQ_CST);
  }
  __atomic_fetch_or(&regs_[kIrr + vector / 32], bit, __ATOMIC_SEQ_CST);
}

bool Lapic::Matches(uint32_t destination, bool logical, bool x2apic_destination) const {
  bool x2 = x2apic();
  // xAPIC messages carry 8 bits; their broadcast reaches x2APICs too.
  if (destination == (x2apic_destination ? 0xffffffff : 0xff)) return true;
  if (!logical) return destination == apic_id_;
  uint32_t ldr = Load(kLdr);
  if (x2) {
    return destination >> 16 == ldr >> 16 && (destination & ldr & 0xffff);
  }
  uint32_t mine = ldr >> 24;
  if (Load(kDfr) >> 28 == 0xf) return (destination & mine & 0xff) != 0;
  return (destination & 0xf0) == (mine & 0xf0) && (destination & mine & 0xf);
}

// ---- the processor's side

int Lapic::Highest(unsigned first) const {
  for (int i = 7; i >= 0; i--) {
    uint32_t word = Load(first + static_cast<unsigned>(i));
    if (word) return i * 32 + 31 - std::countl_zero(word);
  }
  return -1;
}

void Lapic::UpdatePpr() {
  uint32_t tpr = Load(kTpr);
  int isr = Highest(kIsr);
  uint32_t isr_class = isr < 0 ? 0 : static_cast<uint32_t>(isr) & 0xf0;
  Store(kPpr, (tpr & 0xf0) >= isr_class ? tpr : isr_class);
}

int Lapic::Pending() {
  if (!enabled() || !(Load(kSvr) & kSoftwareEnable)) return -1;
  int vector = Highest(kIrr);
  if (vector < 0) return -1;
  UpdatePpr();
  return (static_cast<uint32_t>(vector) & 0xf0) > (Load(kPpr) & 0xf0) ? vector : -1;
}

void Lapic::Acknowledge(uint8_t vector) {
  uint32_t bit = 1u << (vector % 32);
  __atomic_fetch_and(&regs_[kIrr + vector / 32], ~bit, __ATOMIC_SEQ_CST);
  Store(kIsr + vector / 32, Load(kIsr + vector / 32) | bit);
  UpdatePpr();
}

bool Lapic::AcceptsPic() const {
  if (!enabled()) return true;
  uint32_t lint0 = Load(kLvtLint0);
  return !(lint0 & kMasked) && (lint0 >> 8 & 7) == static_cast<uint32_t>(DeliveryMode::kExtInt);
}

void Lapic::EndInterrupt() {
  int vector = Highest(kIsr);
  if (vector < 0) return;
  auto word = static_cast<unsigned>(vector) / 32;
  uint32_t bit = 1u << (vector % 32);
  Store(kIsr + word, Load(kIsr + word) & ~bit);
  UpdatePpr();
  bool level = Load(kTmr + word) & bit;
  if (level && !(Load(kSvr) & kSuppressBroadcast))
    bus_.EndOfInterrupt(static_cast<uint8_t>(vector));
  SetRequest(cpu_, request::kInterrupt);
}

void Lapic::SetCr8(uint64_t value) {
  Store(kTpr, static_cast<uint32_t>(value << 4));
  UpdatePpr();
  SetRequest(cpu_, request::kInterrupt);
}

void Lapic::RaiseLvt(unsigned reg) {
  uint32_t lvt = Load(reg);
  if (lvt & kMasked) return;
  auto mode = static_cast<DeliveryMode>(reg == kLvtTimer || reg == kLvtError ? 0 : lvt >> 8 & 7);
  if (mode == DeliveryMode::kFixed) {
    if ((lvt & 0xff) < 16) return ReportError(kEsrIllegalReceive);
    Accept(static_cast<uint8_t>(lvt), false);
    SetRequest(cpu_, request::kInterrupt);
  } else if (mode == DeliveryMode::kNmi) {
    SetRequest(cpu_, request::kNmi);
  }
}

void Lapic::ReportError(uint32_t bit) {
  if (pending_esr_ & bit) return;
  pending_esr_ |= bit;
  if (bit != kEsrIllegalReceive) RaiseLvt(kLvtError);
}

// ---- timer

unsigned Lapic::Divisor() const {
  uint32_t divide = Load(kDivide);
  unsigned code = (divide & 3) | (divide >> 1 & 4);
  return code == 7 ? 1 : 2u << code;
}

int64_t Lapic::PeriodNs() const { return static_cast<int64_t>(Load(kInitialCount)) * Divisor(); }

void Lapic::SetDeadline(int64_t deadline_ns) {
  deadline_ns_ = deadline_ns;
  bus_.ArmTimer(deadline_ns);
}

void Lapic::StartTimer() {
  if (deadline_mode()) return;
  SetDeadline(Load(kInitialCount) ? bus_.NowNs() + PeriodNs() : INT64_MAX);
}

uint32_t Lapic::CurrentCount() const {
  if (deadline_mode() || deadline_ns_ == INT64_MAX) return 0;
  int64_t left = deadline_ns_ - bus_.NowNs();
  if (left <= 0) {
    if ((Load(kLvtTimer) >> 17 & 3) != 1) return 0;
    left = PeriodNs() - (-left) % PeriodNs();
  }
  return static_cast<uint32_t>((left + Divisor() - 1) / Divisor());
}

void Lapic::SetTscDeadline(int64_t at_ns) { SetDeadline(at_ns == 0 ? INT64_MAX : at_ns); }

void Lapic::RunTimer() {
  if (deadline_ns_ == INT64_MAX) return;
  int64_t now = bus_.NowNs();
  if (now < deadline_ns_) {
    bus_.ArmTimer(deadline_ns_);
    return;
  }
  RaiseLvt(kLvtTimer);
  bool periodic = (Load(kLvtTimer) >> 17 & 3) == 1 && PeriodNs() > 0;
  if (!periodic) {
    SetDeadline(INT64_MAX);
    cpu_.vcpu->msrs.tsc_deadline = 0;
    return;
  }
  // Ticks that were missed while the host was busy are dropped.
  int64_t next = deadline_ns_ + PeriodNs();
  if (next <= now) next = now + PeriodNs() - (now - deadline_ns_) % PeriodNs();
  SetDeadline(next);
}

// ---- registers

bool Lapic::ReadRegister(unsigned reg, uint32_t* value) {
  *value = 0;
  switch (reg) {
    case kId:
    case kVersion:
    case kTpr:
    case kLdr:
    case kSvr:
    case kEsr:
    case kIcrLow:
    case kInitialCount:
    case kDivide:
      *value = Load(reg);
      return true;
    case kPpr:
      UpdatePpr();
      *value = Load(reg);
      return true;
    case kCurrentCount:
      *value = CurrentCount();
      return true;
    case kDfr:
    case kIcrHigh:
    case kApr:
    case kRrd:
      *value = Load(reg);
      return !x2apic();
    default:
      break;
  }
  bool readable = (reg >= kIsr && reg < kEsr) || (reg >= kLvtTimer && reg <= kLvtError);
  if (readable) *value = Load(reg);
  return readable;
}

void Lapic::WriteLvt(unsigned reg, uint32_t value) {
  static constexpr uint32_t kWritable[] = {0x700ff, 0x107ff, 0x107ff, 0x1a7ff, 0x1a7ff, 0x100ff};
  value &= kWritable[reg - kLvtTimer];
  if (!(Load(kSvr) & kSoftwareEnable)) value |= kMasked;
  uint32_t before = Load(reg);
  Store(reg, value);
  if (reg == kLvtTimer && (before ^ value) >> 17 & 3) {
    // Another timer mode: disarmed (one-shot and periodic keep counting).
    if ((before >> 17 & 3) == 2 || (value >> 17 & 3) == 2) {
      cpu_.vcpu->msrs.tsc_deadline = 0;
      Store(kInitialCount, 0);
      SetDeadline(INT64_MAX);
    }
  }
  if (reg == kLvtLint0) SetRequest(cpu_, request::kInterrupt);
}

void Lapic::WriteIcr(uint64_t icr) {
  auto mode = static_cast<DeliveryMode>(icr >> 8 & 7);
  bool fixed = mode == DeliveryMode::kFixed || mode == DeliveryMode::kLowestPriority;
  if (fixed && (icr & 0xff) < 16) return ReportError(kEsrIllegalSend);
  bus_.SendIpi(icr, x2apic());
}

bool Lapic::WriteRegister(unsigned reg, uint32_t value) {
  switch (reg) {
    case kId:
      return !x2apic();  // read-only here, as on current processors
    case kTpr:
      Store(kTpr, value & 0xff);
      UpdatePpr();
      SetRequest(cpu_, request::kInterrupt);
      return true;
    case kEoi:
      EndInterrupt();
      return true;
    case kLdr:
      if (x2apic()) return false;
      Store(kLdr, value & 0xff000000);
      return true;
    case kDfr:
      if (x2apic()) return false;
      Store(kDfr, value | 0x0fffffff);
      return true;
    case kSvr:
      Store(kSvr, value & 0x11ff);
      if (!(value & kSoftwareEnable)) {
        for (unsigned lvt = kLvtTimer; lvt <= kLvtError; lvt++) Store(lvt, Load(lvt) | kMasked);
      }
      SetRequest(cpu_, request::kInterrupt);
      return true;
    case kEsr:
      Store(kEsr, pending_esr_);
      pending_esr_ = 0;
      return true;
    case kIcrLow:
      Store(kIcrLow, value & ~0x1000u);  // delivered at once: the status bit stays 0
      WriteIcr(uint64_t{Load(kIcrHigh)} << 32 | value);
      return true;
    case kIcrHigh:
      Store(kIcrHigh, value & 0xff000000);
      return !x2apic();
    case kInitialCount:
      if (deadline_mode()) return true;
      Store(kInitialCount, value);
      StartTimer();
      return true;
    case kDivide:
      Store(kDivide, value & 0xb);
      if (Load(kInitialCount)) StartTimer();
      return true;
    case kSelfIpi:
      if (!x2apic()) return false;
      Accept(static_cast<uint8_t>(value), false);
      SetRequest(cpu_, request::kInterrupt);
      return true;
    default:
      break;
  }
  if (reg < kLvtTimer || reg > kLvtError) return false;
  WriteLvt(reg, value);
  return true;
}

uint64_t Lapic::IoRead(uint64_t offset, unsigned size) {
  uint32_t value = 0;
  if (x2apic() || (offset & 0xf) >= 4) return 0;
  auto reg = static_cast<unsigned>(offset >> 4);
  if (reg >= 64 || !ReadRegister(reg, &value)) {
    ReportError(kEsrIllegalRegister);
    return 0;
  }
  return value >> (offset & 3) * 8;
}

void Lapic::IoWrite(uint64_t offset, unsigned size, uint64_t value) {
  // Registers are written whole; other accesses are undefined.
  if (x2apic() || (offset & 0xf) || size < 4) return;
  auto reg = static_cast<unsigned>(offset >> 4);
  if (reg >= 64 || !WriteRegister(reg, static_cast<uint32_t>(value)))
    ReportError(kEsrIllegalRegister);
}

bool Lapic::ReadMsr(uint32_t index, uint64_t* value) {
  unsigned reg = index - 0x800;
  if (!x2apic() || reg >= 64) return false;
  if (reg == kIcrLow) {
    *value = uint64_t{Load(kIcrHigh)} << 32 | Load(kIcrLow);
    return true;
  }
  uint32_t low = 0;
  if (reg == kEoi || reg == kSelfIpi || !ReadRegister(reg, &low)) return false;
  *value = low;
  return true;
}

bool Lapic::WriteMsr(uint32_t index, uint64_t value) {
  unsigned reg = index - 0x800;
  if (!x2apic() || reg >= 64) return false;
  if (reg == kIcrLow) {
    if (value & 0xfff33000ull) return false;
    Store(kIcrLow, static_cast<uint32_t>(value));
    Store(kIcrHigh, static_cast<uint32_t>(value >> 32));
    WriteIcr(value);
    return true;
  }
  if (value >> 32) return false;
  if ((reg == kEoi || reg == kEsr) && value != 0) return false;
  if (reg == kTpr && value > 0xff) return false;
  return WriteRegister(reg, static_cast<uint32_t>(value));
}

// ---- state

void Lapic::Save(uint8_t* page) const {
  for (unsigned i = 0; i < 64; i++) {
    uint32_t value = i == kCurrentCount ? CurrentCount() : Load(i);
    std::memcpy(page + i * 16, &value, 4);
  }
}

void Lapic::Load(const uint8_t* page) {
  base_ = cpu_.apic_base;
  for (unsigned i = 0; i < 64; i++) {
    uint32_t value;
    std::memcpy(&value, page + i * 16, 4);
    Store(i, value);
  }
  Store(kId, x2apic() ? apic_id_ : apic_id_ << 24);
  Store(kVersion, kVersionValue);
  uint32_t left = Load(kCurrentCount);
  if (!deadline_mode())
    SetDeadline(left ? bus_.NowNs() + static_cast<int64_t>(left) * Divisor() : INT64_MAX);
  SetRequest(cpu_, request::kInterrupt);
}

}  // namespace kvartz::cpu::x86
