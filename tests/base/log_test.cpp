#include "base/log.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <sstream>

#include "base/sync.h"

namespace kvartz {
namespace {

using testing::HasSubstr;

// The log is the process's: these tests send it to files of their own.
class LogTest : public testing::Test {
 protected:
  void SetUp() override {
    char path[] = "/tmp/kvartz-log-XXXXXX";
    int fd = mkstemp(path);
    ASSERT_GE(fd, 0);
    close(fd);
    path_ = path;
    ASSERT_TRUE(log::SetFile(path_));
  }
  void TearDown() override {
    ASSERT_TRUE(log::SetFile("/dev/stderr"));
    log::SetLevel(LogLevel::kWarn);
    log::SetProgram("");
    unlink(path_.c_str());
  }
  std::string Text() const {
    std::stringstream text;
    text << std::ifstream(path_).rdbuf();
    return text.str();
  }
  std::string path_;
};

TEST_F(LogTest, LinesHaveTheProgramAndTheLevel) {
  log::SetProgram("kvartz-vmm");
  KLOG(kWarn, "net0: dropped {} packets", 3);
  KLOG(kError, "disk 'a' is gone");
  KLOG(kInfo, "not shown");
  log::SetLevel(LogLevel::kInfo);
  KLOG(kInfo, "shown");
  EXPECT_EQ(Text(),
            "kvartz-vmm: warning: net0: dropped 3 packets\n"
            "kvartz-vmm: disk 'a' is gone\n"
            "kvartz-vmm: info: shown\n");
}

TEST_F(LogTest, ControlCharactersCannotForgeALine) {
  log::Write(LogLevel::kError, "name: a\nkvartz-vmm: all is lost\x1b[2J");
  EXPECT_EQ(Text(), "name: a\\x0akvartz-vmm: all is lost\\x1b[2J\n");
}

TEST_F(LogTest, GuestErrorsAreOffUntilAskedForAndLimited) {
  for (int i = 0; i < 5; i++) KLOG_GUEST("uart: line {}", i);
  EXPECT_EQ(Text(), "");
  ASSERT_TRUE(log::EnableCategories("unimp,guest_errors"));
  EXPECT_TRUE(log::CategoryEnabled(log::Category::kUnimp));
  for (int i = 0; i < 1000; i++) KLOG_GUEST("uart: line {}", i);
  std::string text = Text();
  auto lines = std::count(text.begin(), text.end(), '\n');
  EXPECT_GE(lines, 10);
  EXPECT_LE(lines, 50);  // a slow machine may see several windows of a second
  EXPECT_THAT(text, HasSubstr("uart: line 9\n"));
}

TEST_F(LogTest, UnknownCategoriesAreRefusedWithTheKnownOnes) {
  auto result = log::EnableCategories("int,frogs");
  ASSERT_FALSE(result);
  EXPECT_THAT(result.error().what,
              HasSubstr("unknown log item 'frogs'; the items are: guest_errors, unimp, int"));
  EXPECT_FALSE(log::CategoryEnabled(log::Category::kInt));
}

TEST_F(LogTest, CategoriesThatAreKnownElsewhereAreRefusedWithTheReason) {
  for (const char* name : {"trace"}) {
    auto result = log::EnableCategories(std::string("int,") + name);
    ASSERT_FALSE(result) << name;
    EXPECT_EQ(result.error().code, ErrorCode::kUnsupported);
    EXPECT_THAT(result.error().what,
                HasSubstr("not supported yet: log item '" + std::string(name) + "': "));
  }
  EXPECT_FALSE(log::CategoryEnabled(log::Category::kInt));
}

TEST_F(LogTest, LinesOfSeveralThreadsStayWhole) {
  {
    std::vector<Thread> threads;
    for (char c : {'a', 'b', 'c'}) {
      threads.emplace_back("logger", [c] {
        for (int i = 0; i < 300; i++) log::Write(LogLevel::kError, std::string(100, c));
      });
    }
  }
  std::ifstream file(path_);
  int lines = 0;
  for (std::string line; std::getline(file, line); lines++) {
    EXPECT_EQ(line, std::string(100, line.empty() ? '?' : line[0]));
  }
  EXPECT_EQ(lines, 900);
}

TEST(Log, AFileThatCannotBeOpenedIsNamed) {
  auto result = log::SetFile("/nowhere/log");
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().what, "cannot open log file '/nowhere/log': No such file or directory");
}

}  // namespace
}  // namespace kvartz
