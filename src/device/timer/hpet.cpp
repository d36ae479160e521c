#include "device/timer/hpet.h"

#include "device/timer/ticks.h"

namespace kvartz {

namespace {
constexpr uint64_t kCapabilities = 0x000, kConfig = 0x010, kStatus = 0x020, kCounter = 0x0f0,
                   kComparators = 0x100, kStride = 0x20;
constexpr uint64_t kComparatorConfig = 0x00, kComparatorValue = 0x08, kComparatorFsb = 0x10;
constexpr uint64_t kEnable = 1 << 0, kLegacyReplacement = 1 << 1;
constexpr uint64_t kLegacyCapable = 1 << 15, kCounter64 = 1 << 13, kRevision = 1;
constexpr uint64_t kPeriodFs = 1'000'000'000'000'000 / Hpet::kFrequency;
// Comparator configuration.
constexpr uint64_t kLevel = 1 << 1, kInterrupt = 1 << 2, kPeriodic = 1 << 3,
                   kPeriodicCapable = 1 << 4, kSize64 = 1 << 5, kSetValue = 1 << 6,
                   kMode32 = 1 << 8, kFsbEnable = 1 << 14, kFsbCapable = 1 << 15;
constexpr uint64_t kWritable =
    kLevel | kInterrupt | kPeriodic | kSetValue | kMode32 | 0x1f << 9 | kFsbEnable;
constexpr unsigned kRouteShift = 9;
}  // namespace

Hpet::Hpet(const DeviceEnv& env, Wiring wiring) : MmioDevice(env), wiring_(std::move(wiring)) {
  for (unsigned i = 0; i < kTimers; i++) {
    comparators_[i].timer = std::make_unique<Timer>(env.loop, env.clock, [this, i] {
      LockGuard guard(lock());
      Fired(i);
    });
  }
  Reset(ResetPhase::kEnter);
}

uint64_t Hpet::Counter() const {
  if (!(config_ & kEnable)) return counter_;
  return counter_ + NsToTicks(env_.clock.NowNs() - start_ns_, kFrequency);
}

bool Hpet::Legacy() const { return config_ & kLegacyReplacement; }

unsigned Hpet::Line(unsigned index) const {
  if (Legacy() && index < 2) return index == 0 ? 0 : 8;
  return comparators_[index].config >> kRouteShift & 0x1f;
}

void Hpet::Drive(unsigned index, bool level) {
  Comparator& c = comparators_[index];
  if (level == c.driven) return;
  c.driven = level;
  wiring_.gsis->SetIrq(Line(index), level);
}

// The counter has reached the comparator.
void Hpet::Fired(unsigned index) {
  Comparator& c = comparators_[index];
  uint64_t now = Counter();
  if (!(config_ & kEnable)) return;
  if (c.config & kPeriodic) {
    if (c.period == 0) return;
    // Those that passed meanwhile are one interrupt; the phase stays.
    uint64_t mask = c.config & kMode32 ? 0xffffffffull : ~0ull;
    uint64_t behind = (now - c.compare) & mask;
    if (behind > mask / 2) {  // early
      Arm(index);
      return;
    }
    c.compare = (c.compare + (behind / c.period + 1) * c.period) & mask;
  }
  if (c.config & kLevel) status_ |= 1u << index;
  if (c.config & kInterrupt) {
    if (c.config & kFsbEnable) {
      env_.msi.SendMsi(c.fsb >> 32, c.fsb);
    } else if (c.config & kLevel) {
      Drive(index, true);
    } else {
      Drive(index, true);
      Drive(index, false);
    }
  }
  if (c.config & kPeriodic) Arm(index);
}

void Hpet::Arm(unsigned index) {
  Comparator& c = comparators_[index];
  bool wanted = (config_ & kEnable) && ((c.config & kInterrupt) || (c.config & kLevel));
  if (!wanted || ((c.config & kPeriodic) && c.period == 0)) {
    c.timer->Cancel();
    return;
  }
  uint64_t now = Counter();
  uint64_t mask = c.config & kMode32 ? 0xffffffffull : ~0ull;
  uint64_t ticks = (c.compare - now) & mask;
  int64_t now_ns = env_.clock.NowNs();
  c.timer->Arm(TimerDeadline(now_ns, TicksToNs(ticks, kFrequency), now_ns));
}

void Hpet::ArmAll() {
  for (unsigned i = 0; i < kTimers; i++) Arm(i);
}

uint64_t Hpet::ReadRegister(uint64_t offset) const {
  switch (offset) {
    case kCapabilities:
      return kPeriodFs << 32 | uint64_t{0x8086} << 16 | (wiring_.replaced ? kLegacyCapable : 0) |
             kCounter64 | (kTimers - 1) << 8 | kRevision;
    case kConfig:
      return config_;
    case kStatus:
      return status_;
    case kCounter:
      return Counter();
  }
  if (offset < kComparators || offset >= kComparators + kTimers * kStride) return 0;
  const Comparator& c = comparators_[(offset - kComparators) / kStride];
  switch ((offset - kComparators) % kStride) {
    case kComparatorConfig:
      return c.config | kPeriodicCapable | kSize64 | kFsbCapable | uint64_t{wiring_.routes} << 32;
    case kComparatorValue:
      return c.compare;
    case kComparatorFsb:
      return c.fsb;
  }
  return 0;
}

void Hpet::WriteConfig(uint64_t value) {
  uint64_t writable = kEnable | (wiring_.replaced ? kLegacyReplacement : 0);
  value &= writable;
  uint64_t changed = config_ ^ value;
  if (changed & kLegacyReplacement) {
    for (unsigned i = 0; i < kTimers; i++) Drive(i, false);
  }
  uint64_t counter = Counter();
  config_ = value;
  if (changed & kEnable) {
    counter_ = counter;
    start_ns_ = env_.clock.NowNs();
  }
  if (changed & kLegacyReplacement) wiring_.replaced(Legacy());
  ArmAll();
}

void Hpet::WriteComparator(unsigned index, uint64_t reg, uint64_t value, uint64_t mask) {
  Comparator& c = comparators_[index];
  if (reg == kComparatorFsb) c.fsb = (c.fsb & ~mask) | (value & mask);
  if (reg == kComparatorConfig) {
    Drive(index, false);
    uint64_t writable = kWritable & mask;
    c.config = (c.config & ~writable) | (value & writable);
    if (c.config & kMode32) {
      c.compare &= 0xffffffff;
      c.period &= 0xffffffff;
    }
    if (!(c.config & kLevel)) status_ &= ~(1ull << index);
    Arm(index);
  }
  if (reg == kComparatorValue) {
    if (c.config & kMode32) mask &= 0xffffffff;
    // Periodic: the write goes to the period, and to the comparator if it was announced
    // (2.3.9.2.2).
    if (!(c.config & kPeriodic) || (c.config & kSetValue))
      c.compare = (c.compare & ~mask) | (value & mask);
    if (c.config & kPeriodic) c.period = (c.period & ~mask) | (value & mask);
    c.config &= ~kSetValue;
    Arm(index);
  }
}

void Hpet::WriteRegister(uint64_t offset, uint64_t value, uint64_t mask) {
  switch (offset) {
    case kConfig:
      WriteConfig((config_ & ~mask) | (value & mask));
      return;
    case kStatus:
      for (unsigned i = 0; i < kTimers; i++) {
        if (!(value & mask & status_ & 1u << i)) continue;
        status_ &= ~(1ull << i);
        Drive(i, false);
      }
      return;
    case kCounter:
      if (config_ & kEnable) return;  // undefined while it runs
      counter_ = (counter_ & ~mask) | (value & mask);
      return;
  }
  if (offset < kComparators || offset >= kComparators + kTimers * kStride) return;
  WriteComparator((offset - kComparators) / kStride, (offset - kComparators) % kStride, value,
                  mask);
}

uint64_t Hpet::IoRead(uint64_t offset, unsigned size) {
  return ReadRegister(offset & ~7ull) >> (8 * (offset & 7));
}

void Hpet::IoWrite(uint64_t offset, unsigned size, uint64_t value) {
  unsigned shift = 8 * (offset & 7);
  uint64_t mask = (size == 8 ? ~0ull : (1ull << (8 * size)) - 1) << shift;
  WriteRegister(offset & ~7ull, value << shift, mask);
}

void Hpet::Reset(ResetPhase phase) {
  if (phase == ResetPhase::kEnter) {
    config_ = status_ = counter_ = 0;
    for (Comparator& c : comparators_) {
      c.timer->Cancel();
      c.config = c.period = c.fsb = 0;
      c.compare = ~0ull;
    }
  }
  if (phase == ResetPhase::kHold) {
    for (unsigned i = 0; i < kTimers; i++) Drive(i, false);
    if (wiring_.replaced) wiring_.replaced(false);
  }
}

void Hpet::VisitState(StateVisitor& v) {
  v.Version(1);
  v.Field("config", config_);
  v.Field("status", status_);
  uint64_t counter = Counter();
  v.Field("counter", counter);
  constexpr const char* kNames[] = {"timer0", "timer1", "timer2"};
  for (unsigned i = 0; i < kTimers; i++) {
    Comparator& c = comparators_[i];
    v.Section(kNames[i], [&] {
      v.Field("config", c.config);
      v.Field("compare", c.compare);
      v.Field("period", c.period);
      v.Field("fsb", c.fsb);
      v.Field("driven", c.driven);
    });
  }
  if (!v.loading() || v.failed()) return;
  config_ &= kEnable | (wiring_.replaced ? kLegacyReplacement : 0);
  counter_ = counter;
  start_ns_ = env_.clock.NowNs();
  for (Comparator& c : comparators_) c.config &= kWritable;
  for (unsigned i = 0; i < kTimers; i++) {
    if (comparators_[i].driven) wiring_.gsis->SetIrq(Line(i), true);
  }
  if (wiring_.replaced) wiring_.replaced(Legacy());
  ArmAll();
}

}  // namespace kvartz
