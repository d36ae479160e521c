// The board "microvm": no PCI, no firmware, little but serial port, I/O APIC and virtio-mmio.
#pragma once

#include <array>
#include <memory>

#include "machine/board.h"
#include "machine/loader/kernel.h"

namespace kvartz::machine {

// As Board.
class MicrovmBoard final : public Board {
 public:
  // virtio-mmio slots, one after another; slot i has GSI kMmioGsi + i.
  static constexpr uint64_t kMmioBase = 0xfeb00000, kMmioStride = 512;
  static constexpr unsigned kMmioSlots = 8, kMmioGsi = 16;

  MicrovmBoard(const MachineConfig& config, const MachineType& type, const BoardEnv& env);
  ~MicrovmBoard() override;

  void PowerButton() override;

 private:
  Result<> TakeOptions() override;
  Result<> MapRam() override;
  Result<> WireDevices() override;
  Result<> AttachPci(PciDevice& device, const Properties& properties) override;
  Result<MmioSlot> TakeMmioSlot(const DeviceSpec& spec) override;
  Result<> LoadBoot() override;

  unsigned slots_used_ = 0;
  std::unique_ptr<Kernel> kernel_;
};

}  // namespace kvartz::machine
