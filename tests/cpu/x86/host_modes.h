// What the host lets a process run, where tests take its CPU for the oracle.
#pragma once

#include <cstdint>

namespace kvartz::cpu::x86 {

constexpr uint16_t kUser32Cs = 0x23;  // Linux: __USER32_CS
constexpr const char* kNo32BitCode =
    "this host runs no 32-bit code: its kernel has no 32-bit code segment (some hypervisors leave "
    "it "
    "out)";

// Whether kUser32Cs is there: LAR asks without the risk of a fault (SDM vol. 3, 5.10.1).
inline bool HostRuns32BitCode() {
  uint32_t rights = 0;
  bool valid;
  asm("lar %[selector], %[rights]"
      : [rights] "+r"(rights), "=@ccz"(valid)
      : [selector] "r"(uint32_t{kUser32Cs}));
  constexpr uint32_t kPresent = 1 << 15, kCodeOrData = 1 << 12, kCode = 1 << 11, kLong = 1 << 21,
                     kDefault32 = 1 << 22;
  constexpr uint32_t kWanted = kPresent | kCodeOrData | kCode | kDefault32;
  return valid && (rights & (kWanted | kLong)) == kWanted;
}

}  // namespace kvartz::cpu::x86
