#include "device/pci/i440fx.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace kvartz {

namespace {
constexpr uint64_t kBegin = 0xc0000, kEnd = 0x100000;
constexpr unsigned kPam0 = 0x59, kPamCount = 7, kSmram = 0x72;
constexpr uint8_t kReadRam = 1, kWriteRam = 2;
// The area in 16 KiB segments (the last 64 KiB are one of PAM's).
constexpr uint64_t kSegment = 0x4000;
constexpr unsigned kSegments = (kEnd - kBegin) / kSegment;
// CONFADD.
constexpr uint32_t kEnable = 1u << 31;
// 0xcf9.
constexpr uint8_t kResetCpu = 4, kHardReset = 2;
}  // namespace

void PciConfigPorts::Reset(ResetPhase phase) {
  if (phase != ResetPhase::kEnter) return;
  address_ = 0;
  reset_control_ = 0;
}

void PciConfigPorts::VisitState(StateVisitor& v) {
  v.Version(1);
  v.Field("address", address_);
  v.Field("reset_control", reset_control_);
}

uint64_t PciConfigPorts::IoRead(uint64_t offset, unsigned size) {
  if (offset < 4) {
    if (offset == 1 && size == 1) return reset_control_;
    return offset == 0 && size == 4 ? address_ : ~0ull;
  }
  if (!(address_ & kEnable) || (address_ >> 16 & 0xff) != 0) return ~0ull;
  return bus_.ConfigRead(address_ >> 8, (address_ & 0xfc) | (offset & 3), std::min(size, 4u));
}

void PciConfigPorts::IoWrite(uint64_t offset, unsigned size, uint64_t value) {
  if (offset < 4) {
    // CONFADD is a dword only; a byte at 0xcf9 is the reset control register.
    if (offset == 0 && size == 4) address_ = value & ~0x7f000003u;
    if (offset == 1 && size == 1) {
      bool rising = (value & kResetCpu) && !(reset_control_ & kResetCpu);
      reset_control_ = value & (kHardReset | kResetCpu);
      if (rising) env_.machine.Ask(MachineControl::Request::kReset, "reset control register");
    }
    return;
  }
  if (!(address_ & kEnable) || (address_ >> 16 & 0xff) != 0) return;
  bus_.ConfigWrite(address_ >> 8, (address_ & 0xfc) | (offset & 3), size, value);
}

// Writes that go to RAM while reads come from the ROM in front of it.
struct I440fx::RomWriter final : public IoHandler {
  RomWriter(RamBlock& block, uint64_t base) : ram(block), begin(base) {}
  uint64_t IoRead(uint64_t, unsigned) override { return ~0ull; }
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
    std::memcpy(ram.host() + begin + offset, &value, size);
    ram.dirty().Mark(begin + offset, size);
  }
  RamBlock& ram;
  uint64_t begin;
};

I440fx::I440fx(const DeviceEnv& env, std::shared_ptr<RamBlock> ram, std::shared_ptr<RamBlock> rom)
    : PciDevice(env, {.vendor = 0x8086, .device = 0x1237, .revision = 2, .class_code = 0x060000}),
      ram_(std::move(ram)),
      rom_(std::move(rom)) {
  VERIFY(ram_->size() >= kEnd);
  for (unsigned i = 0; i < kSegments; i++)
    writers_.push_back(std::make_unique<RomWriter>(*ram_, kBegin + i * kSegment));
  config().SetWritable(kPam0, 1, 0x30);
  for (unsigned i = 1; i < kPamCount; i++) config().SetWritable(kPam0 + i, 1, 0x33);
  config().SetWritable(kSmram, 1, 0x78);
}

I440fx::~I440fx() = default;

void I440fx::ShadowAll() {
  config().Set(kPam0, 1, 0x30);
  for (unsigned i = 1; i < kPamCount; i++) config().Set(kPam0 + i, 1, 0x33);
  UpdateShadow();
}

void I440fx::Reset(ResetPhase phase) {
  PciDevice::Reset(phase);
  if (phase != ResetPhase::kEnter) return;
  config().Set(kSmram, 1, 0x02);
  UpdateShadow();
}

void I440fx::VisitState(StateVisitor& v) {
  v.Version(1);
  PciDevice::VisitState(v);
  if (v.loading() && !v.failed()) UpdateShadow();
}

void I440fx::ConfigWritten(unsigned offset, unsigned size) {
  if (offset < kPam0 + kPamCount && offset + size > kPam0) UpdateShadow();
}

uint8_t I440fx::EnablesAt(unsigned segment) const {
  uint64_t address = kBegin + segment * kSegment;
  auto& config = const_cast<I440fx*>(this)->config();
  if (address >= 0xf0000) return config.Read(kPam0, 1) >> 4 & 3;
  uint8_t pam = config.Read(kPam0 + 1 + segment / 2, 1);
  return (segment & 1 ? pam >> 4 : pam) & 3;
}

void I440fx::MapRun(const Run& run) {
  Region region;
  region.base = run.begin;
  region.size = run.end - run.begin;
  if (run.enables & kReadRam) {
    region.name = "shadow";
    region.kind = run.enables & kWriteRam ? RegionKind::kRam : RegionKind::kRom;
    region.ram = ram_;
    region.ram_offset = run.begin;
    regions_.push_back(env_.memory.Add(std::move(region)));
    return;
  }
  // Reads come from the ROM below 1 MiB; where that ends, nothing answers.
  uint64_t rom_begin = rom_ ? kEnd - std::min<uint64_t>(rom_->size(), 0x20000) : kEnd;
  uint64_t begin = std::max(run.begin, rom_begin);
  if (begin < run.end) {
    region.name = "bios";
    region.kind = RegionKind::kRom;
    region.base = begin;
    region.size = run.end - begin;
    region.ram = rom_;
    region.ram_offset = rom_->size() - (kEnd - begin);
    if (run.enables & kWriteRam) {
      region.handler = writers_[(begin - kBegin) / kSegment].get();
      region.lock = &lock_;
    }
    regions_.push_back(env_.memory.Add(std::move(region)));
  }
}

void I440fx::UpdateShadow() {
  std::vector<Run> runs;
  for (unsigned i = 0; i < kSegments; i++) {
    uint64_t address = kBegin + i * kSegment;
    uint8_t enables = EnablesAt(i);
    // Write-only segments stay apart: each has its writer, whose offsets start with it.
    if (!runs.empty() && runs.back().enables == enables && enables != kWriteRam) {
      runs.back().end = address + kSegment;
    } else {
      runs.push_back({address, address + kSegment, enables});
    }
  }
  if (runs == runs_) return;
  runs_ = runs;
  AddressSpace::Batch batch(env_.memory);
  for (AddressSpace::RegionId id : regions_) env_.memory.Remove(id);
  regions_.clear();
  for (const Run& run : runs_) MapRun(run);
}

}  // namespace kvartz
