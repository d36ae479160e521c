// Shifts, rotations and multiplications by the host's own instructions; divisions with their
// checks.
#include "cpu/x86/interp/integer.h"

namespace kvartz::cpu::x86 {
namespace {

enum class Count { kOne, kCl, kImm };

template <Count C>
uint8_t GetCount(const Cpu& cpu, const Insn& insn) {
  return C == Count::kOne  ? 1
         : C == Count::kCl ? static_cast<uint8_t>(cpu.gpr[kRcx])
                           : static_cast<uint8_t>(insn.imm);
}

// The host masks the count as the guest's CPU would, and leaves the loaded flags alone where it
// would.
#define SHIFT(name, instruction)                                         \
  struct name {                                                          \
    template <typename T>                                                \
    static void Run(T* a, uint8_t count, uint32_t* ax) {                 \
      asm(KVARTZ_LOAD_FLAGS instruction " %%cl, %[a]" KVARTZ_STORE_FLAGS \
          : [a] "+r"(*a), "+a"(*ax)                                      \
          : "c"(count)                                                   \
          : "cc");                                                       \
    }                                                                    \
  };
SHIFT(Rol, "rol")
SHIFT(Ror, "ror")
SHIFT(Rcl, "rcl")
SHIFT(Rcr, "rcr")
SHIFT(Shl, "shl")
SHIFT(Shr, "shr")
SHIFT(Sar, "sar")

template <typename Op, typename T, Place P, Count C>
void ExecShift(Cpu& cpu, const Insn& insn) {
  uint32_t ax = PackFlags(cpu.rflags);
  const uint8_t count = GetCount<C>(cpu, insn);
  if constexpr (P == Place::kReg) {
    T value = GetReg<T>(cpu, insn.rm);
    Op::template Run<T>(&value, count, &ax);
    SetReg<T>(cpu, insn.rm, value);
  } else {
    Modify<T>(cpu, insn.seg(), EffectiveAddress(cpu, insn),
              [&](T* target) { Op::template Run<T>(target, count, &ax); });
  }
  SetStatus(cpu, ax);
}

template <typename Op>
ExecFn PickShift(const Insn& insn) {
  return BySize(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    const bool memory = insn.has_memory();
    switch (insn.row->operands[1].kind) {
      case OperandKind::kOne:
        return memory ? ExecShift<Op, T, Place::kMem, Count::kOne>
                      : ExecShift<Op, T, Place::kReg, Count::kOne>;
      case OperandKind::kImm:
        return memory ? ExecShift<Op, T, Place::kMem, Count::kImm>
                      : ExecShift<Op, T, Place::kReg, Count::kImm>;
      default:
        return memory ? ExecShift<Op, T, Place::kMem, Count::kCl>
                      : ExecShift<Op, T, Place::kReg, Count::kCl>;
    }
  });
}

#define DOUBLE_SHIFT(name, instruction)                                        \
  struct name {                                                                \
    template <typename T>                                                      \
    static void Run(T* a, T b, uint8_t count, uint32_t* ax) {                  \
      asm(KVARTZ_LOAD_FLAGS instruction " %%cl, %[b], %[a]" KVARTZ_STORE_FLAGS \
          : [a] "+r"(*a), "+a"(*ax)                                            \
          : [b] "r"(b), "c"(count)                                             \
          : "cc");                                                             \
    }                                                                          \
  };
DOUBLE_SHIFT(Shld, "shld")
DOUBLE_SHIFT(Shrd, "shrd")

template <typename Op, typename T, Place P>
void ExecDoubleShift(Cpu& cpu, const Insn& insn) {
  uint32_t ax = PackFlags(cpu.rflags);
  const uint8_t count = insn.row->imm[0] != ImmKind::kNone ? GetCount<Count::kImm>(cpu, insn)
                                                           : GetCount<Count::kCl>(cpu, insn);
  const T filler = GetReg<T>(cpu, insn.reg);
  if constexpr (P == Place::kReg) {
    T value = GetReg<T>(cpu, insn.rm);
    Op::template Run<T>(&value, filler, count, &ax);
    SetReg<T>(cpu, insn.rm, value);
  } else {
    Modify<T>(cpu, insn.seg(), EffectiveAddress(cpu, insn),
              [&](T* target) { Op::template Run<T>(target, filler, count, &ax); });
  }
  SetStatus(cpu, ax);
}
template <typename Op>
ExecFn PickDoubleShift(const Insn& insn) {
  return BySizeWord(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecDoubleShift<Op, T, Place::kMem>
                             : ExecDoubleShift<Op, T, Place::kReg>;
  });
}

// ---- multiplication
template <typename T>
using Wide = std::conditional_t<
    sizeof(T) == 1, uint16_t,
    std::conditional_t<sizeof(T) == 2, uint32_t,
                       std::conditional_t<sizeof(T) == 4, uint64_t, unsigned __int128>>>;

// A product's halves go to AX, or to rDX:rAX.
template <typename T>
void SetWide(Cpu& cpu, Wide<T> value) {
  if constexpr (sizeof(T) == 1) {
    SetReg<uint16_t>(cpu, kRax, value);
  } else {
    SetReg<T>(cpu, kRax, static_cast<T>(value));
    SetReg<T>(cpu, kRdx, static_cast<T>(value >> 8 * sizeof(T)));
  }
}
template <typename T>
Wide<T> GetWide(const Cpu& cpu) {
  if constexpr (sizeof(T) == 1) {
    return GetReg<uint16_t>(cpu, kRax);
  } else {
    return static_cast<Wide<T>>(GetReg<T>(cpu, kRdx)) << 8 * sizeof(T) | GetReg<T>(cpu, kRax);
  }
}

// CF and OF tell that the high half matters. SF, ZF, AF and PF are undefined.
template <typename T, Place P>
void ExecMul(Cpu& cpu, const Insn& insn) {
  const auto product =
      static_cast<Wide<T>>(static_cast<Wide<T>>(GetReg<T>(cpu, kRax)) * ReadRm<T, P>(cpu, insn));
  SetWide<T>(cpu, product);
  SetFlags(cpu, rflags::kCf | rflags::kOf, product >> 8 * sizeof(T) != 0 ? ~0ull : 0);
}

template <typename T>
Wide<T> SignedProduct(T a, T b, bool* overflow) {
  using S = std::make_signed_t<T>;
  const auto wide_a = static_cast<Wide<T>>(static_cast<__int128>(static_cast<S>(a)));
  const auto wide_b = static_cast<Wide<T>>(static_cast<__int128>(static_cast<S>(b)));
  const auto product = static_cast<Wide<T>>(wide_a * wide_b);
  *overflow = product != static_cast<Wide<T>>(static_cast<__int128>(static_cast<S>(product)));
  return product;
}

template <typename T, Place P>
void ExecImulWide(Cpu& cpu, const Insn& insn) {
  bool overflow;
  const Wide<T> product =
      SignedProduct<T>(GetReg<T>(cpu, kRax), ReadRm<T, P>(cpu, insn), &overflow);
  SetWide<T>(cpu, product);
  SetFlags(cpu, rflags::kCf | rflags::kOf, overflow ? ~0ull : 0);
}

template <typename T, Place P, bool kImmediate>
void ExecImul(Cpu& cpu, const Insn& insn) {
  const T source = ReadRm<T, P>(cpu, insn);
  std::make_signed_t<T> product;
  const bool overflow =
      __builtin_mul_overflow(static_cast<std::make_signed_t<T>>(source),
                             static_cast<std::make_signed_t<T>>(
                                 kImmediate ? static_cast<T>(insn.imm) : GetReg<T>(cpu, insn.reg)),
                             &product);
  SetReg<T>(cpu, insn.reg, static_cast<T>(product));
  SetFlags(cpu, rflags::kCf | rflags::kOf, overflow ? ~0ull : 0);
}

// ---- division: #DE for a zero divisor and for a quotient that doesn't fit. All flags are
// undefined and stay.
template <typename T>
void SetQuotient(Cpu& cpu, T quotient, T remainder) {
  if constexpr (sizeof(T) == 1) {
    SetReg<uint16_t>(cpu, kRax, static_cast<uint16_t>(quotient | remainder << 8));
  } else {
    SetReg<T>(cpu, kRax, quotient);
    SetReg<T>(cpu, kRdx, remainder);
  }
}

template <typename T, Place P>
void ExecDiv(Cpu& cpu, const Insn& insn) {
  const T divisor = ReadRm<T, P>(cpu, insn);
  const Wide<T> dividend = GetWide<T>(cpu);
  if (divisor <= static_cast<T>(dividend >> 8 * sizeof(T))) {
    Raise(cpu, kDE);
  }
  T quotient, remainder;
  if constexpr (sizeof(T) == 8) {
    asm("divq %[divisor]"
        : "=a"(quotient), "=d"(remainder)
        : [divisor] "r"(divisor), "a"(static_cast<uint64_t>(dividend)),
          "d"(static_cast<uint64_t>(dividend >> 64))
        : "cc");
  } else {
    quotient = static_cast<T>(dividend / divisor);
    remainder = static_cast<T>(dividend % divisor);
  }
  SetQuotient<T>(cpu, quotient, remainder);
}

template <typename T, Place P>
void ExecIdiv(Cpu& cpu, const Insn& insn) {
  using S = std::make_signed_t<T>;
  const auto divisor = static_cast<S>(ReadRm<T, P>(cpu, insn));
  const Wide<T> bits = GetWide<T>(cpu);
  constexpr unsigned kWideBits = 16 * sizeof(T);
  const __int128 dividend =
      static_cast<__int128>(static_cast<unsigned __int128>(bits) << (128 - kWideBits)) >>
      (128 - kWideBits);
  // The one quotient that overflows even the dividend's type.
  if (divisor == 0 || (divisor == -1 && bits == Wide<T>{1} << (kWideBits - 1))) {
    Raise(cpu, kDE);
  }
  __int128 quotient, remainder;
  if (dividend > INT64_MIN && dividend <= INT64_MAX) [[likely]] {
    quotient = static_cast<int64_t>(dividend) / static_cast<int64_t>(divisor);
    remainder = static_cast<int64_t>(dividend) % static_cast<int64_t>(divisor);
  } else {
    quotient = dividend / divisor;
    remainder = dividend % divisor;
  }
  if (quotient != static_cast<S>(quotient)) {
    Raise(cpu, kDE);
  }
  SetQuotient<T>(cpu, static_cast<T>(quotient), static_cast<T>(remainder));
}

}  // namespace

ExecFn Pick_ROL(const Insn& insn) { return PickShift<Rol>(insn); }
ExecFn Pick_ROR(const Insn& insn) { return PickShift<Ror>(insn); }
ExecFn Pick_RCL(const Insn& insn) { return PickShift<Rcl>(insn); }
ExecFn Pick_RCR(const Insn& insn) { return PickShift<Rcr>(insn); }
ExecFn Pick_SHL(const Insn& insn) { return PickShift<Shl>(insn); }
ExecFn Pick_SHR(const Insn& insn) { return PickShift<Shr>(insn); }
ExecFn Pick_SAR(const Insn& insn) { return PickShift<Sar>(insn); }
ExecFn Pick_SHLD(const Insn& insn) { return PickDoubleShift<Shld>(insn); }
ExecFn Pick_SHRD(const Insn& insn) { return PickDoubleShift<Shrd>(insn); }

ExecFn Pick_MUL(const Insn& insn) {
  return BySize(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecMul<T, Place::kMem> : ExecMul<T, Place::kReg>;
  });
}
ExecFn Pick_IMUL(const Insn& insn) {
  if (insn.row->operand_count == 1) {
    return BySize(insn.operand_size, [&](auto type) -> ExecFn {
      using T = decltype(type);
      return insn.has_memory() ? ExecImulWide<T, Place::kMem> : ExecImulWide<T, Place::kReg>;
    });
  }
  return BySizeWord(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    if (insn.row->operand_count == 3) {
      return insn.has_memory() ? ExecImul<T, Place::kMem, true> : ExecImul<T, Place::kReg, true>;
    }
    return insn.has_memory() ? ExecImul<T, Place::kMem, false> : ExecImul<T, Place::kReg, false>;
  });
}
ExecFn Pick_DIV(const Insn& insn) {
  return BySize(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecDiv<T, Place::kMem> : ExecDiv<T, Place::kReg>;
  });
}
ExecFn Pick_IDIV(const Insn& insn) {
  return BySize(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecIdiv<T, Place::kMem> : ExecIdiv<T, Place::kReg>;
  });
}

}  // namespace kvartz::cpu::x86
