#include "cpu/x86/msr.h"

#include <fmt/core.h>

#include "base/log.h"
#include "cpu/x86/engine.h"
#include "cpu/x86/kvm_clock.h"
#include "cpu/x86/segment.h"

namespace kvartz::cpu::x86 {
namespace {

enum Index : uint32_t {
  kTsc = 0x10,
  kPlatformId = 0x17,
  kApicBase = 0x1b,
  kFeatureControl = 0x3a,
  kTscAdjust = 0x3b,
  kSpecCtrl = 0x48,
  kPredCmd = 0x49,
  kBiosUpdateTrigger = 0x79,
  kMicrocodeRevision = 0x8b,
  kPlatformInfo = 0xce,
  kMtrrCap = 0xfe,
  kArchCapabilities = 0x10a,
  kFlushCmd = 0x10b,
  kMiscFeatures = 0x140,
  kSysenterCs = 0x174,
  kSysenterEsp,
  kSysenterEip,
  kMcgCap = 0x179,
  kMcgStatus,
  kMiscEnable = 0x1a0,
  kDebugCtl = 0x1d9,
  kLastBranchFrom = 0x1db,
  kLastExceptionTo = 0x1de,
  kMtrrPhys = 0x200,
  kMtrrPhysEnd = 0x20f,
  kMtrrFix64k = 0x250,
  kMtrrFix16k0 = 0x258,
  kMtrrFix16k1,
  kMtrrFix4k = 0x268,
  kMtrrFix4kEnd = 0x26f,
  kPat = 0x277,
  kMtrrDefault = 0x2ff,
  kTscDeadline = 0x6e0,
  kX2apic = 0x800,
  kX2apicEnd = 0x8ff,
  kXss = 0xda0,
  kEfer = 0xc0000080,
  kStar,
  kLstar,
  kCstar,
  kFmask,
  kFsBase = 0xc0000100,
  kGsBase,
  kKernelGsBase,
  kTscAux,
  kAmdSyscfg = 0xc0010010,
  kAmdHwcr = 0xc0010015,
  kAmdPatchLoader = 0xc0010020,
  kAmdNbCfg = 0xc001001f,
  kAmdIntPending = 0xc0010055,
  kAmdVmCr = 0xc0010114,
  kAmdOsvwLength = 0xc0010140,
  kAmdOsvwStatus = 0xc0010141,
  kAmdLsCfg = 0xc0011020,
  kAmdDcCfg = 0xc0011022,
  kAmdDeCfg = 0xc0011029,
  kAmdBuCfg2 = 0xc001102a,
};

// Plain registers: no effect but their value, bits outside of `writable` fault.
struct PlainMsr {
  uint32_t index;
  uint64_t MsrState::* value;
  uint64_t writable;
  bool canonical;  // a linear address
};
constexpr PlainMsr kPlain[] = {
    {kSysenterCs, &MsrState::sysenter_cs, 0xffffffff, false},
    {kSysenterEsp, &MsrState::sysenter_esp, ~0ull, true},
    {kSysenterEip, &MsrState::sysenter_eip, ~0ull, true},
    {kStar, &MsrState::star, ~0ull, false},
    {kLstar, &MsrState::lstar, ~0ull, true},
    {kCstar, &MsrState::cstar, ~0ull, true},
    {kFmask, &MsrState::fmask, 0xffffffff, false},
    {kKernelGsBase, &MsrState::kernel_gs_base, ~0ull, true},
    {kMiscEnable, &MsrState::misc_enable, 0x00000003'00c51889ull, false},
    {kDebugCtl, &MsrState::debug_ctl, 0x3, false},
};

const PlainMsr* FindPlain(uint32_t index) {
  for (const PlainMsr& row : kPlain) {
    if (row.index == index) return &row;
  }
  return nullptr;
}

// Registers that hold a fixed value and ignore writes.
struct FixedMsr {
  uint32_t index;
  uint64_t value;
  bool writable;
};
constexpr FixedMsr kFixed[] = {
    {kPlatformId, 0, false},
    {kFeatureControl, 1, false},  // locked, no VMX
    {kBiosUpdateTrigger, 0, true},
    {kMicrocodeRevision, 0x01000065ull << 32, true},
    {kPlatformInfo, 0, false},
    {kMiscFeatures, 0, true},  // CPUID faulting: not there
    {kMcgCap, 0, false},       // no banks
    {kMcgStatus, 0, true},
    {kLastBranchFrom, 0, false},
    {kLastBranchFrom + 1, 0, false},
    {kLastBranchFrom + 2, 0, false},
    {kLastExceptionTo, 0, false},
    {kXss, 0, false},
    {kAmdSyscfg, 0, true},
    {kAmdHwcr, 0x01000000, true},  // TscFreqSel
    {kAmdPatchLoader, 0, true},
    {kAmdNbCfg, 0, true},
    {kAmdIntPending, 0, true},
    {kAmdVmCr, 0x10, false},  // SVMDIS
    {kAmdOsvwLength, 0, false},
    {kAmdOsvwStatus, 0, false},
    {kAmdLsCfg, 0, true},
    {kAmdDcCfg, 0, true},
    {kAmdDeCfg, 2, true},  // LFENCE serializes
    {kAmdBuCfg2, 0, true},
};

const FixedMsr* FindFixed(uint32_t index) {
  for (const FixedMsr& row : kFixed) {
    if (row.index == index) return &row;
  }
  return nullptr;
}

uint64_t PhysicalMask(const Cpu& cpu) { return (1ull << cpu.vcpu->limits().physical_bits) - 1; }

// Memory types of MTRRs and the PAT: UC, WC, WT, WP, WB (and UC- in the PAT).
bool MemoryType(unsigned type, bool pat) {
  return type == 0 || type == 1 || (type >= 4 && type <= 6) || (pat && type == 7);
}

bool EightTypes(uint64_t value, bool pat) {
  for (unsigned i = 0; i < 8; i++) {
    if (!MemoryType(value >> 8 * i & 0xff, pat)) return false;
  }
  return true;
}

// The slot of a fixed-range MTRR, or -1.
int FixedMtrr(uint32_t index) {
  if (index == kMtrrFix64k) return 0;
  if (index == kMtrrFix16k0 || index == kMtrrFix16k1)
    return static_cast<int>(index - kMtrrFix16k0) + 1;
  if (index >= kMtrrFix4k && index <= kMtrrFix4kEnd)
    return static_cast<int>(index - kMtrrFix4k) + 3;
  return -1;
}

uint64_t* MtrrSlot(MsrState& msrs, uint32_t index) {
  if (index >= kMtrrPhys && index <= kMtrrPhysEnd) return &msrs.mtrr_variable[index - kMtrrPhys];
  if (index == kMtrrDefault) return &msrs.mtrr_default;
  int fixed = FixedMtrr(index);
  return fixed >= 0 ? &msrs.mtrr_fixed[fixed] : nullptr;
}

bool WriteMtrr(Cpu& cpu, uint32_t index, uint64_t value) {
  uint64_t* slot = MtrrSlot(cpu.vcpu->msrs, index);
  if (FixedMtrr(index) >= 0) {
    if (!EightTypes(value, false)) return false;
  } else if (index == kMtrrDefault) {
    if ((value & ~0xcffull) || !MemoryType(value & 0xff, false)) return false;
  } else if (index & 1) {
    if (value & ~(PhysicalMask(cpu) & ~0x7ffull)) return false;
  } else if ((value & ~((PhysicalMask(cpu) & ~0xfffull) | 0xff)) ||
             !MemoryType(value & 0xff, false)) {
    return false;
  }
  *slot = value;
  return true;
}

// SDM vol. 3 11.12.5: allowed changes of mode.
bool WriteApicBase(Cpu& cpu, uint64_t value) {
  constexpr uint64_t kExtended = 0x400, kEnable = 0x800;
  if (value & ~((PhysicalMask(cpu) & ~0xfffull) | 0xd00)) return false;
  bool x2 = value & kExtended;
  if (x2 && (!(value & kEnable) || !cpu.vcpu->limits().x2apic)) return false;
  uint64_t old = cpu.apic_base & (kExtended | kEnable), now = value & (kExtended | kEnable);
  bool from_x2_to_xapic = old == (kExtended | kEnable) && now == kEnable;
  bool from_off_to_x2 = old == 0 && now == (kExtended | kEnable);
  if (from_x2_to_xapic || from_off_to_x2) return false;
  value = (value & ~0x100ull) | (cpu.apic_base & 0x100);
  cpu.vcpu->lapic().SetBase(value);
  cpu.tlb->local_apic_page =
      (value & kEnable) && !x2 ? value & PhysicalMask(cpu) & ~0xfffull : ~0ull;
  cpu.tlb->FlushAll();
  return true;
}

bool WriteTscDeadline(Cpu& cpu, uint64_t value) {
  SoftVcpu& vcpu = *cpu.vcpu;
  if (!vcpu.limits().tsc_deadline) return false;
  if (!vcpu.lapic().deadline_mode()) return true;
  vcpu.msrs.tsc_deadline = value;
  // Guest TSC ticks are nanoseconds of guest time plus the offset.
  int64_t at = value == 0 ? 0 : static_cast<int64_t>(value - vcpu.msrs.tsc_offset);
  if (value != 0 && at <= 0) at = 1;
  vcpu.lapic().SetTscDeadline(at);
  return true;
}

bool ReadGated(Cpu& cpu, uint32_t index, uint64_t* value, bool* known) {
  SoftVcpu& vcpu = *cpu.vcpu;
  MsrState& msrs = vcpu.msrs;
  const CpuLimits& limits = vcpu.limits();
  *known = true;
  switch (index) {
    case kTsc:
      *value = vcpu.Tsc();
      return true;
    case kApicBase:
      *value = cpu.apic_base;
      return true;
    case kTscAdjust:
      *value = msrs.tsc_adjust;
      return true;
    case kSpecCtrl:
      *value = msrs.spec_ctrl;
      return limits.spec_ctrl;
    case kArchCapabilities:
      *value = limits.arch_capabilities;
      return limits.has_arch_capabilities;
    case kMtrrCap:
      *value = 0x508;
      return limits.mtrr;  // 8 variable, fixed, WC
    case kPat:
      *value = msrs.pat;
      return true;
    case kTscDeadline:
      *value = msrs.tsc_deadline;
      return limits.tsc_deadline;
    case kEfer:
      *value = cpu.efer;
      return true;
    case kFsBase:
      *value = cpu.seg[kFs].base;
      return true;
    case kGsBase:
      *value = cpu.seg[kGs].base;
      return true;
    case kTscAux:
      *value = msrs.tsc_aux;
      return limits.rdtscp;
    default:
      break;
  }
  if (index >= kX2apic && index <= kX2apicEnd) return vcpu.lapic().ReadMsr(index, value);
  if (KvmClockOwns(index)) return limits.kvm_clock && ReadKvmClock(cpu, index, value);
  if (const uint64_t* slot = MtrrSlot(msrs, index)) {
    *value = *slot;
    return limits.mtrr;
  }
  *known = false;
  return false;
}

bool WriteGated(Cpu& cpu, uint32_t index, uint64_t value, bool* known) {
  SoftVcpu& vcpu = *cpu.vcpu;
  MsrState& msrs = vcpu.msrs;
  const CpuLimits& limits = vcpu.limits();
  *known = true;
  switch (index) {
    case kTsc: {
      uint64_t delta = value - vcpu.Tsc();
      msrs.tsc_offset += delta;
      msrs.tsc_adjust += delta;
      return true;
    }
    case kTscAdjust:
      msrs.tsc_offset += value - msrs.tsc_adjust;
      msrs.tsc_adjust = value;
      return true;
    case kApicBase:
      return WriteApicBase(cpu, value);
    case kSpecCtrl:
      if (!limits.spec_ctrl || (value & ~7ull)) return false;
      msrs.spec_ctrl = value;
      return true;
    case kPredCmd:
      return limits.spec_ctrl && !(value & ~1ull);
    case kFlushCmd:
      return limits.has_arch_capabilities && !(value & ~1ull);
    case kPat:
      if (!EightTypes(value, true)) return false;
      msrs.pat = value;
      return true;
    case kTscDeadline:
      return WriteTscDeadline(cpu, value);
    case kEfer:
      return WriteEfer(cpu, value);
    case kFsBase:
    case kGsBase:
      if (!mmu::Canonical(cpu, value)) return false;
      cpu.seg[index == kFsBase ? kFs : kGs].base = value;
      return true;
    case kTscAux:
      if (!limits.rdtscp || value >> 32) return false;
      msrs.tsc_aux = value;
      return true;
    default:
      break;
  }
  if (index >= kX2apic && index <= kX2apicEnd) return vcpu.lapic().WriteMsr(index, value);
  if (KvmClockOwns(index)) return limits.kvm_clock && WriteKvmClock(cpu, index, value);
  if (MtrrSlot(msrs, index)) return limits.mtrr && WriteMtrr(cpu, index, value);
  *known = false;
  return false;
}

void LogUnknown(const char* what, uint32_t index) {
  static log::RateLimit limit;
  if (limit.Pass()) KLOG(kInfo, "cpu: {} of unknown MSR {:#x}: #GP", what, index);
}

}  // namespace

bool ReadMsr(Cpu& cpu, uint32_t index, uint64_t* value) {
  bool known = false;
  bool ok = ReadGated(cpu, index, value, &known);
  if (known) return ok;
  if (const PlainMsr* plain = FindPlain(index)) {
    *value = cpu.vcpu->msrs.*plain->value;
    return true;
  }
  if (const FixedMsr* fixed = FindFixed(index)) {
    *value = fixed->value;
    return true;
  }
  LogUnknown("read", index);
  return false;
}

bool WriteMsr(Cpu& cpu, uint32_t index, uint64_t value) {
  bool known = false;
  bool ok = WriteGated(cpu, index, value, &known);
  if (known) return ok;
  if (const PlainMsr* plain = FindPlain(index)) {
    if ((value & ~plain->writable) || (plain->canonical && !mmu::Canonical(cpu, value)))
      return false;
    cpu.vcpu->msrs.*plain->value = value;
    return true;
  }
  if (const FixedMsr* fixed = FindFixed(index)) return fixed->writable;
  LogUnknown("write", index);
  return false;
}

bool RestoreMsr(Cpu& cpu, uint32_t index, uint64_t value) {
  MsrState& msrs = cpu.vcpu->msrs;
  switch (index) {
    case kTsc:
      msrs.tsc_offset = value - static_cast<uint64_t>(cpu.vcpu->NowNs());
      return true;
    case kTscAdjust:
      msrs.tsc_adjust = value;
      return true;
    case kTscDeadline:
      msrs.tsc_deadline = value;  // armed when the APIC's registers are there
      return true;
    case kEfer:
      cpu.efer = value & cpu.vcpu->limits().efer;
      return true;
    case kApicBase:
    case kArchCapabilities:
    case kMtrrCap:
      return true;
    default:
      break;
  }
  if (index >= kX2apic && index <= kX2apicEnd) return true;  // in the register page
  if (KvmClockOwns(index)) {
    // What it once wrote to memory is part of that.
    (index == 0x4b564d00 || index == 0x11 ? msrs.kvm_wall_clock : msrs.kvm_system_time) = value;
    return true;
  }
  return WriteMsr(cpu, index, value) || FindFixed(index) != nullptr;
}

void ListMsrs(Cpu& cpu, void (*each)(uint32_t, uint64_t, void*), void* context) {
  static constexpr uint32_t kOthers[] = {kTsc,         kTscAdjust, kSpecCtrl,  kPat,
                                         kTscDeadline, kFsBase,    kGsBase,    kTscAux,
                                         kMtrrDefault, kMcgStatus, 0x4b564d00, 0x4b564d01};
  auto add = [&](uint32_t index) {
    uint64_t value = 0;
    if (ReadMsr(cpu, index, &value)) each(index, value, context);
  };
  for (const PlainMsr& row : kPlain) add(row.index);
  for (uint32_t index : kOthers) add(index);
  for (uint32_t i = kMtrrPhys; i <= kMtrrPhysEnd; i++) add(i);
  add(kMtrrFix64k);
  add(kMtrrFix16k0);
  add(kMtrrFix16k1);
  for (uint32_t i = kMtrrFix4k; i <= kMtrrFix4kEnd; i++) add(i);
}

}  // namespace kvartz::cpu::x86
