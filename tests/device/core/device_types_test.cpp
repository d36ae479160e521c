#include "device/core/device_types.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace kvartz {
namespace {

std::string Describe(const char* name) {
  Result<const DeviceType*> type = FindDeviceType(name);
  EXPECT_TRUE(type) << name;
  return type ? DescribeDevice(**type) : "";
}

// The lines that QEMU 7.2 prints for the same properties, but for the descriptions.
TEST(DeviceTypes, HelpIsInTheFormOfQemu) {
  std::string text = Describe("virtio-blk-pci");
  EXPECT_TRUE(text.starts_with("virtio-blk-pci options:\n  addr=<int32> ")) << text;
  EXPECT_NE(text.find("\n  bootindex=<int32>      - "), std::string::npos) << text;
  EXPECT_NE(text.find("\n  disable-legacy=<OnOffAuto> - "), std::string::npos) << text;
  EXPECT_NE(text.find("\n  drive=<str>            - "), std::string::npos) << text;
  EXPECT_NE(text.find("\n  queue-size=<uint16>    - "), std::string::npos) << text;
  EXPECT_NE(text.find(" (default: 256)\n"), std::string::npos) << text;
}

TEST(DeviceTypes, EveryTypeListsWhatItTakes) {
  for (const DeviceType& type : DeviceTypes()) {
    std::string text = DescribeDevice(type);
    EXPECT_TRUE(text.starts_with(std::string(type.name) + " options:\n  ")) << text;
    // The place belongs to the bus, whatever the device.
    EXPECT_EQ(text.find("\n  addr=<") != std::string::npos, type.bus == DeviceBus::kPci) << text;
    // Nothing stands in it twice.
    std::vector<std::string> names;
    for (size_t at = text.find("\n  "); at != std::string::npos; at = text.find("\n  ", at + 1)) {
      names.push_back(text.substr(at + 3, text.find('=', at) - at - 3));
    }
    EXPECT_EQ(std::ranges::adjacent_find(names), names.end()) << text;
  }
}

TEST(DeviceTypes, UnknownTypeIsRefusedWithTheNearest) {
  Result<const DeviceType*> type = FindDeviceType("virtio-blk-cpi");
  ASSERT_FALSE(type);
  EXPECT_EQ(type.error().what,
            "device 'virtio-blk-cpi' is not known, did you mean 'virtio-blk-pci'?");
}

}  // namespace
}  // namespace kvartz
