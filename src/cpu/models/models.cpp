// The named CPU models: identity and features as published for the processors, in the groupings
// that machine descriptions name. Intel SDM vol. 4 table 2-1 (signatures); AMD CPUID specification;
// the feature lists are QEMU's and libvirt's promises to guests, kept so that a machine moves here
// unchanged.
#include "cpu/models/models.h"

namespace kvartz::cpu {
namespace {

constexpr const char* kIntel = "GenuineIntel";
constexpr const char* kAmd = "AuthenticAMD";
constexpr const char* kHygon = "HygonGenuine";

// Old before new: a base stands above what is built on it.
constexpr CpuModel kModels[] = {
    // names, base, vendor, family, model, stepping, level, extended level, brand,
    // features beyond the base's ("-": without)
    {"486|486-v1", "", kIntel, 4, 8, 0, 1, 0x0, "", "fpu vme pse"},
    {"pentium|pentium-v1", "", kIntel, 5, 4, 3, 1, 0x0, "",
     "fpu vme de pse tsc msr mce cx8 apic mmx"},
    {"pentium2|pentium2-v1", "pentium", kIntel, 6, 5, 2, 2, 0x0, "",
     "pae sep mtrr pge mca cmov pat pse36 fxsr"},
    {"pentium3|pentium3-v1", "pentium2", kIntel, 6, 7, 3, 3, 0x0, "", "sse"},
    {"n270|n270-v1", "pentium3", kIntel, 6, 28, 2, 10, 0x80000008,
     "Intel(R) Atom(TM) CPU N270   @ 1.60GHz", "clflush sse2 ss pni ssse3 movbe lahf-lm nx -pse36"},
    {"coreduo|coreduo-v1", "n270", kIntel, 6, 14, 8, 10, 0x80000008,
     "Genuine Intel(R) CPU           T2600  @ 2.16GHz", "-ssse3 -movbe -lahf-lm"},
    {"core2duo|core2duo-v1", "n270", kIntel, 6, 15, 11, 10, 0x80000008,
     "Intel(R) Core(TM)2 Duo CPU     T7700  @ 2.40GHz", "pse36 cx16 syscall lm -movbe"},
    {"kvm32|kvm32-v1", "pentium3", kIntel, 15, 6, 1, 5, 0x80000008, "Common 32-bit KVM processor",
     "clflush sse2 pni"},
    {"qemu32|qemu32-v1", "kvm32", kIntel, 6, 6, 3, 4, 0x80000004, "QEMU Virtual CPU version 2.5+",
     "-vme -mtrr -mca -pse36 -clflush"},
    {"kvm64|kvm64-v1", "core2duo", kIntel, 15, 6, 1, 13, 0x80000008, "Common KVM processor",
     "-ss -ssse3 -lahf-lm"},
    {"qemu64|qemu64-v1", "kvm64", kAmd, 15, 107, 1, 13, 0x8000000a, "QEMU Virtual CPU version 2.5+",
     "lahf-lm -vme"},
    {"Conroe|Conroe-v1", "core2duo", kIntel, 6, 15, 3, 10, 0x80000008,
     "Intel Celeron_4x0 (Conroe/Merom Class Core 2)", "-ss -cx16"},
    {"Penryn|Penryn-v1", "core2duo", kIntel, 6, 23, 3, 10, 0x80000008,
     "Intel Core 2 Duo P9xxx (Penryn Class Core 2)", "sse4-1 -ss"},
    {"Nehalem|Nehalem-v1", "Penryn", kIntel, 6, 26, 3, 11, 0x80000008,
     "Intel Core i7 9xx (Nehalem Class Core i7)", "sse4-2 popcnt"},
    {"Nehalem-IBRS|Nehalem-v2", "Nehalem", kIntel, 6, 26, 3, 11, 0x80000008,
     "Intel Core i7 9xx (Nehalem Core i7, IBRS update)", "spec-ctrl"},
    {"Westmere|Westmere-v1", "Nehalem", kIntel, 6, 44, 1, 11, 0x80000008,
     "Westmere E56xx/L56xx/X56xx (Nehalem-C)", "pclmulqdq aes arat"},
    {"Westmere-IBRS|Westmere-v2", "Westmere", kIntel, 6, 44, 1, 11, 0x80000008,
     "Westmere E56xx/L56xx/X56xx (IBRS update)", "spec-ctrl"},
    {"SandyBridge|SandyBridge-v1", "Westmere", kIntel, 6, 42, 1, 13, 0x80000008,
     "Intel Xeon E312xx (Sandy Bridge)", "x2apic tsc-deadline xsave avx xsaveopt rdtscp"},
    {"SandyBridge-IBRS|SandyBridge-v2", "SandyBridge", kIntel, 6, 42, 1, 13, 0x80000008,
     "Intel Xeon E312xx (Sandy Bridge, IBRS update)", "spec-ctrl"},
    {"IvyBridge|IvyBridge-v1", "SandyBridge", kIntel, 6, 58, 9, 13, 0x80000008,
     "Intel Xeon E3-12xx v2 (Ivy Bridge)", "f16c rdrand fsgsbase smep erms"},
    {"IvyBridge-IBRS|IvyBridge-v2", "IvyBridge", kIntel, 6, 58, 9, 13, 0x80000008,
     "Intel Xeon E3-12xx v2 (Ivy Bridge, IBRS)", "spec-ctrl"},
    {"Haswell|Haswell-v1", "IvyBridge", kIntel, 6, 60, 4, 13, 0x80000008,
     "Intel Core Processor (Haswell)", "fma pcid movbe bmi1 hle avx2 bmi2 invpcid rtm abm"},
    {"Haswell-IBRS|Haswell-v3", "Haswell", kIntel, 6, 60, 4, 13, 0x80000008,
     "Intel Core Processor (Haswell, IBRS)", "spec-ctrl"},
    {"Haswell-noTSX|Haswell-v2", "Haswell", kIntel, 6, 60, 1, 13, 0x80000008,
     "Intel Core Processor (Haswell, no TSX)", "-hle -rtm"},
    {"Haswell-noTSX-IBRS|Haswell-v4", "Haswell-noTSX", kIntel, 6, 60, 1, 13, 0x80000008,
     "Intel Core Processor (Haswell, no TSX, IBRS)", "spec-ctrl"},
    {"Broadwell|Broadwell-v1", "Haswell", kIntel, 6, 61, 2, 13, 0x80000008,
     "Intel Core Processor (Broadwell)", "rdseed adx smap 3dnowprefetch"},
    {"Broadwell-IBRS|Broadwell-v3", "Broadwell", kIntel, 6, 61, 2, 13, 0x80000008,
     "Intel Core Processor (Broadwell, IBRS)", "spec-ctrl"},
    {"Broadwell-noTSX|Broadwell-v2", "Broadwell", kIntel, 6, 61, 2, 13, 0x80000008,
     "Intel Core Processor (Broadwell, no TSX)", "-hle -rtm"},
    {"Broadwell-noTSX-IBRS|Broadwell-v4", "Broadwell-noTSX", kIntel, 6, 61, 2, 13, 0x80000008,
     "Intel Core Processor (Broadwell, no TSX, IBRS)", "spec-ctrl"},
    {"Skylake-Client|Skylake-Client-v1", "Broadwell", kIntel, 6, 94, 3, 13, 0x80000008,
     "Intel Core Processor (Skylake)", "xsavec xgetbv1"},
    {"Skylake-Client-IBRS|Skylake-Client-v2", "Skylake-Client", kIntel, 6, 94, 3, 13, 0x80000008,
     "Intel Core Processor (Skylake, IBRS)", "spec-ctrl"},
    {"Skylake-Client-noTSX-IBRS|Skylake-Client-v3", "Skylake-Client-IBRS", kIntel, 6, 94, 3, 13,
     0x80000008, "Intel Core Processor (Skylake, IBRS, no TSX)", "-hle -rtm"},
    {"Skylake-Client-v4", "Skylake-Client-noTSX-IBRS", kIntel, 6, 94, 3, 13, 0x80000008,
     "Intel Core Processor (Skylake, IBRS, no TSX)", "xsaves"},
    {"Skylake-Server|Skylake-Server-v1", "Skylake-Client", kIntel, 6, 85, 4, 13, 0x80000008,
     "Intel Xeon Processor (Skylake)",
     "pku avx512f avx512dq clflushopt clwb avx512cd avx512bw avx512vl pdpe1gb"},
    {"Skylake-Server-IBRS|Skylake-Server-v2", "Skylake-Server", kIntel, 6, 85, 4, 13, 0x80000008,
     "Intel Xeon Processor (Skylake, IBRS)", "spec-ctrl -clflushopt"},
    {"Skylake-Server-noTSX-IBRS|Skylake-Server-v3|Skylake-Server-v4", "Skylake-Server-IBRS", kIntel,
     6, 85, 4, 13, 0x80000008, "Intel Xeon Processor (Skylake, IBRS, no TSX)", "-hle -rtm"},
    {"Skylake-Server-v5", "Skylake-Server-noTSX-IBRS", kIntel, 6, 85, 4, 13, 0x80000008,
     "Intel Xeon Processor (Skylake, IBRS, no TSX)", "xsaves"},
    {"Cascadelake-Server|Cascadelake-Server-v1", "Skylake-Server", kIntel, 6, 85, 6, 13, 0x80000008,
     "Intel Xeon Processor (Cascadelake)", "spec-ctrl ssbd avx512vnni"},
    {"Cascadelake-Server-v2", "Cascadelake-Server", kIntel, 6, 85, 6, 13, 0x80000008,
     "Intel Xeon Processor (Cascadelake)",
     "arch-capabilities ibrs-all skip-l1dfl-vmentry rdctl-no mds-no"},
    {"Cascadelake-Server-noTSX|Cascadelake-Server-v3|Cascadelake-Server-v4",
     "Cascadelake-Server-v2", kIntel, 6, 85, 6, 13, 0x80000008,
     "Intel Xeon Processor (Cascadelake)", "-hle -rtm"},
    {"Cascadelake-Server-v5", "Cascadelake-Server-noTSX", kIntel, 6, 85, 6, 13, 0x80000008,
     "Intel Xeon Processor (Cascadelake)", "xsaves"},
    {"Cooperlake|Cooperlake-v1", "Cascadelake-Server-v2", kIntel, 6, 85, 10, 13, 0x80000008,
     "Intel Xeon Processor (Cooperlake)", "stibp avx512-bf16 pschange-mc-no taa-no"},
    {"Cooperlake-v2", "Cooperlake", kIntel, 6, 85, 10, 13, 0x80000008,
     "Intel Xeon Processor (Cooperlake)", "xsaves"},
    {"Icelake-Server|Icelake-Server-v1", "Cascadelake-Server", kIntel, 6, 134, 0, 13, 0x80000008,
     "Intel Xeon Processor (Icelake)",
     "avx512vbmi umip avx512vbmi2 gfni vaes vpclmulqdq avx512bitalg avx512-vpopcntdq la57 "
     "wbnoinvd"},
    {"Icelake-Server-noTSX|Icelake-Server-v2", "Icelake-Server", kIntel, 6, 134, 0, 13, 0x80000008,
     "Intel Xeon Processor (Icelake)", "-hle -rtm"},
    {"Icelake-Server-v3", "Icelake-Server-noTSX", kIntel, 6, 134, 0, 13, 0x80000008,
     "Intel Xeon Processor (Icelake)",
     "arch-capabilities ibrs-all taa-no pschange-mc-no skip-l1dfl-vmentry rdctl-no mds-no"},
    {"Icelake-Server-v4", "Icelake-Server-v3", kIntel, 6, 106, 0, 13, 0x80000008,
     "Intel Xeon Processor (Icelake)", "fsrm rdpid avx512ifma sha-ni"},
    {"Icelake-Server-v5|Icelake-Server-v6", "Icelake-Server-v4", kIntel, 6, 106, 0, 13, 0x80000008,
     "Intel Xeon Processor (Icelake)", "xsaves"},
    {"Denverton|Denverton-v1", "", kIntel, 6, 95, 1, 21, 0x80000008,
     "Intel Atom Processor (Denverton)",
     "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr "
     "sse sse2 pni pclmulqdq ssse3 cx16 sse4-1 sse4-2 x2apic movbe popcnt tsc-deadline aes "
     "xsave rdrand arat spec-ctrl arch-capabilities ssbd fsgsbase smep erms mpx rdseed smap "
     "clflushopt sha-ni xsaveopt xsavec xgetbv1 lahf-lm 3dnowprefetch syscall nx pdpe1gb "
     "rdtscp lm rdctl-no skip-l1dfl-vmentry"},
    {"Denverton-v2", "Denverton", kIntel, 6, 95, 1, 21, 0x80000008,
     "Intel Atom Processor (Denverton)", "-mpx"},
    {"Denverton-v3", "Denverton-v2", kIntel, 6, 95, 1, 21, 0x80000008,
     "Intel Atom Processor (Denverton)", "xsaves"},
    {"Snowridge|Snowridge-v1", "Denverton", kIntel, 6, 134, 1, 27, 0x80000008,
     "Intel Atom Processor (SnowRidge)",
     "core-capability umip gfni cldemote movdiri movdir64b clwb -rdctl-no "
     "-skip-l1dfl-vmentry"},
    {"Snowridge-v2", "Snowridge", kIntel, 6, 134, 1, 27, 0x80000008,
     "Intel Atom Processor (Snowridge, no MPX)", "-mpx"},
    {"Snowridge-v3", "Snowridge-v2", kIntel, 6, 134, 1, 27, 0x80000008,
     "Intel Atom Processor (Snowridge, no MPX)", "xsaves"},
    {"Snowridge-v4", "Snowridge-v3", kIntel, 6, 134, 1, 27, 0x80000008,
     "Intel Atom Processor (Snowridge, no MPX)", "-core-capability"},
    {"KnightsMill|KnightsMill-v1", "Broadwell-noTSX", kIntel, 6, 133, 0, 13, 0x80000008,
     "Intel Xeon Phi Processor (Knights Mill)",
     "ss avx512-4vnniw avx512-4fmaps avx512-vpopcntdq avx512f avx512pf avx512er avx512cd "
     "pdpe1gb -pcid -invpcid -smap"},
    {"athlon|athlon-v1", "pentium3", kAmd, 6, 2, 3, 2, 0x80000008, "QEMU Virtual CPU version 2.5+",
     "sse2 mmxext 3dnowext 3dnow"},
    {"phenom|phenom-v1", "kvm64", kAmd, 16, 2, 3, 5, 0x8000001a,
     "AMD Phenom(tm) 9550 Quad-Core Processor",
     "popcnt lahf-lm abm sse4a mmxext ffxsr pdpe1gb rdtscp 3dnowext 3dnow"},
    {"Opteron_G1|Opteron_G1-v1", "kvm64", kAmd, 15, 6, 1, 5, 0x80000008,
     "AMD Opteron 240 (Gen 1 Class Opteron)", "-cx16"},
    {"Opteron_G2|Opteron_G2-v1", "kvm64", kAmd, 15, 6, 1, 5, 0x80000008,
     "AMD Opteron 22xx (Gen 2 Class Opteron)", "lahf-lm"},
    {"Opteron_G3|Opteron_G3-v1", "Opteron_G2", kAmd, 16, 2, 3, 5, 0x80000008,
     "AMD Opteron 23xx (Gen 3 Class Opteron)", "popcnt abm sse4a misalignsse rdtscp"},
    {"Opteron_G4|Opteron_G4-v1", "", kAmd, 21, 1, 2, 13, 0x8000001a, "AMD Opteron 62xx class CPU",
     "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr "
     "sse sse2 pni pclmulqdq ssse3 cx16 sse4-1 sse4-2 popcnt aes xsave avx lahf-lm abm sse4a "
     "misalignsse 3dnowprefetch xop fma4 syscall nx pdpe1gb rdtscp lm"},
    {"Opteron_G5|Opteron_G5-v1", "Opteron_G4", kAmd, 21, 2, 0, 13, 0x8000001a,
     "AMD Opteron 63xx class CPU", "fma f16c tbm"},
    {"EPYC|EPYC-v1", "", kAmd, 23, 1, 2, 13, 0x8000001e, "AMD EPYC Processor",
     "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr "
     "sse sse2 pni pclmulqdq ssse3 fma cx16 sse4-1 sse4-2 movbe popcnt aes xsave avx f16c "
     "rdrand arat fsgsbase bmi1 avx2 smep bmi2 rdseed adx smap clflushopt sha-ni xsaveopt "
     "xsavec xgetbv1 lahf-lm cr8legacy abm sse4a misalignsse 3dnowprefetch osvw topoext "
     "syscall nx mmxext ffxsr pdpe1gb rdtscp lm"},
    {"EPYC-IBPB|EPYC-v2", "EPYC", kAmd, 23, 1, 2, 13, 0x8000001e, "AMD EPYC Processor (with IBPB)",
     "ibpb"},
    {"EPYC-v3", "EPYC-IBPB", kAmd, 23, 1, 2, 13, 0x8000001e, "AMD EPYC Processor",
     "xsaves perfctr-core clzero xsaveerptr"},
    {"EPYC-Rome|EPYC-Rome-v1", "EPYC-v3", kAmd, 23, 49, 0, 13, 0x8000001e,
     "AMD EPYC-Rome Processor", "umip rdpid clwb wbnoinvd amd-stibp"},
    {"EPYC-Rome-v2", "EPYC-Rome", kAmd, 23, 49, 0, 13, 0x8000001e, "AMD EPYC-Rome Processor",
     "ibrs amd-ssbd"},
    {"EPYC-Milan|EPYC-Milan-v1", "EPYC-Rome-v2", kAmd, 25, 1, 1, 13, 0x8000001e,
     "AMD EPYC-Milan Processor", "pcid fsrm pku erms invpcid"},
    {"Dhyana|Dhyana-v1", "EPYC-IBPB", kHygon, 24, 0, 1, 13, 0x8000001e, "Hygon Dhyana Processor",
     "-pclmulqdq -aes -sha-ni"},
    {"Dhyana-v2", "Dhyana", kHygon, 24, 0, 1, 13, 0x8000001e, "Hygon Dhyana Processor", "xsaves"},
    {"SapphireRapids|SapphireRapids-v1", "Icelake-Server-v5", kIntel, 6, 143, 4, 0x20, 0x80000008,
     "Intel Xeon Processor (SapphireRapids)",
     "hle rtm bus-lock-detect serialize tsx-ldtrk amx-bf16 avx512-fp16 amx-tile amx-int8 avx-vnni "
     "avx512-bf16 fzrm fsrs fsrc xfd"},
    {"EPYC-Milan-v2", "EPYC-Milan", kAmd, 25, 1, 1, 13, 0x80000021, "AMD EPYC-Milan-v2 Processor",
     "vaes vpclmulqdq stibp-always-on amd-psfd no-nested-data-bp lfence-always-serializing "
     "null-sel-clr-base"},
    {"EPYC-Genoa|EPYC-Genoa-v1", "EPYC-Milan-v2", kAmd, 25, 17, 0, 13, 0x80000022,
     "AMD EPYC-Genoa Processor",
     "avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512vbmi avx512vbmi2 gfni "
     "avx512vnni avx512bitalg "
     "avx512-vpopcntdq la57 avx512-bf16 auto-ibrs"},
};

}  // namespace

std::span<const CpuModel> CpuModels() { return kModels; }

}  // namespace kvartz::cpu
