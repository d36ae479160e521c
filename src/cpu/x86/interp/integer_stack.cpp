// PUSH and POP in all their forms, ENTER and LEAVE.
#include "cpu/x86/interp/integer.h"

namespace kvartz::cpu::x86 {
namespace {

template <typename T>
void ExecPushReg(Cpu& cpu, const Insn& insn) {  // PUSH rSP pushes the old value
  Push<T>(cpu, GetReg<T>(cpu, insn.reg));
}
template <typename T>
void ExecPushImm(Cpu& cpu, const Insn& insn) {
  Push<T>(cpu, static_cast<T>(insn.imm));
}
template <typename T, Place P>
void ExecPushRm(Cpu& cpu, const Insn& insn) {
  Push<T>(cpu, ReadRm<T, P>(cpu, insn));
}
template <typename T>
void ExecPopReg(Cpu& cpu, const Insn& insn) {
  const T value = ReadStack<T>(cpu);
  AddToStack(cpu, sizeof(T));
  SetReg<T>(cpu, insn.reg, value);
}
template <typename T>
void ExecPopRm(Cpu& cpu, const Insn& insn) {
  const T value = ReadStack<T>(cpu);
  if (!insn.has_memory()) {
    AddToStack(cpu, sizeof(T));
    SetReg<T>(cpu, insn.rm, value);
    return;
  }
  const uint64_t old_sp = cpu.gpr[kRsp];
  AddToStack(cpu, sizeof(T));  // an address that uses rSP sees the new value
  const uint64_t offset = EffectiveAddress(cpu, insn);
  const uint64_t new_sp = cpu.gpr[kRsp];
  cpu.gpr[kRsp] = old_sp;
  WriteMem<T>(cpu, insn.seg(), offset, value);
  cpu.gpr[kRsp] = new_sp;
}

template <typename T>
void ExecPusha(Cpu& cpu, const Insn&) {
  // The first and the last slot are checked, which covers all: the frame spans two pages at most.
  const uint64_t old_sp = cpu.gpr[kRsp];
  const uint64_t last = TruncateAddress(old_sp - 8 * sizeof(T), cpu.stack_size);
  CheckWrite(cpu, kSs, TruncateAddress(old_sp - sizeof(T), cpu.stack_size), sizeof(T));
  CheckWrite(cpu, kSs, last, sizeof(T));
  for (unsigned i = 0; i < 8; ++i) {
    WriteMem<T>(cpu, kSs, TruncateAddress(old_sp - (i + 1) * sizeof(T), cpu.stack_size),
                static_cast<T>(cpu.gpr[i]));
  }
  SetAddressReg(cpu, kRsp, last, cpu.stack_size);
}
template <typename T>
void ExecPopa(Cpu& cpu, const Insn&) {
  T values[8];
  for (unsigned i = 0; i < 8; ++i) {
    values[i] = ReadStack<T>(cpu, i * sizeof(T));
  }
  AddToStack(cpu, 8 * sizeof(T));
  for (unsigned i = 0; i < 8; ++i) {
    if (7 - i != kRsp) {
      SetReg<T>(cpu, 7 - i, values[i]);
    }
  }
}

// In virtual-8086 mode IF needs IOPL 3, or CR4.VME, which puts VIF in its place (SDM vol. 2 PUSHF,
// POPF).
bool UsesVif(Cpu& cpu, unsigned size) {
  if (!cpu.virtual_8086() || (cpu.rflags & rflags::kIopl) == rflags::kIopl) {
    return false;
  }
  if ((cpu.cr4 & cr4::kVme) == 0 || size != 2) {
    Raise(cpu, kGP, 0);
  }
  return true;
}

template <typename T>
void ExecPushf(Cpu& cpu, const Insn&) {
  uint64_t flags = cpu.rflags & ~(rflags::kVm | rflags::kRf);
  if (UsesVif(cpu, sizeof(T))) {
    flags =
        (flags & ~rflags::kIf) | rflags::kIopl | ((flags & rflags::kVif) != 0 ? rflags::kIf : 0);
  }
  Push<T>(cpu, static_cast<T>(flags));
}

template <typename T>
void ExecPopf(Cpu& cpu, const Insn&) {
  const bool uses_vif = UsesVif(cpu, sizeof(T));
  const auto value = static_cast<uint64_t>(ReadStack<T>(cpu));
  const unsigned iopl = static_cast<unsigned>((cpu.rflags & rflags::kIopl) >> 12);
  uint64_t writable = rflags::kStatus | rflags::kTf | rflags::kDf | rflags::kNt;
  if (sizeof(T) > 2) {
    writable |= rflags::kAc | rflags::kId;
  }
  uint64_t flags = value;
  if (uses_vif) {
    if ((value & rflags::kTf) != 0 ||
        ((value & rflags::kIf) != 0 && (cpu.rflags & rflags::kVip) != 0)) {
      Raise(cpu, kGP, 0);
    }
    writable |= rflags::kVif;
    flags = (value & ~rflags::kVif) | ((value & rflags::kIf) != 0 ? rflags::kVif : 0);
  } else if (cpu.cpl == 0) {
    writable |= rflags::kIopl | rflags::kIf;
  } else if (cpu.cpl <= iopl) {
    writable |= rflags::kIf;
  }
  AddToStack(cpu, sizeof(T));
  const uint64_t cleared = sizeof(T) > 2 ? rflags::kRf : 0;
  SetRflags(cpu, (cpu.rflags & ~(writable | cleared)) | (flags & writable) | 2);
}

// SDM vol. 2 ENTER. All reads and writes are done before a register changes.
template <typename T>
void ExecEnter(Cpu& cpu, const Insn& insn) {
  const unsigned level = insn.imm2 & 31;
  const auto frame_bytes = static_cast<uint16_t>(insn.imm);
  uint64_t sp = cpu.gpr[kRsp];
  auto push = [&](T value) {
    sp = TruncateAddress(sp - sizeof(T), cpu.stack_size);
    WriteMem<T>(cpu, kSs, sp, value);
  };
  push(static_cast<T>(cpu.gpr[kRbp]));
  const uint64_t frame = sp;
  uint64_t bp = cpu.gpr[kRbp];
  for (unsigned i = 1; i < level; ++i) {
    bp = TruncateAddress(bp - sizeof(T), cpu.stack_size);
    push(ReadMem<T>(cpu, kSs, bp));
  }
  if (level > 0) {
    push(static_cast<T>(frame));
  }
  sp = TruncateAddress(sp - frame_bytes, cpu.stack_size);
  CheckWrite(cpu, kSs, sp, 1);  // the new top of the stack must be writable
  SetReg<T>(cpu, kRbp, static_cast<T>(frame));
  SetAddressReg(cpu, kRsp, sp, cpu.stack_size);
}
template <typename T>
void ExecLeave(Cpu& cpu, const Insn&) {
  const uint64_t frame = TruncateAddress(cpu.gpr[kRbp], cpu.stack_size);
  const T value = ReadMem<T>(cpu, kSs, frame);
  SetAddressReg(cpu, kRsp, frame + sizeof(T), cpu.stack_size);
  SetReg<T>(cpu, kRbp, value);
}

}  // namespace

ExecFn Pick_PUSH(const Insn& insn) {
  return BySizeWord(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.row->opcode_register            ? ExecPushReg<T>
           : insn.row->imm[0] != ImmKind::kNone ? ExecPushImm<T>
           : insn.has_memory()                  ? ExecPushRm<T, Place::kMem>
                                                : ExecPushRm<T, Place::kReg>;
  });
}
ExecFn Pick_POP(const Insn& insn) {
  return BySizeWord(insn.operand_size, [&](auto type) -> ExecFn {
    using T = decltype(type);
    return insn.row->opcode_register ? ExecPopReg<T> : ExecPopRm<T>;
  });
}

#define BY_OPERAND_SIZE(mnemonic, function)                                          \
  ExecFn Pick_##mnemonic(const Insn& insn) {                                         \
    return BySizeWord(insn.operand_size,                                             \
                      [](auto type) -> ExecFn { return function<decltype(type)>; }); \
  }
BY_OPERAND_SIZE(PUSHA, ExecPusha)
BY_OPERAND_SIZE(POPA, ExecPopa)
BY_OPERAND_SIZE(PUSHF, ExecPushf)
BY_OPERAND_SIZE(POPF, ExecPopf)
BY_OPERAND_SIZE(ENTER, ExecEnter)
BY_OPERAND_SIZE(LEAVE, ExecLeave)
#undef BY_OPERAND_SIZE

}  // namespace kvartz::cpu::x86
