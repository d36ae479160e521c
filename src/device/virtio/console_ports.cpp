// -device virtconsole and virtserialport: ports of a virtio-serial bus.
#include <fmt/core.h>

#include "device/core/backends.h"
#include "device/virtio/virtio_console.h"

namespace kvartz {
namespace {

constexpr PropertySpec kProperties[] = {
    PROPERTY(ConsolePortConfig, "chardev", chardev, "the other end: id of a -chardev"),
    PROPERTY(ConsolePortConfig, "name", name, "name that the guest sees (/dev/virtio-ports/NAME)"),
    PROPERTY(ConsolePortConfig, "nr", nr,
             "number of the port (4294967295: the first that is free)"),
};

// A port as the machine's list of devices shows it. Its state belongs to the bus.
class ConsolePortDevice final : public Device {
 public:
  ConsolePortDevice(const DeviceEnv& env, VirtioConsole& bus, uint32_t number)
      : Device(env), bus_(bus.handle()), number_(number) {}
  ~ConsolePortDevice() override {
    if (*bus_) (*bus_)->RemovePort(number_);
  }
  void Reset(ResetPhase) override {}
  void VisitState(StateVisitor& visitor) override {
    visitor.Version(1);
    uint32_t number = number_;
    visitor.Field("number", number);
    visitor.Bounded("number", number, number_, number_);
  }

 private:
  const std::shared_ptr<VirtioConsole*> bus_;
  const uint32_t number_;
};

// The bus that bus=ID.0 names, or the first there is.
Result<VirtioConsole*> FindBus(const DeviceRequest& request, const char* driver) {
  const std::string* wanted = request.properties.Find("bus");
  std::string id = wanted ? wanted->substr(0, wanted->rfind('.')) : "";
  for (const auto& device : request.devices) {
    auto* console = dynamic_cast<VirtioConsole*>(VirtioDeviceOf(*device));
    if (console && (!wanted || device->id() == id)) return console;
  }
  return Fail(ErrorCode::kNotFound,
              wanted
                  ? fmt::format("bus={}: there is no such virtio-serial bus", *wanted)
                  : fmt::format("{} needs a bus: put -device virtio-serial-pci before it", driver));
}

Result<std::unique_ptr<Device>> MakePort(DeviceRequest& request, const char* driver, bool console) {
  ConsolePortConfig config;
  TRY(ApplyProperties(kProperties, request.properties, driver, &config));
  config.console = console;
  VirtioConsole* bus = TRY(FindBus(request, driver));
  host::Chardev* chardev = nullptr;
  if (!config.chardev.empty()) {
    chardev = request.env.backends ? request.env.backends->FindChardev(config.chardev) : nullptr;
    if (!chardev)
      return Fail(ErrorCode::kNotFound,
                  fmt::format("chardev={}: there is no such -chardev", config.chardev));
  }
  uint32_t number = TRY(bus->AddPort(config, chardev));
  return std::make_unique<ConsolePortDevice>(request.env, *bus, number);
}

}  // namespace

std::vector<std::string> DescribeConsolePort() {
  return DescribeProperties<ConsolePortConfig>(kProperties);
}
Result<std::unique_ptr<Device>> MakeVirtconsole(DeviceRequest& request) {
  return MakePort(request, "virtconsole", true);
}
Result<std::unique_ptr<Device>> MakeVirtserialport(DeviceRequest& request) {
  return MakePort(request, "virtserialport", false);
}

}  // namespace kvartz
