#include "cpu/x86/fault.h"

#include "base/check.h"
#include "cpu/x86/mmu.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86 {

// ---- raising

namespace {

[[noreturn]] void Leave(Cpu& cpu) {
  cpu.rip = cpu.insn_rip;
  if (cpu.tlb && cpu.tlb->bus_locks) {
    cpu.tlb->bus_locks = 1;
    BusUnlock(cpu);
  }
  VERIFY(cpu.fault_exit != nullptr);
  longjmp(*cpu.fault_exit, 1);
}

}  // namespace

void Raise(Cpu& cpu, Vector vector) {
  cpu.fault.vector = vector;
  cpu.fault.has_error = false;
  cpu.fault.error = 0;
  Leave(cpu);
}

void Raise(Cpu& cpu, Vector vector, uint32_t error) {
  cpu.fault.vector = vector;
  cpu.fault.has_error = true;
  cpu.fault.error = error;
  Leave(cpu);
}

void RaisePageFault(Cpu& cpu, uint64_t linear, uint32_t error) {
  cpu.cr2 = linear;
  Raise(cpu, kPF, error);
}

void RaiseDebugFault(Cpu& cpu, uint64_t bits) {
  cpu.dr[6] = (cpu.dr[6] & ~0xfull) | bits;
  cpu.dr[7] &= ~0x2000ull;
  Raise(cpu, kDB);
}

Event RaisedEvent(const Cpu& cpu) {
  return {.vector = cpu.fault.vector,
          .kind = EventKind::kFault,
          .has_error = cpu.fault.has_error,
          .error = cpu.fault.error};
}

bool DeliverDebugTrap(Cpu& cpu, uint64_t bits) {
  cpu.dr[6] = (cpu.dr[6] & ~0xfull) | bits;
  cpu.dr[7] &= ~0x2000ull;  // GD
  return Deliver(cpu, {.vector = kDB, .kind = EventKind::kTrap});
}

// ---- entering a handler

namespace {

constexpr uint32_t kIdtError = 2;

uint32_t Ext(const Event& event) {
  return event.kind != EventKind::kSoftware && event.kind != EventKind::kSoftwareException;
}

uint64_t PushedFlags(const Cpu& cpu, const Event& event) {
  uint64_t flags = cpu.rflags;
  // Faults push RF set, so that an instruction breakpoint isn't hit again; #DB itself leaves that
  // to software.
  if (event.kind == EventKind::kFault && event.vector != kDB) flags |= rflags::kRf;
  return flags;
}

void ClearFlags(Cpu& cpu, bool interrupt_gate, uint64_t also) {
  uint64_t clear = rflags::kTf | rflags::kRf | also;
  if (interrupt_gate) clear |= rflags::kIf;
  cpu.rflags &= ~clear;
}

// Through the table of real mode's vectors at `table`; also a VM86 task's own handlers (VME).
void EnterReal(Cpu& cpu, const Event& event, uint64_t table, uint64_t flags) {
  auto target = ReadSystem<uint32_t>(cpu, table + 4u * event.vector);
  Stack stack = PresentStack(cpu);
  Push(cpu, stack, 2, flags & 0xffff);
  Push(cpu, stack, 2, cpu.seg[kCs].selector);
  Push(cpu, stack, 2, cpu.rip & 0xffff);
  CommitSp(cpu, stack);
  LoadRealSegment(cpu, kCs, static_cast<uint16_t>(target >> 16));
  cpu.rip = target & 0xffff;
}

[[noreturn]] void RaiseTss(Cpu& cpu, uint32_t ext) {
  Raise(cpu, kTS, SelectorError(cpu.tr.selector) | ext);
}

// SS:ESP of privilege level `cpl` from the present TSS (legacy modes).
void StackFromTss(Cpu& cpu, unsigned cpl, uint32_t ext, uint16_t* ss, uint32_t* esp) {
  bool wide = cpu.tr.type() & 8;
  uint32_t offset = wide ? 4 + 8 * cpl : 2 + 4 * cpl;
  if (offset + (wide ? 5u : 3u) > cpu.tr.limit) RaiseTss(cpu, ext);
  if (wide) {
    *esp = ReadSystem<uint32_t>(cpu, cpu.tr.base + offset);
    *ss = ReadSystem<uint16_t>(cpu, cpu.tr.base + offset + 4);
  } else {
    *esp = ReadSystem<uint16_t>(cpu, cpu.tr.base + offset);
    *ss = ReadSystem<uint16_t>(cpu, cpu.tr.base + offset + 2);
  }
}

uint64_t Stack64FromTss(Cpu& cpu, uint32_t offset, uint32_t ext) {
  if (offset + 7 > cpu.tr.limit) RaiseTss(cpu, ext);
  auto sp = ReadSystem<uint64_t>(cpu, cpu.tr.base + offset);
  if (!mmu::Canonical(cpu, sp)) Raise(cpu, kSS, ext);
  return sp;
}

void EnterTask(Cpu& cpu, const Event& event, uint16_t selector, uint32_t ext) {
  uint32_t error = SelectorError(selector) | ext;
  Descriptor tss;
  if (IsNull(selector) || (selector & 4) || !ReadDescriptor(cpu, selector, &tss))
    Raise(cpu, kGP, error);
  if (!tss.system() || (tss.type() != kTss16 && tss.type() != kTss32)) Raise(cpu, kGP, error);
  if (!tss.present()) Raise(cpu, kNP, error);
  SwitchTask(cpu, selector, tss, TaskSwitch::kEvent, event.has_error, event.error, ext);
}

struct Gate {
  Descriptor d;
  bool interrupt = false;
  unsigned size = 4;  // of what is pushed
};

// The IDT's entry, checked as far as the gate itself goes.
Gate ReadGate(Cpu& cpu, const Event& event) {
  unsigned entry = cpu.long_mode() ? 16 : 8;
  uint32_t ext = Ext(event);
  uint32_t error = event.vector * 8u | kIdtError | ext;
  if (event.vector * entry + entry - 1 > cpu.idtr.limit) Raise(cpu, kGP, error);
  Gate gate;
  gate.d.address = cpu.idtr.base + event.vector * entry;
  gate.d.low = ReadSystem<uint64_t>(cpu, gate.d.address);
  if (entry == 16) gate.d.high = ReadSystem<uint64_t>(cpu, gate.d.address + 8) & 0xffffffff;
  unsigned type = gate.d.system() ? gate.d.type() : 0;
  bool known =
      type == kIntGate32 || type == kTrapGate32 ||
      (!cpu.long_mode() && (type == kIntGate16 || type == kTrapGate16 || type == kTaskGate));
  if (!known) Raise(cpu, kGP, error);
  if (!ext && gate.d.dpl() < cpu.cpl) Raise(cpu, kGP, error);
  if (!gate.d.present()) Raise(cpu, kNP, error);
  gate.interrupt = type == kIntGate32 || type == kIntGate16;
  gate.size = cpu.long_mode() ? 8 : type & 8 ? 4 : 2;
  return gate;
}

void EnterLong(Cpu& cpu, const Event& event, const Gate& gate) {
  uint32_t ext = Ext(event);
  uint16_t selector = gate.d.gate_selector();
  Descriptor code;
  if (IsNull(selector)) Raise(cpu, kGP, ext);
  uint32_t error = SelectorError(selector) | ext;
  if (!ReadDescriptor(cpu, selector, &code)) Raise(cpu, kGP, error);
  if (!code.code() || code.dpl() > cpu.cpl || !code.is_long() || code.big()) Raise(cpu, kGP, error);
  if (!code.present()) Raise(cpu, kNP, error);
  unsigned cpl = code.conforming() ? cpu.cpl : code.dpl();
  unsigned ist = gate.d.low >> 32 & 7;
  Stack stack;
  stack.is64 = true;
  stack.cpl = cpl;
  stack.ext = ext;
  if (ist) {
    stack.sp = Stack64FromTss(cpu, 28 + 8 * ist, ext);
  } else if (cpl < cpu.cpl) {
    stack.sp = Stack64FromTss(cpu, 4 + 8 * cpl, ext);
  } else {
    stack.sp = cpu.gpr[kRsp];
  }
  uint64_t target = gate.d.gate_offset64();
  if (!mmu::Canonical(cpu, target)) Raise(cpu, kGP, ext);
  stack.sp &= ~0xfull;
  Push(cpu, stack, 8, cpu.seg[kSs].selector);
  Push(cpu, stack, 8, cpu.gpr[kRsp]);
  Push(cpu, stack, 8, PushedFlags(cpu, event));
  Push(cpu, stack, 8, cpu.seg[kCs].selector);
  Push(cpu, stack, 8, cpu.rip);
  if (event.has_error) Push(cpu, stack, 8, event.error);
  MarkAccessed(cpu, &code);
  cpu.gpr[kRsp] = stack.sp;
  if (cpl != cpu.cpl) LoadNullSegment(cpu, kSs, static_cast<uint16_t>(cpl));
  cpu.rip = target;
  ClearFlags(cpu, gate.interrupt, rflags::kNt | rflags::kVm);
  SetCs(cpu, selector, code, cpl);
}

// Out of virtual-8086 mode: the data segments go onto the new stack too, and become null.
void PushVm86Segments(Cpu& cpu, Stack& stack, unsigned size) {
  for (SegReg seg : {kGs, kFs, kDs, kEs}) Push(cpu, stack, size, cpu.seg[seg].selector);
}

void EnterLegacy(Cpu& cpu, const Event& event, const Gate& gate) {
  uint32_t ext = Ext(event);
  uint16_t selector = gate.d.gate_selector();
  Descriptor code;
  if (IsNull(selector)) Raise(cpu, kGP, ext);
  uint32_t error = SelectorError(selector) | ext;
  if (!ReadDescriptor(cpu, selector, &code)) Raise(cpu, kGP, error);
  if (!code.code() || code.dpl() > cpu.cpl) Raise(cpu, kGP, error);
  if (!code.present()) Raise(cpu, kNP, error);
  bool vm86 = cpu.virtual_8086();
  unsigned cpl = code.conforming() ? cpu.cpl : code.dpl();
  if (vm86 && cpl != 0) Raise(cpu, kGP, error);

  Stack stack = PresentStack(cpu);
  uint16_t ss_selector = 0;
  Descriptor ss;
  bool inner = cpl < cpu.cpl;
  if (inner) {
    uint32_t esp = 0;
    StackFromTss(cpu, cpl, ext, &ss_selector, &esp);
    ss = CheckStackSegment(cpu, ss_selector, cpl, kTS, ext);
    stack = {.ss = ToSegment(ss_selector, ss), .sp = esp, .cpl = cpl, .ext = ext, .fresh = true};
    if (vm86) PushVm86Segments(cpu, stack, gate.size);
    Push(cpu, stack, gate.size, cpu.seg[kSs].selector);
    Push(cpu, stack, gate.size, cpu.gpr[kRsp]);
  }
  Push(cpu, stack, gate.size, PushedFlags(cpu, event));
  Push(cpu, stack, gate.size, cpu.seg[kCs].selector);
  Push(cpu, stack, gate.size, cpu.rip);
  if (event.has_error) Push(cpu, stack, gate.size, event.error);
  uint64_t target = gate.size == 2 ? gate.d.gate_offset() & 0xffff : gate.d.gate_offset();
  if (target > code.limit()) Raise(cpu, kGP, ext);

  MarkAccessed(cpu, &code);
  if (inner) {
    MarkAccessed(cpu, &ss);
    cpu.seg[kSs] = ToSegment(ss_selector, ss);
    if (vm86) {
      for (SegReg seg : {kGs, kFs, kDs, kEs}) LoadNullSegment(cpu, seg, 0);
    }
  }
  CommitSp(cpu, stack);
  cpu.rip = target;
  ClearFlags(cpu, gate.interrupt, rflags::kNt | rflags::kVm);
  SetCs(cpu, selector, code, cpl);
}

// INT n in virtual-8086 mode with CR4.VME (SDM vol. 3 20.3.3.4). True: done in the task's own
// vector table.
bool EnterVm86Redirected(Cpu& cpu, const Event& event) {
  if (!(cpu.cr4 & cr4::kVme)) return false;
  bool redirected = true;
  uint32_t io_map = 0;
  if (cpu.tr.limit >= 0x67) io_map = ReadSystem<uint16_t>(cpu, cpu.tr.base + 0x66);
  uint32_t byte = io_map - 32 + event.vector / 8;
  if (io_map >= 32 && byte <= cpu.tr.limit) {
    redirected = !(ReadSystem<uint8_t>(cpu, cpu.tr.base + byte) >> (event.vector % 8) & 1);
  } else {
    Raise(cpu, kGP, 0);
  }
  if (!redirected) return false;
  uint64_t flags = cpu.rflags;
  bool iopl3 = (flags & rflags::kIopl) == rflags::kIopl;
  if (!iopl3) {
    flags = (flags & ~rflags::kIf) | rflags::kIopl;
    if (cpu.rflags & rflags::kVif) flags |= rflags::kIf;
  }
  EnterReal(cpu, event, 0, flags);
  ClearFlags(cpu, iopl3, rflags::kNt);
  if (!iopl3) cpu.rflags &= ~rflags::kVif;
  UpdateMode(cpu);
  return true;
}

}  // namespace

void EnterHandler(Cpu& cpu, const Event& event) {
  if (!cpu.protected_mode()) {
    if (event.vector * 4u + 3 > cpu.idtr.limit) Raise(cpu, kGP);
    EnterReal(cpu, event, cpu.idtr.base, cpu.rflags);
    ClearFlags(cpu, true, rflags::kAc);
    UpdateMode(cpu);
    return;
  }
  if (cpu.virtual_8086() && event.kind == EventKind::kSoftware) {
    if (EnterVm86Redirected(cpu, event)) return;
    if ((cpu.rflags & rflags::kIopl) != rflags::kIopl) Raise(cpu, kGP, 0);
  }
  Gate gate = ReadGate(cpu, event);
  if (gate.d.type() == kTaskGate) return EnterTask(cpu, event, gate.d.gate_selector(), Ext(event));
  if (cpu.long_mode()) return EnterLong(cpu, event, gate);
  EnterLegacy(cpu, event, gate);
}

// ---- delivering with all that may go wrong

namespace {

enum class FaultClass { kBenign, kContributory, kPageFault, kDoubleFault };

// SDM vol. 3 table 6-4. External interrupts and software interrupts are benign whatever their
// vector.
FaultClass Classify(const Event& event) {
  if (event.kind != EventKind::kFault && !(event.kind == EventKind::kTrap && event.vector == kDF))
    return FaultClass::kBenign;
  switch (event.vector) {
    case kDE:
    case kTS:
    case kNP:
    case kSS:
    case kGP:
      return FaultClass::kContributory;
    case kPF:
      return FaultClass::kPageFault;
    case kDF:
      return FaultClass::kDoubleFault;
    default:
      return FaultClass::kBenign;
  }
}

}  // namespace

bool Deliver(Cpu& cpu, Event first) {
  // Lives through the longjmp: only ever touched through memory.
  Event event = first;
  Event* volatile current = &event;
  jmp_buf* const outer = cpu.fault_exit;
  jmp_buf here;
  cpu.fault_exit = &here;
  if (setjmp(here) != 0) {
    Event second = RaisedEvent(cpu);
    FaultClass before = Classify(*current), now = Classify(second);
    bool bad = now == FaultClass::kContributory || now == FaultClass::kPageFault;
    if (before == FaultClass::kDoubleFault && bad) {
      cpu.fault_exit = outer;
      return false;
    }
    if ((before == FaultClass::kContributory && now == FaultClass::kContributory) ||
        (before == FaultClass::kPageFault && bad)) {
      *current = {.vector = kDF, .kind = EventKind::kTrap, .has_error = true, .error = 0};
    } else {
      *current = second;
    }
  }
  cpu.insn_rip = cpu.rip;
  if (!cpu.protected_mode()) current->has_error = false;
  EnterHandler(cpu, *current);
  cpu.fault_exit = outer;
  return true;
}

}  // namespace kvartz::cpu::x86
