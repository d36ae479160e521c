// What boards share in reading their options.
#pragma once

#include <optional>
#include <string>

#include "device/core/properties.h"
#include "machine/loader/boot_file.h"
#include "machine/machine_config.h"

namespace kvartz {
class FwCfg;
}

namespace kvartz::machine {

// All that boards know; each has a table of those that it takes.
struct BoardOptions {
  bool acpi = true;
  std::string kernel_irqchip;
  // Taken for compatibility; they concern host memory, which -m and memory objects describe.
  bool dump_guest_core = true;
  bool mem_merge = true;
  bool graphics = true;

  bool hpet = true;
  OnOffAuto smm = OnOffAuto::kAuto;
  OnOffAuto vmport = OnOffAuto::kAuto;
  bool usb = false;
  std::string max_ram_below_4g;

  OnOffAuto pic = OnOffAuto::kAuto;
  OnOffAuto pit = OnOffAuto::kAuto;
  OnOffAuto rtc = OnOffAuto::kAuto;
  OnOffAuto pcie = OnOffAuto::kAuto;
  bool isa_serial = true;
  bool auto_kernel_cmdline = true;
  bool option_roms = false;
};
#define COMMON_BOARD_OPTIONS                                                            \
  PROPERTY(BoardOptions, "acpi", acpi, "ACPI tables"),                                  \
      PROPERTY(BoardOptions, "kernel-irqchip", kernel_irqchip,                          \
               "on, split: interrupt controllers in the host's kernel"),                \
      PROPERTY(BoardOptions, "dump-guest-core", dump_guest_core,                        \
               "guest memory in core dumps of the process"),                            \
      PROPERTY(BoardOptions, "mem-merge", mem_merge, "let the host merge equal pages"), \
      PROPERTY(BoardOptions, "graphics", graphics, "a display")

Properties MachineOptions(const MachineConfig& config);
// kernel-irqchip= with the engine "kvm" or "kvartz". Errors: unknown value, not possible with the
// engine.
Result<cpu::IrqchipMode> ChooseIrqchip(const std::string& kernel_irqchip, const std::string& accel);
// Bytes, with an optional suffix K, M or G. Errors: malformed; `what` names the option.
Result<uint64_t> ParseSize(const std::string& what, const std::string& text);
// multifunction=on of a PCI device. Errors: no switch.
Result<bool> ParseMultifunction(const std::string& id, const Properties& properties);
// addr=SLOT[.FUNCTION] (hexadecimal) of a device on the only bus, as devfn; -1: not given. Errors:
// malformed, another bus.
Result<int> ParsePciAddress(const std::string& id, const Properties& properties);
// bootindex=N of a device. Errors: not a number.
Result<std::optional<uint32_t>> ParseBootIndex(const std::string& id, const Properties& properties);
// The firmware file: as given (a path, or a name in one of the data directories), or `fallback`
// there. Errors: not found.
Result<BootFile> FindFirmware(const BootConfig& boot, const std::string& fallback);
// -fw_cfg's files. Errors: a name that is too long.
Result<> AddUserFiles(const MachineConfig& config, FwCfg& fw_cfg);
// Seconds that the RTC shows beyond UTC of the host.
int64_t RtcOffset(const RtcConfig& config);

}  // namespace kvartz::machine
