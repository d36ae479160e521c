// Near branches.
#include "cpu/x86/interp/integer.h"

namespace kvartz::cpu::x86 {

void CheckTargetSlow(Cpu& cpu, uint64_t target) {
  if (cpu.code_mode != CodeMode::k64 || !mmu::Canonical(cpu, target)) {
    Raise(cpu, kGP, 0);
  }
}

namespace {

// T: the operand size, to which the target is truncated.
template <typename T>
uint64_t RelativeTarget(const Cpu& cpu, const Insn& insn) {
  return static_cast<T>(cpu.rip + static_cast<uint64_t>(insn.imm));
}
template <typename T>
void JumpRelative(Cpu& cpu, const Insn& insn) {
  const uint64_t target = RelativeTarget<T>(cpu, insn);
  CheckTarget(cpu, target);
  cpu.rip = target;
}

template <typename T>
void ExecJump(Cpu& cpu, const Insn& insn) {
  JumpRelative<T>(cpu, insn);
}
template <typename T, Place P>
void ExecJumpRm(Cpu& cpu, const Insn& insn) {
  const uint64_t target = ReadRm<T, P>(cpu, insn);
  CheckTarget(cpu, target);
  cpu.rip = target;
}
template <typename T>
void ExecCall(Cpu& cpu, const Insn& insn) {
  const uint64_t target = RelativeTarget<T>(cpu, insn);
  CheckTarget(cpu, target);
  Push<T>(cpu, static_cast<T>(cpu.rip));
  cpu.rip = target;
}
template <typename T, Place P>
void ExecCallRm(Cpu& cpu, const Insn& insn) {
  const uint64_t target = ReadRm<T, P>(cpu, insn);
  CheckTarget(cpu, target);
  Push<T>(cpu, static_cast<T>(cpu.rip));
  cpu.rip = target;
}
template <typename T>
void ExecReturn(Cpu& cpu, const Insn& insn) {
  const uint64_t target = ReadStack<T>(cpu);
  CheckTarget(cpu, target);
  AddToStack(cpu, sizeof(T) + static_cast<uint16_t>(insn.imm));
  cpu.rip = target;
}

template <unsigned kCode, typename T>
void ExecJcc(Cpu& cpu, const Insn& insn) {
  if (TestCondition(cpu.rflags, kCode)) {
    JumpRelative<T>(cpu, insn);
  }
}
template <unsigned kCode>
ExecFn PickJcc(const Insn& insn) {
  return BySizeWord(insn.operand_size,
                    [](auto type) -> ExecFn { return ExecJcc<kCode, decltype(type)>; });
}

template <typename T>
void ExecJcxz(Cpu& cpu, const Insn& insn) {
  if (TruncateAddress(cpu.gpr[kRcx], insn.address_size) == 0) {
    JumpRelative<T>(cpu, insn);
  }
}
enum class LoopWhile { kAlways, kZero, kNotZero };
template <LoopWhile W, typename T>
void ExecLoop(Cpu& cpu, const Insn& insn) {
  const uint64_t count = TruncateAddress(cpu.gpr[kRcx] - 1, insn.address_size);
  const bool zero = (cpu.rflags & rflags::kZf) != 0;
  if (count != 0 && (W == LoopWhile::kAlways || zero == (W == LoopWhile::kZero))) {
    JumpRelative<T>(cpu, insn);
  }
  SetAddressReg(cpu, kRcx, count, insn.address_size);
}
template <LoopWhile W>
ExecFn PickLoop(const Insn& insn) {
  return BySizeWord(insn.operand_size,
                    [](auto type) -> ExecFn { return ExecLoop<W, decltype(type)>; });
}

}  // namespace

ExecFn Pick_JMP(const Insn& insn) {
  return BySizeWord(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return !insn.row->has_modrm ? ExecJump<T>
           : insn.has_memory()  ? ExecJumpRm<T, Place::kMem>
                                : ExecJumpRm<T, Place::kReg>;
  });
}
ExecFn Pick_CALL(const Insn& insn) {
  return BySizeWord(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return !insn.row->has_modrm ? ExecCall<T>
           : insn.has_memory()  ? ExecCallRm<T, Place::kMem>
                                : ExecCallRm<T, Place::kReg>;
  });
}
ExecFn Pick_RET(const Insn& insn) {
  return BySizeWord(insn.operand_size,
                    [](auto type) -> ExecFn { return ExecReturn<decltype(type)>; });
}
ExecFn Pick_JCXZ(const Insn& insn) {
  return BySizeWord(insn.operand_size,
                    [](auto type) -> ExecFn { return ExecJcxz<decltype(type)>; });
}
ExecFn Pick_LOOP(const Insn& insn) { return PickLoop<LoopWhile::kAlways>(insn); }
ExecFn Pick_LOOPE(const Insn& insn) { return PickLoop<LoopWhile::kZero>(insn); }
ExecFn Pick_LOOPNE(const Insn& insn) { return PickLoop<LoopWhile::kNotZero>(insn); }

#define CONDITION(cc, digit, tested) \
  ExecFn Pick_J##cc(const Insn& insn) { return PickJcc<0x##digit>(insn); }
#include "cpu/x86/decode/conditions.def"
#undef CONDITION

}  // namespace kvartz::cpu::x86
