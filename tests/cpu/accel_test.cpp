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

}  // namespace
}  // namespace kvartz::cpu
