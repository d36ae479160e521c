#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "cpu/x86/guest_case.h"

namespace kvartz::cpu::x86 {
namespace {

using testing::HasSubstr;

GUEST_CODE(statistics_program, R"(
1: cpuid                        # left to the interpreter
  mov $1000, %ecx
2: dec %ecx
  jnz 2b
  out %al, $0xf4)")

TEST(JitStatistics, CountWhatAProgramDid) {
  GuestCase guest(Mode::kLong64, 0, "max", 1, SoftOptions{.code_bytes = 5 << 20});
  guest.Load(CODE_OF(statistics_program));
  EXPECT_EQ(guest.Run().vector, -1);
  auto rows = guest.board.vcpu().JitStatistics();
  ASSERT_TRUE(rows) << rows.error().what;
  std::map<std::string, uint64_t> values;
  for (const EngineStatistic& row : *rows) {
    EXPECT_TRUE(values.emplace(row.name, row.value).second) << row.name;
    EXPECT_STRNE(row.meaning, "");
  }
  EXPECT_EQ(values.at("code bytes"), 5u << 20);
  EXPECT_GT(values.at("code bytes used"), 0u);
  EXPECT_LT(values.at("code bytes used"), values.at("code bytes"));
  EXPECT_EQ(values.at("pages"), 1u);
  EXPECT_GE(values.at("units translated"), 1u);
  EXPECT_EQ(values.at("units"), values.at("units translated"));
  EXPECT_GE(values.at("instructions translated"), 5u);
  EXPECT_GE(values.at("interpreted in units"), 1u);
  EXPECT_EQ(values.at("units dropped"), 0u);
  EXPECT_EQ(values.at("host exceptions"), 0u);
}

TEST(JitStatistics, AreNotThereWithoutTranslation) {
  GuestCase guest(Mode::kLong64, 0, "max", 1, SoftOptions{.jit = false});
  auto rows = guest.board.vcpu().JitStatistics();
  ASSERT_FALSE(rows);
  EXPECT_THAT(rows.error().what, HasSubstr("jit=off"));
}

}  // namespace
}  // namespace kvartz::cpu::x86
