// The ACPI tables of the board "pc".
#pragma once

#include <cstdint>

#include "machine/acpi/tables.h"

namespace kvartz::machine {

struct PcAcpiConfig {
  AcpiCpus cpus;
  uint64_t pci_hole_begin = 0;                            // 32-bit window, up to the I/O APIC
  uint64_t pci_window64_begin = 0, pci_window64_end = 0;  // equal: none
  uint16_t pm_base = 0;
  uint8_t sci = 9;
  bool hpet = true;
  bool fw_cfg = false;
  unsigned serial_ports = 0;  // bit n: COM(n+1) is there
};
AcpiTables BuildPcAcpi(const PcAcpiConfig& config);

}  // namespace kvartz::machine
