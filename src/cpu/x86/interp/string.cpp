// String instructions. A repetition commits its registers after each piece, so that a fault or an
// interrupt finds it between two elements; it then starts again at the same instruction. Forward
// MOVS and STOS go page by page on host memory.
#include <algorithm>

#include "cpu/x86/interp/block_cache.h"
#include "cpu/x86/interp/integer.h"

namespace kvartz::cpu::x86 {
namespace {

uint64_t AddressReg(const Cpu& cpu, const Insn& insn, unsigned number) {
  return TruncateAddress(cpu.gpr[number], insn.address_size);
}
void Advance(Cpu& cpu, const Insn& insn, unsigned number, int64_t bytes) {
  SetAddressReg(cpu, number, cpu.gpr[number] + static_cast<uint64_t>(bytes), insn.address_size);
}
template <typename T>
int64_t Step(const Cpu& cpu) {
  return (cpu.rflags & rflags::kDf) != 0 ? -static_cast<int64_t>(sizeof(T))
                                         : static_cast<int64_t>(sizeof(T));
}
bool Repeats(const Insn& insn) { return (insn.flags & (kHasRep | kHasRepne)) != 0; }

// One element each. The result tells whether REPE/REPNE goes on, as ZF.
template <typename T>
struct Movs {
  static constexpr bool kCompares = false;
  static void One(Cpu& cpu, const Insn& insn) {
    const T value = ReadMem<T>(cpu, insn.seg(), AddressReg(cpu, insn, kRsi));
    WriteMem<T>(cpu, kEs, AddressReg(cpu, insn, kRdi), value);
    Advance(cpu, insn, kRsi, Step<T>(cpu));
    Advance(cpu, insn, kRdi, Step<T>(cpu));
  }
};
template <typename T>
struct Stos {
  static constexpr bool kCompares = false;
  static void One(Cpu& cpu, const Insn& insn) {
    WriteMem<T>(cpu, kEs, AddressReg(cpu, insn, kRdi), GetReg<T>(cpu, kRax));
    Advance(cpu, insn, kRdi, Step<T>(cpu));
  }
};
template <typename T>
struct Lods {
  static constexpr bool kCompares = false;
  static void One(Cpu& cpu, const Insn& insn) {
    SetReg<T>(cpu, kRax, ReadMem<T>(cpu, insn.seg(), AddressReg(cpu, insn, kRsi)));
    Advance(cpu, insn, kRsi, Step<T>(cpu));
  }
};
template <typename T>
void CompareFlags(Cpu& cpu, T a, T b) {
  uint32_t ax = 0;
  asm("cmp %[b], %[a]" KVARTZ_STORE_FLAGS : "+a"(ax) : [a] "r"(a), [b] "r"(b) : "cc");
  SetStatus(cpu, ax);
}
template <typename T>
struct Cmps {
  static constexpr bool kCompares = true;
  static void One(Cpu& cpu, const Insn& insn) {
    const T source = ReadMem<T>(cpu, insn.seg(), AddressReg(cpu, insn, kRsi));
    const T destination = ReadMem<T>(cpu, kEs, AddressReg(cpu, insn, kRdi));
    CompareFlags<T>(cpu, source, destination);
    Advance(cpu, insn, kRsi, Step<T>(cpu));
    Advance(cpu, insn, kRdi, Step<T>(cpu));
  }
};
template <typename T>
struct Scas {
  static constexpr bool kCompares = true;
  static void One(Cpu& cpu, const Insn& insn) {
    CompareFlags<T>(cpu, GetReg<T>(cpu, kRax), ReadMem<T>(cpu, kEs, AddressReg(cpu, insn, kRdi)));
    Advance(cpu, insn, kRdi, Step<T>(cpu));
  }
};

// Bytes from `offset` to the end of its page, if whole pages can be treated at once there: forward
// and flat.
uint64_t RoomInPage(const Cpu& cpu, SegReg seg, uint64_t offset) {
  const uint64_t linear = seg >= kFs ? offset + cpu.seg[seg].base : offset;
  return 4096 - (linear & 4095);
}

// Does as many elements as a page allows on host memory; 0: do one the slow way.
template <typename T>
uint64_t Bulk(Cpu& cpu, const Insn& insn, uint64_t count, Movs<T>) {
  const uint64_t source = AddressReg(cpu, insn, kRsi), destination = AddressReg(cpu, insn, kRdi);
  const uint64_t room =
      std::min(RoomInPage(cpu, insn.seg(), source), RoomInPage(cpu, kEs, destination));
  const uint64_t elements = std::min<uint64_t>(count, room / sizeof(T));
  if (elements < 2) {
    return 0;
  }
  const auto bytes = static_cast<unsigned>(elements * sizeof(T));
  const auto* from = static_cast<const uint8_t*>(MapForRead(cpu, insn.seg(), source, bytes));
  if (from == nullptr) {
    return 0;
  }
  auto* to = static_cast<uint8_t*>(MapForWrite(cpu, kEs, destination, bytes));
  if (to == nullptr) {
    return 0;
  }
  if (to > from && to < from + bytes) {  // the copy feeds itself: element by element, as the CPU
    for (uint64_t i = 0; i < elements; ++i) {
      T value;
      std::memcpy(&value, from + i * sizeof(T), sizeof(T));
      std::memcpy(to + i * sizeof(T), &value, sizeof(T));
    }
  } else {
    std::memmove(to, from, bytes);
  }
  Advance(cpu, insn, kRsi, bytes);
  Advance(cpu, insn, kRdi, bytes);
  return elements;
}
template <typename T>
uint64_t Bulk(Cpu& cpu, const Insn& insn, uint64_t count, Stos<T>) {
  const uint64_t destination = AddressReg(cpu, insn, kRdi);
  const uint64_t elements =
      std::min<uint64_t>(count, RoomInPage(cpu, kEs, destination) / sizeof(T));
  if (elements < 2) {
    return 0;
  }
  const auto bytes = static_cast<unsigned>(elements * sizeof(T));
  auto* to = static_cast<uint8_t*>(MapForWrite(cpu, kEs, destination, bytes));
  if (to == nullptr) {
    return 0;
  }
  const T value = GetReg<T>(cpu, kRax);
  if (sizeof(T) == 1 || value == 0) {
    std::memset(to, static_cast<uint8_t>(value), bytes);
  } else {
    for (uint64_t i = 0; i < elements; ++i) {
      std::memcpy(to + i * sizeof(T), &value, sizeof(T));
    }
  }
  Advance(cpu, insn, kRdi, bytes);
  return elements;
}
template <typename Op>
uint64_t Bulk(Cpu&, const Insn&, uint64_t, Op) {
  return 0;
}

template <typename Op>
void ExecRepeated(Cpu& cpu, const Insn& insn) {
  // A request at the start is kStep, which wants single iterations.
  const bool bulk = cpu.flat_segments && (cpu.rflags & rflags::kDf) == 0 && !Requested(cpu);
  for (;;) {
    const uint64_t count = AddressReg(cpu, insn, kRcx);
    if (count == 0) {
      return;
    }
    uint64_t done = bulk ? Bulk(cpu, insn, count, Op{}) : 0;
    if (done == 0) {
      Op::One(cpu, insn);
      done = 1;
    }
    SetAddressReg(cpu, kRcx, count - done, insn.address_size);
    if (done == count) {
      return;
    }
    if (Op::kCompares && ((cpu.rflags & rflags::kZf) != 0) != ((insn.flags & kHasRep) != 0)) {
      return;
    }
    if (Requested(cpu)) {
      cpu.rip = cpu.insn_rip;
      return;
    }
  }
}
template <typename Op>
void ExecOnce(Cpu& cpu, const Insn& insn) {
  Op::One(cpu, insn);
}

template <template <typename> typename Op>
ExecFn PickString(const Insn& insn) {
  return BySize(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return Repeats(insn) ? ExecRepeated<Op<T>> : ExecOnce<Op<T>>;
  });
}

}  // namespace

ExecFn Pick_MOVS(const Insn& insn) { return PickString<Movs>(insn); }
ExecFn Pick_STOS(const Insn& insn) { return PickString<Stos>(insn); }
ExecFn Pick_LODS(const Insn& insn) { return PickString<Lods>(insn); }
ExecFn Pick_CMPS(const Insn& insn) { return PickString<Cmps>(insn); }
ExecFn Pick_SCAS(const Insn& insn) { return PickString<Scas>(insn); }

}  // namespace kvartz::cpu::x86
