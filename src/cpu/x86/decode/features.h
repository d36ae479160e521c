// The CPUID features that gate instructions, as a bit set.
#pragma once

#include <array>
#include <cstdint>

namespace kvartz::cpu {
class CpuidTable;
}

namespace kvartz::cpu::x86 {

// kAlways is the absence of a gate. A row may name two (VEX.AES needs AVX and AES).
enum class Feature : uint8_t {
  kAlways,
  // CPUID.1:EDX
  kFpu,
  kTsc,
  kMsr,
  kCx8,
  kSep,
  kCmov,
  kClflush,
  kMmx,
  kFxsr,
  kSse,
  kSse2,
  // CPUID.1:ECX
  kSse3,
  kPclmul,
  kMonitor,
  kSsse3,
  kFma,
  kCx16,
  kSse41,
  kSse42,
  kMovbe,
  kPopcnt,
  kAes,
  kXsave,
  kAvx,
  kF16c,
  kRdrand,
  // CPUID.7.0:EBX
  kFsgsbase,
  kBmi1,
  kAvx2,
  kBmi2,
  kInvpcid,
  kRdseed,
  kAdx,
  kSmap,
  kClflushopt,
  kClwb,
  kSha,
  // CPUID.7.0:ECX, EDX
  kPku,
  kGfni,
  kVaes,
  kVpclmul,
  kRdpid,
  kCldemote,
  kMovdiri,
  kMovdir64b,
  kSerialize,
  // CPUID.D.1:EAX
  kXsaveopt,
  kXsavec,
  kXsaves,
  // CPUID.80000001H
  kLahf64,
  kLzcnt,
  kSse4a,
  kPrefetchw,
  kSyscall,
  kRdtscp,
  kSvm,
  // CPUID.80000008H:EBX
  kClzero,
  kWbnoinvd,
  kCount,
};

// Immutable once built.
class FeatureSet {
 public:
  constexpr FeatureSet() = default;
  // Of the guest's CPUID table.
  static FeatureSet FromCpuid(const CpuidTable& table);
  static constexpr FeatureSet All() {
    FeatureSet set;
    set.bits_ = ~uint64_t{0};
    return set;
  }

  constexpr bool Has(Feature feature) const {
    return (bits_ >> static_cast<unsigned>(feature) & 1) != 0;
  }
  constexpr void Set(Feature feature, bool on = true) {
    const uint64_t bit = uint64_t{1} << static_cast<unsigned>(feature);
    bits_ = on ? bits_ | bit : bits_ & ~bit;
  }

 private:
  uint64_t bits_ = 1;  // kAlways
};
static_assert(static_cast<unsigned>(Feature::kCount) <= 64);

}  // namespace kvartz::cpu::x86
