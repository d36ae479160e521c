// Far JMP, CALL and RET, and IRET, through descriptors, call gates and tasks (SDM vol. 2, vol.
// 3 5.8).
#include "cpu/x86/mmu.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86 {
namespace {

bool RealOrVm86(const Cpu& cpu) { return !cpu.protected_mode() || cpu.virtual_8086(); }

uint64_t Truncate(uint64_t value, unsigned size) {
  return size == 8 ? value : size == 4 ? value & 0xffffffff : value & 0xffff;
}

// A target within `code`: limit outside of 64-bit mode, canonical in it.
void CheckTarget(Cpu& cpu, const Descriptor& code, uint64_t offset) {
  if (cpu.long_mode() && code.is_long()) {
    if (!mmu::Canonical(cpu, offset)) Raise(cpu, kGP, 0);
  } else if ((offset & 0xffffffff) > code.limit() || offset >> 32) {
    Raise(cpu, kGP, 0);
  }
}

[[noreturn]] void RaiseSelector(Cpu& cpu, Vector vector, uint16_t selector) {
  Raise(cpu, vector, SelectorError(selector));
}

// A code segment for JMP and CALL without a gate; privilege stays.
void CheckDirect(Cpu& cpu, uint16_t selector, const Descriptor& d) {
  if (cpu.long_mode() && d.is_long() && d.big()) RaiseSelector(cpu, kGP, selector);
  if (d.conforming() ? d.dpl() > cpu.cpl : ((selector & 3u) > cpu.cpl || d.dpl() != cpu.cpl))
    RaiseSelector(cpu, kGP, selector);
  if (!d.present()) RaiseSelector(cpu, kNP, selector);
}

// Target of a far JMP or CALL in protected mode, read and with its kind checked.
Descriptor ReadTarget(Cpu& cpu, uint16_t selector) {
  if (IsNull(selector)) Raise(cpu, kGP, 0);
  Descriptor d;
  if (!ReadDescriptor(cpu, selector, &d)) RaiseSelector(cpu, kGP, selector);
  if (!d.system()) {
    if (!d.code()) RaiseSelector(cpu, kGP, selector);
    return d;
  }
  bool task = d.type() == kTaskGate || d.type() == kTss16 || d.type() == kTss32;
  bool known = d.type() == kCallGate32 || (!cpu.long_mode() && (d.type() == kCallGate16 || task));
  if (!known) RaiseSelector(cpu, kGP, selector);
  if (d.dpl() < cpu.cpl || d.dpl() < (selector & 3u)) RaiseSelector(cpu, kGP, selector);
  if (cpu.long_mode()) {
    if (!ReadDescriptor16(cpu, selector, &d) || (d.high >> 40 & 0x1f))
      RaiseSelector(cpu, kGP, selector);
    d.high &= 0xffffffff;
  }
  if (!d.present()) RaiseSelector(cpu, kNP, selector);
  return d;
}

void ToTask(Cpu& cpu, uint16_t selector, Descriptor d, TaskSwitch kind) {
  if (d.type() == kTaskGate) {
    selector = d.gate_selector();
    if ((selector & 4) || !ReadDescriptor(cpu, selector, &d)) RaiseSelector(cpu, kGP, selector);
    if (!d.system() || (d.type() != kTss16 && d.type() != kTss32))
      RaiseSelector(cpu, kGP, selector);
    if (!d.present()) RaiseSelector(cpu, kNP, selector);
  }
  SwitchTask(cpu, selector, d, kind);
}

// The code segment that a call gate leads to.
Descriptor GateTarget(Cpu& cpu, const Descriptor& gate, bool call) {
  uint16_t selector = gate.gate_selector();
  if (IsNull(selector)) Raise(cpu, kGP, 0);
  Descriptor code;
  if (!ReadDescriptor(cpu, selector, &code)) RaiseSelector(cpu, kGP, selector);
  if (!code.code() || code.dpl() > cpu.cpl) RaiseSelector(cpu, kGP, selector);
  if (cpu.long_mode() && (!code.is_long() || code.big())) RaiseSelector(cpu, kGP, selector);
  if (!call && !code.conforming() && code.dpl() != cpu.cpl) RaiseSelector(cpu, kGP, selector);
  if (!code.present()) RaiseSelector(cpu, kNP, selector);
  return code;
}

unsigned GateSize(const Cpu& cpu, const Descriptor& gate) {
  return cpu.long_mode() ? 8 : gate.type() == kCallGate32 ? 4 : 2;
}

uint64_t GateOffset(const Cpu& cpu, const Descriptor& gate) {
  return cpu.long_mode() ? gate.gate_offset64() : Truncate(gate.gate_offset(), GateSize(cpu, gate));
}

// The inner stack of a call gate, with the caller's SS:SP and parameters on it.
Stack InnerStack(Cpu& cpu, const Descriptor& gate, unsigned cpl, Descriptor* ss) {
  unsigned size = GateSize(cpu, gate);
  uint32_t tss_error = SelectorError(cpu.tr.selector);
  Stack stack;
  stack.cpl = cpl;
  if (size == 8) {
    uint32_t offset = 4 + 8 * cpl;
    if (offset + 7 > cpu.tr.limit) Raise(cpu, kTS, tss_error);
    stack.sp = ReadSystem<uint64_t>(cpu, cpu.tr.base + offset);
    if (!mmu::Canonical(cpu, stack.sp)) Raise(cpu, kSS, 0);
    stack.is64 = true;
  } else {
    bool wide = cpu.tr.type() & 8;
    uint32_t offset = wide ? 4 + 8 * cpl : 2 + 4 * cpl;
    if (offset + (wide ? 5u : 3u) > cpu.tr.limit) Raise(cpu, kTS, tss_error);
    stack.sp = wide ? ReadSystem<uint32_t>(cpu, cpu.tr.base + offset)
                    : ReadSystem<uint16_t>(cpu, cpu.tr.base + offset);
    auto selector = ReadSystem<uint16_t>(cpu, cpu.tr.base + offset + (wide ? 4 : 2));
    *ss = CheckStackSegment(cpu, selector, cpl, kTS, 0);
    stack.ss = ToSegment(selector, *ss);
    stack.fresh = true;
  }
  Stack old = PresentStack(cpu);
  Push(cpu, stack, size, cpu.seg[kSs].selector);
  Push(cpu, stack, size, cpu.gpr[kRsp]);
  if (size != 8) {
    for (unsigned i = gate.gate_count(); i-- > 0;) {
      Stack at = old;
      at.sp += i * size;
      Push(cpu, stack, size, Pop(cpu, at, size));
    }
  }
  return stack;
}

void CallGate(Cpu& cpu, const Descriptor& gate) {
  Descriptor code = GateTarget(cpu, gate, true);
  unsigned size = GateSize(cpu, gate);
  uint64_t offset = GateOffset(cpu, gate);
  uint16_t selector = gate.gate_selector();
  bool inner = !code.conforming() && code.dpl() < cpu.cpl;
  unsigned cpl = inner ? code.dpl() : cpu.cpl;
  CheckTarget(cpu, code, offset);
  Descriptor ss;
  Stack stack = inner ? InnerStack(cpu, gate, cpl, &ss) : PresentStack(cpu);
  Push(cpu, stack, size, cpu.seg[kCs].selector);
  Push(cpu, stack, size, cpu.rip);
  MarkAccessed(cpu, &code);
  if (inner && size == 8) {
    LoadNullSegment(cpu, kSs, static_cast<uint16_t>(cpl));
    cpu.gpr[kRsp] = stack.sp;
  } else if (inner) {
    MarkAccessed(cpu, &ss);
    cpu.seg[kSs] = ToSegment(stack.ss.selector, ss);
    CommitSp(cpu, stack);
  } else {
    CommitSp(cpu, stack);
  }
  cpu.rip = offset;
  SetCs(cpu, selector, code, cpl);
}

}  // namespace

void FarJump(Cpu& cpu, uint16_t selector, uint64_t offset, unsigned size) {
  offset = Truncate(offset, size);
  if (RealOrVm86(cpu)) {
    if (offset > cpu.seg[kCs].limit) Raise(cpu, kGP, 0);
    LoadRealSegment(cpu, kCs, selector);
    cpu.rip = offset;
    return UpdateMode(cpu);
  }
  Descriptor d = ReadTarget(cpu, selector);
  if (!d.system()) {
    CheckDirect(cpu, selector, d);
    CheckTarget(cpu, d, offset);
    MarkAccessed(cpu, &d);
    cpu.rip = offset;
    return SetCs(cpu, selector, d, cpu.cpl);
  }
  if (d.type() != kCallGate16 && d.type() != kCallGate32)
    return ToTask(cpu, selector, d, TaskSwitch::kJump);
  Descriptor code = GateTarget(cpu, d, false);
  CheckTarget(cpu, code, GateOffset(cpu, d));
  MarkAccessed(cpu, &code);
  cpu.rip = GateOffset(cpu, d);
  SetCs(cpu, d.gate_selector(), code, cpu.cpl);
}

void FarCall(Cpu& cpu, uint16_t selector, uint64_t offset, unsigned size) {
  offset = Truncate(offset, size);
  if (RealOrVm86(cpu)) {
    if (offset > cpu.seg[kCs].limit) Raise(cpu, kGP, 0);
    Stack stack = PresentStack(cpu);
    Push(cpu, stack, size, cpu.seg[kCs].selector);
    Push(cpu, stack, size, cpu.rip);
    CommitSp(cpu, stack);
    LoadRealSegment(cpu, kCs, selector);
    cpu.rip = offset;
    return UpdateMode(cpu);
  }
  Descriptor d = ReadTarget(cpu, selector);
  if (!d.system()) {
    CheckDirect(cpu, selector, d);
    CheckTarget(cpu, d, offset);
    Stack stack = PresentStack(cpu);
    Push(cpu, stack, size, cpu.seg[kCs].selector);
    Push(cpu, stack, size, cpu.rip);
    MarkAccessed(cpu, &d);
    CommitSp(cpu, stack);
    cpu.rip = offset;
    return SetCs(cpu, selector, d, cpu.cpl);
  }
  if (d.type() == kCallGate16 || d.type() == kCallGate32) return CallGate(cpu, d);
  ToTask(cpu, selector, d, TaskSwitch::kCall);
}

namespace {

// What RET and IRET pop: checked, not yet loaded.
struct ReturnTarget {
  uint16_t selector = 0;
  uint64_t offset = 0;
  Descriptor code;
  unsigned cpl = 0;  // the new one
  Descriptor ss;
  uint16_t ss_selector = 0;
  bool null_ss = false;
};

Descriptor CheckReturnCode(Cpu& cpu, uint16_t selector) {
  if (IsNull(selector)) Raise(cpu, kGP, 0);
  Descriptor d;
  if (!ReadDescriptor(cpu, selector, &d)) RaiseSelector(cpu, kGP, selector);
  unsigned rpl = selector & 3;
  if (!d.code() || rpl < cpu.cpl) RaiseSelector(cpu, kGP, selector);
  if (cpu.long_mode() && d.is_long() && d.big()) RaiseSelector(cpu, kGP, selector);
  if (d.conforming() ? d.dpl() > rpl : d.dpl() != rpl) RaiseSelector(cpu, kGP, selector);
  if (!d.present()) RaiseSelector(cpu, kNP, selector);
  return d;
}

ReturnTarget MakeTarget(Cpu& cpu, uint16_t selector, uint64_t offset) {
  ReturnTarget target;
  target.selector = selector;
  target.offset = offset;
  target.code = CheckReturnCode(cpu, selector);
  target.cpl = selector & 3;
  return target;
}

// SS of a return to an outer level (or, for IRET in 64-bit mode, to any).
void CheckReturnStack(Cpu& cpu, ReturnTarget& target) {
  bool to64 = cpu.long_mode() && target.code.is_long();
  if (IsNull(target.ss_selector)) {
    if (!to64 || target.cpl == 3 || (target.ss_selector & 3u) != target.cpl) Raise(cpu, kGP, 0);
    target.null_ss = true;
    return;
  }
  target.ss = CheckStackSegment(cpu, target.ss_selector, target.cpl, kGP, 0);
}

// After a return to an outer level: data segments that it may not use become null (SDM, RET).
void DropInnerSegments(Cpu& cpu) {
  for (SegReg seg : {kEs, kDs, kFs, kGs}) {
    Segment& s = cpu.seg[seg];
    if (s.attributes & Segment::kUnusable) continue;
    bool conforming = (s.type() & 0xc) == 0xc;
    if (s.dpl() < cpu.cpl && !conforming) LoadNullSegment(cpu, seg, 0);
  }
}

void LoadReturnStack(Cpu& cpu, ReturnTarget& target, uint64_t sp) {
  if (target.null_ss) {
    LoadNullSegment(cpu, kSs, target.ss_selector);
  } else {
    MarkAccessed(cpu, &target.ss);
    cpu.seg[kSs] = ToSegment(target.ss_selector, target.ss);
  }
  bool to64 = cpu.long_mode() && target.code.is_long();
  if (to64) {
    cpu.gpr[kRsp] = sp;
  } else if (cpu.seg[kSs].attributes & Segment::kDb) {
    cpu.gpr[kRsp] = sp & 0xffffffff;
  } else {
    cpu.gpr[kRsp] = (cpu.gpr[kRsp] & ~0xffffull) | (sp & 0xffff);
  }
}

}  // namespace

void FarReturn(Cpu& cpu, unsigned size, unsigned release) {
  Stack stack = PresentStack(cpu);
  uint64_t offset = Pop(cpu, stack, size);
  auto selector = static_cast<uint16_t>(Pop(cpu, stack, size));
  if (RealOrVm86(cpu)) {
    if (offset > cpu.seg[kCs].limit) Raise(cpu, kGP, 0);
    stack.sp += release;
    CommitSp(cpu, stack);
    LoadRealSegment(cpu, kCs, selector);
    cpu.rip = offset;
    return UpdateMode(cpu);
  }
  ReturnTarget target = MakeTarget(cpu, selector, offset);
  if (target.cpl == cpu.cpl) {
    CheckTarget(cpu, target.code, offset);
    stack.sp += release;
    MarkAccessed(cpu, &target.code);
    CommitSp(cpu, stack);
    cpu.rip = offset;
    return SetCs(cpu, selector, target.code, target.cpl);
  }
  stack.sp += release;
  uint64_t sp = Pop(cpu, stack, size);
  target.ss_selector = static_cast<uint16_t>(Pop(cpu, stack, size));
  CheckReturnStack(cpu, target);
  CheckTarget(cpu, target.code, offset);
  MarkAccessed(cpu, &target.code);
  LoadReturnStack(cpu, target, sp);
  uint64_t top = cpu.gpr[kRsp] + release;
  bool wide =
      (cpu.long_mode() && target.code.is_long()) || (cpu.seg[kSs].attributes & Segment::kDb);
  cpu.gpr[kRsp] = wide ? (cpu.long_mode() && target.code.is_long() ? top : top & 0xffffffff)
                       : (cpu.gpr[kRsp] & ~0xffffull) | (top & 0xffff);
  cpu.rip = offset;
  SetCs(cpu, selector, target.code, target.cpl);
  DropInnerSegments(cpu);
  UpdateMode(cpu);
}

namespace {

// RFLAGS bits that IRET at `cpl` and `iopl` may change.
uint64_t IretMask(unsigned size, unsigned cpl, unsigned iopl) {
  using namespace rflags;
  uint64_t mask = kStatus | kTf | kDf | kNt;
  if (size >= 4) mask |= kRf | kAc | kId;
  if (cpl <= iopl) mask |= kIf;
  if (cpl == 0) {
    mask |= kIopl;
    if (size >= 4) mask |= kVif | kVip;
  }
  return mask;
}

void SetMasked(Cpu& cpu, uint64_t value, uint64_t mask) {
  SetRflags(cpu, (cpu.rflags & ~mask) | (value & mask) | 2);
}

unsigned Iopl(const Cpu& cpu) { return cpu.rflags >> 12 & 3; }

void IretReal(Cpu& cpu, unsigned size) {
  Stack stack = PresentStack(cpu);
  uint64_t offset = Pop(cpu, stack, size);
  auto selector = static_cast<uint16_t>(Pop(cpu, stack, size));
  uint64_t flags = Pop(cpu, stack, size);
  if (offset > cpu.seg[kCs].limit) Raise(cpu, kGP, 0);
  uint64_t mask = IretMask(size, 0, 3) & ~(rflags::kVif | rflags::kVip);
  if (cpu.virtual_8086()) {
    mask &= ~rflags::kIopl;
    if (Iopl(cpu) < 3) {
      // VME: the virtual interrupt flag stands in for IF.
      if (!(cpu.cr4 & cr4::kVme) || size != 2) Raise(cpu, kGP, 0);
      if ((flags & rflags::kTf) || ((flags & rflags::kIf) && (cpu.rflags & rflags::kVip)))
        Raise(cpu, kGP, 0);
      mask = (mask & ~rflags::kIf) | rflags::kVif;
      flags = (flags & ~rflags::kVif) | (flags & rflags::kIf ? rflags::kVif : 0);
    }
  }
  CommitSp(cpu, stack);
  LoadRealSegment(cpu, kCs, selector);
  cpu.rip = offset;
  SetMasked(cpu, flags, mask);
  UpdateMode(cpu);
}

void IretToVm86(Cpu& cpu, Stack& stack, uint64_t offset, uint16_t selector, uint64_t flags) {
  uint64_t esp = Pop(cpu, stack, 4);
  uint16_t segments[kSegCount] = {};
  for (SegReg seg : {kSs, kEs, kDs, kFs, kGs})
    segments[seg] = static_cast<uint16_t>(Pop(cpu, stack, 4));
  segments[kCs] = selector;
  cpu.rflags = (flags & 0x3f7fd5) | rflags::kVm | 2;
  for (unsigned i = 0; i < kSegCount; i++)
    LoadRealSegment(cpu, static_cast<SegReg>(i), segments[i]);
  cpu.gpr[kRsp] = esp;
  cpu.rip = offset & 0xffff;
  UpdateMode(cpu);
  if (flags & rflags::kIf) SetRequest(cpu, request::kInterrupt);
}

void IretTask(Cpu& cpu) {
  if (cpu.long_mode()) Raise(cpu, kGP, 0);
  auto link = ReadSystem<uint16_t>(cpu, cpu.tr.base);
  Descriptor tss;
  if ((link & 4) || IsNull(link) || !ReadDescriptor(cpu, link, &tss)) RaiseSelector(cpu, kTS, link);
  if (!tss.system() || (tss.type() != kTss16Busy && tss.type() != kTss32Busy))
    RaiseSelector(cpu, kTS, link);
  if (!tss.present()) RaiseSelector(cpu, kNP, link);
  SwitchTask(cpu, link, tss, TaskSwitch::kReturn);
}

}  // namespace

void InterruptReturn(Cpu& cpu, unsigned size) {
  if (cpu.events.nmi_masked) {
    cpu.events.nmi_masked = false;
    SetRequest(cpu, request::kInterrupt);  // an NMI may wait
  }
  if (RealOrVm86(cpu)) return IretReal(cpu, size);
  if (cpu.rflags & rflags::kNt) return IretTask(cpu);
  Stack stack = PresentStack(cpu);
  uint64_t offset = Pop(cpu, stack, size);
  auto selector = static_cast<uint16_t>(Pop(cpu, stack, size));
  uint64_t flags = Pop(cpu, stack, size);
  if (!cpu.long_mode() && size == 4 && (flags & rflags::kVm) && cpu.cpl == 0) {
    return IretToVm86(cpu, stack, offset, selector, flags);
  }
  ReturnTarget target = MakeTarget(cpu, selector, offset);
  uint64_t mask = IretMask(size, cpu.cpl, Iopl(cpu));
  bool outer = target.cpl != cpu.cpl;
  if (!outer && cpu.code_mode != CodeMode::k64) {
    CheckTarget(cpu, target.code, offset);
    MarkAccessed(cpu, &target.code);
    CommitSp(cpu, stack);
    cpu.rip = offset;
    SetMasked(cpu, flags, mask);
    return SetCs(cpu, selector, target.code, target.cpl);
  }
  uint64_t sp = Pop(cpu, stack, size);
  target.ss_selector = static_cast<uint16_t>(Pop(cpu, stack, size));
  CheckReturnStack(cpu, target);
  CheckTarget(cpu, target.code, offset);
  MarkAccessed(cpu, &target.code);
  LoadReturnStack(cpu, target, sp);
  cpu.rip = offset;
  SetMasked(cpu, flags, mask);
  SetCs(cpu, selector, target.code, target.cpl);
  if (outer) {
    DropInnerSegments(cpu);
    UpdateMode(cpu);
  }
}

}  // namespace kvartz::cpu::x86
