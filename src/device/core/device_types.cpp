#include "device/core/device_types.h"

#include <algorithm>

namespace kvartz {

#define DEVICE(name, factory, properties, bus, description)        \
  Result<std::unique_ptr<Device>> factory(DeviceRequest& request); \
  std::vector<std::string> properties();
#include "device/devices.def"
#undef DEVICE

namespace {
constexpr DeviceType kTypes[] = {
#define DEVICE(name, factory, properties, bus, description) \
  {name, factory, properties, DeviceBus::bus, description},
#include "device/devices.def"
#undef DEVICE
};
}  // namespace

std::span<const DeviceType> DeviceTypes() { return kTypes; }

Result<const DeviceType*> FindDeviceType(const std::string& name) {
  std::vector<std::string_view> names;
  for (const DeviceType& type : kTypes) {
    if (type.name == name) return &type;
    names.push_back(type.name);
  }
  std::string_view nearest = NearestName(name, names);
  return Fail(ErrorCode::kNotFound,
              "device '" + name + "' is not known" +
                  (nearest.empty() ? "; see -device help"
                                   : ", did you mean '" + std::string(nearest) + "'?"));
}

std::string DescribeDevice(const DeviceType& type) {
  std::vector<std::string> lines = type.properties();
  if (type.bus == DeviceBus::kPci) {
    lines.push_back(DescribeProperty("addr", "int32",
                                     "slot, or slot and function: 06 or 06.0 (hexadecimal)", "-1"));
    lines.push_back(
        DescribeProperty("bootindex", "int32", "place in the firmware's boot order", ""));
  }
  std::ranges::sort(lines);
  std::string text = std::string(type.name) + " options:\n";
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

}  // namespace kvartz
