// Model-specific registers of the own engine (SDM vol. 4), and the limits that CPUID sets to
// control registers.
#pragma once

#include <cstdint>

#include "cpu/cpuid.h"
#include "cpu/x86/cpu.h"

namespace kvartz::cpu::x86 {

// MSRs without a home in Cpu or Lapic.
struct MsrState {
  uint64_t star = 0, lstar = 0, cstar = 0, fmask = 0, kernel_gs_base = 0;
  uint64_t sysenter_cs = 0, sysenter_esp = 0, sysenter_eip = 0;
  uint64_t tsc_offset = 0, tsc_adjust = 0, tsc_aux = 0, tsc_deadline = 0;
  uint64_t pat = 0x0007040600070406, misc_enable = 1, spec_ctrl = 0, debug_ctl = 0;
  uint64_t mtrr_default = 0, mtrr_fixed[11] = {}, mtrr_variable[16] = {};
  uint64_t kvm_wall_clock = 0, kvm_system_time = 0;
};

// Which bits the guest may set. Immutable.
struct CpuLimits {
  unsigned physical_bits = 40;
  uint64_t cr4 = 0, efer = 0, xcr0 = 1;
  bool amd = false, x2apic = false, tsc_deadline = false, mtrr = false, kvm_clock = false,
       spec_ctrl = false;
  bool rdtscp = false, xsavec = false;
  uint64_t arch_capabilities = 0;
  bool has_arch_capabilities = false;

  static CpuLimits FromCpuid(const CpuidTable& table);
};

// False: #GP(0).
bool ReadMsr(Cpu& cpu, uint32_t index, uint64_t* value);
bool WriteMsr(Cpu& cpu, uint32_t index, uint64_t value);
// As by the host, for restoring state: read-only ones too, no side effects beyond the register's
// own.
bool RestoreMsr(Cpu& cpu, uint32_t index, uint64_t value);
// Every MSR that state holds.
void ListMsrs(Cpu& cpu, void (*each)(uint32_t index, uint64_t value, void* context), void* context);

// CR0, CR3, CR4, EFER and XCR0 writes with all checks and effects (SDM vol. 3 2.5). Raise #GP(0).
void WriteCr0(Cpu& cpu, uint64_t value);
void WriteCr3(Cpu& cpu, uint64_t value);
void WriteCr4(Cpu& cpu, uint64_t value);
bool WriteEfer(Cpu& cpu, uint64_t value);

}  // namespace kvartz::cpu::x86
