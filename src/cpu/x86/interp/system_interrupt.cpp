// Software interrupts, the interrupt flag, HLT.
#include "cpu/x86/engine.h"
#include "cpu/x86/fault.h"
#include "cpu/x86/interp/system.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86 {
namespace {

// Who stands in for IF where IOPL forbids it (SDM vol. 3 20.3, 20.4).
enum class IfAccess { kIf, kVirtual, kForbidden };

IfAccess InterruptFlagAccess(const Cpu& cpu) {
  if (!cpu.protected_mode() || cpu.cpl <= Iopl(cpu)) return IfAccess::kIf;
  if (cpu.virtual_8086()) return cpu.cr4 & cr4::kVme ? IfAccess::kVirtual : IfAccess::kForbidden;
  return cpu.cpl == 3 && (cpu.cr4 & cr4::kPvi) ? IfAccess::kVirtual : IfAccess::kForbidden;
}

void SoftwareInterrupt(Cpu& cpu, uint8_t vector, EventKind kind) {
  cpu.no_trap = true;
  EnterHandler(cpu, {.vector = vector, .kind = kind});
}

}  // namespace

void Exec_INT3(Cpu& cpu, const Insn&) {
  SoftwareInterrupt(cpu, kBP, EventKind::kSoftwareException);
}
void Exec_INT(Cpu& cpu, const Insn& insn) {
  SoftwareInterrupt(cpu, static_cast<uint8_t>(insn.imm), EventKind::kSoftware);
}
void Exec_INT1(Cpu& cpu, const Insn&) { SoftwareInterrupt(cpu, kDB, EventKind::kInt1); }
void Exec_INTO(Cpu& cpu, const Insn&) {
  if (cpu.rflags & rflags::kOf) SoftwareInterrupt(cpu, kOF, EventKind::kSoftwareException);
}

void Exec_CLI(Cpu& cpu, const Insn&) {
  switch (InterruptFlagAccess(cpu)) {
    case IfAccess::kIf:
      cpu.rflags &= ~rflags::kIf;
      return;
    case IfAccess::kVirtual:
      cpu.rflags &= ~rflags::kVif;
      return;
    case IfAccess::kForbidden:
      Raise(cpu, kGP, 0);
  }
}

void Exec_STI(Cpu& cpu, const Insn&) {
  switch (InterruptFlagAccess(cpu)) {
    case IfAccess::kIf:
      if (cpu.rflags & rflags::kIf) return;
      cpu.rflags |= rflags::kIf;
      if (!cpu.events.interrupt_shadow) cpu.events.interrupt_shadow = 2;
      SetRequest(cpu, request::kShadow | request::kInterrupt);
      return;
    case IfAccess::kVirtual:
      if (cpu.rflags & rflags::kVip) Raise(cpu, kGP, 0);
      cpu.rflags |= rflags::kVif;
      return;
    case IfAccess::kForbidden:
      Raise(cpu, kGP, 0);
  }
}

void Exec_HLT(Cpu& cpu, const Insn&) { SetRequest(cpu, request::kHalt); }

// The monitored line isn't watched: MWAIT ends at once, as any event may make it.
void Exec_MONITOR(Cpu& cpu, const Insn& insn) {
  if (cpu.gpr[kRcx] & 0xffffffff) Raise(cpu, kGP, 0);
  uint64_t address = insn.address_size == 8 ? cpu.gpr[kRax] : static_cast<uint32_t>(cpu.gpr[kRax]);
  ReadMem<uint8_t>(cpu, insn.flags & kHasSegment ? insn.seg() : kDs, address);
}

void Exec_MWAIT(Cpu& cpu, const Insn&) {
  if (cpu.gpr[kRcx] & 0xfffffffe) Raise(cpu, kGP, 0);
}

// No hypercalls: KVM's answer to an unknown one (-KVM_ENOSYS) under its signature.
void Exec_VMCALL(Cpu& cpu, const Insn&) {
  if (!cpu.vcpu->limits().kvm_clock) Raise(cpu, kUD);
  cpu.gpr[kRax] = static_cast<uint64_t>(-1000);
}

}  // namespace kvartz::cpu::x86
