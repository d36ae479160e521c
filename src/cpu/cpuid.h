// CPUID tables and CPU models, the same for every engine.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/result.h"

namespace kvartz::cpu {

struct CpuTopology {
  unsigned sockets = 1, dies = 1, cores = 1, threads = 1;  // product = maximum CPU count
};

// The APIC id of CPU `index`: socket, die, core and thread in bit fields, each as wide as its count
// needs (SDM vol. 3 sec. 9.9.1). Equal to the index where every count is a power of two.
uint32_t ApicIdOf(unsigned index, const CpuTopology& topology);

// Where a named feature is: a bit of an answer of CPUID, or of MSR IA32_ARCH_CAPABILITIES.
enum class CpuidReg : uint8_t { kEax, kEbx, kEcx, kEdx, kArchCapabilities };
struct CpuidFeature {
  std::string_view name;
  uint32_t leaf = 0, subleaf = 0;
  CpuidReg reg = CpuidReg::kEax;
  uint8_t bit = 0;
};
// By name; '_' and '.' count as '-', other spellings in use ("sse3" for "pni") are known. Null:
// unknown.
const CpuidFeature* FindCpuidFeature(std::string_view name);
std::span<const CpuidFeature> CpuidFeatures();

struct CpuidLeaf {
  uint32_t leaf = 0, subleaf = 0;
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  bool indexed = false;  // the subleaf matters
};

// Who a CPU says it is: leaves 0, 1 (EAX) and 0x80000002 to 4.
struct CpuidIdentity {
  std::string vendor;  // 12 characters
  unsigned family = 0, model = 0, stepping = 0;
  std::string brand;  // up to 48 characters
};

// Sorted by (leaf, subleaf). A value: owned by whoever holds it.
class CpuidTable {
 public:
  explicit CpuidTable(std::vector<CpuidLeaf> leaves = {});
  // Architected lookup: beyond the highest leaf Intel's rule (answer of the highest basic leaf)
  // applies; absent subleaves read zero.
  CpuidLeaf Lookup(uint32_t leaf, uint32_t subleaf) const;
  const CpuidLeaf* Find(uint32_t leaf, uint32_t subleaf) const;
  // The entry of (leaf, subleaf), made if it isn't there.
  CpuidLeaf& At(uint32_t leaf, uint32_t subleaf = 0);
  std::vector<CpuidLeaf>& leaves() { return leaves_; }
  const std::vector<CpuidLeaf>& leaves() const { return leaves_; }
  // A named feature ("avx2", "x2apic"; QEMU's spellings).
  bool Has(std::string_view feature) const;
  // Features by name, space-separated; makes their leaves. For tables that an engine or a test
  // writes; an unknown name is a bug.
  void Add(std::string_view features);
  void Remove(std::string_view features);
  bool Get(const CpuidFeature& feature) const;
  void Set(const CpuidFeature& feature, bool on);
  CpuidIdentity identity() const;
  void SetIdentity(const CpuidIdentity& identity);

  // What MSR IA32_ARCH_CAPABILITIES (0x10a) reads, where the feature "arch-capabilities" is there.
  uint64_t arch_capabilities = 0;

 private:
  std::vector<CpuidLeaf> leaves_;
};

// -cpu MODEL[,+feat][,-feat][,feat=on|off][,prop=value]...
struct CpuModelRequest {
  std::string model = "max";  // "host", "max", "qemu64", "Haswell-noTSX", ...
  std::vector<std::pair<std::string, bool>> features = {};
  std::vector<std::pair<std::string, std::string>> properties =
      {};  // family, model, stepping, vendor, model-id, level, ...
  bool enforce =
      false;  // fail if the engine lacks a feature of the model instead of leaving it out

  // The value of a property, or null.
  const std::string* Property(std::string_view name) const;
  // The value of a numeric or on/off property (on is 1). Errors: malformed or out of range.
  Result<uint64_t> Number(std::string_view name, uint64_t fallback) const;
};
// Errors: an unknown model, feature or property (nearest match); a malformed value.
Result<CpuModelRequest> ParseCpuModel(const std::string& text);
std::vector<std::string> CpuModelNames();
// For "-cpu help": one line a model with its description, then the feature names.
std::string DescribeCpuModels();

// The CPUID of the host's CPU, as the instruction answers.
CpuidTable HostCpuid();

// The guest's table for CPU `index`: the model, restricted to what the engine `supported`s, with
// topology and APIC ids. Dropped features are appended to `dropped` by name. Errors: unknown model
// or feature (nearest match), enforce.
//
// A vendor in leaf 0 of `supported` holds for every model (the guest's SYSCALL runs on such a CPU);
// with an empty one the model's own holds. "max" is all that is supported, "host" the same under
// the identity of the host's CPU. Leaves 0x400000xx of `supported` pass through (their features by
// name); the engine adds its signature. Bits that follow the guest's state (OSXSAVE, OSPKE, APIC
// off, size of the XSAVE area) are the engine's to keep.
Result<CpuidTable> BuildCpuid(const CpuModelRequest& request, const CpuidTable& supported,
                              unsigned index, unsigned cpu_count, const CpuTopology& topology,
                              std::vector<std::string>* dropped);

}  // namespace kvartz::cpu
