#include "device/pci/piix3.h"

namespace kvartz {

namespace {
constexpr unsigned kPirq = 0x60;
constexpr uint8_t kPirqOff = 0x80;
constexpr unsigned PirqOf(unsigned bus_line) { return (bus_line + 3) & 3; }
}  // namespace

Piix3::Piix3(const DeviceEnv& env, IrqSink& isa)
    : PciDevice(
          env, {.vendor = 0x8086, .device = 0x7000, .class_code = 0x060100, .multifunction = true}),
      isa_(isa) {
  config().SetWritable(kPirq, 4, 0x8f8f8f8f);
  config().SetWritable(
      0x4c, 4,
      0xffffffff);  // ISA recovery, X-bus chip selects, top of memory...: kept, without effect
  config().SetWritable(0x69, 1, 0xfe);
  config().SetWritable(0x6a, 2, 0x8097);
}

void Piix3::Reset(ResetPhase phase) {
  PciDevice::Reset(phase);
  if (phase != ResetPhase::kEnter) return;
  config().Set(0x04, 2, 0x0007);  // master, memory and I/O are always on
  config().Set(0x4c, 1, 0x4d);
  config().Set(0x4e, 1, 0x03);
  config().Set(kPirq, 4, 0x80808080);
  config().Set(0x69, 1, 0x02);
  UpdateRoutes();
}

void Piix3::VisitState(StateVisitor& v) {
  v.Version(1);
  PciDevice::VisitState(v);
  if (v.loading() && !v.failed()) UpdateRoutes();
}

void Piix3::ConfigWritten(unsigned offset, unsigned size) {
  if (offset < kPirq + 4 && offset + size > kPirq) UpdateRoutes();
}

void Piix3::SetRoutes(uint8_t ab, uint8_t cd) {
  config().Set(kPirq, 4, ab | ab << 8 | cd << 16 | uint32_t{cd} << 24);
  UpdateRoutes();
}

uint8_t Piix3::LineOf(unsigned slot, unsigned pin) const {
  return pin ? routes_[PirqOf((pin - 1 + slot) & 3)] : 0;
}

void Piix3::UpdateRoutes() {
  LockGuard guard(route_mutex_);
  for (unsigned i = 0; i < 4; i++) {
    uint8_t value = config().Read(kPirq + i, 1);
    routes_[i] = value & kPirqOff ? 0 : value & 15;
  }
  Drive();
}

void Piix3::SetIrq(unsigned line, bool level) {
  LockGuard guard(route_mutex_);
  levels_[PirqOf(line)] = level;
  Drive();
}

void Piix3::Drive() {
  uint16_t wanted = 0;
  for (unsigned i = 0; i < 4; i++) {
    if (levels_[i] && routes_[i]) wanted |= 1 << routes_[i];
  }
  uint16_t changed = wanted ^ driven_;
  driven_ = wanted;
  for (unsigned line = 0; line < 16; line++) {
    if (changed >> line & 1) isa_.SetIrq(line, wanted >> line & 1);
  }
}

}  // namespace kvartz
