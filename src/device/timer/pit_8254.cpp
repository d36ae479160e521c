#include "device/timer/pit_8254.h"

#include "device/timer/ticks.h"

namespace kvartz {

namespace {
uint16_t ToBcd(uint32_t value) {
  value %= 10000;
  return value / 1000 << 12 | value / 100 % 10 << 8 | value / 10 % 10 << 4 | value % 10;
}
uint32_t FromBcd(uint16_t value) {
  return (value >> 12) * 1000 + (value >> 8 & 15) * 100 + (value >> 4 & 15) * 10 + (value & 15);
}
bool Periodic(uint8_t mode) { return mode == 2 || mode == 3; }
// Modes in which the gate's level enables counting; in the others its rising edge starts it.
bool GateHolds(uint8_t mode) { return mode == 0 || mode == 4; }
}  // namespace

Pit8254::Pit8254(const DeviceEnv& env, IrqLine irq)
    : MmioDevice(env), irq_(irq), timer_(env.loop, env.clock, [this] { TimerFired(); }) {
  counters_[2].gate = false;
}

uint64_t Pit8254::TicksSince(const Counter& c) const {
  if (!c.loaded) return 0;
  if (GateHolds(c.mode) && !c.gate) return c.held_ticks;
  return c.held_ticks + NsToTicks(env_.clock.NowNs() - c.start_ns, kFrequency);
}

uint16_t Pit8254::CountNow(const Counter& c) const {
  uint64_t ticks = TicksSince(c);
  uint32_t value;
  if (c.mode == 2) {
    value = c.count - ticks % c.count;
  } else if (c.mode == 3) {
    value = c.count - 2 * ticks % c.count;
    value &= ~1u;
  } else {
    uint32_t modulus = c.bcd ? 10000 : 65536;
    value = (c.count + modulus - ticks % modulus) % modulus;
  }
  return c.bcd ? ToBcd(value) : value;
}

bool Pit8254::Output(const Counter& c) const {
  if (!c.loaded) return c.mode != 0;
  uint64_t ticks = TicksSince(c);
  switch (c.mode) {
    case 0:
    case 1:
      return ticks >= c.count;
    case 2:
      return !c.gate || ticks % c.count != c.count - 1;
    case 3:
      return !c.gate || ticks % c.count < (c.count + 1) / 2;
    default:
      return ticks != c.count;
  }
}

void Pit8254::SetIrq(bool level) {
  irq_level_ = level;
  irq_.Set(level && irq_connected_);
}

void Pit8254::SetIrqConnected(bool connected) {
  LockGuard guard(lock());
  irq_connected_ = connected;
  irq_.Set(irq_level_ && irq_connected_);
}

void Pit8254::ArmTimer() {
  timer_.Arm(
      TimerDeadline(counters_[0].start_ns, TicksToNs(next_event_, kFrequency), env_.clock.NowNs()));
}

// The end of counter 0's period, or its terminal count: OUT rises.
void Pit8254::TimerFired() {
  LockGuard guard(lock());
  Counter& c = counters_[0];
  if (!c.loaded || TicksSince(c) < next_event_) return;
  if (c.mode != 0) SetIrq(false);
  SetIrq(true);
  if (!Periodic(c.mode)) return;
  next_event_ = (TicksSince(c) / c.count + 1) * c.count;
  ArmTimer();
}

void Pit8254::Load(unsigned index, uint16_t value) {
  Counter& c = counters_[index];
  c.count = c.bcd ? FromBcd(value) : value;
  if (c.count == 0) c.count = c.bcd ? 10000 : 65536;
  // Mode 3 counts an odd number by making one half longer; a count of 1 isn't allowed in the
  // periodic modes.
  if (Periodic(c.mode) && c.count == 1) c.count = 2;
  c.loaded = true;
  c.start_ns = env_.clock.NowNs();
  c.held_ticks = 0;
  if (index != 0) return;
  if (c.mode == 1 || c.mode == 5) return;  // started by the gate, which is wired high
  if (c.mode == 0) SetIrq(false);
  next_event_ = c.count;
  ArmTimer();
}

void Pit8254::WriteCount(unsigned index, uint8_t value) {
  Counter& c = counters_[index];
  if (c.access == 1) {
    Load(index, value);
  } else if (c.access == 2) {
    Load(index, value << 8);
  } else if (!c.write_high_next) {
    c.write_low = value;
    c.write_high_next = true;
    if (c.mode == 0 && index == 0) {  // writing the first byte stops the counter (mode 0)
      timer_.Cancel();
      SetIrq(false);
    }
  } else {
    c.write_high_next = false;
    Load(index, value << 8 | c.write_low);
  }
}

void Pit8254::LatchCount(Counter& c) {
  if (c.latched_bytes) return;
  c.latched_count = CountNow(c);
  c.latched_bytes = c.access == 3 ? 2 : 1;
}

void Pit8254::LatchStatus(Counter& c) {
  if (c.status_latched) return;
  c.status_latched = true;
  c.latched_status = Output(c) << 7 | (c.loaded ? 0 : 1 << 6) | c.access << 4 | c.mode << 1 | c.bcd;
}

uint8_t Pit8254::ReadCount(unsigned index) {
  Counter& c = counters_[index];
  if (c.status_latched) {
    c.status_latched = false;
    return c.latched_status;
  }
  if (c.latched_bytes) {
    bool high = c.access == 2 || (c.access == 3 && c.latched_bytes == 1);
    c.latched_bytes--;
    return high ? c.latched_count >> 8 : c.latched_count;
  }
  uint16_t count = CountNow(c);
  if (c.access == 1) return count;
  if (c.access == 2) return count >> 8;
  c.read_high_next = !c.read_high_next;
  return c.read_high_next ? count : count >> 8;
}

void Pit8254::WriteControl(uint8_t value) {
  unsigned select = value >> 6;
  if (select == 3) {  // read-back
    for (unsigned i = 0; i < 3; i++) {
      if (!(value >> (i + 1) & 1)) continue;
      if (!(value & 0x20)) LatchCount(counters_[i]);
      if (!(value & 0x10)) LatchStatus(counters_[i]);
    }
    return;
  }
  Counter& c = counters_[select];
  if ((value >> 4 & 3) == 0) {
    LatchCount(c);
    return;
  }
  bool gate = c.gate;
  uint32_t count = c.count;
  c = Counter{};
  c.gate = gate;
  c.count = count;
  c.access = value >> 4 & 3;
  c.mode = value >> 1 & 7;
  if (c.mode > 5) c.mode -= 4;  // modes 2 and 3 have two encodings
  c.bcd = value & 1;
  if (select == 0) {
    timer_.Cancel();
    SetIrq(c.mode != 0);
  }
}

void Pit8254::SetGate(unsigned index, bool level) {
  Counter& c = counters_[index];
  if (level == c.gate) return;
  if (GateHolds(c.mode)) {
    if (!level) {
      c.held_ticks = TicksSince(c);
    } else {
      c.start_ns = env_.clock.NowNs();
    }
  } else if (level) {
    c.start_ns = env_.clock.NowNs();
    c.held_ticks = 0;
  }
  c.gate = level;
}

uint64_t Pit8254::IoRead(uint64_t port, unsigned) {
  if (port == kSpeaker) {
    // Bit 4 toggles with each refresh request (15 us); software uses it as a coarse clock.
    bool refresh = env_.clock.NowNs() / 15085 & 1;
    return counters_[2].gate | speaker_data_ << 1 | refresh << 4 | Output(counters_[2]) << 5;
  }
  return port == kBase + 3 ? 0xff : ReadCount(port - kBase);
}

void Pit8254::IoWrite(uint64_t port, unsigned, uint64_t value) {
  if (port == kSpeaker) {
    speaker_data_ = value & 2;
    SetGate(2, value & 1);
  } else if (port == kBase + 3) {
    WriteControl(value);
  } else {
    WriteCount(port - kBase, value);
  }
}

void Pit8254::Reset(ResetPhase phase) {
  if (phase == ResetPhase::kEnter) {
    timer_.Cancel();
    counters_ = {};
    counters_[2].gate = false;
    speaker_data_ = false;
    irq_connected_ = true;
  }
  if (phase == ResetPhase::kHold) SetIrq(false);
}

void Pit8254::Counter::VisitState(StateVisitor& v) {
  v.Field("mode", mode);
  v.Bounded("mode", mode, 0, 5);
  v.Field("bcd", bcd);
  v.Field("access", access);
  v.Bounded("access", access, 1, 3);
  v.Field("loaded", loaded);
  v.Field("count", count);
  v.Bounded("count", count, 1, 65536);
  v.Field("write_low", write_low);
  v.Field("write_high_next", write_high_next);
  v.Field("read_high_next", read_high_next);
  v.Field("latched_count", latched_count);
  v.Field("latched_bytes", latched_bytes);
  v.Bounded("latched_bytes", latched_bytes, 0, 2);
  v.Field("latched_status", latched_status);
  v.Field("status_latched", status_latched);
  v.Field("gate", gate);
  v.Field("start_ns", start_ns);
  v.Bounded("start_ns", start_ns, 0, INT64_MAX);
  v.Field("held_ticks", held_ticks);
}

void Pit8254::VisitState(StateVisitor& v) {
  v.Version(1);
  constexpr const char* kNames[] = {"counter0", "counter1", "counter2"};
  for (unsigned i = 0; i < 3; i++) v.Section(kNames[i], [&] { counters_[i].VisitState(v); });
  v.Field("next_event", next_event_);
  v.Field("speaker_data", speaker_data_);
  v.Field("irq_connected", irq_connected_);
  v.Field("irq_level", irq_level_);
  bool armed = timer_.armed();
  v.Field("armed", armed);
  if (!v.loading() || v.failed()) return;
  SetIrq(irq_level_);
  timer_.Cancel();
  if (armed) ArmTimer();
}

}  // namespace kvartz
