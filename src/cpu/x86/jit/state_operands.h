// Names of State's fields as operands, for the translator's files.
#pragma once

#include "cpu/x86/jit/assembler.h"
#include "cpu/x86/jit/state.h"

namespace kvartz::cpu::x86::jit {

inline HostMem Gs(size_t offset) { return HostMem::Gs(offset); }
inline HostMem SlotPage(unsigned slot) {
  return Gs(offsetof(State, slots) + slot * sizeof(Slot) + offsetof(Slot, page));
}
inline HostMem SegmentBase(unsigned segment) {
  return Gs(offsetof(State, cpu) + offsetof(Cpu, seg) + segment * sizeof(Segment) +
            offsetof(Segment, base));
}
inline HostMem Requests() { return Gs(offsetof(State, cpu) + offsetof(Cpu, requests)); }
inline HostMem Rflags() { return Gs(offsetof(State, cpu) + offsetof(Cpu, rflags)); }
inline HostMem PageBase() { return Gs(offsetof(State, page)); }

}  // namespace kvartz::cpu::x86::jit
