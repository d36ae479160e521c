#include "cpu/accel.h"

#include <fmt/core.h>

#include <algorithm>
#include <charconv>

#include "base/text.h"

namespace kvartz::cpu {
namespace {

constexpr std::string_view kEngines[] = {"kvm", "kvartz", "tcg"};
constexpr std::string_view kKvmOptions[] = {"kernel-irqchip", "dirty-ring-size"};
constexpr std::string_view kSoftOptions[] = {"jit", "tb-size", "thread"};

// Branches of translated code reach 2 GiB.
constexpr uint64_t kMiB = 1 << 20, kCodeMiBMost = 2047, kCodeMiBOfCpu = 4, kCodeMiBDefault = 64;

Result<bool> WantsKvm(std::string_view name) {
  if (name == "kvm") return true;
  if (name == "kvartz" || name == "tcg") return false;
  std::string_view nearest = NearestName(name, kEngines);
  return Fail(ErrorCode::kNotFound,
              fmt::format("unknown accelerator '{}': {}", name,
                          nearest.empty() ? "there are kvm and kvartz (also called tcg)"
                                          : fmt::format("did you mean '{}'?", nearest)));
}

// What to do where KVM was asked for and nothing else.
std::string Remedy(KvmFitness::Verdict verdict) {
  constexpr const char* kOwnEngine = "or use -accel kvartz, which needs no hardware";
  if (verdict == KvmFitness::Verdict::kEmulated) {
    return fmt::format("use a host with VMX or SVM, {}", kOwnEngine);
  }
  return kOwnEngine;
}

AccelChoice OwnEngine(const std::string& why) { return {"kvartz", "own engine: " + why}; }

}  // namespace

Result<AccelChoice> ChooseAccel(const std::vector<std::string>& names,
                                const std::function<const KvmFitness&()>& probe) {
  for (const std::string& name : names) TRY(WantsKvm(name));
  bool automatic = names.empty();
  bool kvm_first = automatic || TRY(WantsKvm(names[0]));
  if (!kvm_first) return OwnEngine("as asked for");

  const KvmFitness& fitness = probe();
  if (fitness.verdict == KvmFitness::Verdict::kFit) {
    return AccelChoice{"kvm", "KVM: " + fitness.why};
  }
  bool other = automatic;
  for (const std::string& name : names) other |= !TRY(WantsKvm(name));
  if (other) return OwnEngine(fitness.why);
  return Fail(ErrorCode::kUnsupported,
              fmt::format("accelerator 'kvm': {}; {}", fitness.why, Remedy(fitness.verdict)));
}

Result<AccelChoice> ChooseAccel(const std::vector<std::string>& names) {
  return ChooseAccel(names, ProbeKvm);
}

Result<KvmOptions> ParseKvmOptions(
    const std::vector<std::pair<std::string, std::string>>& options) {
  KvmOptions parsed;
  for (const auto& [name, value] : options) {
    if (name == "kernel-irqchip") {
      if (value == "off") {
        return Fail(ErrorCode::kUnsupported,
                    "-accel kvm: kernel-irqchip=off is not supported: use split, which leaves only "
                    "the local APICs in the kernel");
      }
      if (value != "on" && value != "split") {
        return Fail(ErrorCode::kInvalid,
                    fmt::format("-accel kvm: kernel-irqchip='{}' is neither on nor split", value));
      }
      parsed.irqchip = value == "on" ? IrqchipMode::kKernel : IrqchipMode::kUser;
    } else if (name == "dirty-ring-size") {
      uint32_t entries = 0;
      auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), entries);
      // KVM keeps some entries in reserve: fewer than a page of them is no ring.
      constexpr uint32_t kFewest = 1024, kMost = 65536;
      bool good = error == std::errc() && end == value.data() + value.size() &&
                  (entries & (entries - 1)) == 0 &&
                  (entries == 0 || (entries >= kFewest && entries <= kMost));
      if (!good) {
        return Fail(ErrorCode::kInvalid,
                    fmt::format("-accel kvm: dirty-ring-size='{}' is no power of two from {} to {}",
                                value, kFewest, kMost));
      }
      parsed.dirty_ring_entries = entries;
    } else {
      std::string_view nearest = NearestName(name, kKvmOptions);
      return Fail(ErrorCode::kNotFound,
                  fmt::format("-accel kvm: unknown option '{}': {}", name,
                              nearest.empty() ? "there are kernel-irqchip and dirty-ring-size"
                                              : fmt::format("did you mean '{}'?", nearest)));
    }
  }
  return parsed;
}

Result<SoftOptions> ParseSoftOptions(
    const std::vector<std::pair<std::string, std::string>>& options) {
  SoftOptions parsed;
  for (const auto& [name, value] : options) {
    if (name == "jit") {
      if (value != "on" && value != "off") {
        return Fail(ErrorCode::kInvalid,
                    fmt::format("-accel kvartz: jit='{}' is neither on nor off", value));
      }
      parsed.jit = value == "on";
    } else if (name == "tb-size") {
      uint64_t mib = 0;
      auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), mib);
      if (error != std::errc() || end != value.data() + value.size() || mib < kCodeMiBOfCpu ||
          mib > kCodeMiBMost) {
        return Fail(ErrorCode::kInvalid,
                    fmt::format("-accel kvartz: tb-size='{}' is no number of MiB from {} to {}",
                                value, kCodeMiBOfCpu, kCodeMiBMost));
      }
      parsed.code_bytes = mib * kMiB;
    } else if (name == "thread") {
      if (value == "single") {
        return Fail(ErrorCode::kUnsupported,
                    "-accel kvartz: thread=single is not supported: each CPU has a thread of its "
                    "own (thread=multi)");
      }
      if (value != "multi") {
        return Fail(ErrorCode::kInvalid,
                    fmt::format("-accel kvartz: thread='{}' is not multi", value));
      }
    } else {
      std::string_view nearest = NearestName(name, kSoftOptions);
      return Fail(ErrorCode::kNotFound,
                  fmt::format("-accel kvartz: unknown option '{}': {}", name,
                              nearest.empty() ? "there are jit, tb-size and thread"
                                              : fmt::format("did you mean '{}'?", nearest)));
    }
  }
  return parsed;
}

Result<uint64_t> CodeBytesOfCpu(const SoftOptions& options, unsigned cpu_count) {
  const uint64_t fewest = kCodeMiBOfCpu * kMiB * cpu_count;
  if (options.code_bytes == 0)
    return std::max(fewest, kCodeMiBDefault * kMiB) / cpu_count & ~uint64_t{4095};
  if (options.code_bytes < fewest) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("-accel kvartz: tb-size={} is too little for {} CPUs: {} MiB a CPU are "
                            "needed, {} together",
                            options.code_bytes / kMiB, cpu_count, kCodeMiBOfCpu, fewest / kMiB));
  }
  return options.code_bytes / cpu_count & ~uint64_t{4095};
}

}  // namespace kvartz::cpu
