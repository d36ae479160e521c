#include "cpu/accel.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvartz::cpu {
namespace {

using ::testing::HasSubstr;
using Verdict = KvmFitness::Verdict;
using Names = std::vector<std::string>;

Result<AccelChoice> Choose(const Names& names, Verdict verdict, const std::string& why = "found") {
  static KvmFitness fitness;
  fitness = {verdict, why};
  return ChooseAccel(names, []() -> const KvmFitness& { return fitness; });
}

constexpr Verdict kUnfit[] = {Verdict::kAbsent, Verdict::kNoPermission, Verdict::kEmulated,
                              Verdict::kBroken};

TEST(ChooseAccel, TakesKvmWhereItIsFit) {
  for (const Names& names : {Names{}, Names{"kvm"}, Names{"kvm", "tcg"}}) {
    Result<AccelChoice> choice = Choose(names, Verdict::kFit);
    ASSERT_TRUE(choice.has_value());
    EXPECT_EQ(choice->name, "kvm");
    EXPECT_EQ(choice->reason, "KVM: found");
  }
}

TEST(ChooseAccel, TakesTheOwnEngineElseAndSaysWhy) {
  for (Verdict verdict : kUnfit) {
    for (const Names& names : {Names{}, Names{"kvm", "tcg"}, Names{"kvm", "kvartz"}}) {
      Result<AccelChoice> choice = Choose(names, verdict, "/dev/kvm is not there");
      ASSERT_TRUE(choice.has_value());
      EXPECT_EQ(choice->name, "kvartz");
      EXPECT_EQ(choice->reason, "own engine: /dev/kvm is not there");
    }
  }
}

TEST(ChooseAccel, AsksNobodyWhereTheOwnEngineIsWanted) {
  for (const Names& names : {Names{"kvartz"}, Names{"tcg"}, Names{"tcg", "kvm"}}) {
    Result<AccelChoice> choice = ChooseAccel(names, []() -> const KvmFitness& {
      ADD_FAILURE() << "probed";
      return ProbeKvm();
    });
    ASSERT_TRUE(choice.has_value());
    EXPECT_EQ(choice->name, "kvartz");
  }
}

TEST(ChooseAccel, RefusesKvmAloneWhereItIsNotFit) {
  for (Verdict verdict : kUnfit) {
    Result<AccelChoice> choice = Choose({"kvm"}, verdict, "no such thing");
    ASSERT_FALSE(choice.has_value());
    EXPECT_THAT(choice.error().what, HasSubstr("'kvm': no such thing"));
    EXPECT_THAT(choice.error().what, HasSubstr("-accel kvartz"));
    EXPECT_EQ(choice.error().what.find('\n'), std::string::npos);
  }
  EXPECT_THAT(Choose({"kvm"}, Verdict::kEmulated).error().what, HasSubstr("VMX or SVM"));
}

TEST(ChooseAccel, RefusesUnknownNames) {
  EXPECT_THAT(Choose({"kvn"}, Verdict::kFit).error().what, HasSubstr("did you mean 'kvm'?"));
  EXPECT_THAT(Choose({"tcg", "whpx-or-so"}, Verdict::kFit).error().what,
              HasSubstr("there are kvm and kvartz"));
}

TEST(ParseKvmOptions, TakesTheKnownOnes) {
  Result<KvmOptions> options =
      ParseKvmOptions({{"kernel-irqchip", "split"}, {"dirty-ring-size", "4096"}});
  ASSERT_TRUE(options.has_value());
  EXPECT_EQ(options->irqchip, IrqchipMode::kUser);
  EXPECT_EQ(options->dirty_ring_entries, 4096u);
  EXPECT_EQ(ParseKvmOptions({{"kernel-irqchip", "on"}})->irqchip, IrqchipMode::kKernel);
  EXPECT_FALSE(ParseKvmOptions({})->irqchip.has_value());
}

TEST(ParseKvmOptions, RefusesTheRest) {
  auto error = [](const std::string& name, const std::string& value) {
    Result<KvmOptions> options = ParseKvmOptions({{name, value}});
    return options ? "" : options.error().what;
  };
  EXPECT_THAT(error("kernel-irqchip", "off"), HasSubstr("use split"));
  EXPECT_THAT(error("kernel-irqchip", "maybe"), HasSubstr("neither on nor split"));
  EXPECT_THAT(error("kernel-irqchipp", "on"), HasSubstr("did you mean 'kernel-irqchip'?"));
  EXPECT_THAT(error("dirty-ring-size", "1000"), HasSubstr("no power of two"));
  EXPECT_THAT(error("dirty-ring-size", "x"), HasSubstr("no power of two"));
}

TEST(ParseSoftOptions, TakesTheKnownOnes) {
  Result<SoftOptions> options =
      ParseSoftOptions({{"jit", "off"}, {"tb-size", "2047"}, {"thread", "multi"}});
  ASSERT_TRUE(options.has_value());
  EXPECT_FALSE(options->jit);
  EXPECT_EQ(options->code_bytes, 2047ull << 20);
  EXPECT_TRUE(ParseSoftOptions({{"jit", "on"}})->jit);
  EXPECT_TRUE(ParseSoftOptions({})->jit);
  EXPECT_EQ(ParseSoftOptions({{"tb-size", "4"}})->code_bytes, 4ull << 20);
}

TEST(ParseSoftOptions, RefusesTheRest) {
  auto error = [](const std::string& name, const std::string& value) {
    Result<SoftOptions> options = ParseSoftOptions({{name, value}});
    return options ? "" : options.error().what;
  };
  EXPECT_THAT(error("jit", "maybe"), HasSubstr("neither on nor off"));
  EXPECT_THAT(error("thread", "single"), HasSubstr("thread=single is not supported"));
  EXPECT_THAT(error("thread", "many"), HasSubstr("'many' is not multi"));
  for (const char* size : {"3", "2048", "0", "-1", "64M", "", "99999999999999999999"})
    EXPECT_THAT(error("tb-size", size), HasSubstr("no number of MiB from 4 to 2047")) << size;
  EXPECT_THAT(error("tb-sise", "64"), HasSubstr("did you mean 'tb-size'?"));
  EXPECT_THAT(error("one-insn-per-tb", "on"), HasSubstr("there are jit, tb-size and thread"));
}

TEST(CodeBytesOfCpu, SharesTheMemoryOut) {
  constexpr uint64_t kMiB = 1 << 20;
  EXPECT_EQ(CodeBytesOfCpu({}, 1), 64 * kMiB);
  EXPECT_EQ(CodeBytesOfCpu({}, 3), 64 * kMiB / 3 / 4096 * 4096);
  EXPECT_EQ(CodeBytesOfCpu({}, 255), 4 * kMiB);
  EXPECT_EQ(CodeBytesOfCpu({.code_bytes = 2047 * kMiB}, 1), 2047 * kMiB);
  EXPECT_EQ(CodeBytesOfCpu({.code_bytes = 8 * kMiB}, 2), 4 * kMiB);
  Result<uint64_t> refused = CodeBytesOfCpu({.code_bytes = 8 * kMiB}, 3);
  ASSERT_FALSE(refused.has_value());
  EXPECT_THAT(refused.error().what, HasSubstr("tb-size=8 is too little for 3 CPUs"));
  EXPECT_THAT(refused.error().what, HasSubstr("12 together"));
}

}  // namespace
}  // namespace kvartz::cpu
