// ACPI tables, built once and placed either by the board (no firmware) or by firmware, which is
// given a script for it. ACPI 6.4, ch. 5.2.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "machine/acpi/aml.h"

namespace kvartz::machine {

// Tables at offsets from an address yet unknown, with a list of what depends on it.
class AcpiTables {
 public:
  struct Pointer {
    bool in_rsdp;
    uint32_t offset;
    uint8_t size;  // 4 or 8; the field holds the target's offset in tables()
  };
  struct Checksum {
    bool in_rsdp;
    uint32_t offset, start, length;
  };

  // Appends a table: `body` follows the standard header of 36 bytes. Returns its offset.
  // `pointers`: offsets in the table of fields (with their sizes) that hold offsets of other
  // tables.
  struct Field {
    uint32_t offset;
    uint8_t size;
  };
  uint32_t Add(const char* signature, uint8_t revision, const aml::Bytes& body,
               const std::vector<Field>& pointers = {});
  // The FACS has neither that header nor a checksum; it is aligned to 64 bytes.
  uint32_t AddFacs();
  // RSDT, XSDT and RSDP that list the tables at `offsets`. Last.
  void Finish(const std::vector<uint32_t>& offsets);

  const std::vector<uint8_t>& tables() const { return tables_; }
  const std::vector<uint8_t>& rsdp() const { return rsdp_; }
  const std::vector<Pointer>& pointers() const { return pointers_; }
  const std::vector<Checksum>& checksums() const { return checksums_; }

  // RSDP at `base`, the tables behind it, all pointers and checksums final.
  std::vector<uint8_t> PlaceAt(uint64_t base) const;
  // The script of etc/table-loader: allocate, patch, sum. Commands of QEMU's "bios linker/loader"
  // interface.
  std::vector<uint8_t> LoaderScript() const;

 private:
  void Align(unsigned alignment);
  std::vector<uint8_t> tables_, rsdp_;
  std::vector<Pointer> pointers_;
  std::vector<Checksum> checksums_;
};

// What the tables say of the processors and interrupt controllers.
struct AcpiCpus {
  std::vector<uint32_t> apic_ids;
};
enum class LegacyPics { kNo, kYes };
aml::Bytes MadtBody(const AcpiCpus& cpus, LegacyPics pics,
                    const std::vector<unsigned>& level_lines);
// Processor devices for \_SB.
aml::Bytes ProcessorDevices(const AcpiCpus& cpus);
aml::Bytes HpetBody(uint64_t address);

// The fixed description table. Fields that a board leaves at zero are absent there.
struct Fadt {
  uint32_t facs = 0, dsdt = 0;  // offsets in the tables
  uint16_t sci = 0;
  uint32_t pm1_event = 0, pm1_control = 0, pm_timer = 0, gpe0 = 0;
  uint8_t gpe0_length = 0;
  uint8_t century = 0;
  uint16_t boot_arch = 0;
  uint32_t flags = 0;
  struct Register {
    uint8_t space = 0, width_bits = 0;  // space 0: memory, 1: I/O
    uint64_t address = 0;
  };
  Register reset, sleep_control, sleep_status;
  uint8_t reset_value = 0;

  static constexpr uint32_t kWbinvd = 1 << 0, kC1 = 1 << 2, kPowerButtonIsDevice = 1 << 4,
                            kSleepButtonIsDevice = 1 << 5, kRtcNotFixed = 1 << 6, kReset = 1 << 10,
                            kPlatformClock = 1 << 15, kHwReduced = 1 << 20;
  static constexpr uint16_t kLegacyDevices = 1 << 0, k8042 = 1 << 1, kNoVga = 1 << 2,
                            kNoRtc = 1 << 5;
};
uint32_t AddFadt(AcpiTables& tables, const Fadt& fadt);

}  // namespace kvartz::machine
