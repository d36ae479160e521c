// What the general instructions share: registers, memory operands, flags, the stack.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/x86/cpu.h"
#include "cpu/x86/decode/insn.h"
#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86 {

// ---- registers, numbered as Insn::reg and Insn::rm are (byte registers: 16..19 are AH CH DH BH)
template <typename T>
inline T GetReg(const Cpu& cpu, unsigned number) {
  if constexpr (sizeof(T) == 1) {
    return reinterpret_cast<const T*>(cpu.gpr)[(number & 15) * 8 + (number >> 4)];
  } else {
    return static_cast<T>(cpu.gpr[number]);
  }
}

// 32-bit results clear the upper half; smaller ones leave the rest alone.
template <typename T>
inline void SetReg(Cpu& cpu, unsigned number, T value) {
  if constexpr (sizeof(T) == 1) {
    reinterpret_cast<T*>(cpu.gpr)[(number & 15) * 8 + (number >> 4)] = value;
  } else if constexpr (sizeof(T) == 2) {
    std::memcpy(&cpu.gpr[number], &value, 2);
  } else {
    cpu.gpr[number] = static_cast<std::make_unsigned_t<T>>(value);
  }
}

// ---- where the operands are
enum class Place { kReg, kMem };

template <typename T, Place P>
inline T ReadRm(Cpu& cpu, const Insn& insn) {
  if constexpr (P == Place::kReg) {
    return GetReg<T>(cpu, insn.rm);
  } else {
    return ReadMem<T>(cpu, insn.seg(), EffectiveAddress(cpu, insn));
  }
}
template <typename T, Place P>
inline void WriteRm(Cpu& cpu, const Insn& insn, T value) {
  if constexpr (P == Place::kReg) {
    SetReg<T>(cpu, insn.rm, value);
  } else {
    WriteMem<T>(cpu, insn.seg(), EffectiveAddress(cpu, insn), value);
  }
}

// The value in memory that can't be mapped, once the write is known to be possible: a fault is a
// write's.
template <typename T>
[[gnu::noinline]] T ReadForWrite(Cpu& cpu, SegReg seg, uint64_t offset) {
  CheckWrite(cpu, seg, offset, sizeof(T));
  return ReadMem<T>(cpu, seg, offset);
}
// Reads memory, applies `change(T*)`, writes it back.
template <typename T, typename Change>
inline void Modify(Cpu& cpu, SegReg seg, uint64_t offset, Change change) {
  T value;
  if (void* host = MapForWrite(cpu, seg, offset, sizeof(T))) [[likely]] {
    std::memcpy(&value, host, sizeof(T));  // at any alignment
    change(&value);
    std::memcpy(host, &value, sizeof(T));
    return;
  }
  value = ReadForWrite<T>(cpu, seg, offset);
  change(&value);
  WriteMem<T>(cpu, seg, offset, value);
}
// The same as one atomic access: `change` uses the host's LOCK prefix.
template <typename T, typename Change>
inline void ModifyLocked(Cpu& cpu, SegReg seg, uint64_t offset, Change change) {
  if (void* host = MapForWrite(cpu, seg, offset, sizeof(T))) [[likely]] {
    change(static_cast<T*>(host));
    return;
  }
  BusLock(cpu);
  T value = ReadForWrite<T>(cpu, seg, offset);
  change(&value);
  WriteMem<T>(cpu, seg, offset, value);
  BusUnlock(cpu);
}

// ---- status flags as LAHF and SETO leave them in AX: SF ZF AF PF CF in AH, OF in bit 0
inline uint32_t PackFlags(uint64_t flags) {
  return static_cast<uint32_t>((flags & 0xd5) << 8 | (flags >> 11 & 1));
}
inline uint64_t UnpackFlags(uint32_t ax) { return (ax >> 8 & 0xd5) | (ax & 1) << 11; }
inline void SetFlags(Cpu& cpu, uint64_t mask, uint64_t value) {
  cpu.rflags = (cpu.rflags & ~mask) | (value & mask);
}
inline void SetStatus(Cpu& cpu, uint32_t ax) {
  cpu.rflags = (cpu.rflags & ~rflags::kStatus) | UnpackFlags(ax);
}

// Assembly that brings the packed flags in AX into the host's, and back.
#define KVARTZ_LOAD_FLAGS "addb $127, %%al\n\tsahf\n\t"
#define KVARTZ_STORE_FLAGS "\n\tlahf\n\tseto %%al"

// SF, ZF and PF of a result.
template <typename T>
inline uint64_t ResultFlags(T value) {
  const auto bits = static_cast<std::make_unsigned_t<T>>(value);
  return (bits >> (8 * sizeof(T) - 1) & 1) * rflags::kSf | (bits == 0 ? rflags::kZf : 0) |
         (__builtin_parity(static_cast<uint8_t>(bits)) ? 0 : rflags::kPf);
}

// Condition code 0..15, as in the low bits of Jcc.
inline bool TestCondition(uint64_t flags, unsigned code) {
  bool result;
  switch (code >> 1) {
    case 0:
      result = (flags & rflags::kOf) != 0;
      break;
    case 1:
      result = (flags & rflags::kCf) != 0;
      break;
    case 2:
      result = (flags & rflags::kZf) != 0;
      break;
    case 3:
      result = (flags & (rflags::kCf | rflags::kZf)) != 0;
      break;
    case 4:
      result = (flags & rflags::kSf) != 0;
      break;
    case 5:
      result = (flags & rflags::kPf) != 0;
      break;
    case 6:
      result = ((flags >> 7 ^ flags >> 11) & 1) != 0;
      break;
    default:
      result = (((flags >> 7 ^ flags >> 11) | flags >> 6) & 1) != 0;
      break;
  }
  return result != ((code & 1) != 0);
}

// ---- choosing an instantiation when an instruction is decoded: `select` is called with a value of
// the operand's type
template <typename Select>
ExecFn BySize(unsigned size, Select select) {
  switch (size) {
    case 1:
      return select(uint8_t{});
    case 2:
      return select(uint16_t{});
    case 4:
      return select(uint32_t{});
    default:
      return select(uint64_t{});
  }
}
// For rows without a byte form.
template <typename Select>
ExecFn BySizeWord(unsigned size, Select select) {
  return size == 2 ? select(uint16_t{}) : size == 4 ? select(uint32_t{}) : select(uint64_t{});
}
// For rows of 32 and 64 bits.
template <typename Select>
ExecFn BySizeW(unsigned size, Select select) {
  return size == 8 ? select(uint64_t{}) : select(uint32_t{});
}

// ---- addresses and the stack
inline uint64_t TruncateAddress(uint64_t value, unsigned size) {
  return size == 8   ? value
         : size == 4 ? static_cast<uint32_t>(value)
                     : static_cast<uint16_t>(value);
}
// A register that is written as an address of `size` bytes (rSP, rCX, rSI, rDI, rBP).
inline void SetAddressReg(Cpu& cpu, unsigned number, uint64_t value, unsigned size) {
  if (size == 2) {
    SetReg<uint16_t>(cpu, number, static_cast<uint16_t>(value));
  } else {
    cpu.gpr[number] = size == 4 ? static_cast<uint32_t>(value) : value;
  }
}

template <typename T>
inline void Push(Cpu& cpu, T value) {
  const uint64_t sp = TruncateAddress(cpu.gpr[kRsp] - sizeof(T), cpu.stack_size);
  WriteMem<T>(cpu, kSs, sp, value);
  SetAddressReg(cpu, kRsp, sp, cpu.stack_size);
}
template <typename T>
inline T ReadStack(Cpu& cpu, uint64_t offset = 0) {
  return ReadMem<T>(cpu, kSs, TruncateAddress(cpu.gpr[kRsp] + offset, cpu.stack_size));
}
inline void AddToStack(Cpu& cpu, uint64_t delta) {
  SetAddressReg(cpu, kRsp, cpu.gpr[kRsp] + delta, cpu.stack_size);
}

// Raises #GP(0) unless a near branch may go to `target`.
void CheckTargetSlow(Cpu& cpu, uint64_t target);
inline void CheckTarget(Cpu& cpu, uint64_t target) {
  const bool fine = cpu.code_mode == CodeMode::k64
                        ? static_cast<int64_t>(target << 16) >> 16 == static_cast<int64_t>(target)
                        : target <= cpu.seg[kCs].limit;
  if (!fine) [[unlikely]] {
    CheckTargetSlow(cpu, target);
  }
}

}  // namespace kvartz::cpu::x86
