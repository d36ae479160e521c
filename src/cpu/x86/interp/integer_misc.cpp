// Flags, decimal arithmetic, BOUND, hints.
#include <sched.h>

#include "cpu/x86/interp/integer.h"

namespace kvartz::cpu::x86 {

void Exec_CLC(Cpu& cpu, const Insn&) { cpu.rflags &= ~rflags::kCf; }
void Exec_STC(Cpu& cpu, const Insn&) { cpu.rflags |= rflags::kCf; }
void Exec_CMC(Cpu& cpu, const Insn&) { cpu.rflags ^= rflags::kCf; }
void Exec_CLD(Cpu& cpu, const Insn&) { cpu.rflags &= ~rflags::kDf; }
void Exec_STD(Cpu& cpu, const Insn&) { cpu.rflags |= rflags::kDf; }
void Exec_LAHF(Cpu& cpu, const Insn&) {
  SetReg<uint8_t>(cpu, kHighByte, static_cast<uint8_t>((cpu.rflags & 0xd5) | 2));
}
void Exec_SAHF(Cpu& cpu, const Insn&) { SetFlags(cpu, 0xd5, GetReg<uint8_t>(cpu, kHighByte)); }
void Exec_SALC(Cpu& cpu, const Insn&) {
  SetReg<uint8_t>(cpu, kRax, (cpu.rflags & rflags::kCf) != 0 ? 0xff : 0);
}

void Exec_NOP(Cpu&, const Insn&) {}
// Spinning for long means that another CPU has something to do first: perhaps its thread waits for
// this core.
void Exec_PAUSE(Cpu& cpu, const Insn&) {
  thread_local unsigned pauses = 0;
  if (cpu.tlb->world != nullptr && ++pauses % 64 == 0) {
    sched_yield();
  } else {
    __builtin_ia32_pause();
  }
}
void Exec_FENCE(Cpu&, const Insn&) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
// Guest caches aren't modelled: only the access is checked.
void Exec_CLFLUSH(Cpu& cpu, const Insn& insn) {
  ReadMem<uint8_t>(cpu, insn.seg(), EffectiveAddress(cpu, insn));
}

// ---- decimal arithmetic, SDM vol. 2
namespace {

void AsciiAdjust(Cpu& cpu, bool subtract) {
  const auto al = GetReg<uint8_t>(cpu, kRax);
  const bool adjust = (al & 15) > 9 || (cpu.rflags & rflags::kAf) != 0;
  auto ax = GetReg<uint16_t>(cpu, kRax);
  if (adjust) {
    ax = static_cast<uint16_t>(subtract ? ax - 0x106 : ax + 0x106);
  }
  SetReg<uint16_t>(cpu, kRax, ax & 0xff0f);
  SetFlags(cpu, rflags::kAf | rflags::kCf, adjust ? ~0ull : 0);
}

void DecimalAdjust(Cpu& cpu, bool subtract) {
  const auto old = GetReg<uint8_t>(cpu, kRax);
  const bool old_carry = (cpu.rflags & rflags::kCf) != 0;
  const bool low = (old & 15) > 9 || (cpu.rflags & rflags::kAf) != 0;
  const bool high = old > 0x99 || old_carry;
  const int delta = (low ? 6 : 0) + (high ? 0x60 : 0);
  const auto value = static_cast<uint8_t>(subtract ? old - delta : old + delta);
  // DAS also reports the borrow of its low step.
  const bool carry = high || (subtract && low && old < 6);
  SetReg<uint8_t>(cpu, kRax, value);
  SetFlags(cpu, rflags::kStatus & ~rflags::kOf,
           ResultFlags<uint8_t>(value) | (low ? rflags::kAf : 0) | (carry ? rflags::kCf : 0));
}

}  // namespace

void Exec_AAA(Cpu& cpu, const Insn&) { AsciiAdjust(cpu, false); }
void Exec_AAS(Cpu& cpu, const Insn&) { AsciiAdjust(cpu, true); }
void Exec_DAA(Cpu& cpu, const Insn&) { DecimalAdjust(cpu, false); }
void Exec_DAS(Cpu& cpu, const Insn&) { DecimalAdjust(cpu, true); }
void Exec_AAM(Cpu& cpu, const Insn& insn) {
  const auto base = static_cast<uint8_t>(insn.imm);
  if (base == 0) {
    Raise(cpu, kDE);
  }
  const auto al = GetReg<uint8_t>(cpu, kRax);
  const auto low = static_cast<uint8_t>(al % base);
  SetReg<uint16_t>(cpu, kRax, static_cast<uint16_t>(al / base << 8 | low));
  SetFlags(cpu, rflags::kSf | rflags::kZf | rflags::kPf, ResultFlags<uint8_t>(low));
}
void Exec_AAD(Cpu& cpu, const Insn& insn) {
  const auto ax = GetReg<uint16_t>(cpu, kRax);
  const auto value = static_cast<uint8_t>((ax & 0xff) + (ax >> 8) * static_cast<uint8_t>(insn.imm));
  SetReg<uint16_t>(cpu, kRax, value);
  SetFlags(cpu, rflags::kSf | rflags::kZf | rflags::kPf, ResultFlags<uint8_t>(value));
}

namespace {
template <typename T>
void ExecBound(Cpu& cpu, const Insn& insn) {
  using S = std::make_signed_t<T>;
  const uint64_t offset = EffectiveAddress(cpu, insn);
  const auto lower = static_cast<S>(ReadMem<T>(cpu, insn.seg(), offset));
  const auto upper = static_cast<S>(
      ReadMem<T>(cpu, insn.seg(), TruncateAddress(offset + sizeof(T), insn.address_size)));
  const auto index = static_cast<S>(GetReg<T>(cpu, insn.reg));
  if (index < lower || index > upper) {
    Raise(cpu, kBR);
  }
}
}  // namespace
ExecFn Pick_BOUND(const Insn& insn) {
  return insn.operand_size == 2 ? ExecBound<uint16_t> : ExecBound<uint32_t>;
}

}  // namespace kvartz::cpu::x86
