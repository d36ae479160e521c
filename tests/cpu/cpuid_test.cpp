#include "cpu/cpuid.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvartz::cpu {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// A small engine of no vendor.
CpuidTable Engine(std::string_view features) {
  CpuidTable table;
  table.Add(
      "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx "
      "fxsr sse sse2 pni cx16 hypervisor syscall nx lm");
  table.Add(features);
  table.At(0).eax = 0xd;
  table.At(0x80000000).eax = 0x8000001e;
  table.At(0x80000008).eax = 0x302e;
  return table;
}

CpuidTable MustBuild(const std::string& text, const CpuidTable& engine, unsigned index = 0,
                     CpuTopology topology = {}, std::vector<std::string>* dropped = nullptr) {
  Result<CpuModelRequest> request = ParseCpuModel(text);
  EXPECT_TRUE(request.has_value()) << request.error().what;
  unsigned count = topology.sockets * topology.dies * topology.cores * topology.threads;
  Result<CpuidTable> table = BuildCpuid(*request, engine, index, count, topology, dropped);
  EXPECT_TRUE(table.has_value()) << table.error().what;
  return table.value_or(CpuidTable{});
}

std::string ParseError(const std::string& text) {
  Result<CpuModelRequest> request = ParseCpuModel(text);
  return request ? "" : request.error().what;
}

// Bits as the SDM's CPUID pages give them.
TEST(CpuidFeatures, AreWhereTheManualSaysTheyAre) {
  struct Row {
    const char* name;
    uint32_t leaf, subleaf;
    CpuidReg reg;
    unsigned bit;
  };
  const Row rows[] = {
      {"fpu", 1, 0, CpuidReg::kEdx, 0},
      {"pbe", 1, 0, CpuidReg::kEdx, 31},
      {"sse3", 1, 0, CpuidReg::kEcx, 0},
      {"hypervisor", 1, 0, CpuidReg::kEcx, 31},
      {"sse4.2", 1, 0, CpuidReg::kEcx, 20},
      {"x2apic", 1, 0, CpuidReg::kEcx, 21},
      {"tsc_deadline", 1, 0, CpuidReg::kEcx, 24},
      {"avx512vl", 7, 0, CpuidReg::kEbx, 31},
      {"la57", 7, 0, CpuidReg::kEcx, 16},
      {"ssbd", 7, 0, CpuidReg::kEdx, 31},
      {"md-clear", 7, 0, CpuidReg::kEdx, 10},
      {"xsaves", 0xd, 1, CpuidReg::kEax, 3},
      {"lahf_lm", 0x80000001, 0, CpuidReg::kEcx, 0},
      {"lm", 0x80000001, 0, CpuidReg::kEdx, 29},
      {"topoext", 0x80000001, 0, CpuidReg::kEcx, 22},
      {"invtsc", 0x80000007, 0, CpuidReg::kEdx, 8},
      {"ibpb", 0x80000008, 0, CpuidReg::kEbx, 12},
      {"kvm-pv-eoi", 0x40000001, 0, CpuidReg::kEax, 6},
      {"avx-vnni", 7, 1, CpuidReg::kEax, 4},
      {"arat", 6, 0, CpuidReg::kEax, 2},
  };
  for (const Row& row : rows) {
    const CpuidFeature* feature = FindCpuidFeature(row.name);
    ASSERT_NE(feature, nullptr) << row.name;
    EXPECT_EQ(feature->leaf, row.leaf) << row.name;
    EXPECT_EQ(feature->subleaf, row.subleaf) << row.name;
    EXPECT_EQ(feature->reg, row.reg) << row.name;
    EXPECT_EQ(feature->bit, row.bit) << row.name;
  }
  EXPECT_EQ(FindCpuidFeature("sse5"), nullptr);
}

TEST(CpuidTable, LookupFollowsTheVendorBeyondTheHighestLeaf) {
  CpuidTable table({{.leaf = 0, .eax = 1}, {.leaf = 1, .eax = 0x1234}});
  table.SetIdentity({"GenuineIntel", 6, 60, 4, ""});
  EXPECT_EQ(table.Lookup(7, 0).eax, table.Lookup(1, 0).eax);
  EXPECT_EQ(table.Lookup(0x80000055, 0).eax, table.Lookup(1, 0).eax);
  EXPECT_EQ(table.Lookup(0x40000000, 0).eax, 0u);
  table.SetIdentity({"AuthenticAMD", 25, 1, 1, ""});
  EXPECT_EQ(table.Lookup(7, 0).eax, 0u);
}

TEST(CpuidTable, AbsentSubleavesReadZeroButNameTheirTopologyLevel) {
  CpuidTable table = MustBuild("max", Engine("x2apic"), 3, {.cores = 2, .threads = 2});
  EXPECT_EQ(table.Lookup(7, 5).ebx, 0u);
  CpuidLeaf beyond = table.Lookup(0xb, 7);
  EXPECT_EQ(beyond.ecx, 7u);
  EXPECT_EQ(beyond.edx, 3u);
  EXPECT_EQ(beyond.ebx, 0u);
}

TEST(CpuidTable, IdentityGoesThereAndBack) {
  CpuidTable table;
  table.SetIdentity({"AuthenticAMD", 25, 17, 1, "AMD EPYC"});
  EXPECT_EQ(table.Find(1, 0)->eax, 0x00a10f11u);  // Family 19h model 11h stepping 1
  CpuidIdentity identity = table.identity();
  EXPECT_EQ(identity.vendor, "AuthenticAMD");
  EXPECT_EQ(identity.family, 25u);
  EXPECT_EQ(identity.model, 17u);
  EXPECT_EQ(identity.brand, "AMD EPYC");
}

TEST(ApicId, FieldsAreAsWideAsTheirCounts) {
  CpuTopology topology{.sockets = 2, .cores = 3, .threads = 2};
  // 3 cores take 2 bits: socket at bit 3, core at bit 1.
  EXPECT_EQ(ApicIdOf(0, topology), 0u);
  EXPECT_EQ(ApicIdOf(5, topology), 5u);
  EXPECT_EQ(ApicIdOf(6, topology), 8u);
  EXPECT_EQ(ApicIdOf(11, topology), 13u);
  EXPECT_EQ(ApicIdOf(7, {.sockets = 2, .dies = 2, .cores = 2}), 7u);
}

TEST(HostCpuid, IsWhatTheInstructionSays) {
  CpuidTable host = HostCpuid();
  EXPECT_EQ(host.Has("avx2"), bool(__builtin_cpu_supports("avx2")));
  EXPECT_EQ(host.Has("popcnt"), bool(__builtin_cpu_supports("popcnt")));
  EXPECT_EQ(host.identity().vendor.size(), 12u);
  ASSERT_NE(host.Find(1, 0), nullptr);
}

TEST(BuildCpuid, LeavesOutWhatTheEngineLacks) {
  std::vector<std::string> dropped;
  CpuidTable table = MustBuild("Nehalem", Engine("ssse3 sse4-1 sse4-2"), 0, {}, &dropped);
  EXPECT_THAT(dropped, ElementsAre("popcnt", "lahf-lm"));
  EXPECT_TRUE(table.Has("sse4.2"));
  EXPECT_FALSE(table.Has("popcnt"));
  EXPECT_EQ(table.identity().vendor, "GenuineIntel");
}

TEST(BuildCpuid, DropsWhatNeedsSomethingThatIsMissing) {
  std::vector<std::string> dropped;
  CpuidTable table = MustBuild("max,-xsave", Engine("xsave avx avx2 fma"), 0, {}, &dropped);
  EXPECT_FALSE(table.Has("avx2"));
  EXPECT_FALSE(table.Has("fma"));
  EXPECT_EQ(table.Find(0xd, 0), nullptr);
}

TEST(BuildCpuid, EnforceNamesWhatIsMissingAndTheRemedy) {
  Result<CpuModelRequest> request = ParseCpuModel("Nehalem,enforce");
  ASSERT_TRUE(request.has_value());
  Result<CpuidTable> table =
      BuildCpuid(*request, Engine("ssse3 sse4-1 sse4-2 lahf-lm"), 0, 1, {}, nullptr);
  ASSERT_FALSE(table.has_value());
  EXPECT_THAT(table.error().what, HasSubstr("popcnt"));
  EXPECT_THAT(table.error().what, HasSubstr("-cpu Nehalem,-popcnt"));
}

TEST(BuildCpuid, HardwaresVendorHoldsForEveryModel) {
  CpuidTable engine = Engine("");
  engine.SetIdentity({"AuthenticAMD", 25, 17, 1, "AMD EPYC"});
  CpuidTable table = MustBuild("Conroe", engine);
  EXPECT_EQ(table.identity().vendor, "AuthenticAMD");
  EXPECT_EQ(table.identity().model, 15u);
  EXPECT_EQ(MustBuild("Conroe,vendor=GenuineIntel", engine).identity().vendor, "GenuineIntel");
}

TEST(BuildCpuid, MaxIsEverythingButNestingAndHostIsTheHost) {
  CpuidTable engine = Engine("svm avx xsave popcnt");
  CpuidTable max = MustBuild("max", engine);
  EXPECT_TRUE(max.Has("popcnt"));
  EXPECT_FALSE(max.Has("svm"));
  EXPECT_TRUE(MustBuild("max,+svm", engine).Has("svm"));
  CpuidTable host = MustBuild("host", engine);
  EXPECT_EQ(host.identity().brand, HostCpuid().identity().brand);
  EXPECT_EQ(host.identity().family, HostCpuid().identity().family);
}

TEST(BuildCpuid, TakesLevelsAsAskedFor) {
  CpuidTable table = MustBuild("max,level=1,xlevel=0x80000008", Engine("avx2 xsave avx"));
  EXPECT_EQ(table.Lookup(0, 0).eax, 1u);
  EXPECT_EQ(table.Find(7, 0), nullptr);
  EXPECT_EQ(table.Find(0xd, 0), nullptr);
  EXPECT_EQ(table.Lookup(0x80000000, 0).eax, 0x80000008u);
}

TEST(BuildCpuid, LevelsGrowWithFeatures) {
  CpuidTable table = MustBuild("qemu64,+clzero,+smep", Engine("clzero smep"));
  EXPECT_GE(table.Lookup(0, 0).eax, 7u);
  EXPECT_TRUE(table.Has("smep"));
  EXPECT_GE(MustBuild("kvm32,+invtsc", Engine("invtsc")).Lookup(0x80000000, 0).eax, 0x80000007u);
}

// SDM vol. 2A, CPUID leaf 0DH; vol. 1 sec. 13.5.
TEST(BuildCpuid, XsaveLeavesFollowTheFeatures) {
  CpuidTable table = MustBuild("max", Engine("xsave avx pku avx512f xsavec"));
  EXPECT_EQ(table.Lookup(0xd, 0).eax, 0x2e7u);  // x87 SSE AVX opmask ZMM_Hi256 Hi16_ZMM PKRU
  EXPECT_EQ(table.Lookup(0xd, 0).ecx, 2696u);
  EXPECT_EQ(table.Lookup(0xd, 2).eax, 256u);
  EXPECT_EQ(table.Lookup(0xd, 2).ebx, 576u);
  CpuidTable avx = MustBuild("max", Engine("xsave avx"));
  EXPECT_EQ(avx.Lookup(0xd, 0).eax, 7u);
  EXPECT_EQ(avx.Lookup(0xd, 0).ecx, 832u);
}

// SDM vol. 3 sec. 9.9: two sockets of four cores of two threads.
TEST(BuildCpuid, TopologyOfAnIntelCpu) {
  CpuTopology topology{.sockets = 2, .cores = 4, .threads = 2};
  CpuidTable engine = Engine("x2apic ssse3 sse4-1 sse4-2 popcnt lahf-lm");
  CpuidTable table = MustBuild("Nehalem", engine, 11, topology);
  EXPECT_EQ(table.Lookup(1, 0).ebx >> 24, 11u);
  EXPECT_EQ(table.Lookup(1, 0).ebx >> 16 & 0xff, 8u);
  EXPECT_TRUE(table.Has("ht"));
  CpuidLeaf smt = table.Lookup(0xb, 0), core = table.Lookup(0xb, 1);
  EXPECT_THAT((std::array{smt.eax, smt.ebx, smt.ecx, smt.edx}), ElementsAre(1, 2, 0x100, 11));
  EXPECT_THAT((std::array{core.eax, core.ebx, core.ecx, core.edx}), ElementsAre(3, 8, 0x201, 11));
  EXPECT_EQ(table.Lookup(4, 0).eax >> 26, 3u);          // four core ids a package
  EXPECT_EQ(table.Lookup(4, 0).eax >> 14 & 0xfff, 1u);  // L1 shared by two threads
  EXPECT_EQ(table.Lookup(4, 3).eax >> 14 & 0xfff, 7u);  // L3 shared by the package
  EXPECT_EQ(table.Lookup(4, 4).eax, 0u);
}

// AMD APM vol. 3 app. E, Fn8000_0008 and Fn8000_001E.
TEST(BuildCpuid, TopologyOfAnAmdCpu) {
  CpuTopology topology{.sockets = 2, .cores = 4, .threads = 2};
  CpuidTable table = MustBuild("EPYC", Engine("topoext"), 13, topology);
  EXPECT_EQ(table.Lookup(0x80000008, 0).ecx, 0x3007u);
  EXPECT_EQ(table.Lookup(0x8000001e, 0).eax, 13u);
  EXPECT_EQ(table.Lookup(0x8000001e, 0).ebx, 0x102u);  // core 2, two threads
  EXPECT_TRUE(table.Has("cmp-legacy"));
  EXPECT_EQ(table.Lookup(0x8000001d, 3).eax >> 14 & 0xfff, 7u);
  EXPECT_EQ(table.Find(4, 0), nullptr);
}

TEST(BuildCpuid, AddressSizes) {
  EXPECT_EQ(MustBuild("max", Engine("")).Lookup(0x80000008, 0).eax, 0x302eu);
  EXPECT_EQ(MustBuild("qemu64", Engine("")).Lookup(0x80000008, 0).eax, 0x3028u);
  EXPECT_EQ(MustBuild("qemu64,phys-bits=44", Engine("")).Lookup(0x80000008, 0).eax, 0x302cu);
  Result<CpuModelRequest> request = ParseCpuModel("qemu64,phys-bits=52");
  Result<CpuidTable> table = BuildCpuid(*request, Engine(""), 0, 1, {}, nullptr);
  ASSERT_FALSE(table.has_value());
  EXPECT_THAT(table.error().what, HasSubstr("phys-bits"));
}

TEST(BuildCpuid, ParavirtualLeavesPassAndCanBeHidden) {
  CpuidTable engine = Engine("kvmclock kvm-pv-eoi kvm-pv-unhalt");
  CpuidTable table = MustBuild("qemu64", engine);
  EXPECT_EQ(table.Lookup(0x40000001, 0).eax,
            0u);  // range is announced by leaf 0x40000000, the engine's
  EXPECT_TRUE(table.Has("kvmclock"));
  EXPECT_FALSE(table.Has("kvm-pv-unhalt"));
  EXPECT_FALSE(MustBuild("qemu64,kvm=off", engine).Has("kvmclock"));
  EXPECT_TRUE(MustBuild("qemu64,-kvmclock", engine).Has("kvm-pv-eoi"));
}

TEST(BuildCpuid, RefusesATopologyThatIsTooSmall) {
  Result<CpuidTable> table = BuildCpuid({}, Engine(""), 0, 3, {.cores = 2}, nullptr);
  ASSERT_FALSE(table.has_value());
  EXPECT_THAT(table.error().what, HasSubstr("topology"));
}

TEST(ParseCpuModel, TakesQemusSpellings) {
  Result<CpuModelRequest> request = ParseCpuModel(
      "Haswell-noTSX,+x2apic,-aes,rdtscp=off,smep,enforce,model-id=Some CPU,level=0xd");
  ASSERT_TRUE(request.has_value()) << request.error().what;
  EXPECT_EQ(request->model, "Haswell-noTSX");
  EXPECT_THAT(request->features, ElementsAre(std::pair("x2apic", true), std::pair("aes", false),
                                             std::pair("rdtscp", false), std::pair("smep", true)));
  EXPECT_TRUE(request->enforce);
  EXPECT_EQ(*request->Property("model-id"), "Some CPU");
  EXPECT_EQ(request->Number("level", 0).value(), 13u);
}

TEST(ParseCpuModel, RefusesByName) {
  EXPECT_THAT(ParseError("Haswel"), HasSubstr("did you mean 'Haswell'?"));
  EXPECT_THAT(ParseError("qemu64,+avx3"), HasSubstr("did you mean 'avx'?"));
  EXPECT_THAT(ParseError("qemu64,avx=maybe"), HasSubstr("neither on nor off"));
  EXPECT_THAT(ParseError("qemu64,level=ten"), HasSubstr("not a number"));
  EXPECT_THAT(ParseError("qemu64,vendor=me"), HasSubstr("12 characters"));
  EXPECT_THAT(ParseError("qemu64,hv-relaxed"), HasSubstr("not supported yet"));
  EXPECT_THAT(ParseError("qemu64,+avx=on"), HasSubstr("write '+name'"));
  EXPECT_THAT(ParseError(""), HasSubstr("unknown CPU model"));
}

TEST(ParseCpuModel, NamesAndDescriptionsAreThere) {
  EXPECT_THAT(CpuModelNames(), testing::Contains("Skylake-Server-noTSX-IBRS"));
  EXPECT_THAT(DescribeCpuModels(), HasSubstr("Haswell-v2"));
}

}  // namespace
}  // namespace kvartz::cpu
