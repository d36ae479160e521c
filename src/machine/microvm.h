// The board "microvm": no PCI, no firmware, little but serial port, I/O APIC and virtio-mmio.
// Started by a kernel directly.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "machine/board.h"
#include "machine/loader/kernel.h"

namespace kvartz::machine {

// As Board.
class MicrovmBoard final : public Board {
 public:
  // virtio-mmio slots, one after another, each with a line of its own.
  static constexpr uint64_t kMmioBase = 0xfeb00000, kMmioStride = 512;
  static constexpr unsigned kMmioSlots = 8;

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
  std::string CommandLine() const;

  struct Options {
    bool acpi = true, pic = false, pit = false, rtc = true, isa_serial = true,
         auto_kernel_cmdline = true;
  } options_;
  std::vector<MmioSlot> slots_;  // in use
  std::unique_ptr<IrqSink> pic_output_;
  std::unique_ptr<Kernel> kernel_;
};

}  // namespace kvartz::machine
