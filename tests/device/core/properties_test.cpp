#include "device/core/properties.h"

#include <gtest/gtest.h>

namespace kvartz {
namespace {

struct Config {
  bool flag = false;
  OnOffAuto mode = OnOffAuto::kAuto;
  uint16_t queues = 1;
  uint32_t block = 512;
  uint64_t size = 7;
  int32_t index = -1;
  std::string serial;
  MacAddress mac;
};
constexpr PropertySpec kTable[] = {
    PROPERTY(Config, "flag", flag, "a flag"),         PROPERTY(Config, "mode", mode, "a mode"),
    PROPERTY(Config, "num-queues", queues, "queues"), PROPERTY(Config, "block", block, "bytes"),
    PROPERTY(Config, "size", size, "bytes"),          PROPERTY(Config, "index", index, "a number"),
    PROPERTY(Config, "serial", serial, "text"),       PROPERTY(Config, "mac", mac, "address"),
};

TEST(Properties, EveryTypeIsParsed) {
  Config config;
  Properties properties{
      {"flag", "on"},     {"mode", "off"}, {"num-queues", "4"}, {"block", "4k"},
      {"size", "0x1000"}, {"index", "-5"}, {"serial", "a,b"},   {"mac", "52:54:00:12:34:56"},
      {"id", "x"},        {"bus", "pci.0"}};
  ASSERT_TRUE(ApplyProperties(kTable, properties, "toy", &config));
  EXPECT_TRUE(config.flag);
  EXPECT_EQ(config.mode, OnOffAuto::kOff);
  EXPECT_EQ(config.queues, 4);
  EXPECT_EQ(config.block, 4096u);
  EXPECT_EQ(config.size, 4096u);
  EXPECT_EQ(config.index, -5);
  EXPECT_EQ(config.serial, "a,b");
  EXPECT_EQ(FormatMac(config.mac), "52:54:00:12:34:56");
}

TEST(Properties, UnknownNameIsRefusedWithTheNearest) {
  Config config;
  auto result = ApplyProperties(kTable, {{"num-queue", "4"}}, "toy", &config);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().what,
            "device toy has no property 'num-queue': did you mean 'num-queues'?");
  result = ApplyProperties(kTable, {{"zzzzzzzzzzzz", "4"}}, "toy", &config);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().what, "device toy has no property 'zzzzzzzzzzzz': see -device toy,help");
}

TEST(Properties, MalformedValuesAreRefused) {
  const std::pair<std::string, std::string> kBad[] = {{"flag", "maybe"},
                                                      {"mode", "x"},
                                                      {"num-queues", "65536"},
                                                      {"num-queues", "-1"},
                                                      {"block", ""},
                                                      {"block", "5q"},
                                                      {"block", "4194304k"},
                                                      {"size", "99999999999999999999"},
                                                      {"index", "2147483648"},
                                                      {"mac", "52:54"},
                                                      {"mac", "52:54:00:12:34:5g"}};
  for (const auto& bad : kBad) {
    Config config;
    EXPECT_FALSE(ApplyProperties(kTable, {bad}, "toy", &config)) << bad.first << "=" << bad.second;
  }
}

TEST(Properties, HelpListsNameTypeDefault) {
  EXPECT_EQ(DescribeProperties<Config>(kTable),
            (std::vector<std::string>{
                "  flag=<bool>            - a flag (default: false)",
                "  mode=<OnOffAuto>       - a mode (default: \"auto\")",
                "  num-queues=<uint16>    - queues (default: 1)",
                "  block=<uint32>         - bytes (default: 512)",
                "  size=<uint64>          - bytes (default: 7)",
                "  index=<int32>          - a number (default: -1)",
                "  serial=<str>           - text",
                "  mac=<str>              - address",
            }));
}

TEST(Properties, LaterValueWins) {
  Properties properties;
  properties.Set("a", "1");
  properties.Set("a", "2");
  ASSERT_NE(properties.Find("a"), nullptr);
  EXPECT_EQ(*properties.Find("a"), "2");
  EXPECT_EQ(properties.all().size(), 1u);
}

}  // namespace
}  // namespace kvartz
