// CPUID tables and CPU models, the same for every engine.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/result.h"

namespace kvartz::cpu {

struct CpuTopology {
  unsigned sockets = 1, dies = 1, cores = 1, threads = 1;  // product = maximum CPU count
};

struct CpuidLeaf {
  uint32_t leaf = 0, subleaf = 0;
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  bool indexed = false;  // the subleaf matters
};

// Sorted by (leaf, subleaf).
class CpuidTable {
 public:
  explicit CpuidTable(std::vector<CpuidLeaf> leaves = {});
  // Architected lookup: beyond the highest leaf Intel's rule (answer of the highest basic leaf) applies; absent subleaves
  // read zero.
  CpuidLeaf Lookup(uint32_t leaf, uint32_t subleaf) const;
  const CpuidLeaf* Find(uint32_t leaf, uint32_t subleaf) const;
  std::vector<CpuidLeaf>& leaves() { return leaves_; }
  const std::vector<CpuidLeaf>& leaves() const { return leaves_; }
  // A named feature ("avx2", "x2apic"; QEMU's spellings).
  bool Has(const std::string& feature) const;

 private:
  std::vector<CpuidLeaf> leaves_;
};

// -cpu MODEL[,+feat][,-feat][,feat=on|off][,prop=value]...
struct CpuModelRequest {
  std::string model = "max";  // "host", "max", "qemu64", "Haswell-noTSX", ...
  std::vector<std::pair<std::string, bool>> features;
  std::vector<std::pair<std::string, std::string>> properties;  // family, model, stepping, vendor, model-id, level...
  bool enforce = false;  // fail if the engine lacks a feature of the model instead of leaving it out
};
Result<CpuModelRequest> ParseCpuModel(const std::string& text);
std::vector<std::string> CpuModelNames();

// The CPUID of the host's CPU, as the instruction answers.
CpuidTable HostCpuid();

// The guest's table for CPU `index`: the model, restricted to what the engine `supported`s, with topology and APIC ids.
// Dropped features are appended to `dropped` by name. Errors: unknown model or feature (nearest match), enforce.
Result<CpuidTable> BuildCpuid(const CpuModelRequest& request, const CpuidTable& supported, unsigned index,
                              unsigned cpu_count, const CpuTopology& topology, std::vector<std::string>* dropped);

}  // namespace kvartz::cpu
