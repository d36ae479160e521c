// The ACPI tables of the board "microvm": hardware-reduced.
#pragma once

#include <cstdint>
#include <vector>

#include "machine/acpi/tables.h"

namespace kvartz::machine {

struct MicrovmAcpiConfig {
  AcpiCpus cpus;
  struct Slot {
    uint64_t base = 0;
    unsigned gsi = 0;
  };
  std::vector<Slot> slots;  // of virtio-mmio, those in use
  uint64_t slot_size = 512;
  uint16_t registers = 0;  // ports of AcpiReduced
  unsigned power_button_gsi = 0;
  bool serial = false, rtc = false, fw_cfg = false;
};
AcpiTables BuildMicrovmAcpi(const MicrovmAcpiConfig& config);

}  // namespace kvartz::machine
