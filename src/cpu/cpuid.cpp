#include "cpu/cpuid.h"

#include <cpuid.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/check.h"

namespace kvartz::cpu {
namespace {

constexpr uint32_t kExtended = 0x80000000;
constexpr uint32_t kHypervisor = 0x40000000;

// Leaves whose answer depends on ECX.
bool IsIndexed(uint32_t leaf) {
  constexpr uint32_t kLeaves[] = {4,    7,    0xb,  0xd,  0xf,  0x10, 0x12,       0x14,
                                  0x17, 0x18, 0x1d, 0x1f, 0x20, 0x23, 0x8000001d, 0x24};
  return std::ranges::find(kLeaves, leaf) != std::end(kLeaves);
}

uint32_t* RegisterOf(CpuidLeaf& leaf, CpuidReg reg) {
  switch (reg) {
    case CpuidReg::kEax:
      return &leaf.eax;
    case CpuidReg::kEbx:
      return &leaf.ebx;
    case CpuidReg::kEcx:
      return &leaf.ecx;
    default:
      return &leaf.edx;
  }
}

bool Before(const CpuidLeaf& a, const CpuidLeaf& b) {
  return std::pair(a.leaf, a.subleaf) < std::pair(b.leaf, b.subleaf);
}

unsigned WidthOf(unsigned count) { return count <= 1 ? 0 : std::bit_width(count - 1); }

template <typename Visit>
void ForEachWord(std::string_view words, Visit visit) {
  while (!words.empty()) {
    size_t end = std::min(words.find(' '), words.size());
    if (end > 0) visit(words.substr(0, end));
    words.remove_prefix(std::min(end + 1, words.size()));
  }
}

// Subleaves of `leaf` that are read from the host; a list of levels ends earlier.
uint32_t SubleavesOf(uint32_t leaf) {
  switch (leaf) {
    case 4:
    case 0xb:
    case 0x1f:
    case 0x8000001d:
      return 16;
    case 0xd:
      return 20;  // components of XCR0 and XSS
    default:
      return 1;
  }
}

void AppendHostLeaf(uint32_t leaf, std::vector<CpuidLeaf>* leaves) {
  uint32_t count = SubleavesOf(leaf);
  for (uint32_t subleaf = 0; subleaf < count; ++subleaf) {
    CpuidLeaf row{.leaf = leaf, .subleaf = subleaf, .indexed = IsIndexed(leaf)};
    __cpuid_count(leaf, subleaf, row.eax, row.ebx, row.ecx, row.edx);
    if (leaf == 7 && subleaf == 0) count = std::min(row.eax, 2u) + 1;
    bool empty = (row.eax | row.ebx | row.ecx | row.edx) == 0;
    bool last_level = leaf == 4 || leaf == 0x8000001d ? (row.eax & 0x1f) == 0 : row.ebx == 0;
    if (leaf != 0xd && leaf != 7 && subleaf > 0 && last_level) break;
    if (subleaf == 0 || !empty) leaves->push_back(row);
  }
}

}  // namespace

uint32_t ApicIdOf(unsigned index, const CpuTopology& topology) {
  unsigned thread = index % topology.threads;
  unsigned core = index / topology.threads % topology.cores;
  unsigned die = index / (topology.threads * topology.cores) % topology.dies;
  unsigned socket = index / (topology.threads * topology.cores * topology.dies);
  uint32_t id = socket;
  id = id << WidthOf(topology.dies) | die;
  id = id << WidthOf(topology.cores) | core;
  return id << WidthOf(topology.threads) | thread;
}

CpuidTable::CpuidTable(std::vector<CpuidLeaf> leaves) : leaves_(std::move(leaves)) {
  std::ranges::sort(leaves_, Before);
}

const CpuidLeaf* CpuidTable::Find(uint32_t leaf, uint32_t subleaf) const {
  auto it = std::ranges::lower_bound(leaves_, CpuidLeaf{.leaf = leaf, .subleaf = subleaf}, Before);
  if (it == leaves_.end() || it->leaf != leaf || it->subleaf != subleaf) return nullptr;
  return &*it;
}

CpuidLeaf CpuidTable::Lookup(uint32_t leaf, uint32_t subleaf) const {
  CpuidLeaf zero{.leaf = leaf, .subleaf = subleaf};
  uint32_t range = leaf & 0xffff0000;
  const CpuidLeaf* top = Find(range, 0);
  bool in_range = top != nullptr && leaf <= top->eax;
  if (!in_range) {
    // AMD answers zero; Intel (and what imitates it) as if the highest basic leaf had been asked
    // for, with the subleaf given. The ranges of hypervisors that aren't there answer zero.
    const CpuidLeaf* basic = Find(0, 0);
    if (basic == nullptr || range == kHypervisor || identity().vendor != "GenuineIntel") {
      return zero;
    }
    leaf = basic->eax;
  }
  const CpuidLeaf* row = Find(leaf, 0);
  if (row == nullptr) return zero;
  if (!row->indexed) return *row;
  row = Find(leaf, subleaf);
  if (row != nullptr) return *row;
  // Beyond the last topology level ECX still names the level, EDX the APIC id.
  if (leaf == 0xb || leaf == 0x1f) {
    zero.ecx = subleaf & 0xff;
    zero.edx = Find(leaf, 0)->edx;
  }
  return zero;
}

CpuidLeaf& CpuidTable::At(uint32_t leaf, uint32_t subleaf) {
  CpuidLeaf row{.leaf = leaf, .subleaf = subleaf, .indexed = IsIndexed(leaf)};
  auto it = std::ranges::lower_bound(leaves_, row, Before);
  if (it == leaves_.end() || it->leaf != leaf || it->subleaf != subleaf) {
    it = leaves_.insert(it, row);
  }
  return *it;
}

bool CpuidTable::Get(const CpuidFeature& feature) const {
  if (feature.reg == CpuidReg::kArchCapabilities)
    return (arch_capabilities >> feature.bit & 1) != 0;
  const CpuidLeaf* found = Find(feature.leaf, feature.subleaf);
  if (found == nullptr) return false;
  CpuidLeaf row = *found;
  return (*RegisterOf(row, feature.reg) >> feature.bit & 1) != 0;
}

void CpuidTable::Set(const CpuidFeature& feature, bool on) {
  auto put = [&](auto& word) {
    auto bit = std::remove_reference_t<decltype(word)>(1) << feature.bit;
    word = on ? word | bit : word & ~bit;
  };
  if (feature.reg == CpuidReg::kArchCapabilities) return put(arch_capabilities);
  put(*RegisterOf(At(feature.leaf, feature.subleaf), feature.reg));
}

bool CpuidTable::Has(std::string_view name) const {
  const CpuidFeature* feature = FindCpuidFeature(name);
  return feature != nullptr && Get(*feature);
}

void CpuidTable::Add(std::string_view features) {
  ForEachWord(features, [&](std::string_view name) {
    const CpuidFeature* feature = FindCpuidFeature(name);
    VERIFY(feature != nullptr);
    Set(*feature, true);
  });
}

void CpuidTable::Remove(std::string_view features) {
  ForEachWord(features, [&](std::string_view name) {
    const CpuidFeature* feature = FindCpuidFeature(name);
    VERIFY(feature != nullptr);
    if (Get(*feature)) Set(*feature, false);
  });
}

CpuidIdentity CpuidTable::identity() const {
  CpuidIdentity identity;
  if (const CpuidLeaf* zero = Find(0, 0); zero != nullptr && zero->ebx != 0) {
    char vendor[12];
    std::memcpy(vendor, &zero->ebx, 4);
    std::memcpy(vendor + 4, &zero->edx, 4);
    std::memcpy(vendor + 8, &zero->ecx, 4);
    identity.vendor.assign(vendor, sizeof(vendor));
  }
  if (const CpuidLeaf* one = Find(1, 0)) {
    unsigned family = one->eax >> 8 & 0xf;
    unsigned model = one->eax >> 4 & 0xf;
    if (family == 6 || family == 15) model |= one->eax >> 12 & 0xf0;
    identity.family = family == 15 ? family + (one->eax >> 20 & 0xff) : family;
    identity.model = model;
    identity.stepping = one->eax & 0xf;
  }
  for (uint32_t leaf = kExtended + 2; leaf <= kExtended + 4; ++leaf) {
    const CpuidLeaf* row = Find(leaf, 0);
    if (row == nullptr) break;
    char text[16];
    std::memcpy(text, &row->eax, sizeof(text));
    identity.brand.append(text, strnlen(text, sizeof(text)));
  }
  return identity;
}

void CpuidTable::SetIdentity(const CpuidIdentity& identity) {
  CpuidLeaf& zero = At(0);
  char vendor[12] = {};
  identity.vendor.copy(vendor, sizeof(vendor));
  std::memcpy(&zero.ebx, vendor, 4);
  std::memcpy(&zero.edx, vendor + 4, 4);
  std::memcpy(&zero.ecx, vendor + 8, 4);

  unsigned base_family = std::min(identity.family, 15u);
  At(1).eax = (identity.family - base_family) << 20 | (identity.model >> 4) << 16 |
              base_family << 8 | (identity.model & 0xf) << 4 | identity.stepping;

  char brand[48] = {};
  identity.brand.copy(brand, sizeof(brand));
  for (unsigned i = 0; i < 3; ++i) std::memcpy(&At(kExtended + 2 + i).eax, brand + 16 * i, 16);
}

CpuidTable HostCpuid() {
  std::vector<CpuidLeaf> leaves;
  leaves.reserve(64);
  for (uint32_t range : {0u, kExtended}) {
    uint32_t highest = __get_cpuid_max(range, nullptr);
    constexpr uint32_t kMaxLeaves = 0x100;
    if (highest < range || highest - range > kMaxLeaves) continue;
    for (uint32_t leaf = range; leaf <= highest; ++leaf) AppendHostLeaf(leaf, &leaves);
  }
  return CpuidTable(std::move(leaves));
}

}  // namespace kvartz::cpu
