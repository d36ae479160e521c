#include "device/core/device_types.h"

namespace kvartz {

#define DEVICE(name, factory, bus, description) \
  Result<std::unique_ptr<Device>> factory(DeviceRequest& request);
#include "device/devices.def"
#undef DEVICE

namespace {
constexpr DeviceType kTypes[] = {
#define DEVICE(name, factory, bus, description) {name, factory, DeviceBus::bus, description},
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

}  // namespace kvartz
