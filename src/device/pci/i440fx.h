// 440FX host bridge (PCI 8086:1237): configuration mechanism #1, shadowing of 0xc0000-0xfffff,
// reset control register. Threads: guarded by its slot; the configuration ports take the same bus
// lock as every configuration access. Spec: Intel 82441FX datasheet (290549), 3.2.18 (PAM), 3.1.1
// (CONFADD); PIIX3 datasheet 2.5.4 (reset control, 0xcf9). Modelled: PAM read and write enables.
// Missing: SMRAM (there is no SMM), DRAM timing.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "device/pci/pci_device.h"

namespace kvartz {

// Ports 0xcf8-0xcff in front of a bus.
class PciConfigPorts final : public MmioDevice {
 public:
  static constexpr uint16_t kBase = 0xcf8;  // 8 ports; the handler's offsets are 0..7

  PciConfigPorts(const DeviceEnv& env, PciBus& bus) : MmioDevice(env), bus_(bus) {}
  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;
  uint64_t IoRead(uint64_t offset, unsigned size) override;
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override;

 private:
  PciBus& bus_;
  uint32_t address_ = 0;
  uint8_t reset_control_ = 0;
};

class I440fx final : public PciDevice {
 public:
  // The shadowed area: `ram` (block offset = address) in front of `rom`, whose last bytes end at 1
  // MiB. rom may be null.
  I440fx(const DeviceEnv& env, std::shared_ptr<RamBlock> ram, std::shared_ptr<RamBlock> rom);
  ~I440fx() override;

  // As firmware does before it hands over: all of the area is RAM.
  void ShadowAll();

  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;

 private:
  struct RomWriter;
  struct Run {
    uint64_t begin = 0, end = 0;
    uint8_t enables = 0;
    bool operator==(const Run&) const = default;
  };
  void ConfigWritten(unsigned offset, unsigned size) override;
  void UpdateShadow();
  uint8_t EnablesAt(unsigned segment) const;
  void MapRun(const Run& run);

  std::shared_ptr<RamBlock> ram_, rom_;
  std::vector<std::unique_ptr<RomWriter>> writers_;  // one a segment
  std::vector<Run> runs_;
  std::vector<AddressSpace::RegionId> regions_;
};

}  // namespace kvartz
