// What a unit's code depends on besides its bytes, as a number: part of the key that it is found
// by.
#pragma once

#include <cstdint>

#include "cpu/x86/cpu.h"
#include "cpu/x86/decode/insn.h"
#include "cpu/x86/jit/unit.h"
#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86::jit {

namespace mode {
constexpr uint16_t kUser = 1;        // CPL 3
constexpr unsigned kClassShift = 1;  // Tlb::Class of data accesses: two bits
constexpr uint16_t kSse = 8, kAvx = 0x10, kX87 = 0x20;
constexpr uint16_t kSingle = 0x40;  // accesses are checked one by one
// 0 in 64-bit mode:
constexpr uint16_t kCode16 = 0x80, kCode32 = 0x100;
constexpr uint16_t kReal = 0x200;  // real or virtual-8086 mode
constexpr uint16_t kStack32 = 0x400;
constexpr uint16_t kFlat = 0x800;          // DS, ES and SS are all of the address space
constexpr uint16_t kCodeFlat = 0x1000;     // CS is
constexpr uint16_t kCodeAligned = 0x2000;  // CS begins where a page does
constexpr uint16_t kLegacy = kCode16 | kCode32;
}  // namespace mode

// Code of the CPU's present mode can be translated.
inline bool Translatable(const Cpu& cpu) {
  return (cpu.cpl == 0 || cpu.cpl == 3) && cpu.tlb->data_class() <= Tlb::kNoSmap;
}
// Where the segment of the present code begins and ends. In 64-bit mode there is none.
struct CodeSegment {
  uint64_t base = 0, limit = 0;
  static CodeSegment Of(const Cpu& cpu) {
    if (cpu.code_mode == CodeMode::k64) [[likely]]
      return {};
    return {cpu.seg[kCs].base, cpu.seg[kCs].limit};
  }
  bool operator==(const CodeSegment&) const = default;
};
inline uint64_t CodeLinear(const Cpu& cpu, uint64_t rip) {
  return cpu.code_mode == CodeMode::k64 ? rip : static_cast<uint32_t>(rip + cpu.seg[kCs].base);
}
// The whole page around `linear`, where RIP is, can be reached by RIP as it is there: within CS's
// limit, and in 16-bit code by 16-bit targets. Its part in front of the segment doesn't matter.
bool CodePageFits(const Cpu& cpu, uint64_t linear);

// CS begins at 0, and has no end in code of this size.
inline bool RipIsLinear(uint16_t mode) {
  return (mode & mode::kLegacy) == 0 ||
         ((mode & mode::kCode32) != 0 && (mode & mode::kCodeFlat) != 0);
}

uint16_t ModeOf(const Cpu& cpu);
unsigned ClassOf(uint16_t mode);
UnitMode UnitModeOf(uint16_t mode);
DecodeContext DecodeContextOf(uint16_t mode, const FeatureSet& features);

}  // namespace kvartz::cpu::x86::jit
