#include "device/pci/piix4_pm.h"

#include <cstring>

namespace kvartz {

namespace {
constexpr unsigned kPmBase = 0x40, kDevActB = 0x58, kPmRegMisc = 0x80, kSmbBase = 0x90,
                   kSmbHostConfig = 0xd2;
constexpr uint16_t kPmSize = 64, kSmbSize = 16;
// SMBus host registers.
constexpr unsigned kSmbStatus = 0, kSmbControl = 2;
constexpr uint8_t kSmbDeviceError = 1 << 2, kSmbStart = 1 << 6;
}  // namespace

Piix4Pm::Piix4Pm(const DeviceEnv& env, IrqLine sci)
    : PciDevice(env, {.vendor = 0x8086,
                      .device = 0x7113,
                      .revision = 3,
                      .class_code = 0x068000,
                      .interrupt_pin = 1}),
      pm_(env, lock_, sci) {
  config().Set(kPmBase, 4, 1);
  config().SetWritable(kPmBase, 4, 0xffc0);
  config().SetWritable(kDevActB, 4, 0xffffffff);
  config().SetWritable(kPmRegMisc, 1, 0x01);
  config().Set(kSmbBase, 4, 1);
  config().SetWritable(kSmbBase, 4, 0xfff0);
  config().SetWritable(kSmbHostConfig, 1, 0x0f);
}

void Piix4Pm::Reset(ResetPhase phase) {
  PciDevice::Reset(phase);
  pm_.Reset(phase);
  if (phase != ResetPhase::kEnter) return;
  // APMC_EN set: firmware takes SMM for initialised already, and leaves it alone.
  config().Set(kDevActB, 4, 1 << 25);
  std::memset(smbus_.registers, 0, sizeof smbus_.registers);
  std::memset(apm_.registers, 0, sizeof apm_.registers);
  UpdateBlocks();
}

void Piix4Pm::Enable(uint16_t pm_base, uint16_t smbus_base) {
  config().Set(kPmBase, 2, pm_base | 1);
  config().Set(kPmRegMisc, 1, 1);
  config().Set(kSmbBase, 2, smbus_base | 1);
  config().Set(kSmbHostConfig, 1, 0x09);
  UpdateBlocks();
}

void Piix4Pm::PressPowerButton() {
  LockGuard guard(lock());
  pm_.PressPowerButton();
}

void Piix4Pm::RaiseGpe(unsigned event) {
  LockGuard guard(lock());
  pm_.RaiseGpe(event);
}

void Piix4Pm::VisitState(StateVisitor& v) {
  v.Version(1);
  PciDevice::VisitState(v);
  v.Section("pm", [&] { pm_.VisitState(v); });
  v.Field("smbus", smbus_.registers);
  v.Field("apm", apm_.registers);
  if (v.loading() && !v.failed()) UpdateBlocks();
}

void Piix4Pm::ConfigWritten(unsigned offset, unsigned size) { UpdateBlocks(); }

void Piix4Pm::MapBlock(Block& block, const char* name, uint16_t base, uint16_t size,
                       IoHandler& handler) {
  if (block.base == base) return;
  AddressSpace::Batch batch(env_.ports);
  if (block.base) env_.ports.Remove(block.region);
  block.base = base;
  if (!base) return;
  Region region;
  region.name = id() + name;
  region.base = base;
  region.size = size;
  region.handler = &handler;
  region.lock = &lock_;
  region.max_access = 4;
  block.region = env_.ports.Add(std::move(region));
}

void Piix4Pm::UpdateBlocks() {
  bool pm_on = config().Read(kPmRegMisc, 1) & 1, smbus_on = config().Read(kSmbHostConfig, 1) & 1;
  MapBlock(pm_block_, ".pm", pm_on ? config().Read(kPmBase, 2) & 0xffc0 : 0, kPmSize, pm_);
  MapBlock(smbus_block_, ".smbus", smbus_on ? config().Read(kSmbBase, 2) & 0xfff0 : 0, kSmbSize,
           smbus_);
}

uint64_t Piix4Pm::Smbus::IoRead(uint64_t offset, unsigned) { return registers[offset & 15]; }

// Nobody is on the bus: every transaction ends in a device error at once.
void Piix4Pm::Smbus::IoWrite(uint64_t offset, unsigned, uint64_t value) {
  if (offset == kSmbStatus) {
    registers[kSmbStatus] &= ~value;
    return;
  }
  registers[offset & 15] = offset == kSmbControl ? value & ~kSmbStart : value;
  if (offset == kSmbControl && (value & kSmbStart)) registers[kSmbStatus] |= kSmbDeviceError;
}

}  // namespace kvartz
