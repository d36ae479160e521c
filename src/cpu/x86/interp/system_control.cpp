// Control and debug registers, descriptor tables, TLB, MSRs, time, CPUID.
#include "cpu/x86/engine.h"
#include "cpu/x86/fault.h"
#include "cpu/x86/interp/system.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86 {

void MoveControl(Cpu& cpu, const Insn& insn);

namespace {

void CheckUmip(Cpu& cpu) {
  if ((cpu.cr4 & cr4::kUmip) && cpu.cpl > 0) Raise(cpu, kGP, 0);
}

uint64_t ReadCr(Cpu& cpu, unsigned number) {
  switch (number) {
    case 0:
      return cpu.cr0;
    case 2:
      return cpu.cr2;
    case 3:
      return cpu.cr3;
    case 4:
      return cpu.cr4;
    case 8:
      return cpu.vcpu->lapic().cr8();
    default:
      Raise(cpu, kUD);
  }
}

void WriteCr(Cpu& cpu, unsigned number, uint64_t value) {
  switch (number) {
    case 0:
      return WriteCr0(cpu, value);
    case 2:
      cpu.cr2 = value;
      return;
    case 3:
      return WriteCr3(cpu, value);
    case 4:
      return WriteCr4(cpu, value);
    case 8:
      if (value >> 4) Raise(cpu, kGP, 0);
      return cpu.vcpu->lapic().SetCr8(value);
    default:
      Raise(cpu, kUD);
  }
}

// DR4 and DR5 are aliases of DR6 and DR7 unless CR4.DE is set; DR7.GD guards all of them.
unsigned DebugRegister(Cpu& cpu, unsigned number) {
  bool alias = number == 4 || number == 5;
  if (number > 7 || (alias && (cpu.cr4 & cr4::kDe))) Raise(cpu, kUD);
  if (cpu.dr[7] & 0x2000) RaiseDebugFault(cpu, dr6::kBd);
  return (alias ? number + 2 : number) & 7;
}

void WriteDr(Cpu& cpu, unsigned number, uint64_t value) {
  number = DebugRegister(cpu, number);
  if (number >= 6 && value >> 32) Raise(cpu, kGP, 0);
  if (number == 6) value = (value & 0xe00f) | dr6::kFixed;
  if (number == 7) value = (value & 0xffff2bff) | 0x400;
  if (number < 4 && !mmu::Canonical(cpu, value)) Raise(cpu, kGP, 0);
  cpu.dr[number & 7] = value;
  if (number != 6) {
    cpu.tlb->FlushAll();  // pages with data breakpoints have no TLB entries
    UpdateMode(cpu);
  }
}

void StoreTable(Cpu& cpu, const Insn& insn, const TableRegister& table) {
  CheckUmip(cpu);
  uint64_t at = EffectiveAddress(cpu, insn);
  bool is64 = cpu.code_mode == CodeMode::k64;
  CheckWrite(cpu, insn.seg(), at, is64 ? 10 : 6);
  WriteMem<uint16_t>(cpu, insn.seg(), at, table.limit);
  if (is64) {
    WriteMem<uint64_t>(cpu, insn.seg(), at + 2, table.base);
  } else {
    WriteMem<uint32_t>(cpu, insn.seg(), at + 2, static_cast<uint32_t>(table.base));
  }
}

void LoadTable(Cpu& cpu, const Insn& insn, TableRegister* table) {
  uint64_t at = EffectiveAddress(cpu, insn);
  auto limit = ReadMem<uint16_t>(cpu, insn.seg(), at);
  uint64_t base;
  if (cpu.code_mode == CodeMode::k64) {
    base = ReadMem<uint64_t>(cpu, insn.seg(), at + 2);
    if (!mmu::Canonical(cpu, base)) Raise(cpu, kGP, 0);
  } else {
    base = ReadMem<uint32_t>(cpu, insn.seg(), at + 2);
    if (PlainSize(cpu, insn) == 2) base &= 0xffffff;
  }
  *table = {base, limit};
}

// LDT and TSS descriptors: 16 bytes in long mode.
Descriptor ReadSystemDescriptor(Cpu& cpu, uint16_t selector) {
  Descriptor d;
  bool ok = !(selector & 4) && (cpu.long_mode() ? ReadDescriptor16(cpu, selector, &d)
                                                : ReadDescriptor(cpu, selector, &d));
  if (!ok) Raise(cpu, kGP, SelectorError(selector));
  if (cpu.long_mode() && (d.high >> 40 & 0x1f)) Raise(cpu, kGP, SelectorError(selector));
  return d;
}

Segment SystemSegment(Cpu& cpu, uint16_t selector, const Descriptor& d) {
  Segment s = ToSegment(selector, d);
  if (cpu.long_mode()) {
    s.base = d.base64();
    if (!mmu::Canonical(cpu, s.base)) Raise(cpu, kGP, SelectorError(selector));
  }
  return s;
}

void CheckTsd(Cpu& cpu) {
  if ((cpu.cr4 & cr4::kTsd) && cpu.cpl > 0) Raise(cpu, kGP, 0);
}

void SetEdxEax(Cpu& cpu, uint64_t value) {
  cpu.gpr[kRax] = static_cast<uint32_t>(value);
  cpu.gpr[kRdx] = value >> 32;
}

uint64_t EdxEax(const Cpu& cpu) {
  return cpu.gpr[kRdx] << 32 | static_cast<uint32_t>(cpu.gpr[kRax]);
}

}  // namespace

void MoveControl(Cpu& cpu, const Insn& insn) {
  bool is64 = cpu.code_mode == CodeMode::k64;
  uint64_t source = is64 ? cpu.gpr[insn.rm] : static_cast<uint32_t>(cpu.gpr[insn.rm]);
  uint64_t value = 0;
  switch (insn.opcode) {
    case 0x20:
      value = ReadCr(cpu, insn.reg);
      break;
    case 0x21:
      value = cpu.dr[DebugRegister(cpu, insn.reg)];
      break;
    case 0x22:
      return WriteCr(cpu, insn.reg, source);
    default:
      return WriteDr(cpu, insn.reg, source);
  }
  WriteGpr(cpu, insn.rm, is64 ? 8 : 4, value);
}

void Exec_SMSW(Cpu& cpu, const Insn& insn) {
  CheckUmip(cpu);
  StoreWord(cpu, insn, cpu.cr0);
}

void Exec_LMSW(Cpu& cpu, const Insn& insn) {
  uint64_t value = ReadRm16(cpu, insn) & 0xf;
  // PE can be set this way, not cleared.
  WriteCr0(cpu, (cpu.cr0 & ~0xeull) | value);
}

void Exec_CLTS(Cpu& cpu, const Insn&) { cpu.cr0 &= ~cr0::kTs; }
void Exec_CLAC(Cpu& cpu, const Insn&) { SetRflags(cpu, cpu.rflags & ~rflags::kAc); }
void Exec_STAC(Cpu& cpu, const Insn&) { SetRflags(cpu, cpu.rflags | rflags::kAc); }

void Exec_XGETBV(Cpu& cpu, const Insn&) {
  if (!(cpu.cr4 & cr4::kOsxsave)) Raise(cpu, kUD);
  auto index = static_cast<uint32_t>(cpu.gpr[kRcx]);
  if (index == 0) return SetEdxEax(cpu, cpu.xcr0);
  if (index != 1 || !cpu.vcpu->limits().xsavec) Raise(cpu, kGP, 0);
  SetEdxEax(cpu, cpu.xcr0 & (cpu.fpu.xstate_bv | 3));
}

void Exec_XSETBV(Cpu& cpu, const Insn&) {
  if (!(cpu.cr4 & cr4::kOsxsave)) Raise(cpu, kUD);
  uint64_t value = EdxEax(cpu);
  bool bad = static_cast<uint32_t>(cpu.gpr[kRcx]) != 0 || !(value & 1) ||
             (value & ~cpu.vcpu->limits().xcr0) || ((value & 4) && !(value & 2));
  if (bad) Raise(cpu, kGP, 0);
  cpu.xcr0 = value;
}

void Exec_SGDT(Cpu& cpu, const Insn& insn) { StoreTable(cpu, insn, cpu.gdtr); }
void Exec_SIDT(Cpu& cpu, const Insn& insn) { StoreTable(cpu, insn, cpu.idtr); }
void Exec_LGDT(Cpu& cpu, const Insn& insn) { LoadTable(cpu, insn, &cpu.gdtr); }
void Exec_LIDT(Cpu& cpu, const Insn& insn) { LoadTable(cpu, insn, &cpu.idtr); }

void Exec_SLDT(Cpu& cpu, const Insn& insn) {
  CheckUmip(cpu);
  StoreWord(cpu, insn, cpu.ldtr.selector);
}

void Exec_STR(Cpu& cpu, const Insn& insn) {
  CheckUmip(cpu);
  StoreWord(cpu, insn, cpu.tr.selector);
}

void Exec_LLDT(Cpu& cpu, const Insn& insn) {
  uint16_t selector = ReadRm16(cpu, insn);
  if (IsNull(selector)) {
    cpu.ldtr = Segment{};
    cpu.ldtr.selector = selector;
    cpu.ldtr.attributes = Segment::kUnusable;
    return;
  }
  Descriptor d = ReadSystemDescriptor(cpu, selector);
  if (!d.system() || d.type() != kLdt) Raise(cpu, kGP, SelectorError(selector));
  if (!d.present()) Raise(cpu, kNP, SelectorError(selector));
  cpu.ldtr = SystemSegment(cpu, selector, d);
}

void Exec_LTR(Cpu& cpu, const Insn& insn) {
  uint16_t selector = ReadRm16(cpu, insn);
  if (IsNull(selector)) Raise(cpu, kGP, 0);
  Descriptor d = ReadSystemDescriptor(cpu, selector);
  bool available = d.system() && (d.type() == kTss32 || (d.type() == kTss16 && !cpu.long_mode()));
  if (!available) Raise(cpu, kGP, SelectorError(selector));
  if (!d.present()) Raise(cpu, kNP, SelectorError(selector));
  Segment s = SystemSegment(cpu, selector, d);
  SetBusy(cpu, d, true);
  s.attributes |= 2;
  cpu.tr = s;
}

void Exec_INVLPG(Cpu& cpu, const Insn& insn) {
  uint64_t offset = EffectiveAddress(cpu, insn);
  bool is64 = cpu.code_mode == CodeMode::k64;
  uint64_t base = is64 && insn.segment < kFs ? 0 : cpu.seg[insn.segment].base;
  uint64_t linear = is64 ? base + offset : (base + offset) & 0xffffffff;
  if (mmu::Canonical(cpu, linear)) cpu.tlb->FlushPage(linear);
}

void Exec_INVPCID(Cpu& cpu, const Insn& insn) {
  uint64_t type =
      cpu.code_mode == CodeMode::k64 ? cpu.gpr[insn.reg] : static_cast<uint32_t>(cpu.gpr[insn.reg]);
  uint64_t at = EffectiveAddress(cpu, insn);
  uint64_t descriptor[2];
  ReadMemBytes(cpu, insn.seg(), at, descriptor, sizeof(descriptor));
  uint64_t pcid = descriptor[0];
  bool bad = type > 3 || (type < 2 && (pcid >> 12 || (pcid && !(cpu.cr4 & cr4::kPcide)))) ||
             (type == 0 && !mmu::Canonical(cpu, descriptor[1]));
  if (bad) Raise(cpu, kGP, 0);
  if (type == 0) return cpu.tlb->FlushPage(descriptor[1]);
  if (type == 1) return cpu.tlb->FlushPcid(static_cast<unsigned>(pcid));
  cpu.tlb->FlushAll();
}

// Caches are the host's.
void Exec_INVD(Cpu&, const Insn&) {}
void Exec_WBINVD(Cpu&, const Insn&) {}

void Exec_RDMSR(Cpu& cpu, const Insn&) {
  uint64_t value = 0;
  if (!ReadMsr(cpu, static_cast<uint32_t>(cpu.gpr[kRcx]), &value)) Raise(cpu, kGP, 0);
  SetEdxEax(cpu, value);
}

void Exec_WRMSR(Cpu& cpu, const Insn&) {
  if (!WriteMsr(cpu, static_cast<uint32_t>(cpu.gpr[kRcx]), EdxEax(cpu))) Raise(cpu, kGP, 0);
}

void Exec_RDTSC(Cpu& cpu, const Insn&) {
  CheckTsd(cpu);
  SetEdxEax(cpu, cpu.vcpu->Tsc());
}

void Exec_RDTSCP(Cpu& cpu, const Insn&) {
  CheckTsd(cpu);
  SetEdxEax(cpu, cpu.vcpu->Tsc());
  cpu.gpr[kRcx] = static_cast<uint32_t>(cpu.vcpu->msrs.tsc_aux);
}

void Exec_RDPID(Cpu& cpu, const Insn& insn) { cpu.gpr[insn.rm] = cpu.vcpu->msrs.tsc_aux; }

// No performance counters.
void Exec_RDPMC(Cpu& cpu, const Insn&) { Raise(cpu, kGP, 0); }

void Exec_CPUID(Cpu& cpu, const Insn&) {
  CpuidLeaf leaf =
      cpu.vcpu->Cpuid(static_cast<uint32_t>(cpu.gpr[kRax]), static_cast<uint32_t>(cpu.gpr[kRcx]));
  cpu.gpr[kRax] = leaf.eax;
  cpu.gpr[kRbx] = leaf.ebx;
  cpu.gpr[kRcx] = leaf.ecx;
  cpu.gpr[kRdx] = leaf.edx;
}

}  // namespace kvartz::cpu::x86
