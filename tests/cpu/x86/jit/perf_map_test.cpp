#include "cpu/x86/jit/perf_map.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "cpu/x86/guest_case.h"

namespace kvartz::cpu::x86::jit {
namespace {

using testing::HasSubstr;

std::string TextOf(const std::string& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

class PerfMapTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/kvartz-perf-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    directory_ = name;
    path_ = directory_ + "/map";
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }
  std::string directory_, path_;
};

// The format: linux, tools/perf/Documentation/jit-interface.txt.
TEST_F(PerfMapTest, NamesALineEach) {
  Result<PerfMap> map = PerfMap::Create(path_);
  ASSERT_TRUE(map) << map.error().what;
  map->Add(reinterpret_cast<const uint8_t*>(0x7f0000001000), 0x2c, "guest:0x401000");
  map->Add(reinterpret_cast<const uint8_t*>(0x1000), 16, "b");
  EXPECT_EQ(TextOf(path_), "7f0000001000 2c guest:0x401000\n1000 10 b\n");
  struct stat info = {};
  ASSERT_EQ(stat(path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600u);
}

TEST_F(PerfMapTest, TouchesNothingThatIsThere) {
  std::ofstream(path_) << "mine";
  Result<PerfMap> again = PerfMap::Create(path_);
  ASSERT_FALSE(again);
  EXPECT_THAT(again.error().what, HasSubstr(path_));
  EXPECT_THAT(again.error().what, HasSubstr("remove it"));
  EXPECT_EQ(TextOf(path_), "mine");

  const std::string link = directory_ + "/link", target = directory_ + "/target";
  ASSERT_EQ(symlink(target.c_str(), link.c_str()), 0);
  EXPECT_FALSE(PerfMap::Create(link));
  EXPECT_FALSE(std::filesystem::exists(target));
  EXPECT_FALSE(PerfMap::Create(directory_ + "/no/such"));
}

GUEST_CODE(perf_map_loop, "1: dec %ecx; jnz 1b; out %al, $0xf4")

TEST(PerfMapOfProcess, HasTheStubsAndEachUnit) {
  const std::string path = PerfMap::PathOfProcess();
  unlink(path.c_str());  // of a process of the past
  {
    GuestCase guest(Mode::kLong64, 0, "max", 1, SoftOptions{.perf_map = true});
    guest.Load(CODE_OF(perf_map_loop));
    guest.initial.gpr[kRcx] = 1000;
    EXPECT_EQ(guest.Run().vector, -1);
  }
  const std::string text = TextOf(path);
  unlink(path.c_str());
  EXPECT_THAT(text, HasSubstr(" kvartz-stubs\n"));
  EXPECT_THAT(text, HasSubstr(" guest:0x8000\n"));
}

}  // namespace
}  // namespace kvartz::cpu::x86::jit
