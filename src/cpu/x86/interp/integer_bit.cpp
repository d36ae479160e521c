// Bit tests, scans, counts, CRC32, BMI1 and BMI2.
#include <sys/random.h>

#include <array>
#include <bit>

#include "cpu/x86/interp/integer.h"

namespace kvartz::cpu::x86 {
namespace {

enum class BitOp { kTest, kSet, kReset, kComplement };

template <BitOp Op, typename T>
void ChangeBit(T* target, unsigned bit, bool* carry) {
  const T mask = static_cast<T>(T{1} << bit);
  *carry = (*target & mask) != 0;
  if constexpr (Op == BitOp::kSet) {
    *target = static_cast<T>(*target | mask);
  } else if constexpr (Op == BitOp::kReset) {
    *target = static_cast<T>(*target & ~mask);
  } else if constexpr (Op == BitOp::kComplement) {
    *target = static_cast<T>(*target ^ mask);
  }
}
template <BitOp Op, typename T>
void ChangeBitLocked(T* target, unsigned bit, bool* carry) {
  const T mask = static_cast<T>(T{1} << bit);
  T old;
  if constexpr (Op == BitOp::kSet) {
    old = __atomic_fetch_or(target, mask, __ATOMIC_SEQ_CST);
  } else if constexpr (Op == BitOp::kReset) {
    old = __atomic_fetch_and(target, static_cast<T>(~mask), __ATOMIC_SEQ_CST);
  } else {
    old = __atomic_fetch_xor(target, mask, __ATOMIC_SEQ_CST);
  }
  *carry = (old & mask) != 0;
}

template <typename T>
T BitIndex(const Cpu& cpu, const Insn& insn) {
  return insn.row->imm[0] != ImmKind::kNone ? static_cast<T>(static_cast<uint8_t>(insn.imm))
                                            : GetReg<T>(cpu, insn.reg);
}

template <BitOp Op, typename T>
void ExecBitReg(Cpu& cpu, const Insn& insn) {
  bool carry;
  T value = GetReg<T>(cpu, insn.rm);
  ChangeBit<Op, T>(&value, BitIndex<T>(cpu, insn) % (8 * sizeof(T)), &carry);
  if constexpr (Op != BitOp::kTest) {
    SetReg<T>(cpu, insn.rm, value);
  }
  SetFlags(cpu, rflags::kCf, carry ? rflags::kCf : 0);
}
template <BitOp Op, typename T, bool kAtomic>
void ExecBitMem(Cpu& cpu, const Insn& insn) {
  constexpr unsigned kBits = 8 * sizeof(T);
  const T index = BitIndex<T>(cpu, insn);
  uint64_t offset = EffectiveAddress(cpu, insn);
  if (insn.row->imm[0] ==
      ImmKind::kNone) {  // a bit string: the index is signed and may leave the operand
    const int64_t element = static_cast<std::make_signed_t<T>>(index) >> std::countr_zero(kBits);
    offset =
        TruncateAddress(offset + static_cast<uint64_t>(element) * sizeof(T), insn.address_size);
  }
  const unsigned bit = index % kBits;
  bool carry;
  if constexpr (Op == BitOp::kTest) {
    T value = ReadMem<T>(cpu, insn.seg(), offset);
    ChangeBit<Op, T>(&value, bit, &carry);
  } else if constexpr (kAtomic) {
    ModifyLocked<T>(cpu, insn.seg(), offset,
                    [&](T* target) { ChangeBitLocked<Op, T>(target, bit, &carry); });
  } else {
    Modify<T>(cpu, insn.seg(), offset, [&](T* target) { ChangeBit<Op, T>(target, bit, &carry); });
  }
  SetFlags(cpu, rflags::kCf, carry ? rflags::kCf : 0);
}

template <BitOp Op>
ExecFn PickBit(const Insn& insn) {
  return BySizeWord(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    if constexpr (Op != BitOp::kTest) {
      if (insn.has_memory() && insn.locked()) {
        return ExecBitMem<Op, T, true>;
      }
    }
    return insn.has_memory() ? ExecBitMem<Op, T, false> : ExecBitReg<Op, T>;
  });
}

// Two-operand instructions that compute a value and flags from a source: Op::Run(source, &flags),
// Op::kFlags.
template <typename Op, typename T, Place P>
void ExecUnary(Cpu& cpu, const Insn& insn) {
  const T source = ReadRm<T, P>(cpu, insn);
  uint64_t flags = 0;
  SetReg<T>(cpu, insn.reg, Op::template Run<T>(source, &flags));
  SetFlags(cpu, Op::kFlags, flags);
}
template <typename Op>
ExecFn PickUnary(const Insn& insn) {
  return BySizeWord(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecUnary<Op, T, Place::kMem> : ExecUnary<Op, T, Place::kReg>;
  });
}

struct Tzcnt {
  static constexpr uint64_t kFlags = rflags::kZf | rflags::kCf;
  template <typename T>
  static T Run(T source, uint64_t* flags) {
    const auto count = static_cast<T>(std::countr_zero(source));
    *flags = (source == 0 ? rflags::kCf : 0) | (count == 0 ? rflags::kZf : 0);
    return count;
  }
};
struct Lzcnt {
  static constexpr uint64_t kFlags = rflags::kZf | rflags::kCf;
  template <typename T>
  static T Run(T source, uint64_t* flags) {
    const auto count = static_cast<T>(std::countl_zero(source));
    *flags = (source == 0 ? rflags::kCf : 0) | (count == 0 ? rflags::kZf : 0);
    return count;
  }
};
struct Popcnt {
  static constexpr uint64_t kFlags = rflags::kStatus;
  template <typename T>
  static T Run(T source, uint64_t* flags) {
    *flags = source == 0 ? rflags::kZf : 0;
    return static_cast<T>(std::popcount(source));
  }
};

// A source of 0 leaves the destination alone.
template <typename T, Place P, bool kReverse>
void ExecScan(Cpu& cpu, const Insn& insn) {
  const T source = ReadRm<T, P>(cpu, insn);
  if (source != 0) {
    SetReg<T>(cpu, insn.reg,
              static_cast<T>(kReverse ? 8 * sizeof(T) - 1 - std::countl_zero(source)
                                      : std::countr_zero(source)));
  }
  SetFlags(cpu, rflags::kZf, source == 0 ? rflags::kZf : 0);
}
template <bool kReverse>
ExecFn PickScan(const Insn& insn) {
  return BySizeWord(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecScan<T, Place::kMem, kReverse>
                             : ExecScan<T, Place::kReg, kReverse>;
  });
}

// CRC-32C, reflected, without inversions.
constexpr auto kCrcTable = [] {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) {
      crc = crc >> 1 ^ ((crc & 1) != 0 ? 0x82f63b78 : 0);
    }
    table[i] = crc;
  }
  return table;
}();
template <typename T, Place P>
void ExecCrc32(Cpu& cpu, const Insn& insn) {
  const T source = ReadRm<T, P>(cpu, insn);
  auto crc = static_cast<uint32_t>(cpu.gpr[insn.reg]);
  for (unsigned i = 0; i < sizeof(T); ++i) {
    crc = crc >> 8 ^ kCrcTable[(crc ^ source >> (8 * i)) & 0xff];
  }
  cpu.gpr[insn.reg] = crc;  // the upper half is cleared in the 64-bit form, too
}

// ---- BMI: three operands, the flags of Op::kFlags from Op::Run(first, second, &flags)
enum class Shape { kVvvvRm, kRmVvvv };  // which source comes first; the destination is ModRM.reg
template <typename Op, typename T, Place P, Shape S>
void ExecBmi(Cpu& cpu, const Insn& insn) {
  const T rm = ReadRm<T, P>(cpu, insn);
  const T vvvv = GetReg<T>(cpu, insn.vvvv);
  uint64_t flags = 0;
  const T result = S == Shape::kVvvvRm ? Op::template Run<T>(vvvv, rm, &flags)
                                       : Op::template Run<T>(rm, vvvv, &flags);
  SetReg<T>(cpu, insn.reg, result);
  SetFlags(cpu, Op::kFlags, flags);
}
template <typename Op, Shape S>
ExecFn PickBmi(const Insn& insn) {
  return BySizeW(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecBmi<Op, T, Place::kMem, S> : ExecBmi<Op, T, Place::kReg, S>;
  });
}
// ... and two operands, the destination in VEX.vvvv.
template <typename Op, typename T, Place P>
void ExecBls(Cpu& cpu, const Insn& insn) {
  const T source = ReadRm<T, P>(cpu, insn);
  uint64_t flags = 0;
  const T result = Op::template Run<T>(source, &flags);
  SetReg<T>(cpu, insn.vvvv, result);
  SetFlags(cpu, Op::kFlags, flags | (ResultFlags<T>(result) & (rflags::kSf | rflags::kZf)));
}
template <typename Op>
ExecFn PickBls(const Insn& insn) {
  return BySizeW(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecBls<Op, T, Place::kMem> : ExecBls<Op, T, Place::kReg>;
  });
}

constexpr uint64_t kLogicFlags = rflags::kOf | rflags::kSf | rflags::kZf | rflags::kCf;
struct Blsr {
  static constexpr uint64_t kFlags = kLogicFlags;
  template <typename T>
  static T Run(T a, uint64_t* flags) {
    *flags = a == 0 ? rflags::kCf : 0;
    return a & (a - 1);
  }
};
struct Blsmsk {
  static constexpr uint64_t kFlags = kLogicFlags;
  template <typename T>
  static T Run(T a, uint64_t* flags) {
    *flags = a == 0 ? rflags::kCf : 0;
    return a ^ (a - 1);
  }
};
struct Blsi {
  static constexpr uint64_t kFlags = kLogicFlags;
  template <typename T>
  static T Run(T a, uint64_t* flags) {
    *flags = a != 0 ? rflags::kCf : 0;
    return a & (0 - a);
  }
};
struct Andn {
  static constexpr uint64_t kFlags = kLogicFlags;
  template <typename T>
  static T Run(T a, T b, uint64_t* flags) {
    const T result = ~a & b;
    *flags = ResultFlags<T>(result);
    return result;
  }
};
struct Bextr {
  static constexpr uint64_t kFlags = rflags::kOf | rflags::kZf | rflags::kCf;
  template <typename T>
  static T Run(T a, T control, uint64_t* flags) {
    const unsigned start = control & 0xff, length = control >> 8 & 0xff;
    T result = start < 8 * sizeof(T) ? a >> start : 0;
    if (length < 8 * sizeof(T)) {
      result &= (T{1} << length) - 1;
    }
    *flags = result == 0 ? rflags::kZf : 0;
    return result;
  }
};
struct Bzhi {
  static constexpr uint64_t kFlags = kLogicFlags;
  template <typename T>
  static T Run(T a, T index, uint64_t* flags) {
    const unsigned n = index & 0xff;
    const bool all = n >= 8 * sizeof(T);
    const T result = all ? a : a & ((T{1} << n) - 1);
    *flags = ResultFlags<T>(result) | (all ? rflags::kCf : 0);
    return result;
  }
};
struct Pdep {
  static constexpr uint64_t kFlags = 0;
  template <typename T>
  static T Run(T source, T mask, uint64_t*) {
    T result = 0;
    for (; mask != 0; mask &= mask - 1, source >>= 1) {
      result |= (source & 1) != 0 ? mask & (0 - mask) : 0;
    }
    return result;
  }
};
struct Pext {
  static constexpr uint64_t kFlags = 0;
  template <typename T>
  static T Run(T source, T mask, uint64_t*) {
    T result = 0;
    for (T bit = 1; mask != 0; mask &= mask - 1, bit <<= 1) {
      result |= (source & mask & (0 - mask)) != 0 ? bit : 0;
    }
    return result;
  }
};
struct Sarx {
  static constexpr uint64_t kFlags = 0;
  template <typename T>
  static T Run(T a, T count, uint64_t*) {
    return static_cast<T>(static_cast<std::make_signed_t<T>>(a) >> (count % (8 * sizeof(T))));
  }
};
struct Shlx {
  static constexpr uint64_t kFlags = 0;
  template <typename T>
  static T Run(T a, T count, uint64_t*) {
    return a << (count % (8 * sizeof(T)));
  }
};
struct Shrx {
  static constexpr uint64_t kFlags = 0;
  template <typename T>
  static T Run(T a, T count, uint64_t*) {
    return a >> (count % (8 * sizeof(T)));
  }
};

template <typename T, Place P>
void ExecRorx(Cpu& cpu, const Insn& insn) {
  SetReg<T>(cpu, insn.reg,
            std::rotr(ReadRm<T, P>(cpu, insn), static_cast<int>(insn.imm & (8 * sizeof(T) - 1))));
}
// The high half wins where both destinations are the same register.
template <typename T, Place P>
void ExecMulx(Cpu& cpu, const Insn& insn) {
  const auto product =
      static_cast<unsigned __int128>(GetReg<T>(cpu, kRdx)) * ReadRm<T, P>(cpu, insn);
  SetReg<T>(cpu, insn.vvvv, static_cast<T>(product));
  SetReg<T>(cpu, insn.reg, static_cast<T>(product >> 8 * sizeof(T)));
}

template <typename T>
void ExecRandom(Cpu& cpu, const Insn& insn) {
  T value = 0;
  const bool ready = getrandom(&value, sizeof value, 0) == sizeof value;
  SetReg<T>(cpu, insn.rm, ready ? value : T{0});
  SetFlags(cpu, rflags::kStatus, ready ? rflags::kCf : 0);
}
ExecFn PickRandom(const Insn& insn) {
  return BySizeWord(insn.operand_size,
                    [](auto type) -> ExecFn { return ExecRandom<decltype(type)>; });
}

}  // namespace

ExecFn Pick_BT(const Insn& insn) { return PickBit<BitOp::kTest>(insn); }
ExecFn Pick_BTS(const Insn& insn) { return PickBit<BitOp::kSet>(insn); }
ExecFn Pick_BTR(const Insn& insn) { return PickBit<BitOp::kReset>(insn); }
ExecFn Pick_BTC(const Insn& insn) { return PickBit<BitOp::kComplement>(insn); }
ExecFn Pick_BSF(const Insn& insn) { return PickScan<false>(insn); }
ExecFn Pick_BSR(const Insn& insn) { return PickScan<true>(insn); }
ExecFn Pick_TZCNT(const Insn& insn) { return PickUnary<Tzcnt>(insn); }
ExecFn Pick_LZCNT(const Insn& insn) { return PickUnary<Lzcnt>(insn); }
ExecFn Pick_POPCNT(const Insn& insn) { return PickUnary<Popcnt>(insn); }
ExecFn Pick_CRC32(const Insn& insn) {
  // An operand size of 16 bits is the source's only.
  const unsigned size = insn.row->operands[1].size == 1 ? 1 : insn.operand_size;
  return BySize(size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecCrc32<T, Place::kMem> : ExecCrc32<T, Place::kReg>;
  });
}
ExecFn Pick_ANDN(const Insn& insn) { return PickBmi<Andn, Shape::kVvvvRm>(insn); }
ExecFn Pick_BLSR(const Insn& insn) { return PickBls<Blsr>(insn); }
ExecFn Pick_BLSMSK(const Insn& insn) { return PickBls<Blsmsk>(insn); }
ExecFn Pick_BLSI(const Insn& insn) { return PickBls<Blsi>(insn); }
ExecFn Pick_BEXTR(const Insn& insn) { return PickBmi<Bextr, Shape::kRmVvvv>(insn); }
ExecFn Pick_BZHI(const Insn& insn) { return PickBmi<Bzhi, Shape::kRmVvvv>(insn); }
ExecFn Pick_PDEP(const Insn& insn) { return PickBmi<Pdep, Shape::kVvvvRm>(insn); }
ExecFn Pick_PEXT(const Insn& insn) { return PickBmi<Pext, Shape::kVvvvRm>(insn); }
ExecFn Pick_SARX(const Insn& insn) { return PickBmi<Sarx, Shape::kRmVvvv>(insn); }
ExecFn Pick_SHLX(const Insn& insn) { return PickBmi<Shlx, Shape::kRmVvvv>(insn); }
ExecFn Pick_SHRX(const Insn& insn) { return PickBmi<Shrx, Shape::kRmVvvv>(insn); }
ExecFn Pick_RORX(const Insn& insn) {
  return BySizeW(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecRorx<T, Place::kMem> : ExecRorx<T, Place::kReg>;
  });
}
ExecFn Pick_MULX(const Insn& insn) {
  return BySizeW(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.has_memory() ? ExecMulx<T, Place::kMem> : ExecMulx<T, Place::kReg>;
  });
}
ExecFn Pick_RDRAND(const Insn& insn) { return PickRandom(insn); }
ExecFn Pick_RDSEED(const Insn& insn) { return PickRandom(insn); }

}  // namespace kvartz::cpu::x86
