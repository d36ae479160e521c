// What the system instructions share.
#pragma once

#include "cpu/x86/cpu.h"
#include "cpu/x86/decode/insn.h"
#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86 {

// Operand size of an instruction by 66 and mode alone (2 or 4): for those whose first operand tells
// something else.
inline unsigned PlainSize(const Cpu& cpu, const Insn& insn) {
  return (cpu.code_mode == CodeMode::k16) == ((insn.flags & kHas66) != 0) ? 4 : 2;
}

inline void WriteGpr(Cpu& cpu, unsigned number, unsigned size, uint64_t value) {
  if (size == 8) {
    cpu.gpr[number] = value;
  } else if (size == 4) {
    cpu.gpr[number] = static_cast<uint32_t>(value);
  } else {
    std::memcpy(&cpu.gpr[number], &value, size);
  }
}

inline uint64_t ReadSized(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size) {
  switch (size) {
    case 1:
      return ReadMem<uint8_t>(cpu, seg, offset);
    case 2:
      return ReadMem<uint16_t>(cpu, seg, offset);
    case 4:
      return ReadMem<uint32_t>(cpu, seg, offset);
    default:
      return ReadMem<uint64_t>(cpu, seg, offset);
  }
}

inline void WriteSized(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size, uint64_t value) {
  switch (size) {
    case 1:
      return WriteMem<uint8_t>(cpu, seg, offset, static_cast<uint8_t>(value));
    case 2:
      return WriteMem<uint16_t>(cpu, seg, offset, static_cast<uint16_t>(value));
    case 4:
      return WriteMem<uint32_t>(cpu, seg, offset, static_cast<uint32_t>(value));
    default:
      return WriteMem<uint64_t>(cpu, seg, offset, value);
  }
}

// A 16-bit source in ModRM.rm.
inline uint16_t ReadRm16(Cpu& cpu, const Insn& insn) {
  return insn.has_memory() ? ReadMem<uint16_t>(cpu, insn.seg(), EffectiveAddress(cpu, insn))
                           : static_cast<uint16_t>(cpu.gpr[insn.rm]);
}

// A word of system state to ModRM.rm: zero-extended to the operand size in a register, 16 bits in
// memory.
inline void StoreWord(Cpu& cpu, const Insn& insn, uint64_t value) {
  if (insn.has_memory()) {
    WriteMem<uint16_t>(cpu, insn.seg(), EffectiveAddress(cpu, insn), static_cast<uint16_t>(value));
  } else {
    WriteGpr(cpu, insn.rm, insn.operand_size, value);
  }
}

inline unsigned Iopl(const Cpu& cpu) { return cpu.rflags >> 12 & 3; }

}  // namespace kvartz::cpu::x86
