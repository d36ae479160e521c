// The paravirtual clock of KVM guests (Linux Documentation/virt/kvm/x86/msr.rst): a page that tells
// the TSC's rate and zero.
#pragma once

#include "cpu/x86/cpu.h"

namespace kvartz::cpu::x86 {

bool KvmClockOwns(uint32_t msr);
bool ReadKvmClock(Cpu& cpu, uint32_t msr, uint64_t* value);
bool WriteKvmClock(Cpu& cpu, uint32_t msr, uint64_t value);

}  // namespace kvartz::cpu::x86
