// Segment registers and far transfers.
#include "cpu/x86/engine.h"
#include "cpu/x86/fault.h"
#include "cpu/x86/interp/system.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86 {

void MoveControl(Cpu& cpu, const Insn& insn);  // system_control.cpp

namespace {

// MOV SS and POP SS hold off interrupts for one instruction, unless the one before did already.
void BeginShadow(Cpu& cpu) {
  if (cpu.events.interrupt_shadow) return;
  cpu.events.interrupt_shadow = 1;
  SetRequest(cpu, request::kShadow);
}

SegReg FixedSegment(const Insn& insn) {
  switch (insn.opcode) {
    case 0x06:
    case 0x07:
      return kEs;
    case 0x0e:
      return kCs;
    case 0x16:
    case 0x17:
      return kSs;
    case 0x1e:
    case 0x1f:
      return kDs;
    case 0xa0:
    case 0xa1:
      return kFs;
    default:
      return kGs;
  }
}

// LxS: a far pointer to a segment register and a general one.
void LoadFarPointer(Cpu& cpu, const Insn& insn, SegReg seg) {
  uint64_t at = EffectiveAddress(cpu, insn);
  unsigned size = insn.operand_size;
  uint64_t offset = ReadSized(cpu, insn.seg(), at, size);
  auto selector = ReadMem<uint16_t>(cpu, insn.seg(), at + size);
  LoadSegment(cpu, seg, selector);
  WriteGpr(cpu, insn.reg, size, offset);
}

void SetZf(Cpu& cpu, bool set) {
  cpu.rflags = set ? cpu.rflags | rflags::kZf : cpu.rflags & ~rflags::kZf;
}

// Visible to LAR, LSL, VERR, VERW at the present privilege.
bool Visible(const Cpu& cpu, uint16_t selector, const Descriptor& d) {
  if (d.conforming()) return true;
  return d.dpl() >= cpu.cpl && d.dpl() >= (selector & 3u);
}

bool HasRights(const Cpu& cpu, const Descriptor& d, bool limit) {
  if (!d.system()) return true;
  switch (d.type()) {
    case kTss32:
    case kTss32Busy:
    case kLdt:
      return true;
    case kTss16:
    case kTss16Busy:
      return !cpu.long_mode();
    case kCallGate32:
      return !limit;
    case kCallGate16:
    case kTaskGate:
      return !limit && !cpu.long_mode();
    default:
      return false;
  }
}

bool Lookup(Cpu& cpu, uint16_t selector, Descriptor* d) {
  return !IsNull(selector) && ReadDescriptor(cpu, selector, d) && Visible(cpu, selector, *d);
}

struct FarPointer {
  uint16_t selector;
  uint64_t offset;
};

FarPointer FarTarget(Cpu& cpu, const Insn& insn) {
  if (!insn.has_memory()) return {insn.imm2, static_cast<uint64_t>(insn.imm)};
  uint64_t at = EffectiveAddress(cpu, insn);
  uint64_t offset = ReadSized(cpu, insn.seg(), at, insn.operand_size);
  return {ReadMem<uint16_t>(cpu, insn.seg(), at + insn.operand_size), offset};
}

void CheckFsgsbase(Cpu& cpu) {
  if (!(cpu.cr4 & cr4::kFsgsbase)) Raise(cpu, kUD);
}

void ReadBase(Cpu& cpu, const Insn& insn, SegReg seg) {
  CheckFsgsbase(cpu);
  WriteGpr(cpu, insn.rm, insn.operand_size == 8 ? 8 : 4, cpu.seg[seg].base);
}

void WriteBase(Cpu& cpu, const Insn& insn, SegReg seg) {
  CheckFsgsbase(cpu);
  uint64_t value =
      insn.operand_size == 8 ? cpu.gpr[insn.rm] : static_cast<uint32_t>(cpu.gpr[insn.rm]);
  if (!mmu::Canonical(cpu, value)) Raise(cpu, kGP, 0);
  cpu.seg[seg].base = value;
}

Segment FlatSegment(uint16_t selector, uint32_t type, unsigned dpl, uint32_t extra) {
  Segment s;
  s.limit = 0xffffffff;
  s.attributes = type | Segment::kS | Segment::kP | Segment::kG | dpl << 5 | extra;
  s.selector = selector;
  return s;
}

// The segments of SYSCALL, SYSRET, SYSENTER and SYSEXIT: flat, by convention rather than by
// descriptor.
void LoadFlat(Cpu& cpu, uint16_t cs, uint16_t ss, unsigned cpl, bool is64) {
  cpu.seg[kCs] = FlatSegment(cs, 0xb, cpl, is64 ? Segment::kL : Segment::kDb);
  cpu.seg[kSs] = FlatSegment(ss, 0x3, cpl, Segment::kDb);
}

}  // namespace

void Exec_MOV(Cpu& cpu, const Insn& insn) {
  if (insn.opcode == 0x8c) {
    if (insn.reg >= kSegCount) Raise(cpu, kUD);
    return StoreWord(cpu, insn, cpu.seg[insn.reg].selector);
  }
  if (insn.opcode != 0x8e) return MoveControl(cpu, insn);
  if (insn.reg == kCs || insn.reg >= kSegCount) Raise(cpu, kUD);
  LoadSegment(cpu, static_cast<SegReg>(insn.reg), ReadRm16(cpu, insn));
  if (insn.reg == kSs) BeginShadow(cpu);
}

void Exec_PUSH(Cpu& cpu, const Insn& insn) {
  Stack stack = PresentStack(cpu);
  uint16_t selector = cpu.seg[FixedSegment(insn)].selector;
  // A 32- or 64-bit push of a segment register may write 16 bits only; processors since Pentium Pro
  // do for 32 bits.
  uint64_t sp = stack.sp;
  if (insn.operand_size == 4) {
    stack.sp -= 2;
    Push(cpu, stack, 2, selector);
    stack.sp = ((sp - 4) & stack.mask()) | (sp & ~stack.mask());
  } else {
    Push(cpu, stack, insn.operand_size, selector);
  }
  CommitSp(cpu, stack);
}

void Exec_POP(Cpu& cpu, const Insn& insn) {
  Stack stack = PresentStack(cpu);
  SegReg seg = FixedSegment(insn);
  auto selector = static_cast<uint16_t>(Pop(cpu, stack, insn.operand_size));
  LoadSegment(cpu, seg, selector);
  CommitSp(cpu, stack);
  if (seg == kSs) BeginShadow(cpu);
}

void Exec_LES(Cpu& cpu, const Insn& insn) { LoadFarPointer(cpu, insn, kEs); }
void Exec_LDS(Cpu& cpu, const Insn& insn) { LoadFarPointer(cpu, insn, kDs); }
void Exec_LSS(Cpu& cpu, const Insn& insn) { LoadFarPointer(cpu, insn, kSs); }
void Exec_LFS(Cpu& cpu, const Insn& insn) { LoadFarPointer(cpu, insn, kFs); }
void Exec_LGS(Cpu& cpu, const Insn& insn) { LoadFarPointer(cpu, insn, kGs); }

void Exec_LAR(Cpu& cpu, const Insn& insn) {
  uint16_t selector = ReadRm16(cpu, insn);
  Descriptor d;
  bool ok = Lookup(cpu, selector, &d) && HasRights(cpu, d, false);
  if (ok) WriteGpr(cpu, insn.reg, insn.operand_size, d.low >> 32 & 0xffff00);
  SetZf(cpu, ok);
}

void Exec_LSL(Cpu& cpu, const Insn& insn) {
  uint16_t selector = ReadRm16(cpu, insn);
  Descriptor d;
  bool ok = Lookup(cpu, selector, &d) && HasRights(cpu, d, true);
  if (ok) WriteGpr(cpu, insn.reg, insn.operand_size, d.limit());
  SetZf(cpu, ok);
}

void Exec_VERR(Cpu& cpu, const Insn& insn) {
  Descriptor d;
  bool ok = Lookup(cpu, ReadRm16(cpu, insn), &d);
  SetZf(cpu, ok && d.readable());
}

void Exec_VERW(Cpu& cpu, const Insn& insn) {
  Descriptor d;
  bool ok = Lookup(cpu, ReadRm16(cpu, insn), &d);
  SetZf(cpu, ok && d.writable_data());
}

void Exec_ARPL(Cpu& cpu, const Insn& insn) {
  auto source = static_cast<uint16_t>(cpu.gpr[insn.reg] & 3);
  uint64_t at = insn.has_memory() ? EffectiveAddress(cpu, insn) : 0;
  if (insn.has_memory()) CheckWrite(cpu, insn.seg(), at, 2);
  uint16_t value = ReadRm16(cpu, insn);
  bool raise = (value & 3) < source;
  if (raise) {
    value = static_cast<uint16_t>((value & ~3) | source);
    if (insn.has_memory()) {
      WriteMem<uint16_t>(cpu, insn.seg(), at, value);
    } else {
      WriteGpr(cpu, insn.rm, 2, value);
    }
  }
  SetZf(cpu, raise);
}

void Exec_SWAPGS(Cpu& cpu, const Insn&) {
  std::swap(cpu.seg[kGs].base, cpu.vcpu->msrs.kernel_gs_base);
}

void Exec_RDFSBASE(Cpu& cpu, const Insn& insn) { ReadBase(cpu, insn, kFs); }
void Exec_RDGSBASE(Cpu& cpu, const Insn& insn) { ReadBase(cpu, insn, kGs); }
void Exec_WRFSBASE(Cpu& cpu, const Insn& insn) { WriteBase(cpu, insn, kFs); }
void Exec_WRGSBASE(Cpu& cpu, const Insn& insn) { WriteBase(cpu, insn, kGs); }

void Exec_CALLF(Cpu& cpu, const Insn& insn) {
  FarPointer target = FarTarget(cpu, insn);
  FarCall(cpu, target.selector, target.offset, insn.operand_size);
}

void Exec_JMPF(Cpu& cpu, const Insn& insn) {
  FarPointer target = FarTarget(cpu, insn);
  FarJump(cpu, target.selector, target.offset, insn.operand_size);
}

void Exec_RETF(Cpu& cpu, const Insn& insn) {
  unsigned release = insn.opcode == 0xca ? static_cast<uint16_t>(insn.imm) : 0;
  FarReturn(cpu, insn.w() ? 8 : PlainSize(cpu, insn), release);
}

void Exec_IRET(Cpu& cpu, const Insn& insn) {
  InterruptReturn(cpu, insn.w() ? 8 : PlainSize(cpu, insn));
}

void Exec_SYSCALL(Cpu& cpu, const Insn&) {
  MsrState& msrs = cpu.vcpu->msrs;
  bool is64 = cpu.code_mode == CodeMode::k64;
  // Outside of 64-bit mode only AMD's processors have it, and here only long mode does.
  if (!(cpu.efer & efer::kSce) || !cpu.long_mode() || (!is64 && !cpu.vcpu->limits().amd))
    Raise(cpu, kUD);
  cpu.gpr[kRcx] = cpu.rip;
  cpu.gpr[kR11] = cpu.rflags & ~rflags::kRf;
  auto cs = static_cast<uint16_t>(msrs.star >> 32 & 0xfffc);
  LoadFlat(cpu, cs, static_cast<uint16_t>(cs + 8), 0, true);
  cpu.rip = is64 ? msrs.lstar : msrs.cstar;
  cpu.rflags = (cpu.rflags & ~(msrs.fmask | rflags::kRf)) | 2;
  cpu.no_trap = true;
  UpdateMode(cpu);
}

void Exec_SYSRET(Cpu& cpu, const Insn& insn) {
  MsrState& msrs = cpu.vcpu->msrs;
  if (!(cpu.efer & efer::kSce) || cpu.code_mode != CodeMode::k64) Raise(cpu, kUD);
  bool to64 = insn.w();
  if (to64 && !mmu::Canonical(cpu, cpu.gpr[kRcx])) Raise(cpu, kGP, 0);
  auto base = static_cast<uint16_t>(msrs.star >> 48);
  auto cs = static_cast<uint16_t>((to64 ? base + 16 : base) | 3);
  cpu.rip = to64 ? cpu.gpr[kRcx] : static_cast<uint32_t>(cpu.gpr[kRcx]);
  LoadFlat(cpu, cs, static_cast<uint16_t>((base + 8) | 3), 3, to64);
  SetRflags(cpu, (cpu.gpr[kR11] & 0x3c7fd7) | 2);
  UpdateMode(cpu);
}

void Exec_SYSENTER(Cpu& cpu, const Insn&) {
  MsrState& msrs = cpu.vcpu->msrs;
  if (cpu.long_mode() && cpu.vcpu->limits().amd) Raise(cpu, kUD);
  if (!cpu.protected_mode() || (msrs.sysenter_cs & 0xfffc) == 0) Raise(cpu, kGP, 0);
  auto cs = static_cast<uint16_t>(msrs.sysenter_cs & 0xfffc);
  bool is64 = cpu.long_mode();
  cpu.rflags &= ~(rflags::kVm | rflags::kIf | rflags::kRf);
  LoadFlat(cpu, cs, static_cast<uint16_t>(cs + 8), 0, is64);
  cpu.gpr[kRsp] = is64 ? msrs.sysenter_esp : static_cast<uint32_t>(msrs.sysenter_esp);
  cpu.rip = is64 ? msrs.sysenter_eip : static_cast<uint32_t>(msrs.sysenter_eip);
  UpdateMode(cpu);
}

void Exec_SYSEXIT(Cpu& cpu, const Insn& insn) {
  MsrState& msrs = cpu.vcpu->msrs;
  if (cpu.long_mode() && cpu.vcpu->limits().amd) Raise(cpu, kUD);
  if (!cpu.protected_mode() || (msrs.sysenter_cs & 0xfffc) == 0) Raise(cpu, kGP, 0);
  bool to64 = insn.w() && cpu.long_mode();
  if (to64 && (!mmu::Canonical(cpu, cpu.gpr[kRcx]) || !mmu::Canonical(cpu, cpu.gpr[kRdx])))
    Raise(cpu, kGP, 0);
  auto base = static_cast<uint16_t>(msrs.sysenter_cs & 0xfffc);
  auto cs = static_cast<uint16_t>((base + (to64 ? 32 : 16)) | 3);
  LoadFlat(cpu, cs, static_cast<uint16_t>(cs + 8), 3, to64);
  cpu.gpr[kRsp] = to64 ? cpu.gpr[kRcx] : static_cast<uint32_t>(cpu.gpr[kRcx]);
  cpu.rip = to64 ? cpu.gpr[kRdx] : static_cast<uint32_t>(cpu.gpr[kRdx]);
  UpdateMode(cpu);
}

}  // namespace kvartz::cpu::x86
