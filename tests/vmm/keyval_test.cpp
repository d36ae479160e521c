#include "vmm/keyval.h"

#include <gtest/gtest.h>

namespace kvartz::vmm {
namespace {

std::string Get(const Result<Properties>& properties, const char* name) {
  const std::string* value = properties->Find(name);
  return value ? *value : "(none)";
}

TEST(KeyvalTest, NamesValuesAndImpliedFirst) {
  auto p = ParseKeyval("virtio-blk-pci,drive=d0,serial=a=b", "driver");
  ASSERT_TRUE(p);
  EXPECT_EQ(Get(p, "driver"), "virtio-blk-pci");
  EXPECT_EQ(Get(p, "drive"), "d0");
  EXPECT_EQ(Get(p, "serial"), "a=b");
}

TEST(KeyvalTest, DoubledCommasAreCommas) {
  auto p = ParseKeyval("file=a,,b,,,format=raw", "");
  ASSERT_TRUE(p);
  EXPECT_EQ(Get(p, "file"), "a,b,");
  EXPECT_EQ(Get(p, "format"), "raw");
}

TEST(KeyvalTest, ShortBooleans) {
  auto p = ParseKeyval("unix:/x,server,nowait", "path");
  ASSERT_TRUE(p);
  EXPECT_EQ(Get(p, "path"), "unix:/x");
  EXPECT_EQ(Get(p, "server"), "on");
  EXPECT_EQ(Get(p, "wait"), "off");
}

TEST(KeyvalTest, JsonFlattensToDottedNames) {
  auto p = ParseKeyval(
      R"({"driver":"raw","file":{"driver":"file","filename":"a,b"},"n":5,"ro":true,"l":["x","y"]})",
      "");
  ASSERT_TRUE(p);
  EXPECT_EQ(Get(p, "driver"), "raw");
  EXPECT_EQ(Get(p, "file.driver"), "file");
  EXPECT_EQ(Get(p, "file.filename"), "a,b");
  EXPECT_EQ(Get(p, "n"), "5");
  EXPECT_EQ(Get(p, "ro"), "on");
  EXPECT_EQ(Get(p, "l.1"), "y");
}

TEST(KeyvalTest, MalformedIsRefused) {
  for (const char* text : {"=x", "a=1,=2", "a,,", "{", "{\"a\":}", "[1]"}) {
    bool fine = std::string_view(text) == "a,,";  // the first value is "a,"
    EXPECT_EQ(ParseKeyval(text, "first").has_value(), fine || std::string_view(text) == "[1]")
        << text;
  }
  EXPECT_FALSE(ParseKeyval(std::string(100, '[').insert(0, "{\"a\":"), ""));
}

TEST(KeyvalTest, Sizes) {
  EXPECT_EQ(ParseSize("512").value(), 512u);
  EXPECT_EQ(ParseSize("512", 'M').value(), 512u << 20);
  EXPECT_EQ(ParseSize("4k").value(), 4096u);
  EXPECT_EQ(ParseSize("1.5G").value(), 3ull << 29);
  EXPECT_EQ(ParseSize("0x1000").value(), 4096u);
  EXPECT_EQ(ParseSize("2T").value(), 2ull << 40);
  for (const char* bad : {"", "M", "-1", "1X", "1.5", "1..5M", "99999999999999999999",
                          "9000000000G", "0x", "1e5M", "infM"}) {
    EXPECT_FALSE(ParseSize(bad)) << bad;
  }
}

TEST(KeyvalTest, WhatIsLeftOverIsRefusedWithTheNearestName) {
  Properties properties{{"formt", "raw"}};
  auto refused = RefuseRest(properties, "file format id");
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().what.find("did you mean format"), std::string::npos)
      << refused.error().what;
}

}  // namespace
}  // namespace kvartz::vmm
