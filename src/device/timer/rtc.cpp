#include "device/timer/rtc.h"

#include <algorithm>

#include "device/timer/ticks.h"

namespace kvartz {

namespace {
constexpr uint8_t kSeconds = 0, kSecondsAlarm = 1, kMinutes = 2, kMinutesAlarm = 3, kHours = 4,
                  kHoursAlarm = 5, kDayOfWeek = 6, kDay = 7, kMonth = 8, kYear = 9, kRegA = 10,
                  kRegB = 11, kRegC = 12, kRegD = 13;
constexpr uint8_t kUpdateInProgress = 0x80;  // A
constexpr uint8_t kSet = 0x80, kPie = 0x40, kAie = 0x20, kUie = 0x10, kBinary = 0x04,
                  k24Hours = 0x02;                                   // B
constexpr uint8_t kIrqf = 0x80, kPf = 0x40, kAf = 0x20, kUf = 0x10;  // C
constexpr uint8_t kValid = 0x80;                                     // D
constexpr int64_t kSecond = 1000000000;
constexpr int64_t kUpdateLeadNs = 244'000;  // UIP is set that long before the time changes
constexpr uint64_t kTickHz = 32768;
constexpr int64_t kDaySeconds = 86400;

int64_t FloorDiv(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Proleptic Gregorian calendar, as days since 1970-01-01.
int64_t DaysOf(int64_t year, unsigned month, unsigned day) {
  year -= month <= 2;
  int64_t era = FloorDiv(year, 400);
  unsigned year_of_era = year - era * 400;
  unsigned day_of_year = (153 * (month > 2 ? month - 3 : month + 9) + 2) / 5 + day - 1;
  unsigned day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
  return era * 146097 + day_of_era - 719468;
}
struct Date {
  int64_t year;
  unsigned month, day;
};
Date DateOf(int64_t days) {
  days += 719468;
  int64_t era = FloorDiv(days, 146097);
  unsigned day_of_era = days - era * 146097;
  unsigned year_of_era =
      (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146096) / 365;
  unsigned day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
  unsigned shifted = (5 * day_of_year + 2) / 153;
  unsigned month = shifted < 10 ? shifted + 3 : shifted - 9;
  return {year_of_era + era * 400 + (month <= 2), month, day_of_year - (153 * shifted + 2) / 5 + 1};
}
}  // namespace

Rtc::Rtc(const DeviceEnv& env, IrqLine irq, const Clock& wall, int64_t offset_s)
    : MmioDevice(env),
      irq_(irq),
      wall_(wall),
      timer_(env.loop, env.clock, [this] { TimerFired(); }),
      offset_s_(offset_s) {
  ram_[kRegA] = 0x26;
  ram_[kRegB] = k24Hours;
  seen_s_ = NowS();
}

void Rtc::SetByte(uint8_t index, uint8_t value) { ram_[index & 0x7f] = value; }

int64_t Rtc::NowS() const { return FloorDiv(wall_.NowNs(), kSecond) + offset_s_; }

// Since the second began.
int64_t Rtc::FractionNs() const {
  int64_t wall = wall_.NowNs();
  return wall - FloorDiv(wall, kSecond) * kSecond;
}

// SET, or a divider held in reset, stops the clock.
bool Rtc::Halted() const { return (ram_[kRegB] & kSet) || (ram_[kRegA] & 0x60) == 0x60; }

bool Rtc::Updating() const { return !Halted() && FractionNs() >= kSecond - kUpdateLeadNs; }

uint8_t Rtc::Encode(unsigned value) const {
  return ram_[kRegB] & kBinary ? value : value / 10 << 4 | value % 10;
}

unsigned Rtc::Decode(uint8_t value) const {
  return ram_[kRegB] & kBinary ? value : (value >> 4) * 10 + (value & 15);
}

uint8_t Rtc::EncodeHour(unsigned hour) const {
  if (ram_[kRegB] & k24Hours) return Encode(hour);
  return Encode(hour % 12 == 0 ? 12 : hour % 12) | (hour >= 12 ? 0x80 : 0);
}

unsigned Rtc::DecodeHour(uint8_t value) const {
  if (ram_[kRegB] & k24Hours) return Decode(value);
  return Decode(value & 0x7f) % 12 + (value & 0x80 ? 12 : 0);
}

void Rtc::StoreTime(int64_t seconds) {
  int64_t days = FloorDiv(seconds, kDaySeconds);
  unsigned time = seconds - days * kDaySeconds;
  Date date = DateOf(days);
  ram_[kSeconds] = Encode(time % 60);
  ram_[kMinutes] = Encode(time / 60 % 60);
  ram_[kHours] = EncodeHour(time / 3600);
  ram_[kDayOfWeek] =
      Encode((days + 4 - FloorDiv(days + 4, 7) * 7) + 1);  // 1970-01-01 was a Thursday; Sunday is 1
  ram_[kDay] = Encode(date.day);
  ram_[kMonth] = Encode(date.month);
  ram_[kYear] = Encode(date.year % 100);
  ram_[kCentury] = Encode(date.year / 100 % 100);
}

// The time that the registers show, whatever the guest wrote there.
int64_t Rtc::LoadTime() const {
  unsigned month = std::clamp(Decode(ram_[kMonth]), 1u, 12u),
           day = std::clamp(Decode(ram_[kDay]), 1u, 31u);
  int64_t year = Decode(ram_[kCentury]) * 100 + Decode(ram_[kYear]);
  return DaysOf(year, month, day) * kDaySeconds + DecodeHour(ram_[kHours]) * 3600 +
         Decode(ram_[kMinutes]) * 60 + Decode(ram_[kSeconds]);
}

// The first second after `after_s` at which the alarm matches. A field of 11xxxxxx matches always.
int64_t Rtc::NextAlarm(int64_t after_s) const {
  auto any = [](uint8_t value) { return value >= 0xc0; };
  unsigned second = Decode(ram_[kSecondsAlarm]), minute = Decode(ram_[kMinutesAlarm]),
           hour = DecodeHour(ram_[kHoursAlarm]);
  bool any_second = any(ram_[kSecondsAlarm]), any_minute = any(ram_[kMinutesAlarm]),
       any_hour = any(ram_[kHoursAlarm]);
  if ((!any_second && second > 59) || (!any_minute && minute > 59) || (!any_hour && hour > 23))
    return INT64_MAX;
  int64_t t = after_s + 1;
  // Each step jumps to the next candidate of the field that doesn't match; hours wrap at most once.
  for (int step = 0; step < 8; step++) {
    unsigned time = t - FloorDiv(t, kDaySeconds) * kDaySeconds;
    if (!any_hour && time / 3600 != hour) {
      t += ((hour + 24 - time / 3600) % 24) * 3600 - time % 3600;
    } else if (!any_minute && time / 60 % 60 != minute) {
      t += ((minute + 60 - time / 60 % 60) % 60) * 60 - time % 60;
    } else if (!any_second && time % 60 != second) {
      t += (second + 60 - time % 60) % 60;
    } else {
      return t;
    }
  }
  return INT64_MAX;
}

// Length of the periodic interrupt in ticks of 32768 Hz; 0: off.
uint64_t Rtc::PeriodTicks() const {
  unsigned rate = ram_[kRegA] & 15, divider = ram_[kRegA] >> 4 & 7;
  if (rate == 0 || divider > 2) return 0;
  if (rate <= 2) rate += 7;
  return 1ull << (rate - 1);
}

// Sets the flags of what happened since the last look.
void Rtc::CatchUp() {
  if (!Halted()) {
    int64_t now_s = NowS();
    if (now_s > seen_s_) {
      ram_[kRegC] |= kUf;
      if (NextAlarm(seen_s_) <= now_s) ram_[kRegC] |= kAf;
    }
    seen_s_ = now_s;
  }
  uint64_t tick = NsToTicks(env_.clock.NowNs(), kTickHz);
  if (uint64_t period = PeriodTicks(); period && tick / period != seen_tick_ / period)
    ram_[kRegC] |= kPf;
  seen_tick_ = tick;
  UpdateIrq();
}

void Rtc::UpdateIrq() {
  bool level = ram_[kRegC] & ram_[kRegB] & (kPf | kAf | kUf);
  ram_[kRegC] = level ? ram_[kRegC] | kIrqf : ram_[kRegC] & ~kIrqf;
  if (level == level_) return;
  level_ = level;
  irq_.Set(level);
}

// Only for events whose interrupt is enabled; flags that are polled are found by CatchUp.
void Rtc::ArmTimer() {
  int64_t now = env_.clock.NowNs(), deadline = INT64_MAX;
  uint8_t enabled =
      ram_[kRegB] & ~ram_[kRegC];  // a flag that is set already has nothing to wait for
  if (uint64_t period = PeriodTicks(); period && (enabled & kPie)) {
    uint64_t next = (NsToTicks(now, kTickHz) / period + 1) * period;
    deadline = TimerDeadline(0, TicksToNs(next, kTickHz), now);
  }
  if (!Halted() && (enabled & (kUie | kAie))) {
    int64_t now_s = NowS();
    int64_t event_s = enabled & kUie ? now_s + 1 : NextAlarm(now_s);
    if (event_s != INT64_MAX) {
      deadline =
          std::min(deadline, TimerDeadline(now, (event_s - now_s) * kSecond - FractionNs(), now));
    }
  }
  if (deadline == INT64_MAX) {
    timer_.Cancel();
  } else {
    timer_.Arm(deadline);
  }
}

void Rtc::TimerFired() {
  LockGuard guard(lock());
  CatchUp();
  ArmTimer();
}

uint8_t Rtc::ReadData() {
  switch (index_) {
    case kSeconds:
    case kMinutes:
    case kHours:
    case kDayOfWeek:
    case kDay:
    case kMonth:
    case kYear:
    case kCentury:
      if (!Halted()) StoreTime(NowS());
      return ram_[index_];
    case kRegA:
      return ram_[kRegA] | (Updating() ? kUpdateInProgress : 0);
    case kRegC: {
      CatchUp();
      uint8_t value = ram_[kRegC];
      ram_[kRegC] = 0;
      UpdateIrq();
      ArmTimer();
      return value;
    }
    case kRegD:
      return kValid;
    default:
      return ram_[index_];
  }
}

void Rtc::WriteData(uint8_t value) {
  switch (index_) {
    case kSeconds:
    case kMinutes:
    case kHours:
    case kDayOfWeek:
    case kDay:
    case kMonth:
    case kYear:
    case kCentury:
      if (!Halted()) StoreTime(NowS());
      ram_[index_] = value;
      if (!Halted()) {
        CatchUp();
        offset_s_ += LoadTime() - NowS();  // the fraction of the second goes on
        seen_s_ = NowS();
      }
      break;
    case kRegA:
    case kRegB: {
      CatchUp();
      bool was_halted = Halted();
      if (!was_halted) StoreTime(NowS());
      if (index_ == kRegA) {
        ram_[kRegA] = value & ~kUpdateInProgress;
      } else {
        // SET ends the update interrupt enable (MC146818A, register B).
        ram_[kRegB] = value & kSet ? value & ~kUie : value;
      }
      if (was_halted && !Halted()) {
        offset_s_ += LoadTime() - NowS();
        seen_s_ = NowS();
      } else if (!was_halted && !Halted()) {
        StoreTime(NowS());  // the format may have changed
      }
      UpdateIrq();
      break;
    }
    case kRegC:
    case kRegD:
      break;
    default:
      ram_[index_] = value;
      if (index_ == kSecondsAlarm || index_ == kMinutesAlarm || index_ == kHoursAlarm) CatchUp();
  }
  ArmTimer();
}

uint64_t Rtc::IoRead(uint64_t offset, unsigned) { return offset == 0 ? 0xff : ReadData(); }

void Rtc::IoWrite(uint64_t offset, unsigned, uint64_t value) {
  if (offset == 0) {
    index_ = value & 0x7f;  // bit 7 masks NMI
  } else {
    WriteData(value);
  }
}

void Rtc::Reset(ResetPhase phase) {
  // The clock has a battery: reset only ends interrupts.
  if (phase == ResetPhase::kEnter) {
    index_ = 0;
    ram_[kRegB] &= ~(kPie | kAie | kUie);
    ram_[kRegC] = 0;
    timer_.Cancel();
  }
  if (phase == ResetPhase::kHold) {
    level_ = false;
    irq_.Set(false);
  }
}

void Rtc::VisitState(StateVisitor& v) {
  v.Version(1);
  v.Field("index", index_);
  v.Field("ram", ram_);
  v.Field("offset_s", offset_s_);
  v.Field("seen_s", seen_s_);
  v.Field("seen_tick", seen_tick_);
  if (!v.loading() || v.failed()) return;
  constexpr int64_t kMost =
      20000ll * 366 * kDaySeconds;  // further than four digits of a year can go
  offset_s_ = std::clamp(offset_s_, -kMost, kMost);
  seen_s_ = std::clamp(seen_s_, -kMost, kMost);
  index_ &= 0x7f;
  level_ = ram_[kRegC] & kIrqf;
  irq_.Set(level_);
  ArmTimer();
}

}  // namespace kvartz
