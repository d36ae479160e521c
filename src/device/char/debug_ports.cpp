#include "device/char/debug_ports.h"

#include "device/core/backends.h"
#include "device/core/device_types.h"

namespace kvartz {

DebugConsole::~DebugConsole() { *self_ = nullptr; }

Result<> DebugConsole::Connect(host::Chardev& chardev) {
  port_ = TRY(chardev.Connect(*this));
  return {};
}

void DebugConsole::IoWrite(uint64_t, unsigned, uint64_t value) {
  if (!port_) return;
  // Debug output never stops the guest: what the host doesn't take in time is lost.
  if (pending_.size() < kMaxPending) pending_.push_back(static_cast<char>(value));
  if (scheduled_) return;
  scheduled_ = true;
  env_.loop.Post([self = self_] {
    if (*self) (*self)->Flush();
  });
}

void DebugConsole::Flush() {
  LockGuard guard(lock());
  scheduled_ = false;
  if (port_) pending_.erase(0, port_->Write(pending_));
}

namespace {
struct DebugconConfig {
  uint32_t iobase = 0xe9;
  uint32_t readback = 0xe9;
  std::string chardev;
};
constexpr PropertySpec kDebugconProperties[] = {
    PROPERTY(DebugconConfig, "iobase", iobase, "I/O port"),
    PROPERTY(DebugconConfig, "readback", readback, "what reading the port answers"),
    PROPERTY(DebugconConfig, "chardev", chardev, "where the output goes"),
};
struct DebugExitConfig {
  uint32_t iobase = 0x501;
  uint32_t iosize = 2;
};
constexpr PropertySpec kDebugExitProperties[] = {
    PROPERTY(DebugExitConfig, "iobase", iobase, "first I/O port"),
    PROPERTY(DebugExitConfig, "iosize", iosize, "number of ports"),
};

Result<> CheckPorts(const char* driver, uint32_t base, uint32_t count) {
  if (count >= 1 && count <= 8 && base + count <= 0x10000) return {};
  return Fail(ErrorCode::kInvalid,
              std::string(driver) + ": its ports don't fit: iobase up to 0xffff, at most 8 ports");
}
}  // namespace

std::vector<std::string> DescribeIsaDebugcon() {
  return DescribeProperties<DebugconConfig>(kDebugconProperties);
}

Result<std::unique_ptr<Device>> MakeIsaDebugcon(DeviceRequest& request) {
  DebugconConfig config;
  TRY(ApplyProperties(kDebugconProperties, request.properties, "isa-debugcon", &config));
  TRY(CheckPorts("isa-debugcon", config.iobase, 1));
  auto device = std::make_unique<DebugConsole>(request.env, config.readback);
  if (!config.chardev.empty()) {
    host::Chardev* chardev =
        request.env.backends ? request.env.backends->FindChardev(config.chardev) : nullptr;
    if (!chardev) {
      return Fail(ErrorCode::kNotFound, "isa-debugcon: there is no chardev '" + config.chardev +
                                            "'; add -chardev ...,id=" + config.chardev);
    }
    TRY(device->Connect(*chardev));
  }
  request.ports.push_back({static_cast<uint16_t>(config.iobase), 1});
  return device;
}

std::vector<std::string> DescribeIsaDebugExit() {
  return DescribeProperties<DebugExitConfig>(kDebugExitProperties);
}

Result<std::unique_ptr<Device>> MakeIsaDebugExit(DeviceRequest& request) {
  DebugExitConfig config;
  TRY(ApplyProperties(kDebugExitProperties, request.properties, "isa-debug-exit", &config));
  TRY(CheckPorts("isa-debug-exit", config.iobase, config.iosize));
  request.ports.push_back(
      {static_cast<uint16_t>(config.iobase), static_cast<uint16_t>(config.iosize)});
  return std::make_unique<DebugExit>(request.env);
}

}  // namespace kvartz
