#include "device/core/acpi_pm.h"

#include "device/timer/ticks.h"

namespace kvartz {

namespace {
constexpr uint16_t kTimerOverflow = 1 << 0, kPowerButton = 1 << 8;
constexpr uint16_t kStatusBits = 0x8531, kEnableBits = 0x0521;
constexpr uint16_t kSciEnable = 1 << 0, kSleepEnable = 1 << 13;
constexpr uint16_t kControlBits = 0x1c06;  // SLP_TYP, GBL_RLS, BM_RLD
constexpr unsigned kHalfShift = 23;        // the status bit is set when bit 23 changes
}  // namespace

AcpiPm::AcpiPm(const DeviceEnv& env, Mutex& lock, IrqLine sci)
    : env_(env), lock_(lock), sci_(sci), timer_(env.loop, env.clock, [this] {
        LockGuard guard(lock_);
        CatchUp();
        Update();
      }) {}

uint64_t AcpiPm::Ticks() const { return NsToTicks(env_.clock.NowNs(), kTimerFrequency); }

void AcpiPm::CatchUp() {
  uint64_t half = Ticks() >> kHalfShift;
  if (half != seen_half_) pm1_status_ |= kTimerOverflow;
  seen_half_ = half;
}

void AcpiPm::Update() {
  sci_.Set((pm1_status_ & pm1_enable_) || (gpe_status_ & gpe_enable_));
  if ((pm1_enable_ & kTimerOverflow) && !(pm1_status_ & kTimerOverflow)) {
    int64_t now = env_.clock.NowNs();
    timer_.Arm(TimerDeadline(
        0, TicksToNs(((Ticks() >> kHalfShift) + 1) << kHalfShift, kTimerFrequency), now));
  } else {
    timer_.Cancel();
  }
}

void AcpiPm::PressPowerButton() {
  pm1_status_ |= kPowerButton;
  Update();
}

void AcpiPm::RaiseGpe(unsigned event) {
  gpe_status_ |= 1 << (event & 15);
  Update();
}

void AcpiPm::Reset(ResetPhase phase) {
  if (phase == ResetPhase::kEnter) {
    pm1_status_ = pm1_enable_ = pm1_control_ = gpe_status_ = gpe_enable_ = 0;
    seen_half_ = Ticks() >> kHalfShift;
    timer_.Cancel();
  }
  if (phase == ResetPhase::kHold) sci_.Set(false);
}

void AcpiPm::VisitState(StateVisitor& v) {
  v.Version(1);
  v.Field("pm1_status", pm1_status_);
  v.Field("pm1_enable", pm1_enable_);
  v.Field("pm1_control", pm1_control_);
  v.Field("gpe_status", gpe_status_);
  v.Field("gpe_enable", gpe_enable_);
  v.Field("seen_half", seen_half_);
  if (v.loading() && !v.failed()) Update();
}

uint8_t AcpiPm::ReadByte(unsigned offset) {
  auto part = [&](unsigned base, uint32_t value) {
    return static_cast<uint8_t>(value >> (8 * (offset - base)));
  };
  switch (offset & ~1u) {
    case kPm1Status:
      CatchUp();
      return part(kPm1Status, pm1_status_);
    case kPm1Enable:
      return part(kPm1Enable, pm1_enable_);
    case kPm1Control:
      return part(kPm1Control, pm1_control_ | kSciEnable);
    case kGpeStatus:
      return part(kGpeStatus, gpe_status_);
    case kGpeEnable:
      return part(kGpeEnable, gpe_enable_);
  }
  return 0;
}

void AcpiPm::WriteByte(unsigned offset, uint8_t value) {
  unsigned shift = 8 * (offset & 1);
  uint16_t wide = value << shift, mask = 0xff << shift;
  auto replace = [&](uint16_t& reg, uint16_t writable) {
    reg = (reg & ~(mask & writable)) | (wide & writable);
  };
  switch (offset & ~1u) {
    case kPm1Status:
      CatchUp();
      pm1_status_ &= ~(wide & kStatusBits);
      break;
    case kPm1Enable:
      replace(pm1_enable_, kEnableBits);
      break;
    case kPm1Control:
      replace(pm1_control_, kControlBits);
      if ((wide & kSleepEnable) && (pm1_control_ >> 10 & 7) == kSleepTypeOff) {
        env_.machine.Ask(MachineControl::Request::kPowerOff, "acpi");
      }
      break;
    case kGpeStatus:
      gpe_status_ &= ~wide;
      break;
    case kGpeEnable:
      replace(gpe_enable_, 0xffff);
      break;
  }
}

uint64_t AcpiPm::IoRead(uint64_t offset, unsigned size) {
  // Read as a whole: the timer's bytes must belong together.
  if (offset >= kTimer && offset < kTimer + 4) {
    return (Ticks() & 0xffffff) >> (8 * (offset - kTimer));
  }
  uint64_t value = 0;
  for (unsigned i = 0; i < size; i++) value |= uint64_t{ReadByte(offset + i)} << (8 * i);
  return value;
}

void AcpiPm::IoWrite(uint64_t offset, unsigned size, uint64_t value) {
  for (unsigned i = 0; i < size; i++) WriteByte(offset + i, value >> (8 * i));
  Update();
}

}  // namespace kvartz
