#include "device/irq/pic_8259.h"

namespace kvartz {

namespace {
constexpr uint8_t kCascade = 2;
// Lines that the ELCR can make level-triggered: not timer, keyboard and cascade, nor RTC and FERR.
constexpr uint8_t kElcrMask[2] = {0xf8, 0xde};
}  // namespace

int PicPair::Chip::Highest(uint8_t mask) const {
  for (unsigned i = 1; i <= 8; i++) {
    unsigned line = (lowest + i) & 7;
    if (mask >> line & 1) return line;
  }
  return -1;
}

void PicPair::Chip::VisitState(StateVisitor& v) {
  v.Field("lines", lines);
  v.Field("irr", irr);
  v.Field("isr", isr);
  v.Field("imr", imr);
  v.Field("elcr", elcr);
  v.Field("vector_base", vector_base);
  v.Field("lowest", lowest);
  v.Bounded("lowest", lowest, 0, 7);
  v.Field("init_step", init_step);
  v.Bounded("init_step", init_step, 0, 4);
  v.Field("needs_icw4", needs_icw4);
  v.Field("auto_eoi", auto_eoi);
  v.Field("rotate_on_auto_eoi", rotate_on_auto_eoi);
  v.Field("special_mask", special_mask);
  v.Field("fully_nested", fully_nested);
  v.Field("read_isr", read_isr);
  v.Field("poll", poll);
}

// The line that interrupts now: requested, not masked, and more urgent than what is in service. -1:
// none.
int PicPair::Pending(unsigned index) const {
  const Chip& chip = chips_[index];
  int request = chip.Highest(chip.irr & ~chip.imr);
  if (request < 0) return -1;
  uint8_t in_service = chip.isr;
  if (chip.special_mask) in_service &= ~chip.imr;
  if (chip.fully_nested && index == 0) in_service &= ~(1 << kCascade);
  int current = chip.Highest(in_service);
  if (current < 0) return request;
  auto urgency = [&](int line) { return (line - chip.lowest - 1) & 7; };
  return urgency(request) < urgency(current) ? request : -1;
}

void PicPair::SetLine(unsigned index, unsigned line, bool level) {
  Chip& chip = chips_[index];
  uint8_t bit = 1 << line;
  bool before = chip.lines & bit;
  chip.lines = level ? chip.lines | bit : chip.lines & ~bit;
  if (chip.elcr & bit) {
    chip.irr = level ? chip.irr | bit : chip.irr & ~bit;
  } else if (level && !before) {
    chip.irr |= bit;
  }
}

void PicPair::Update() {
  // The slave's output is the master's line 2; as a level, so that a second request of the slave
  // isn't lost.
  uint8_t cascade = 1 << kCascade;
  bool slave = Pending(1) >= 0;
  chips_[0].irr = slave ? chips_[0].irr | cascade : chips_[0].irr & ~cascade;
  bool output = Pending(0) >= 0;
  if (output == output_) return;
  output_ = output;
  intr_.Set(output);
}

void PicPair::SetIrq(unsigned line, bool level) {
  if (line > 15 || line == kCascade) return;
  LockGuard guard(lock());
  SetLine(line >> 3, line & 7, level);
  Update();
}

uint8_t PicPair::TakeInterrupt(unsigned index, int line) {
  Chip& chip = chips_[index];
  if (line < 0) return chip.vector_base + 7;
  uint8_t bit = 1 << line;
  if (chip.auto_eoi) {
    if (chip.rotate_on_auto_eoi) chip.lowest = line;
  } else {
    chip.isr |= bit;
  }
  if (!(chip.elcr & bit)) chip.irr &= ~bit;
  return chip.vector_base + line;
}

uint8_t PicPair::Acknowledge() {
  LockGuard guard(lock());
  int line = Pending(0);
  uint8_t vector = TakeInterrupt(0, line);
  if (line == kCascade) vector = TakeInterrupt(1, Pending(1));
  // The processor took the request: the next one is a new edge of INTR.
  output_ = false;
  intr_.Set(false);
  Update();
  return vector;
}

void PicPair::Reset(ResetPhase phase) {
  if (phase == ResetPhase::kEnter) {
    for (Chip& chip : chips_) {
      uint8_t lines = chip.lines;
      chip = Chip{};
      chip.lines = lines;
    }
  }
  if (phase == ResetPhase::kHold) {
    output_ = false;
    intr_.Set(false);
  }
}

void PicPair::VisitState(StateVisitor& v) {
  v.Version(1);
  v.Section("master", [&] { chips_[0].VisitState(v); });
  v.Section("slave", [&] { chips_[1].VisitState(v); });
  if (v.loading() && !v.failed()) {
    output_ = Pending(0) >= 0;
    intr_.Set(output_);
  }
}

void PicPair::WriteOcw2(unsigned index, uint8_t value) {
  Chip& chip = chips_[index];
  bool rotate = value & 0x80, specific = value & 0x40, eoi = value & 0x20;
  if (!eoi && !specific) {
    chip.rotate_on_auto_eoi = rotate;
    return;
  }
  int line = value & 7;
  if (eoi) {
    uint8_t in_service = chip.special_mask ? chip.isr & ~chip.imr : chip.isr;
    if (!specific) line = chip.Highest(in_service);
    if (line < 0) return;
    chip.isr &= ~(1 << line);
    if (rotate) chip.lowest = line;
  } else if (rotate) {
    chip.lowest = line;  // set priority
  }
}

void PicPair::WriteCommand(unsigned index, uint8_t value) {
  Chip& chip = chips_[index];
  if (value & 0x10) {  // ICW1
    uint8_t lines = chip.lines, elcr = chip.elcr;
    chip = Chip{};
    chip.lines = lines;
    chip.elcr = elcr;
    chip.irr = lines & elcr;
    chip.init_step = 2;
    chip.needs_icw4 = value & 1;
  } else if (value & 0x08) {  // OCW3
    if (value & 0x40) chip.special_mask = value & 0x20;
    chip.poll = value & 0x04;
    if (value & 0x02) chip.read_isr = value & 0x01;
  } else {
    WriteOcw2(index, value);
  }
}

void PicPair::WriteData(unsigned index, uint8_t value) {
  Chip& chip = chips_[index];
  switch (chip.init_step) {
    case 2:
      chip.vector_base = value & 0xf8;
      chip.init_step = 3;
      break;
    case 3:  // the cascade is wired
      chip.init_step = chip.needs_icw4 ? 4 : 0;
      break;
    case 4:
      chip.auto_eoi = value & 0x02;
      chip.fully_nested = value & 0x10;
      chip.init_step = 0;
      break;
    default:
      chip.imr = value;
  }
}

uint8_t PicPair::ReadChip(unsigned index, bool data) {
  Chip& chip = chips_[index];
  if (chip.poll) {
    chip.poll = false;
    int line = Pending(index);
    if (line < 0) return 0;
    TakeInterrupt(index, line);
    Update();
    return 0x80 | line;
  }
  if (data) return chip.imr;
  return chip.read_isr ? chip.isr : chip.irr;
}

uint64_t PicPair::IoRead(uint64_t port, unsigned) {
  if (port == kElcr || port == kElcr + 1) return chips_[port - kElcr].elcr;
  return ReadChip(port >= kSlave, port & 1);
}

void PicPair::IoWrite(uint64_t port, unsigned, uint64_t value) {
  if (port == kElcr || port == kElcr + 1) {
    Chip& chip = chips_[port - kElcr];
    chip.elcr = value & kElcrMask[port - kElcr];
    chip.irr = (chip.irr & ~chip.elcr) | (chip.lines & chip.elcr);
  } else if (port & 1) {
    WriteData(port >= kSlave, value);
  } else {
    WriteCommand(port >= kSlave, value);
  }
  Update();
}

}  // namespace kvartz
