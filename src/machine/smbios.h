// SMBIOS tables of a virtual machine. DSP0134 3.0, ch. 5 (entry points) and 7 (structures).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "machine/machine_config.h"

namespace kvartz::machine {

struct SmbiosInput {
  const SmbiosConfig* texts = nullptr;
  std::string machine_name;  // of the machine type; the default product version
  std::array<uint8_t, 16> uuid{};
  unsigned sockets = 1, cores_per_socket = 1, threads_per_socket = 1;
  uint32_t cpuid_signature = 0, cpuid_features = 0;  // leaf 1: eax, edx
  // Guest-physical ranges of RAM.
  struct Range {
    uint64_t base = 0, size = 0;
  };
  std::vector<Range> ram;
};

struct SmbiosTables {
  std::vector<uint8_t>
      anchor;  // "_SM_" entry point 2.8 of 31 bytes; the tables' address at offset 0x18 is zero
  std::vector<uint8_t> tables;
  // Anchor and tables for `base` (16-byte aligned), all checksums final.
  std::vector<uint8_t> PlaceAt(uint32_t base) const;
};
SmbiosTables BuildSmbios(const SmbiosInput& input);

}  // namespace kvartz::machine
