// From a model to the answers of CPUID. Intel SDM vol. 2A, CPUID; AMD APM vol. 3 app. E.
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <set>

#include "base/check.h"
#include "cpu/cpuid.h"
#include "cpu/models/models.h"

namespace kvartz::cpu {
namespace {

constexpr uint32_t kExtended = 0x80000000;
constexpr uint32_t kHypervisor = 0x40000000;

// What every named model has besides its own features, where the engine can: the guest may know
// that it is one.
constexpr std::string_view kVirtual =
    "x2apic hypervisor kvmclock kvm-nopiodelay kvm-steal-time kvm-pv-eoi kvmclock-stable-bit";

// Nested virtualisation and a host's topology never pass to a guest by way of "max" or "host".
constexpr std::string_view kNotByDefault = "vmx svm ht cmp-legacy kvm-hint-dedicated";

// "max" where the engine has no identity of its own: the plainest 64-bit one that operating systems
// accept without looking for a real processor's registers.
CpuidIdentity MaxIdentity() { return {"AuthenticAMD", 6, 6, 3, "Kvartz Virtual CPU"}; }

// Features that mean nothing without another one.
struct Dependency {
  std::string_view on, features;
};
constexpr Dependency kDependencies[] = {
    {"xsave", "avx xsaveopt xsavec xgetbv1 xsaves xfd mpx pku amx-tile"},
    {"avx",
     "avx2 fma f16c fma4 xop vaes vpclmulqdq avx512f avx-vnni avx-ifma avx-vnni-int8 "
     "avx-ne-convert"},
    {"avx512f",
     "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512vbmi2 "
     "avx512vnni avx512bitalg avx512-vpopcntdq avx512-4vnniw avx512-4fmaps avx512-vp2intersect "
     "avx512-fp16 avx512-bf16"},
    {"amx-tile", "amx-bf16 amx-int8 amx-fp16"},
    {"lm", "pdpe1gb pcid la57 fsgsbase"},
    {"apic", "x2apic tsc-deadline"},
    {"pcid", "invpcid"},
};

// The components of XSAVE's standard format after SSE, SDM vol. 1 sec. 13.5, and the features that
// bring them.
struct XsaveComponent {
  uint8_t index;
  uint32_t size, offset;
  std::string_view feature;
};
constexpr XsaveComponent kXsaveComponents[] = {
    {2, 256, 576, "avx"},     {3, 64, 960, "mpx"},        {4, 64, 1024, "mpx"},
    {5, 64, 1088, "avx512f"}, {6, 512, 1152, "avx512f"},  {7, 1024, 1664, "avx512f"},
    {9, 8, 2688, "pku"},      {17, 64, 2752, "amx-tile"}, {18, 8192, 2816, "amx-tile"},
};

// Caches that a guest is shown where the engine names none.
struct Cache {
  uint8_t level, type;  // type: 1 data, 2 instruction, 3 unified
  uint16_t ways;
  uint32_t size_kib;
};
constexpr uint32_t kLineSize = 64;
constexpr Cache kCaches[] = {{1, 1, 8, 32}, {1, 2, 8, 32}, {2, 3, 8, 512}, {3, 3, 16, 16384}};

unsigned WidthOf(unsigned count) { return count <= 1 ? 0 : std::bit_width(count - 1); }

template <typename Visit>
void ForEachWord(std::string_view words, Visit visit) {
  while (!words.empty()) {
    size_t end = std::min(words.find(' '), words.size());
    if (end > 0) visit(words.substr(0, end));
    words.remove_prefix(std::min(end + 1, words.size()));
  }
}

const CpuModel* FindModel(std::string_view name) {
  for (const CpuModel& model : CpuModels()) {
    for (std::string_view rest = model.names; !rest.empty();) {
      size_t end = std::min(rest.find('|'), rest.size());
      if (rest.substr(0, end) == name) return &model;
      rest.remove_prefix(std::min(end + 1, rest.size()));
    }
  }
  return nullptr;
}

// A name may stand for several bits ("kvmclock").
void SetByName(CpuidTable* table, std::string_view name, bool on) {
  const CpuidFeature* feature = FindCpuidFeature(name);
  VERIFY(feature != nullptr);  // of our own tables, or checked
  for (const CpuidFeature& each : CpuidFeatures()) {
    if (each.name == feature->name && (on || table->Get(each))) table->Set(each, on);
  }
}

void AddFeaturesOf(const CpuModel& model, CpuidTable* table) {
  if (const CpuModel* base = FindModel(model.base)) AddFeaturesOf(*base, table);
  ForEachWord(model.features, [&](std::string_view word) {
    bool on = word[0] != '-';
    SetByName(table, on ? word : word.substr(1), on);
  });
}

// One table under construction.
class Builder {
 public:
  Builder(const CpuModelRequest& request, const CpuidTable& supported, const CpuTopology& topology,
          uint32_t apic_id)
      : request_(request), supported_(supported), topology_(topology), apic_id_(apic_id) {}

  Result<CpuidTable> Build(std::vector<std::string>* dropped) {
    TRY(ChooseModel());
    TRY(ApplyRequest());
    TRY(Restrict(dropped));
    TRY(SetLevels());
    TRY(AddAddressSizes());
    AddProcessorInfo();
    AddCaches();
    AddTopology();
    AddXsave();
    if (TRY(request_.Number("pmu", full_ ? 1 : 0)) != 0) CopyLeaf(0xa);
    Trim();
    return std::move(table_);
  }

 private:
  void TakeEverything();
  void TakeModel(const CpuModel& model);
  Result<> ChooseModel();
  Result<> ApplyRequest();
  Result<> Restrict(std::vector<std::string>* dropped);
  Result<> SetLevels();
  Result<> AddAddressSizes();
  void AddProcessorInfo();
  void AddCaches();
  void AddTopology();
  void AddXsave();
  void Trim();

  void CopyLeaf(uint32_t leaf) {
    if (const CpuidLeaf* row = supported_.Find(leaf, 0)) table_.At(leaf) = *row;
  }
  bool is_amd() const { return vendor_ == "AuthenticAMD" || vendor_ == "HygonGenuine"; }
  unsigned package_cpus() const { return topology_.dies * topology_.cores * topology_.threads; }
  unsigned package_width() const {
    return WidthOf(topology_.dies) + WidthOf(topology_.cores) + WidthOf(topology_.threads);
  }

  const CpuModelRequest& request_;
  const CpuidTable& supported_;
  const CpuTopology& topology_;
  const uint32_t apic_id_;
  bool full_ = false;  // host, max
  std::string vendor_;
  uint32_t level_ = 0, xlevel_ = 0;
  CpuidTable table_;
};

// Whole words, so that bits without a name here pass as well.
void Builder::TakeEverything() {
  for (const CpuidFeature& feature : CpuidFeatures()) {
    const CpuidLeaf* row = supported_.Find(feature.leaf, feature.subleaf);
    if (row == nullptr || feature.reg == CpuidReg::kArchCapabilities) continue;
    CpuidLeaf& to = table_.At(feature.leaf, feature.subleaf);
    if (feature.reg == CpuidReg::kEax) to.eax = row->eax;
    if (feature.reg == CpuidReg::kEbx) to.ebx = row->ebx;
    if (feature.reg == CpuidReg::kEcx) to.ecx = row->ecx;
    if (feature.reg == CpuidReg::kEdx) to.edx = row->edx;
  }
  table_.arch_capabilities = supported_.arch_capabilities;
  ForEachWord(kNotByDefault, [&](std::string_view name) { SetByName(&table_, name, false); });
  const CpuidLeaf* basic = supported_.Find(0, 0);
  const CpuidLeaf* extended = supported_.Find(kExtended, 0);
  level_ = basic != nullptr ? basic->eax : 1;
  xlevel_ = extended != nullptr ? extended->eax : kExtended + 8;
}

void Builder::TakeModel(const CpuModel& model) {
  AddFeaturesOf(model, &table_);
  ForEachWord(kVirtual, [&](std::string_view name) {
    bool possible = name != "x2apic" || table_.Has("apic");
    if (possible && supported_.Has(name)) SetByName(&table_, name, true);
  });
  level_ = model.level;
  xlevel_ = model.xlevel;
}

Result<> Builder::ChooseModel() {
  CpuidIdentity own = supported_.identity();
  CpuidIdentity identity = own.vendor.empty() ? MaxIdentity() : own;
  full_ = request_.model == "host" || request_.model == "max";
  if (full_) {
    TakeEverything();
    if (request_.model == "host") identity = HostCpuid().identity();
  } else if (request_.model != "base") {
    const CpuModel* model = FindModel(request_.model);
    if (model == nullptr) return std::unexpected(ParseCpuModel(request_.model).error());
    TakeModel(*model);
    identity = {model->vendor, model->family, model->model, model->stepping, model->brand};
  } else {
    level_ = 1;
  }
  if (!own.vendor.empty()) identity.vendor = own.vendor;
  if (const std::string* vendor = request_.Property("vendor")) identity.vendor = *vendor;
  if (const std::string* brand = request_.Property("model-id")) identity.brand = *brand;
  identity.family = TRY(request_.Number("family", identity.family));
  identity.model = TRY(request_.Number("model", identity.model));
  identity.stepping = TRY(request_.Number("stepping", identity.stepping));
  vendor_ = identity.vendor;
  table_.SetIdentity(identity);
  return {};
}

Result<> Builder::ApplyRequest() {
  for (const auto& [name, on] : request_.features) {
    if (FindCpuidFeature(name) == nullptr) {
      return std::unexpected(ParseCpuModel("base,+" + name).error());
    }
    SetByName(&table_, name, on);
  }
  if (TRY(request_.Number("kvm", 1)) == 0) {
    for (const CpuidFeature& feature : CpuidFeatures()) {
      if (feature.leaf == kHypervisor + 1 && table_.Get(feature)) table_.Set(feature, false);
    }
  }
  return {};
}

// Leaves out what the engine lacks.
Result<> Builder::Restrict(std::vector<std::string>* dropped) {
  std::vector<std::string> missing;
  for (const CpuidFeature& feature : CpuidFeatures()) {
    // Topology decides these.
    if (feature.name == "ht" || feature.name == "cmp-legacy") continue;
    if (!table_.Get(feature) || supported_.Get(feature)) continue;
    table_.Set(feature, false);
    missing.emplace_back(feature.name);
  }
  for (const Dependency& row : kDependencies) {
    if (table_.Has(row.on)) continue;
    ForEachWord(row.features, [&](std::string_view name) {
      if (!table_.Has(name)) return;
      SetByName(&table_, name, false);
      missing.emplace_back(name);
    });
  }
  if (!table_.Has("arch-capabilities")) table_.arch_capabilities = 0;
  if (!missing.empty() && request_.enforce) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("CPU model '{}' needs features that this engine and host lack: {}; "
                            "switch them off (-cpu {},-{}) or leave out 'enforce'",
                            request_.model, fmt::join(missing, " "), request_.model,
                            fmt::join(missing, ",-")));
  }
  if (dropped != nullptr) dropped->insert(dropped->end(), missing.begin(), missing.end());
  return {};
}

// The highest leaves: the model's, more where a feature is in a higher one, or as asked for.
Result<> Builder::SetLevels() {
  level_ = std::max<uint32_t>(level_, TRY(request_.Number("min-level", 0)));
  xlevel_ = std::max<uint32_t>(xlevel_, TRY(request_.Number("min-xlevel", 0)));
  for (const CpuidFeature& feature : CpuidFeatures()) {
    if (feature.reg == CpuidReg::kArchCapabilities || !table_.Get(feature)) continue;
    bool pv = feature.leaf >= kHypervisor && feature.leaf < kExtended;
    if (feature.leaf >= kExtended) xlevel_ = std::max(xlevel_, feature.leaf);
    if (feature.leaf < kExtended && !pv) level_ = std::max(level_, feature.leaf);
  }
  if (table_.Has("xsave")) level_ = std::max(level_, 0xdu);
  if (topology_.dies > 1) level_ = std::max(level_, 0x1fu);
  if (topology_.cores * topology_.threads > 1 && level_ >= 4) level_ = std::max(level_, 0xbu);
  if (table_.Has("lm")) xlevel_ = std::max(xlevel_, kExtended + 8);
  level_ = TRY(request_.Number("level", level_));
  xlevel_ = TRY(request_.Number("xlevel", xlevel_));
  table_.At(0).eax = level_;
  if (xlevel_ >= kExtended) {
    CpuidLeaf& top = table_.At(kExtended);
    top.eax = xlevel_;
    if (is_amd()) {
      const CpuidLeaf& zero = *table_.Find(0, 0);
      CpuidLeaf& again = table_.At(kExtended);
      again.ebx = zero.ebx;
      again.ecx = zero.ecx;
      again.edx = zero.edx;
    }
  }
  return {};
}

Result<> Builder::AddAddressSizes() {
  const CpuidLeaf* row = supported_.Find(kExtended + 8, 0);
  uint32_t host_bits = row != nullptr ? row->eax & 0xff : 40;
  uint32_t bits = std::min(host_bits, 40u);
  if (TRY(request_.Number("host-phys-bits", full_ ? 1 : 0)) != 0) bits = host_bits;
  bits = TRY(request_.Number("phys-bits", bits));
  if (bits > host_bits) {
    return Fail(
        ErrorCode::kUnsupported,
        fmt::format("CPU property 'phys-bits': {} is more than the engine's {}", bits, host_bits));
  }
  if (!table_.Has("lm")) bits = table_.Has("pae") || table_.Has("pse36") ? 36 : 32;
  uint32_t linear = !table_.Has("lm") ? 32 : table_.Has("la57") ? 57 : 48;
  table_.At(kExtended + 8).eax = linear << 8 | bits;
  return {};
}

void Builder::AddProcessorInfo() {
  unsigned cpus = std::min(package_cpus(), 255u);
  CpuidLeaf& one = table_.At(1);
  one.ebx = (apic_id_ & 0xff) << 24 | kLineSize / 8 << 8;
  if (cpus > 1) one.ebx |= cpus << 16;
  SetByName(&table_, "ht", cpus > 1);
  SetByName(&table_, "cmp-legacy", cpus > 1 && is_amd());
  if (is_amd()) {
    // The bits that AMD repeats from leaf 1 (APM vol. 3, Fn8000_0001_EDX).
    constexpr uint32_t kRepeated = 0x0183f3ff;
    uint32_t repeated = table_.Find(1, 0)->edx & kRepeated;
    CpuidLeaf& extended = table_.At(kExtended + 1);
    extended.edx = (extended.edx & ~kRepeated) | repeated;
    extended.eax = table_.Find(1, 0)->eax;
  }
  if (level_ >= 2) table_.At(2).eax = level_ >= 4 && !is_amd() ? 0x00ff0001 : 1;
  if (level_ >= 5) table_.At(5);
  if (full_) CopyLeaf(0x15);
}

void Builder::AddCaches() {
  uint32_t index = 0;
  for (const Cache& cache : kCaches) {
    bool shared = cache.level == 3;
    uint32_t sharers = 1u << (shared ? WidthOf(topology_.cores) + WidthOf(topology_.threads)
                                     : WidthOf(topology_.threads));
    CpuidLeaf row;
    row.eax = cache.type | cache.level << 5 | 1u << 8;  // self-initializing
    row.ebx = (cache.ways - 1u) << 22 | (kLineSize - 1);
    row.ecx = cache.size_kib * 1024 / (cache.ways * kLineSize) - 1;
    uint32_t leaf = is_amd() ? kExtended + 0x1d : 4;
    uint32_t limit = is_amd() ? sharers : std::min(sharers, 4096u);
    row.eax |= (limit - 1) << 14;
    if (!is_amd()) {
      uint32_t cores = 1u << (WidthOf(topology_.cores) + WidthOf(topology_.dies));
      row.eax |= (std::min(cores, 64u) - 1) << 26;
    }
    if (is_amd() && !table_.Has("topoext")) continue;
    CpuidLeaf& to = table_.At(leaf, index++);
    row.leaf = to.leaf;
    row.subleaf = to.subleaf;
    row.indexed = true;
    to = row;
  }
  // L1 and TLBs (AMD only); L2 and L3. Associativity codes: APM vol. 3, Fn8000_0006.
  if (is_amd()) {
    constexpr uint32_t kTlb = 0xff40ff40, kL1 = kCaches[0].size_kib << 24 | 8 << 16 | 1 << 8 | 64;
    CpuidLeaf& l1 = table_.At(kExtended + 5);
    l1.eax = l1.ebx = kTlb;
    l1.ecx = l1.edx = kL1;
  }
  constexpr uint32_t kEightWays = 6, kSixteenWays = 8;
  CpuidLeaf& l2 = table_.At(kExtended + 6);
  l2.ecx = kCaches[2].size_kib << 16 | kEightWays << 12 | 1 << 8 | kLineSize;
  if (is_amd()) {
    l2.edx = kCaches[3].size_kib / 512 << 18 | kSixteenWays << 12 | 1 << 8 | kLineSize;
  }
}

void Builder::AddTopology() {
  unsigned thread_width = WidthOf(topology_.threads);
  unsigned core_width = thread_width + WidthOf(topology_.cores);
  struct Level {
    uint32_t type, width, count;  // SDM vol. 2A: 1 SMT, 2 core, 5 die
  };
  auto fill = [&](uint32_t leaf, std::initializer_list<Level> levels) {
    uint32_t subleaf = 0;
    for (const Level& level : levels) {
      CpuidLeaf& row = table_.At(leaf, subleaf);
      row.eax = level.width;
      row.ebx = level.count;
      row.ecx = level.type << 8 | subleaf++;
      row.edx = apic_id_;
    }
  };
  fill(0xb, {{1, thread_width, topology_.threads}, {2, package_width(), package_cpus()}});
  if (topology_.dies > 1) {
    fill(0x1f, {{1, thread_width, topology_.threads},
                {2, core_width, topology_.cores * topology_.threads},
                {5, package_width(), package_cpus()}});
  }
  if (is_amd()) {
    table_.At(kExtended + 8).ecx =
        package_cpus() > 1 ? package_width() << 12 | std::min(package_cpus() - 1, 255u) : 0;
  }
  if (table_.Has("topoext")) {
    CpuidLeaf& row = table_.At(kExtended + 0x1e);
    row.eax = apic_id_;
    row.ebx = (topology_.threads - 1) << 8 |
              (apic_id_ >> thread_width & ((1u << (package_width() - thread_width)) - 1));
    row.ecx = apic_id_ >> core_width & ((1u << WidthOf(topology_.dies)) - 1);
    row.ecx |= (topology_.dies - 1) << 8;
  }
}

void Builder::AddXsave() {
  if (!table_.Has("xsave")) {
    std::erase_if(table_.leaves(), [](const CpuidLeaf& row) { return row.leaf == 0xd; });
    return;
  }
  constexpr uint32_t kLegacySize = 576;
  uint32_t components = 3, size = kLegacySize;
  for (const XsaveComponent& component : kXsaveComponents) {
    const CpuidLeaf* host = supported_.Find(0xd, component.index);
    if (!table_.Has(component.feature)) continue;
    CpuidLeaf& row = table_.At(0xd, component.index);
    row.eax = host != nullptr && host->eax != 0 ? host->eax : component.size;
    row.ebx = host != nullptr && host->eax != 0 ? host->ebx : component.offset;
    row.ecx = host != nullptr ? host->ecx : 0;
    components |= 1u << component.index;
    size = std::max(size, row.eax + row.ebx);
  }
  CpuidLeaf& main = table_.At(0xd, 0);
  main.eax = components;
  main.ebx = kLegacySize;
  main.ecx = size;
  main.edx = 0;
  CpuidLeaf& extensions = table_.At(0xd, 1);
  extensions.ebx = table_.Has("xsavec") ? kLegacySize : 0;
  extensions.ecx = extensions.edx = 0;  // no supervisor components
}

// Leaves above the highest ones don't exist; nor do the PV leaves where nothing is offered there.
void Builder::Trim() {
  const CpuidLeaf* pv = table_.Find(kHypervisor + 1, 0);
  bool no_pv = pv == nullptr || (pv->eax | pv->edx) == 0;
  std::erase_if(table_.leaves(), [&](const CpuidLeaf& row) {
    if (row.leaf >= kExtended) return xlevel_ < kExtended || row.leaf > xlevel_;
    if (row.leaf >= kHypervisor) return no_pv;
    return row.leaf > level_;
  });
}

}  // namespace

Result<CpuidTable> BuildCpuid(const CpuModelRequest& request, const CpuidTable& supported,
                              unsigned index, unsigned cpu_count, const CpuTopology& topology,
                              std::vector<std::string>* dropped) {
  unsigned maximum = topology.sockets * topology.dies * topology.cores * topology.threads;
  if (maximum == 0 || index >= cpu_count || cpu_count > maximum) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("CPU {} of {} does not fit a topology of {} sockets, {} dies, {} cores, "
                    "{} threads",
                    index, cpu_count, topology.sockets, topology.dies, topology.cores,
                    topology.threads));
  }
  return Builder(request, supported, topology, ApicIdOf(index, topology)).Build(dropped);
}

}  // namespace kvartz::cpu
