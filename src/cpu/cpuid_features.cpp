// Every named CPUID feature, declared once: a row is a register, its names from bit 0 upwards ("-":
// no name here). Intel SDM vol. 2A, CPUID; AMD APM vol. 3 app. E; Linux
// Documentation/virt/kvm/x86/cpuid.rst. The spellings are QEMU's.
#include <algorithm>
#include <array>

#include "cpu/cpuid.h"

namespace kvartz::cpu {
namespace {

struct Word {
  uint32_t leaf, subleaf;
  CpuidReg reg;
  std::string_view names;
};

constexpr Word kWords[] = {
    {1, 0, CpuidReg::kEdx,
     "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov "
     "pat pse36 pn clflush - ds acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"},
    {1, 0, CpuidReg::kEcx,
     "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm "
     "- pcid dca sse4-1 sse4-2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand "
     "hypervisor"},
    {6, 0, CpuidReg::kEax, "- - arat"},
    {7, 0, CpuidReg::kEbx,
     "fsgsbase tsc-adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm - - mpx - "
     "avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel-pt avx512pf "
     "avx512er avx512cd sha-ni avx512bw avx512vl"},
    {7, 0, CpuidReg::kEcx,
     "- avx512vbmi umip pku - waitpkg avx512vbmi2 cet-ss gfni vaes vpclmulqdq avx512vnni "
     "avx512bitalg - avx512-vpopcntdq - "
     "la57 - - - - - rdpid - bus-lock-detect cldemote - movdiri movdir64b - sgxlc pks"},
    {7, 0, CpuidReg::kEdx,
     "- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - - - serialize "
     "hybrid "
     "tsx-ldtrk - - arch-lbr cet-ibt - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl stibp "
     "flush-l1d arch-capabilities core-capability ssbd"},
    {7, 1, CpuidReg::kEax,
     "- - - - avx-vnni avx512-bf16 - cmpccxadd - - fzrm fsrs fsrc - - - "
     "- - - - - amx-fp16 - avx-ifma"},
    {7, 1, CpuidReg::kEdx, "- - - - avx-vnni-int8 avx-ne-convert - - - - - - - - prefetchiti"},
    {0xd, 1, CpuidReg::kEax, "xsaveopt xsavec xgetbv1 xsaves xfd"},
    {0x40000001, 0, CpuidReg::kEax,
     "kvmclock kvm-nopiodelay kvm-mmu kvmclock2 kvm-asyncpf kvm-steal-time kvm-pv-eoi "
     "kvm-pv-unhalt - kvm-pv-tlb-flush kvm-asyncpf-vmexit kvm-pv-ipi kvm-poll-control "
     "kvm-pv-sched-yield kvm-asyncpf-int kvm-msi-ext-dest-id "
     "kvm-hc-map-gpa-range kvm-migration-control - - - - - - kvmclock-stable-bit"},
    {0x40000001, 0, CpuidReg::kEdx, "kvm-hint-dedicated"},
    {0x80000001, 0, CpuidReg::kEdx,
     "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr-opt pdpe1gb rdtscp - lm "
     "3dnowext 3dnow"},
    {0x80000001, 0, CpuidReg::kEcx,
     "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop "
     "skinit wdt - lwp "
     "fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb"},
    {0x80000007, 0, CpuidReg::kEdx, "- - - - - - - - invtsc"},
    {0x80000008, 0, CpuidReg::kEbx,
     "clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs amd-stibp "
     "- stibp-always-on - - - - - - amd-ssbd virt-ssbd amd-no-ssb - amd-psfd btc-no"},
    {0x80000021, 0, CpuidReg::kEax,
     "no-nested-data-bp - lfence-always-serializing - - - null-sel-clr-base - auto-ibrs"},
    {0, 0, CpuidReg::kArchCapabilities,
     "rdctl-no ibrs-all rsba skip-l1dfl-vmentry ssb-no mds-no pschange-mc-no tsx-ctrl "
     "taa-no - - - - sbdr-ssdp-no fbsdp-no psdp-no "
     "- fb-clear - - - - - - pbrsb-no - gds-no rfds-no"},
};

struct Alias {
  std::string_view alias, name;
};
constexpr Alias kAliases[] = {
    {"sse3", "pni"},       {"pclmuldq", "pclmulqdq"}, {"xd", "nx"},  {"i64", "lm"},
    {"ffxsr", "fxsr-opt"}, {"lzcnt", "abm"},          {"htt", "ht"}, {"psn", "pn"}};

template <typename Visit>
constexpr void ForEachName(Visit visit) {
  for (const Word& word : kWords) {
    uint8_t bit = 0;
    for (size_t at = 0; at < word.names.size(); ++bit) {
      size_t end = std::min(word.names.find(' ', at), word.names.size());
      std::string_view name = word.names.substr(at, end - at);
      if (name != "-") visit(CpuidFeature{name, word.leaf, word.subleaf, word.reg, bit});
      at = end + 1;
    }
  }
}

constexpr size_t kCount = [] {
  size_t count = 0;
  ForEachName([&](const CpuidFeature&) { ++count; });
  return count;
}();

constexpr std::array<CpuidFeature, kCount> kFeatures = [] {
  std::array<CpuidFeature, kCount> features;
  size_t at = 0;
  ForEachName([&](const CpuidFeature& feature) { features[at++] = feature; });
  return features;
}();

constexpr char Plain(char c) { return c == '_' || c == '.' ? '-' : c; }

bool SameName(std::string_view a, std::string_view b) {
  return std::ranges::equal(a, b, [](char x, char y) { return Plain(x) == Plain(y); });
}

}  // namespace

std::span<const CpuidFeature> CpuidFeatures() { return kFeatures; }

const CpuidFeature* FindCpuidFeature(std::string_view name) {
  for (const Alias& row : kAliases) {
    if (SameName(row.alias, name)) name = row.name;
  }
  auto it = std::ranges::find_if(kFeatures,
                                 [&](const CpuidFeature& f) { return SameName(f.name, name); });
  return it == kFeatures.end() ? nullptr : &*it;
}

}  // namespace kvartz::cpu
