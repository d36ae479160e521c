// The board "pc": i440FX, PIIX3 and PIIX4, as SeaBIOS and operating systems know it.
#pragma once

#include <compare>
#include <memory>
#include <optional>

#include "device/pci/pci_device.h"
#include "machine/acpi/tables.h"
#include "machine/board.h"
#include "machine/loader/kernel.h"

namespace kvartz {
class I440fx;
class Piix3;
class Piix4Pm;
class Rtc;
class FwCfg;
class Hpet;
}  // namespace kvartz

namespace kvartz::machine {

class IrqForward;

// As Board.
class PcBoard final : public Board {
 public:
  PcBoard(const MachineConfig& config, const MachineType& type, const BoardEnv& env);
  ~PcBoard() override;

  void PowerButton() override;
  PciBus& pci() { return *pci_; }

 private:
  Result<> TakeOptions() override;
  Result<> MapRam() override;
  Result<> WireDevices() override;
  Result<> AttachPci(PciDevice& device, const Properties& properties) override;
  Result<MmioSlot> TakeMmioSlot(const DeviceSpec& spec) override;
  Result<> LoadBoot() override;

  Result<> OpenFirmware();
  void WireInterrupts();
  Result<> WirePci();
  unsigned SerialPorts() const;
  AcpiTables Acpi() const;
  // Tables and data for firmware; devices may have changed since the last reset.
  void FillFwCfg();
  std::vector<uint8_t> BootOrder() const;
  void FillCmos();
  std::vector<E820Entry> E820() const;
  // What firmware does before it starts a kernel: routes, register blocks, BARs, shadow RAM.
  void PlayFirmware();
  void AssignBars();

  struct Options {
    bool acpi = true, hpet = true, pit = true;
    uint64_t max_ram_below_4g = 0;  // 0: not given
  } options_;
  std::unique_ptr<PciBus> pci_;
  I440fx* host_bridge_ = nullptr;
  Piix3* isa_bridge_ = nullptr;
  Piix4Pm* pm_ = nullptr;
  Rtc* rtc_ = nullptr;
  Hpet* hpet_ = nullptr;
  FwCfg* fw_cfg_ = nullptr;
  std::shared_ptr<RamBlock> bios_;
  std::unique_ptr<Kernel> kernel_;  // null: firmware starts the machine
  // bootindex= of PCI functions, in its order.
  struct BootDevice {
    uint32_t index;
    uint8_t devfn;
    auto operator<=>(const BootDevice&) const = default;
  };
  std::vector<BootDevice> boot_devices_;
  std::unique_ptr<IrqSink> pic_output_;
  std::unique_ptr<IrqForward> pirq_;
  uint64_t pci_hole_begin_ = 0;
};

}  // namespace kvartz::machine
