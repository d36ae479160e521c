// What a machine is to be: plain values, made by the command line (or another front end).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/result.h"
#include "cpu/accel.h"
#include "device/core/device_types.h"
#include "memory/ram.h"

namespace kvartz::machine {

enum class BoardKind { kPc, kMicrovm };

// One name of -M.
struct MachineType {
  std::string name;   // "pc-i440fx-kvartz-0.1"
  std::string alias;  // "pc": the newest of its family; or empty
  BoardKind board;
  std::string description;
};
const std::vector<MachineType>& MachineTypes();
// Takes names, aliases, and the names that other VMMs gave the same machine ("pc-i440fx-7.2",
// "pc-i440fx-jammy"...). Errors: unknown; says the nearest name.
Result<const MachineType*> FindMachineType(const std::string& name);

struct BootConfig {
  std::string kernel;  // bzImage, vmlinux or other ELF with a PVH note, multiboot 1
  std::string initrd;  // multiboot: "file arguments,file arguments..."
  std::string cmdline;
  std::string firmware;                // file; empty: the default where there is no kernel
  std::string dtb;                     // refused: no board here takes one
  std::vector<std::string> data_dirs;  // -L: searched for firmware, before the system's directories
  std::string order = "cad";           // -boot order=, once=
  std::optional<bool> menu;
  std::optional<unsigned> splash_time_ms;
};

struct RtcConfig {
  enum class Base { kUtc, kLocaltime, kDate };
  Base base = Base::kUtc;
  int64_t date_s = 0;  // kDate: seconds since 1970 at the machine's start
};

// -smbios type=N,...: texts that replace the defaults; empty: default.
struct SmbiosConfig {
  std::string bios_vendor, bios_version, bios_date;
  std::string manufacturer, product, version, serial, sku, family;
  std::string board_manufacturer, board_product, board_version, board_serial, board_asset;
  std::string chassis_manufacturer, chassis_version, chassis_serial, chassis_asset, chassis_sku;
  std::vector<std::string> oem_strings;
};

struct MachineConfig {
  std::string type = "pc";
  // -M options other than the type; each board takes its own and refuses the rest by name:
  // pc: acpi, hpet, pit, vmport, usb, smm, kernel-irqchip, max-ram-below-4g, graphics;
  // microvm: acpi, pic, pit, rtc, pcie, isa-serial, kernel-irqchip, auto-kernel-cmdline,
  // x-option-roms.
  std::vector<std::pair<std::string, std::string>> options;

  uint64_t ram_bytes = 128ull << 20;
  RamOptions ram_options;

  unsigned cpu_count = 1;
  cpu::CpuTopology topology;
  cpu::CpuModelRequest cpu_model;
  cpu::SoftOptions soft;  // -accel kvartz,...
  cpu::KvmOptions kvm;    // -accel kvm,...; kernel-irqchip= of the machine comes second

  BootConfig boot;
  RtcConfig rtc;
  SmbiosConfig smbios;
  std::string name;
  std::optional<std::array<uint8_t, 16>> uuid;  // in the order of its text form
  std::vector<std::pair<std::string, std::vector<uint8_t>>>
      fw_cfg_files;  // -fw_cfg name=...,string=|file=

  std::vector<DeviceSpec> devices;
};

}  // namespace kvartz::machine
