// The page walk (SDM vol. 3 ch. 4).
#pragma once

#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86 {

struct Mapping {
  uint64_t physical = 0;
  unsigned page_shift = 12;  // 12, 21, 22 or 30
  bool global = false;       // survives a load of CR3
  bool dirty = true;         // D was set before
};

namespace pf {
constexpr uint32_t kPresent = 1, kWrite = 2, kUser = 4, kReserved = 8, kFetch = 16;
}

// Whether A and D bits are set; kSetAccessedOnly leaves D alone even for a write.
enum WalkEffect : uint8_t { kNoEffect, kSetAccessed, kSetAccessedOnly };

// Translates `linear` for an access by code of class `cls`. False: page fault with *error.
bool Walk(Cpu& cpu, Tlb::Class cls, uint64_t linear, Access access, WalkEffect effect,
          Mapping* mapping, uint32_t* error);

}  // namespace kvartz::cpu::x86
