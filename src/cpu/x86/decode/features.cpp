#include "cpu/x86/decode/features.h"

#include "cpu/cpuid.h"

namespace kvartz::cpu::x86 {
namespace {

enum Register : uint8_t { kEax, kEbx, kEcx, kEdx };
struct FeatureBit {
  Feature feature;
  uint32_t leaf;
  uint32_t subleaf;
  Register reg;
  uint8_t bit;
};

// SDM vol. 2 "CPUID", APM vol. 3 appendix E.
constexpr FeatureBit kBits[] = {
    {Feature::kFpu, 1, 0, kEdx, 0},
    {Feature::kTsc, 1, 0, kEdx, 4},
    {Feature::kMsr, 1, 0, kEdx, 5},
    {Feature::kCx8, 1, 0, kEdx, 8},
    {Feature::kSep, 1, 0, kEdx, 11},
    {Feature::kCmov, 1, 0, kEdx, 15},
    {Feature::kClflush, 1, 0, kEdx, 19},
    {Feature::kMmx, 1, 0, kEdx, 23},
    {Feature::kFxsr, 1, 0, kEdx, 24},
    {Feature::kSse, 1, 0, kEdx, 25},
    {Feature::kSse2, 1, 0, kEdx, 26},
    {Feature::kSse3, 1, 0, kEcx, 0},
    {Feature::kPclmul, 1, 0, kEcx, 1},
    {Feature::kMonitor, 1, 0, kEcx, 3},
    {Feature::kSsse3, 1, 0, kEcx, 9},
    {Feature::kFma, 1, 0, kEcx, 12},
    {Feature::kCx16, 1, 0, kEcx, 13},
    {Feature::kSse41, 1, 0, kEcx, 19},
    {Feature::kSse42, 1, 0, kEcx, 20},
    {Feature::kMovbe, 1, 0, kEcx, 22},
    {Feature::kPopcnt, 1, 0, kEcx, 23},
    {Feature::kAes, 1, 0, kEcx, 25},
    {Feature::kXsave, 1, 0, kEcx, 26},
    {Feature::kAvx, 1, 0, kEcx, 28},
    {Feature::kF16c, 1, 0, kEcx, 29},
    {Feature::kRdrand, 1, 0, kEcx, 30},
    {Feature::kFsgsbase, 7, 0, kEbx, 0},
    {Feature::kBmi1, 7, 0, kEbx, 3},
    {Feature::kAvx2, 7, 0, kEbx, 5},
    {Feature::kBmi2, 7, 0, kEbx, 8},
    {Feature::kInvpcid, 7, 0, kEbx, 10},
    {Feature::kRdseed, 7, 0, kEbx, 18},
    {Feature::kAdx, 7, 0, kEbx, 19},
    {Feature::kSmap, 7, 0, kEbx, 20},
    {Feature::kClflushopt, 7, 0, kEbx, 23},
    {Feature::kClwb, 7, 0, kEbx, 24},
    {Feature::kSha, 7, 0, kEbx, 29},
    {Feature::kPku, 7, 0, kEcx, 3},
    {Feature::kGfni, 7, 0, kEcx, 8},
    {Feature::kVaes, 7, 0, kEcx, 9},
    {Feature::kVpclmul, 7, 0, kEcx, 10},
    {Feature::kRdpid, 7, 0, kEcx, 22},
    {Feature::kCldemote, 7, 0, kEcx, 25},
    {Feature::kMovdiri, 7, 0, kEcx, 27},
    {Feature::kMovdir64b, 7, 0, kEcx, 28},
    {Feature::kSerialize, 7, 0, kEdx, 14},
    {Feature::kXsaveopt, 0xd, 1, kEax, 0},
    {Feature::kXsavec, 0xd, 1, kEax, 1},
    {Feature::kXsaves, 0xd, 1, kEax, 3},
    {Feature::kLahf64, 0x80000001, 0, kEcx, 0},
    {Feature::kSvm, 0x80000001, 0, kEcx, 2},
    {Feature::kLzcnt, 0x80000001, 0, kEcx, 5},
    {Feature::kSse4a, 0x80000001, 0, kEcx, 6},
    {Feature::kPrefetchw, 0x80000001, 0, kEcx, 8},
    {Feature::kSyscall, 0x80000001, 0, kEdx, 11},
    {Feature::kRdtscp, 0x80000001, 0, kEdx, 27},
    {Feature::kClzero, 0x80000008, 0, kEbx, 0},
    {Feature::kWbnoinvd, 0x80000008, 0, kEbx, 9},
};
static_assert(std::size(kBits) + 1 == static_cast<size_t>(Feature::kCount));

}  // namespace

FeatureSet FeatureSet::FromCpuid(const CpuidTable& table) {
  FeatureSet set;
  for (const FeatureBit& row : kBits) {
    const CpuidLeaf* leaf = table.Find(row.leaf, row.subleaf);
    if (leaf != nullptr) {
      const uint32_t registers[] = {leaf->eax, leaf->ebx, leaf->ecx, leaf->edx};
      set.Set(row.feature, (registers[row.reg] >> row.bit & 1) != 0);
    }
  }
  return set;
}

}  // namespace kvartz::cpu::x86
