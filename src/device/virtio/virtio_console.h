// virtio console (virtio 1.2 ch. 5.3): a bus of ports, each a byte stream between the guest and a
// chardev.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "device/core/device_types.h"
#include "device/virtio/virtio_device.h"
#include "host/chardev/chardev.h"

namespace kvartz {

struct ConsoleConfig {
  VirtioConfig virtio;
  uint32_t max_ports = 31;
  bool emergency_write = true;
};
extern const std::span<const PropertySpec> kConsoleProperties;

// -device virtconsole and virtserialport.
struct ConsolePortConfig {
  static constexpr uint32_t kAnyNumber = UINT32_MAX;
  std::string chardev;
  std::string name;  // as the guest sees it: /dev/virtio-ports/NAME
  uint32_t nr = kAnyNumber;
  bool console = false;
};

// As VirtioDevice; everything happens on the main loop.
class VirtioConsole final : public VirtioDevice {
 public:
  VirtioConsole(const DeviceEnv& env, const ConsoleConfig& config);
  ~VirtioConsole() override;

  // Takes the lock, as does RemovePort. `chardev` null: nobody is at the other end. Returns the
  // port's number. Errors: no free number, number or chardev taken.
  Result<uint32_t> AddPort(const ConsolePortConfig& config, host::Chardev* chardev);
  void RemovePort(uint32_t number);
  // Points at null once the bus is gone.
  std::shared_ptr<VirtioConsole*> handle() const { return self_; }

 protected:
  uint64_t DeviceFeatures() const override;
  std::span<const uint8_t> ConfigSpace() override;
  void ConfigWritten(unsigned offset, std::span<const uint8_t> bytes, VirtioInterface by) override;
  void QueueKicked(unsigned queue) override;
  void Started() override;
  void DeviceReset() override;
  void VisitDevice(StateVisitor& visitor) override;

 private:
  class Port;
  struct ControlMessage {
    uint32_t id;
    uint16_t event;
    uint16_t value;
    std::string text;
  };
  bool multiport() const;
  static unsigned ReceiveQueue(uint32_t port) { return port == 0 ? 0 : 2 + 2 * port; }
  Port* FindPort(uint32_t number) {
    return number < ports_.size() ? ports_[number].get() : nullptr;
  }
  void Tell(uint32_t id, uint16_t event, uint16_t value, std::string text = {});
  void SendControl();
  void HandleControl(const VirtqElement& element);
  void PortIsReady(Port& port);
  void Transmit(uint32_t number);
  void AskForInput(uint32_t number);

  // virtio_console_config (5.3.4).
  struct Space {
    uint16_t cols, rows;
    uint32_t max_nr_ports;
    uint32_t emerg_wr;
  };
  const ConsoleConfig config_;
  Space space_{};
  std::vector<std::unique_ptr<Port>> ports_;  // by number; null: none
  std::deque<ControlMessage> messages_;       // that the driver has no buffers for yet
  bool driver_ready_ = false;
  VirtqElement element_;
  VirtqElement control_element_;  // messages go out while another element is worked on
  // Null for posted tasks that come after the end.
  std::shared_ptr<VirtioConsole*> self_;
};

}  // namespace kvartz
