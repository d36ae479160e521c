// Moves, exchanges, sign extensions and conditional moves.
#include "cpu/x86/interp/integer.h"

namespace kvartz::cpu::x86 {
namespace {

template <typename T, Place P>
void ExecStore(Cpu& cpu, const Insn& insn) {  // MOV rm, r
  WriteRm<T, P>(cpu, insn, GetReg<T>(cpu, insn.reg));
}
template <typename T, Place P>
void ExecLoad(Cpu& cpu, const Insn& insn) {  // MOV r, rm
  SetReg<T>(cpu, insn.reg, ReadRm<T, P>(cpu, insn));
}
template <typename T, Place P>
void ExecStoreImm(Cpu& cpu, const Insn& insn) {
  WriteRm<T, P>(cpu, insn, static_cast<T>(insn.imm));
}
template <typename T>
void ExecLoadImm(Cpu& cpu, const Insn& insn) {
  SetReg<T>(cpu, insn.reg, static_cast<T>(insn.imm));
}
template <typename T>
void ExecLoadOffset(Cpu& cpu, const Insn& insn) {
  SetReg<T>(cpu, kRax, ReadMem<T>(cpu, insn.seg(), static_cast<uint64_t>(insn.disp)));
}
template <typename T>
void ExecStoreOffset(Cpu& cpu, const Insn& insn) {
  WriteMem<T>(cpu, insn.seg(), static_cast<uint64_t>(insn.disp), GetReg<T>(cpu, kRax));
}

template <typename To, typename From, Place P>
void ExecExtend(Cpu& cpu, const Insn& insn) {  // From is signed for a sign extension
  const auto value = static_cast<From>(ReadRm<std::make_unsigned_t<From>, P>(cpu, insn));
  SetReg<To>(cpu, insn.reg, static_cast<To>(value));
}
template <typename From>
ExecFn PickExtend(const Insn& insn) {
  return BySizeWord(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecExtend<T, From, Place::kMem> : ExecExtend<T, From, Place::kReg>;
  });
}

template <typename T>
T SwapBytes(T value) {
  if constexpr (sizeof(T) == 2) {
    return __builtin_bswap16(value);
  } else if constexpr (sizeof(T) == 4) {
    return __builtin_bswap32(value);
  } else {
    return __builtin_bswap64(value);
  }
}
template <typename T>
void ExecLoadSwapped(Cpu& cpu, const Insn& insn) {
  SetReg<T>(cpu, insn.reg, SwapBytes(ReadRm<T, Place::kMem>(cpu, insn)));
}
template <typename T>
void ExecStoreSwapped(Cpu& cpu, const Insn& insn) {
  WriteRm<T, Place::kMem>(cpu, insn, SwapBytes(GetReg<T>(cpu, insn.reg)));
}
// BSWAP of 16 bits is undefined; CPUs clear the register.
template <typename T>
void ExecSwapReg(Cpu& cpu, const Insn& insn) {
  SetReg<T>(cpu, insn.reg, sizeof(T) == 2 ? T{0} : SwapBytes(GetReg<T>(cpu, insn.reg)));
}

template <typename T>
void ExecLea(Cpu& cpu, const Insn& insn) {
  SetReg<T>(cpu, insn.reg, static_cast<T>(EffectiveAddress(cpu, insn)));
}

template <typename T>
void ExecExchangeReg(Cpu& cpu, const Insn& insn) {  // "90+r": rm is 0, RAX
  const T old = GetReg<T>(cpu, insn.rm);
  SetReg<T>(cpu, insn.rm, GetReg<T>(cpu, insn.reg));
  SetReg<T>(cpu, insn.reg, old);
}
template <typename T>
void ExecExchangeMem(Cpu& cpu, const Insn& insn) {  // locked with or without the prefix
  T value = GetReg<T>(cpu, insn.reg);
  ModifyLocked<T>(cpu, insn.seg(), EffectiveAddress(cpu, insn),
                  [&](T* target) { value = __atomic_exchange_n(target, value, __ATOMIC_SEQ_CST); });
  SetReg<T>(cpu, insn.reg, value);
}

// ---- compare and exchange, exchange and add
template <typename T>
uint32_t SubFlags(T a, T b) {
  uint32_t ax = 0;
  asm("sub %[b], %[a]" KVARTZ_STORE_FLAGS : [a] "+r"(a), "+a"(ax) : [b] "r"(b) : "cc");
  return ax;
}

// On inequality memory is written back unchanged: the CPU always writes. RAX and rm of 32 bits are
// only zero-extended when they are written.
template <typename T>
void ExecCmpxchgReg(Cpu& cpu, const Insn& insn) {
  const T expected = GetReg<T>(cpu, kRax);
  const T old = GetReg<T>(cpu, insn.rm);
  SetStatus(cpu, SubFlags<T>(expected, old));
  if (old == expected) {
    SetReg<T>(cpu, insn.rm, GetReg<T>(cpu, insn.reg));
  } else {
    SetReg<T>(cpu, kRax, old);
  }
}
template <typename T, bool kAtomic>
void ExecCmpxchgMem(Cpu& cpu, const Insn& insn) {
  const T expected = GetReg<T>(cpu, kRax);
  const T desired = GetReg<T>(cpu, insn.reg);
  T old = expected;
  const uint64_t offset = EffectiveAddress(cpu, insn);
  if constexpr (kAtomic) {
    ModifyLocked<T>(cpu, insn.seg(), offset, [&](T* target) {
      __atomic_compare_exchange_n(target, &old, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    });
  } else {
    Modify<T>(cpu, insn.seg(), offset, [&](T* target) {
      old = *target;
      if (old == expected) {
        *target = desired;
      }
    });
  }
  SetStatus(cpu, SubFlags<T>(expected, old));
  if (old != expected) {
    SetReg<T>(cpu, kRax, old);
  }
}

template <typename T>
uint32_t AddFlags(T a, T b) {
  uint32_t ax = 0;
  asm("add %[b], %[a]" KVARTZ_STORE_FLAGS : [a] "+r"(a), "+a"(ax) : [b] "r"(b) : "cc");
  return ax;
}
template <typename T>
void ExecXaddReg(Cpu& cpu, const Insn& insn) {
  const T source = GetReg<T>(cpu, insn.reg);
  const T old = GetReg<T>(cpu, insn.rm);
  SetReg<T>(cpu, insn.reg, old);
  SetReg<T>(cpu, insn.rm, static_cast<T>(old + source));
  SetStatus(cpu, AddFlags<T>(old, source));
}
template <typename T, bool kAtomic>
void ExecXaddMem(Cpu& cpu, const Insn& insn) {
  const T source = GetReg<T>(cpu, insn.reg);
  const uint64_t offset = EffectiveAddress(cpu, insn);
  T old;
  if constexpr (kAtomic) {
    ModifyLocked<T>(cpu, insn.seg(), offset,
                    [&](T* target) { old = __atomic_fetch_add(target, source, __ATOMIC_SEQ_CST); });
  } else {
    Modify<T>(cpu, insn.seg(), offset, [&](T* target) {
      old = *target;
      *target = static_cast<T>(old + source);
    });
  }
  SetReg<T>(cpu, insn.reg, old);
  SetStatus(cpu, AddFlags<T>(old, source));
}

// ---- conditions
template <unsigned kCode, typename T, Place P>
void ExecCmov(
    Cpu& cpu,
    const Insn& insn) {  // memory is read and 32-bit registers are zero-extended in any case
  const T source = ReadRm<T, P>(cpu, insn);
  SetReg<T>(cpu, insn.reg, TestCondition(cpu.rflags, kCode) ? source : GetReg<T>(cpu, insn.reg));
}
template <unsigned kCode>
ExecFn PickCmov(const Insn& insn) {
  return BySizeWord(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecCmov<kCode, T, Place::kMem> : ExecCmov<kCode, T, Place::kReg>;
  });
}
template <unsigned kCode, Place P>
void ExecSet(Cpu& cpu, const Insn& insn) {
  WriteRm<uint8_t, P>(cpu, insn, TestCondition(cpu.rflags, kCode) ? 1 : 0);
}
template <unsigned kCode>
ExecFn PickSet(const Insn& insn) {
  return insn.has_memory() ? ExecSet<kCode, Place::kMem> : ExecSet<kCode, Place::kReg>;
}

template <typename T>
struct Half;
template <>
struct Half<uint16_t> {
  using Type = int8_t;
};
template <>
struct Half<uint32_t> {
  using Type = int16_t;
};
template <>
struct Half<uint64_t> {
  using Type = int32_t;
};
template <typename T>
void ExecExtendAccumulator(Cpu& cpu, const Insn&) {
  SetReg<T>(cpu, kRax, static_cast<T>(static_cast<typename Half<T>::Type>(cpu.gpr[kRax])));
}
template <typename T>
void ExecExtendToRdx(Cpu& cpu, const Insn&) {
  const bool negative = (GetReg<T>(cpu, kRax) >> (8 * sizeof(T) - 1)) != 0;
  SetReg<T>(cpu, kRdx, negative ? static_cast<T>(~T{0}) : T{0});
}

template <typename T, Place P>
ExecFn PickMov(const Insn& insn) {
  const Row& row = *insn.row;
  if (row.operands[0].kind == OperandKind::kMoffs) {
    return ExecStoreOffset<T>;
  }
  if (row.operands[1].kind == OperandKind::kMoffs) {
    return ExecLoadOffset<T>;
  }
  if (row.opcode_register) {
    return ExecLoadImm<T>;
  }
  if (row.imm[0] != ImmKind::kNone) {
    return ExecStoreImm<T, P>;
  }
  return row.operands[0].kind == OperandKind::kReg ? ExecLoad<T, P> : ExecStore<T, P>;
}

}  // namespace

ExecFn Pick_MOV(const Insn& insn) {
  return BySize(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? PickMov<T, Place::kMem>(insn) : PickMov<T, Place::kReg>(insn);
  });
}
ExecFn Pick_MOVZX(const Insn& insn) {
  return insn.row->operands[1].size == 1 ? PickExtend<uint8_t>(insn) : PickExtend<uint16_t>(insn);
}
ExecFn Pick_MOVSX(const Insn& insn) {
  return insn.row->operands[1].size == 1 ? PickExtend<int8_t>(insn) : PickExtend<int16_t>(insn);
}
ExecFn Pick_MOVSXD(const Insn& insn) {
  if (insn.operand_size == 2) {
    return PickExtend<int16_t>(insn);
  }
  return PickExtend<int32_t>(insn);
}
ExecFn Pick_MOVBE(const Insn& insn) {
  const bool load = insn.row->operands[0].kind == OperandKind::kReg;
  return BySizeWord(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return load ? ExecLoadSwapped<T> : ExecStoreSwapped<T>;
  });
}
ExecFn Pick_MOVNTI(const Insn& insn) {
  return insn.operand_size == 8 ? ExecStore<uint64_t, Place::kMem>
                                : ExecStore<uint32_t, Place::kMem>;
}
ExecFn Pick_BSWAP(const Insn& insn) {
  return BySizeWord(insn.operand_size,
                    [](auto type) -> ExecFn { return ExecSwapReg<decltype(type)>; });
}
ExecFn Pick_LEA(const Insn& insn) {
  return BySizeWord(insn.operand_size, [](auto type) -> ExecFn { return ExecLea<decltype(type)>; });
}
ExecFn Pick_XCHG(const Insn& insn) {
  return BySize(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecExchangeMem<T> : ExecExchangeReg<T>;
  });
}
ExecFn Pick_CMPXCHG(const Insn& insn) {
  return BySize(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return !insn.has_memory() ? ExecCmpxchgReg<T>
           : insn.locked()    ? ExecCmpxchgMem<T, true>
                              : ExecCmpxchgMem<T, false>;
  });
}
ExecFn Pick_XADD(const Insn& insn) {
  return BySize(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return !insn.has_memory() ? ExecXaddReg<T>
           : insn.locked()    ? ExecXaddMem<T, true>
                              : ExecXaddMem<T, false>;
  });
}
ExecFn Pick_CBW(const Insn& insn) {
  return BySizeWord(insn.operand_size,
                    [](auto type) -> ExecFn { return ExecExtendAccumulator<decltype(type)>; });
}
ExecFn Pick_CWD(const Insn& insn) {
  return BySizeWord(insn.operand_size,
                    [](auto type) -> ExecFn { return ExecExtendToRdx<decltype(type)>; });
}

#define CONDITION(cc, digit, tested)                                         \
  ExecFn Pick_SET##cc(const Insn& insn) { return PickSet<0x##digit>(insn); } \
  ExecFn Pick_CMOV##cc(const Insn& insn) { return PickCmov<0x##digit>(insn); }
#include "cpu/x86/decode/conditions.def"
#undef CONDITION

namespace {
// CMPXCHG8B and 16B always write; LOCK or not, the host's locked instruction does it.
bool CompareExchange(uint64_t* target, uint64_t* old, uint64_t desired) {
  return __atomic_compare_exchange_n(target, old, desired, false, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST);
}
bool CompareExchange(unsigned __int128* target, unsigned __int128* old, unsigned __int128 desired) {
  auto low = static_cast<uint64_t>(*old), high = static_cast<uint64_t>(*old >> 64);
  bool equal;
  asm volatile("lock cmpxchg16b %[target]"
               : [target] "+m"(*target), "+a"(low), "+d"(high), "=@ccz"(equal)
               : "b"(static_cast<uint64_t>(desired)), "c"(static_cast<uint64_t>(desired >> 64))
               : "memory");
  *old = static_cast<unsigned __int128>(high) << 64 | low;
  return equal;
}

template <typename T, typename Half>
void ExecCmpxchgPair(Cpu& cpu, const Insn& insn) {
  constexpr unsigned kBits = 8 * sizeof(Half);
  const T expected = static_cast<T>(GetReg<Half>(cpu, kRdx)) << kBits | GetReg<Half>(cpu, kRax);
  const T desired = static_cast<T>(GetReg<Half>(cpu, kRcx)) << kBits | GetReg<Half>(cpu, kRbx);
  const uint64_t offset = EffectiveAddress(cpu, insn);
  T old = expected;
  bool equal;
  if (void* host = MapForWrite(cpu, insn.seg(), offset, sizeof(T))) [[likely]] {
    equal = CompareExchange(static_cast<T*>(host), &old, desired);
  } else {
    BusLock(cpu);
    CheckWrite(cpu, insn.seg(), offset, sizeof(T));
    ReadMemBytes(cpu, insn.seg(), offset, &old, sizeof(T));
    equal = old == expected;
    WriteMemBytes(cpu, insn.seg(), offset, equal ? &desired : &old, sizeof(T));
    BusUnlock(cpu);
  }
  SetFlags(cpu, rflags::kZf, equal ? rflags::kZf : 0);
  if (!equal) {
    SetReg<Half>(cpu, kRax, static_cast<Half>(old));
    SetReg<Half>(cpu, kRdx, static_cast<Half>(old >> kBits));
  }
}
}  // namespace

void Exec_CMPXCHG8B(Cpu& cpu, const Insn& insn) { ExecCmpxchgPair<uint64_t, uint32_t>(cpu, insn); }
void Exec_CMPXCHG16B(Cpu& cpu, const Insn& insn) {
  if ((mmu::Linear(cpu, insn.seg(), EffectiveAddress(cpu, insn), 16, Access::kWrite) & 15) != 0) {
    Raise(cpu, kGP, 0);
  }
  ExecCmpxchgPair<unsigned __int128, uint64_t>(cpu, insn);
}

void Exec_XLAT(Cpu& cpu, const Insn& insn) {
  const uint64_t offset =
      TruncateAddress(cpu.gpr[kRbx] + GetReg<uint8_t>(cpu, kRax), insn.address_size);
  SetReg<uint8_t>(cpu, kRax, ReadMem<uint8_t>(cpu, insn.seg(), offset));
}

}  // namespace kvartz::cpu::x86
