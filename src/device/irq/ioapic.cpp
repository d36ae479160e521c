#include "device/irq/ioapic.h"

#include <fmt/core.h>

#include "base/log.h"

namespace kvartz {

namespace {
constexpr uint64_t kSelect = 0x00, kWindow = 0x10, kEoi = 0x40;
constexpr uint8_t kRegId = 0, kRegVersion = 1, kRegArbitration = 2, kRegTable = 0x10;
constexpr uint32_t kVersion = 0x20 | (IoApic::kPins - 1) << 16;

// Redirection entry.
constexpr uint64_t kRemoteIrr = 1 << 14, kLevel = 1 << 15, kMasked = 1 << 16;
constexpr uint64_t kReadOnly = 1 << 12 | kRemoteIrr;
constexpr uint64_t kWritable = 0xff000000'0001ffffull & ~kReadOnly;
constexpr unsigned kLowestPriority = 1, kExtInt = 7;
}  // namespace

void IoApic::ResetRegisters() {
  select_ = 0;
  id_ = 0;
  pending_ = 0;
  entries_.fill(kMasked);
}

void IoApic::Reset(ResetPhase phase) {
  if (phase == ResetPhase::kEnter) ResetRegisters();
}

void IoApic::SetIrq(unsigned pin, bool level) {
  if (pin >= kPins) return;
  LockGuard guard(lock());
  uint32_t bit = 1u << pin;
  bool before = lines_ & bit;
  lines_ = level ? lines_ | bit : lines_ & ~bit;
  if (entries_[pin] & kLevel) {
    pending_ = level ? pending_ | bit : pending_ & ~bit;
  } else if (level && !before && !(entries_[pin] & kMasked)) {
    pending_ |= bit;  // an edge at a masked pin is lost (82093AA, 3.2.4)
  }
  Service(pin);
}

void IoApic::Service(unsigned pin) {
  uint32_t bit = 1u << pin;
  uint64_t& entry = entries_[pin];
  if (!(pending_ & bit) || (entry & kMasked)) return;
  if (entry & kLevel) {
    if (entry & kRemoteIrr) return;
    entry |= kRemoteIrr;
  } else {
    pending_ &= ~bit;
  }
  unsigned mode = entry >> 8 & 7;
  if (mode == kExtInt) {
    KLOG_GUEST("ioapic: pin {} asks for ExtINT, which only LINT0 gives", pin);
    return;
  }
  // The message of an entry: SDM vol. 3, 11.11. The destination's upper bits (extended destination
  // id) aren't used.
  uint64_t destination = entry >> 56;
  bool logical = entry >> 11 & 1;
  uint64_t address =
      0xfee00000 | destination << 12 | (mode == kLowestPriority ? 8 : 0) | (logical ? 4 : 0);
  uint32_t data = (entry & 0x7ff) | (entry & kLevel) | 1 << 14;
  env_.msi.SendMsi(address, data);
}

void IoApic::EndOfInterrupt(uint8_t vector) {
  LockGuard guard(lock());
  EndLocked(vector);
}

void IoApic::EndLocked(uint8_t vector) {
  for (unsigned pin = 0; pin < kPins; pin++) {
    uint64_t& entry = entries_[pin];
    if ((entry & 0xff) != vector || !(entry & kLevel) || !(entry & kRemoteIrr)) continue;
    entry &= ~kRemoteIrr;
    Service(pin);
  }
}

uint32_t IoApic::ReadRegister() const {
  switch (select_) {
    case kRegId:
    case kRegArbitration:
      return uint32_t{id_} << 24;
    case kRegVersion:
      return kVersion;
  }
  unsigned pin = (select_ - kRegTable) / 2;
  if (select_ < kRegTable || pin >= kPins) return 0;
  return select_ & 1 ? entries_[pin] >> 32 : entries_[pin];
}

void IoApic::WriteRegister(uint32_t value) {
  if (select_ == kRegId) id_ = value >> 24 & 0xf;
  unsigned pin = (select_ - kRegTable) / 2;
  if (select_ < kRegTable || pin >= kPins) return;
  uint64_t& entry = entries_[pin];
  uint64_t wide = select_ & 1 ? uint64_t{value} << 32 : value;
  uint64_t mask = kWritable & (select_ & 1 ? 0xffffffff00000000ull : 0xffffffffull);
  entry = (entry & ~mask) | (wide & mask);
  uint32_t bit = 1u << pin;
  if (entry & kLevel) {
    pending_ = (pending_ & ~bit) | (lines_ & bit);
  } else {
    entry &= ~kRemoteIrr;  // what Linux relies on to end a level interrupt without an EOI register
    if (entry & kMasked) pending_ &= ~bit;
  }
  Service(pin);
}

uint64_t IoApic::IoRead(uint64_t offset, unsigned) {
  if (offset == kSelect) return select_;
  if (offset == kWindow) return ReadRegister();
  return 0;
}

void IoApic::IoWrite(uint64_t offset, unsigned size, uint64_t value) {
  if (offset == kSelect) select_ = value;
  if (offset == kWindow && size == 4) WriteRegister(value);
  if (offset == kEoi) EndLocked(value);
}

void IoApic::VisitState(StateVisitor& v) {
  v.Version(1);
  v.Field("select", select_);
  v.Field("id", id_);
  v.Field("lines", lines_);
  v.Field("pending", pending_);
  v.Field("entries", entries_);
  if (!v.loading() || v.failed()) return;
  lines_ &= (1u << kPins) - 1;
  pending_ &= (1u << kPins) - 1;
  for (uint64_t& entry : entries_) entry &= kWritable | kRemoteIrr;
}

}  // namespace kvartz
