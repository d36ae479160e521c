// Arithmetic, logic, comparison: each operation is the host's own instruction, whose flags are the
// guest's.
#include "cpu/x86/interp/integer.h"

namespace kvartz::cpu::x86 {
namespace {

enum class Form { kRegReg, kRegMem, kRegImm, kMemReg, kMemImm };  // destination, source
enum class Order { kRmFirst, kRegFirst };

// Operations of two operands. Run computes, Locked does the same to memory atomically; both leave
// packed flags in *ax.
#define TWO_OPERANDS(name, instruction, load)                                \
  struct name {                                                              \
    static constexpr bool kFlagsIn = sizeof(load) > 1;                       \
    template <typename T>                                                    \
    static void Run(T* a, T b, uint32_t* ax) {                               \
      asm(load instruction " %[b], %[a]" KVARTZ_STORE_FLAGS                  \
          : [a] "+r"(*a), "+a"(*ax)                                          \
          : [b] "r"(b)                                                       \
          : "cc");                                                           \
    }                                                                        \
    template <typename T>                                                    \
    static void Locked(T* a, T b, uint32_t* ax) {                            \
      asm volatile(load "lock " instruction " %[b], %[a]" KVARTZ_STORE_FLAGS \
                   : [a] "+m"(*a), "+a"(*ax)                                 \
                   : [b] "r"(b)                                              \
                   : "cc", "memory");                                        \
    }                                                                        \
  };
TWO_OPERANDS(Add, "add", "")
TWO_OPERANDS(Or, "or", "")
TWO_OPERANDS(Adc, "adc", KVARTZ_LOAD_FLAGS)
TWO_OPERANDS(Sbb, "sbb", KVARTZ_LOAD_FLAGS)
TWO_OPERANDS(And, "and", "")
TWO_OPERANDS(Sub, "sub", "")
TWO_OPERANDS(Xor, "xor", "")

// The instruction's name with the suffix of T's size, for a lone memory operand.
#define LOCKED_BY_SIZE(load, instruction)                           \
  if constexpr (sizeof(T) == 1) {                                   \
    asm volatile(load "lock " instruction "b %0" KVARTZ_STORE_FLAGS \
                 : "+m"(*a), "+a"(*ax)                              \
                 :                                                  \
                 : "cc", "memory");                                 \
  } else if constexpr (sizeof(T) == 2) {                            \
    asm volatile(load "lock " instruction "w %0" KVARTZ_STORE_FLAGS \
                 : "+m"(*a), "+a"(*ax)                              \
                 :                                                  \
                 : "cc", "memory");                                 \
  } else if constexpr (sizeof(T) == 4) {                            \
    asm volatile(load "lock " instruction "l %0" KVARTZ_STORE_FLAGS \
                 : "+m"(*a), "+a"(*ax)                              \
                 :                                                  \
                 : "cc", "memory");                                 \
  } else {                                                          \
    asm volatile(load "lock " instruction "q %0" KVARTZ_STORE_FLAGS \
                 : "+m"(*a), "+a"(*ax)                              \
                 :                                                  \
                 : "cc", "memory");                                 \
  }
// Operations of one operand. They start from the present flags: INC and DEC keep CF, NOT keeps all.
#define ONE_OPERAND(name, instruction)                             \
  struct name {                                                    \
    template <typename T>                                          \
    static void Run(T* a, uint32_t* ax) {                          \
      asm(KVARTZ_LOAD_FLAGS instruction " %[a]" KVARTZ_STORE_FLAGS \
          : [a] "+r"(*a), "+a"(*ax)                                \
          :                                                        \
          : "cc");                                                 \
    }                                                              \
    template <typename T>                                          \
    static void Locked(T* a, uint32_t* ax) {                       \
      LOCKED_BY_SIZE(KVARTZ_LOAD_FLAGS, instruction)               \
    }                                                              \
  };
ONE_OPERAND(Inc, "inc")
ONE_OPERAND(Dec, "dec")
ONE_OPERAND(Not, "not")
ONE_OPERAND(Neg, "neg")

template <typename T, Form F>
T Source(Cpu& cpu, const Insn& insn) {
  if constexpr (F == Form::kRegImm || F == Form::kMemImm) {
    return static_cast<T>(insn.imm);
  } else if constexpr (F == Form::kRegMem) {
    return ReadRm<T, Place::kMem>(cpu, insn);
  } else {
    return GetReg<T>(cpu, insn.reg);
  }
}

template <typename Op, typename T, Form F>
void ExecTwo(Cpu& cpu, const Insn& insn) {
  uint32_t ax = Op::kFlagsIn ? PackFlags(cpu.rflags) : 0;
  const T source = Source<T, F>(cpu, insn);
  if constexpr (F == Form::kMemReg || F == Form::kMemImm) {
    Modify<T>(cpu, insn.seg(), EffectiveAddress(cpu, insn),
              [&](T* target) { Op::template Run<T>(target, source, &ax); });
  } else {
    const unsigned number = F == Form::kRegMem ? insn.reg : insn.rm;
    T value = GetReg<T>(cpu, number);
    Op::template Run<T>(&value, source, &ax);
    SetReg<T>(cpu, number, value);
  }
  SetStatus(cpu, ax);
}

// ADD r, rm between registers: the direction is the only difference.
template <typename Op, typename T>
void ExecTwoReversed(Cpu& cpu, const Insn& insn) {
  uint32_t ax = Op::kFlagsIn ? PackFlags(cpu.rflags) : 0;
  T value = GetReg<T>(cpu, insn.reg);
  Op::template Run<T>(&value, GetReg<T>(cpu, insn.rm), &ax);
  SetReg<T>(cpu, insn.reg, value);
  SetStatus(cpu, ax);
}

template <typename Op, typename T>
void ExecTwoLocked(Cpu& cpu, const Insn& insn) {
  uint32_t ax = PackFlags(cpu.rflags);
  const T source =
      insn.row->imm[0] != ImmKind::kNone ? static_cast<T>(insn.imm) : GetReg<T>(cpu, insn.reg);
  ModifyLocked<T>(cpu, insn.seg(), EffectiveAddress(cpu, insn),
                  [&](T* target) { Op::template Locked<T>(target, source, &ax); });
  SetStatus(cpu, ax);
}

// CMP and TEST: nothing is written.
template <typename Op, typename T, Form F>
void ExecCompare(Cpu& cpu, const Insn& insn) {
  uint32_t ax = 0;
  const T source = Source<T, F>(cpu, insn);
  T value;
  if constexpr (F == Form::kMemReg || F == Form::kMemImm) {
    value = ReadRm<T, Place::kMem>(cpu, insn);
  } else {
    value = GetReg<T>(cpu, F == Form::kRegMem ? insn.reg : insn.rm);
  }
  Op::template Run<T>(&value, source, &ax);
  SetStatus(cpu, ax);
}
template <typename Op, typename T>
void ExecCompareReversed(Cpu& cpu, const Insn& insn) {
  uint32_t ax = 0;
  T value = GetReg<T>(cpu, insn.reg);
  Op::template Run<T>(&value, GetReg<T>(cpu, insn.rm), &ax);
  SetStatus(cpu, ax);
}

bool RegisterFirst(const Insn& insn) { return insn.row->operands[0].kind == OperandKind::kReg; }
bool HasImmediate(const Insn& insn) { return insn.row->imm[0] != ImmKind::kNone; }

template <typename Op>
ExecFn PickTwo(const Insn& insn) {
  return BySize(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    if (!insn.has_memory()) {
      return HasImmediate(insn)    ? ExecTwo<Op, T, Form::kRegImm>
             : RegisterFirst(insn) ? ExecTwoReversed<Op, T>
                                   : ExecTwo<Op, T, Form::kRegReg>;
    }
    if (insn.locked()) {
      return ExecTwoLocked<Op, T>;
    }
    return HasImmediate(insn)    ? ExecTwo<Op, T, Form::kMemImm>
           : RegisterFirst(insn) ? ExecTwo<Op, T, Form::kRegMem>
                                 : ExecTwo<Op, T, Form::kMemReg>;
  });
}

template <typename Op>
ExecFn PickCompare(const Insn& insn) {
  return BySize(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    if (!insn.has_memory()) {
      return HasImmediate(insn)    ? ExecCompare<Op, T, Form::kRegImm>
             : RegisterFirst(insn) ? ExecCompareReversed<Op, T>
                                   : ExecCompare<Op, T, Form::kRegReg>;
    }
    return HasImmediate(insn)    ? ExecCompare<Op, T, Form::kMemImm>
           : RegisterFirst(insn) ? ExecCompare<Op, T, Form::kRegMem>
                                 : ExecCompare<Op, T, Form::kMemReg>;
  });
}

template <typename Op, typename T>
void ExecOneReg(Cpu& cpu, const Insn& insn) {
  const unsigned number = insn.row->opcode_register ? insn.reg : insn.rm;
  uint32_t ax = PackFlags(cpu.rflags);
  T value = GetReg<T>(cpu, number);
  Op::template Run<T>(&value, &ax);
  SetReg<T>(cpu, number, value);
  SetStatus(cpu, ax);
}
template <typename Op, typename T, bool kLockedAccess>
void ExecOneMem(Cpu& cpu, const Insn& insn) {
  uint32_t ax = PackFlags(cpu.rflags);
  const uint64_t offset = EffectiveAddress(cpu, insn);
  if constexpr (kLockedAccess) {
    ModifyLocked<T>(cpu, insn.seg(), offset,
                    [&](T* target) { Op::template Locked<T>(target, &ax); });
  } else {
    Modify<T>(cpu, insn.seg(), offset, [&](T* target) { Op::template Run<T>(target, &ax); });
  }
  SetStatus(cpu, ax);
}

template <typename Op>
ExecFn PickOne(const Insn& insn) {
  return BySize(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return !insn.has_memory() ? ExecOneReg<Op, T>
           : insn.locked()    ? ExecOneMem<Op, T, true>
                              : ExecOneMem<Op, T, false>;
  });
}

// ADCX carries in CF, ADOX in OF; no other flag changes.
template <typename T, Place P, uint64_t kFlag>
void ExecAddCarry(Cpu& cpu, const Insn& insn) {
  const T a = GetReg<T>(cpu, insn.reg);
  const T b = ReadRm<T, P>(cpu, insn);
  T sum;
  const bool first = __builtin_add_overflow(a, b, &sum);
  const bool second = __builtin_add_overflow(sum, static_cast<T>((cpu.rflags & kFlag) != 0), &sum);
  SetReg<T>(cpu, insn.reg, sum);
  SetFlags(cpu, kFlag, first || second ? kFlag : 0);
}
template <uint64_t kFlag>
ExecFn PickAddCarry(const Insn& insn) {
  return BySizeW(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecAddCarry<T, Place::kMem, kFlag>
                             : ExecAddCarry<T, Place::kReg, kFlag>;
  });
}

}  // namespace

ExecFn Pick_ADD(const Insn& insn) { return PickTwo<Add>(insn); }
ExecFn Pick_OR(const Insn& insn) { return PickTwo<Or>(insn); }
ExecFn Pick_ADC(const Insn& insn) { return PickTwo<Adc>(insn); }
ExecFn Pick_SBB(const Insn& insn) { return PickTwo<Sbb>(insn); }
ExecFn Pick_AND(const Insn& insn) { return PickTwo<And>(insn); }
ExecFn Pick_SUB(const Insn& insn) { return PickTwo<Sub>(insn); }
ExecFn Pick_XOR(const Insn& insn) { return PickTwo<Xor>(insn); }
ExecFn Pick_CMP(const Insn& insn) { return PickCompare<Sub>(insn); }
ExecFn Pick_TEST(const Insn& insn) { return PickCompare<And>(insn); }
ExecFn Pick_INC(const Insn& insn) { return PickOne<Inc>(insn); }
ExecFn Pick_DEC(const Insn& insn) { return PickOne<Dec>(insn); }
ExecFn Pick_NOT(const Insn& insn) { return PickOne<Not>(insn); }
ExecFn Pick_NEG(const Insn& insn) { return PickOne<Neg>(insn); }
ExecFn Pick_ADCX(const Insn& insn) { return PickAddCarry<rflags::kCf>(insn); }
ExecFn Pick_ADOX(const Insn& insn) { return PickAddCarry<rflags::kOf>(insn); }

}  // namespace kvartz::cpu::x86
