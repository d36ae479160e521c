// Control registers (SDM vol. 3 2.5) and what CPUID allows of them.
#include "cpu/x86/engine.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86 {

CpuLimits CpuLimits::FromCpuid(const CpuidTable& table) {
  CpuLimits limits;
  auto has = [&](const char* name) { return table.Has(name); };
  limits.physical_bits = table.Lookup(0x80000008, 0).eax & 0xff;
  if (limits.physical_bits < 32 || limits.physical_bits > 52) limits.physical_bits = 36;
  struct Row {
    const char* feature;
    uint64_t bits;
  };
  static constexpr Row kCr4[] = {
      {"vme", cr4::kVme | cr4::kPvi},
      {"tsc", cr4::kTsd},
      {"de", cr4::kDe},
      {"pse", cr4::kPse},
      {"pae", cr4::kPae},
      {"mce", cr4::kMce},
      {"pge", cr4::kPge},
      {"fxsr", cr4::kOsfxsr},
      {"sse", cr4::kOsxmmexcpt},
      {"umip", cr4::kUmip},
      {"la57", cr4::kLa57},
      {"fsgsbase", cr4::kFsgsbase},
      {"pcid", cr4::kPcide},
      {"xsave", cr4::kOsxsave},
      {"smep", cr4::kSmep},
      {"smap", cr4::kSmap},
  };
  limits.cr4 = cr4::kPce;
  for (const Row& row : kCr4) {
    if (has(row.feature)) limits.cr4 |= row.bits;
  }
  if (has("syscall")) limits.efer |= efer::kSce;
  if (has("lm")) limits.efer |= efer::kLme | efer::kLma;
  if (has("nx")) limits.efer |= efer::kNxe;
  if (has("xsave")) limits.xcr0 = has("avx") ? 7 : 3;
  const std::string vendor = table.identity().vendor;
  limits.amd = vendor == "AuthenticAMD" || vendor == "HygonGenuine";
  limits.x2apic = has("x2apic");
  limits.tsc_deadline = has("tsc-deadline");
  limits.mtrr = has("mtrr");
  limits.kvm_clock = has("kvmclock");
  limits.spec_ctrl = has("spec-ctrl");
  limits.rdtscp = has("rdtscp") || has("rdpid");
  limits.xsavec = has("xsavec");
  limits.has_arch_capabilities = has("arch-capabilities");
  limits.arch_capabilities = table.arch_capabilities;
  return limits;
}

namespace {

// Long mode is active while paging is on with EFER.LME.
void CheckPagingChange(Cpu& cpu, uint64_t value, uint64_t changed) {
  bool on = value & cr0::kPg;
  bool lme = cpu.efer & efer::kLme;
  if (changed & cr0::kPg) {
    if (on && lme && (!(cpu.cr4 & cr4::kPae) || (cpu.seg[kCs].attributes & Segment::kL)))
      Raise(cpu, kGP, 0);
    if (!on && (cpu.code_mode == CodeMode::k64 || (cpu.cr4 & cr4::kPcide))) Raise(cpu, kGP, 0);
  }
  bool pae_on = on && !lme && (cpu.cr4 & cr4::kPae);
  if (pae_on && (changed & (cr0::kPg | cr0::kCd | cr0::kNw)) && !mmu::PdptesValid(cpu, cpu.cr3))
    Raise(cpu, kGP, 0);
}

}  // namespace

void WriteCr0(Cpu& cpu, uint64_t value) {
  constexpr uint64_t kKnown = cr0::kPe | cr0::kMp | cr0::kEm | cr0::kTs | cr0::kEt | cr0::kNe |
                              cr0::kWp | cr0::kAm | cr0::kNw | cr0::kCd | cr0::kPg;
  if (value >> 32) Raise(cpu, kGP, 0);
  value = (value & kKnown) | cr0::kEt;
  if ((value & cr0::kPg) && !(value & cr0::kPe)) Raise(cpu, kGP, 0);
  if ((value & cr0::kNw) && !(value & cr0::kCd)) Raise(cpu, kGP, 0);
  uint64_t changed = cpu.cr0 ^ value;
  CheckPagingChange(cpu, value, changed);
  cpu.cr0 = value;
  if (changed & cr0::kPg) {
    bool lma = (value & cr0::kPg) && (cpu.efer & efer::kLme);
    cpu.efer = lma ? cpu.efer | efer::kLma : cpu.efer & ~efer::kLma;
  }
  if (changed & (cr0::kPg | cr0::kWp | cr0::kPe)) cpu.tlb->FlushAll();
  UpdateMode(cpu);
}

void WriteCr3(Cpu& cpu, uint64_t value) {
  if (cpu.long_mode()) {
    uint64_t reserved = ~((1ull << cpu.vcpu->limits().physical_bits) - 1);
    if (cpu.cr4 & cr4::kPcide) reserved &= ~(1ull << 63);
    if (value & reserved) Raise(cpu, kGP, 0);
  } else {
    value &= 0xffffffff;
    if ((cpu.cr0 & cr0::kPg) && (cpu.cr4 & cr4::kPae) && !mmu::PdptesValid(cpu, value))
      Raise(cpu, kGP, 0);
  }
  mmu::LoadCr3(cpu, value);
}

void WriteCr4(Cpu& cpu, uint64_t value) {
  if (value & ~cpu.vcpu->limits().cr4) Raise(cpu, kGP, 0);
  uint64_t changed = cpu.cr4 ^ value;
  if (cpu.long_mode() && (!(value & cr4::kPae) || (changed & cr4::kLa57))) Raise(cpu, kGP, 0);
  if ((changed & value & cr4::kPcide) && (!cpu.long_mode() || (cpu.cr3 & 0xfff)))
    Raise(cpu, kGP, 0);
  constexpr uint64_t kPaging =
      cr4::kPse | cr4::kPae | cr4::kPge | cr4::kPcide | cr4::kSmep | cr4::kSmap | cr4::kLa57;
  bool reload = (cpu.cr0 & cr0::kPg) && !cpu.long_mode() && (value & cr4::kPae) &&
                (changed & (cr4::kPae | cr4::kPge | cr4::kPse | cr4::kSmep));
  if (reload && !mmu::PdptesValid(cpu, cpu.cr3)) Raise(cpu, kGP, 0);
  cpu.cr4 = value;
  if (changed & kPaging) {
    cpu.tlb->FlushAll();
    if (changed & cr4::kPcide) cpu.tlb->SwitchTo(value & cr4::kPcide ? cpu.cr3 & 0xfff : 0, false);
  }
  UpdateMode(cpu);
}

bool WriteEfer(Cpu& cpu, uint64_t value) {
  if (value & ~cpu.vcpu->limits().efer) return false;
  if (((cpu.efer ^ value) & efer::kLme) && (cpu.cr0 & cr0::kPg)) return false;
  value = (value & ~efer::kLma) | (cpu.efer & efer::kLma);
  bool flush = (cpu.efer ^ value) & efer::kNxe;
  cpu.efer = value;
  if (flush) cpu.tlb->FlushAll();
  UpdateMode(cpu);
  return true;
}

}  // namespace kvartz::cpu::x86
