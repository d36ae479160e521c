// What CPUID may say under the own engine.
#include "cpu/x86/engine.h"

namespace kvartz::cpu::x86 {
namespace {

// Done by the engine itself.
constexpr const char* kOwn =
    "vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca pat pse36 clflush fxsr x2apic "
    "tsc-deadline hypervisor pcid xsave "
    "fsgsbase tsc-adjust smep erms invpcid smap umip fsrm rdpid clflushopt clwb arat syscall nx "
    "pdpe1gb rdtscp lm lahf-lm "
    "3dnowprefetch wbnoinvd xsaveerptr invtsc spec-ctrl arch-capabilities kvmclock kvm-nopiodelay "
    "kvmclock2 kvmclock-stable-bit";
// Run on the host's units, or with its instructions.
constexpr const char* kNative[] = {
    "fpu",  "cmov",       "mmx",    "sse",      "sse2",   "pni",     "pclmulqdq", "ssse3",
    "fma",  "cx16",       "sse4-1", "sse4-2",   "movbe",  "popcnt",  "aes",       "avx",
    "f16c", "rdrand",     "bmi1",   "avx2",     "bmi2",   "rdseed",  "adx",       "sha-ni",
    "vaes", "vpclmulqdq", "gfni",   "xsaveopt", "xsavec", "xgetbv1", "abm",       "mmxext"};
// Only where they are asked for by name: five-level paging changes the layout of kernels, MONITOR
// makes idle ones spin.
constexpr const char* kOnRequest[] = {"la57", "monitor"};

// IA32_ARCH_CAPABILITIES: there is no speculation whose leaks a guest could mitigate.
constexpr uint64_t kArchCapabilities = 1 << 0 |   // RDCL_NO
                                       1 << 1 |   // IBRS_ALL
                                       1 << 3 |   // SKIP_L1DFL_VMENTRY
                                       1 << 4 |   // SSB_NO
                                       1 << 5 |   // MDS_NO
                                       1 << 6 |   // IF_PSCHANGE_MC_NO
                                       1 << 8 |   // TAA_NO
                                       1 << 13 |  // SBDR_SSDP_NO
                                       1 << 14 |  // FBSDP_NO
                                       1 << 15 |  // PSDP_NO
                                       1 << 20 |  // BHI_NO
                                       1 << 24 |  // PBRSB_NO
                                       1 << 26 |  // GDS_NO
                                       1 << 27;   // RFDS_NO

}  // namespace

CpuidTable SoftCpuid(const CpuModelRequest& request) {
  CpuidTable table;
  const CpuidTable host = HostCpuid();
  table.At(0).eax = 0x16;
  table.At(0x80000000).eax = 0x80000008;
  table.Add(kOwn);
  for (const char* feature : kNative) {
    if (host.Has(feature)) table.Add(feature);
  }
  for (const char* feature : kOnRequest) {
    for (const auto& [name, on] : request.features) {
      if (on && name == feature) table.Add(feature);
    }
  }
  table.arch_capabilities = kArchCapabilities;
  table.At(0x80000008).eax = 48 << 8 | 40;
  // x87, SSE, AVX state in the standard format.
  CpuidLeaf& sizes = table.At(0xd, 0);
  sizes.indexed = true;
  sizes.eax = host.Has("avx") ? 7 : 3;
  sizes.ebx = sizes.ecx = host.Has("avx") ? sizeof(XsaveArea) : 576;
  if (host.Has("avx")) {
    CpuidLeaf& avx = table.At(0xd, 2);
    avx.indexed = true;
    avx.eax = 256;
    avx.ebx = 576;
  }
  return table;
}

}  // namespace kvartz::cpu::x86
