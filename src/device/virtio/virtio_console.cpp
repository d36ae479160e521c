#include "device/virtio/virtio_console.h"

#include <fmt/core.h>
#include <linux/virtio_console.h>
#include <linux/virtio_ids.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "base/check.h"
#include "base/endian.h"

namespace kvartz {
namespace {

constexpr PropertySpec kProperties[] = {
    PROPERTY(ConsoleConfig, "max_ports", max_ports, "numbers that ports can have, from 1 to 31"),
    PROPERTY(ConsoleConfig, "emergency-write", emergency_write,
             "the guest can write bytes to port 0 without a queue"),
    VIRTIO_PROPERTIES(ConsoleConfig),
};

constexpr unsigned kControlReceive = 2, kControlTransmit = 3;
// More than a well-behaved driver leaves unread: three for each port.
constexpr size_t kMaxMessages = 256;
// Bytes that go to a chardev in one go.
constexpr size_t kChunk = 4096;

// virtio_console_control (5.3.6.2).
struct WireControl {
  Le32 id;
  Le16 event;
  Le16 value;
};
static_assert(sizeof(WireControl) == 8);

std::vector<uint16_t> QueueSizes(const ConsoleConfig& config) {
  std::vector<uint16_t> sizes{128, 128, 32, 32};
  sizes.resize(2 + 2 * config.max_ports, 128);
  if (config.max_ports == 1) sizes.resize(4, 32);
  return sizes;
}

}  // namespace

const std::span<const PropertySpec> kConsoleProperties = kProperties;

// One port. Guarded by the device's lock, which its callbacks take; the chardev calls them on the
// main loop.
class VirtioConsole::Port final : public host::CharUser {
 public:
  Port(VirtioConsole& owner, uint32_t port_number, const ConsolePortConfig& port_config)
      : console(owner), number(port_number), config(port_config) {}

  size_t CanReceive() override;
  void Receive(std::span<const uint8_t> data) override;
  void CharEventArrived(host::CharEvent event) override;
  void CharWritable() override {
    LockGuard guard(console.lock());
    blocked = false;
    console.RingDoorbell(ReceiveQueue(number) + 1);
  }
  bool host_open() const { return config.console || (end && end->open()); }

  VirtioConsole& console;
  const uint32_t number;
  const ConsolePortConfig config;
  std::unique_ptr<host::Chardev::Port> end;
  bool guest_open = false;
  bool blocked = false;  // the chardev has no room
  uint64_t sent = 0;     // bytes of the first element in the ring that the chardev has already
};

VirtioConsole::VirtioConsole(const DeviceEnv& env, const ConsoleConfig& config)
    : VirtioDevice(env, VIRTIO_ID_CONSOLE, config.virtio, QueueSizes(config)),
      config_(config),
      ports_(config.max_ports),
      self_(std::make_shared<VirtioConsole*>(this)) {
  space_.max_nr_ports = config_.max_ports;
}

VirtioConsole::~VirtioConsole() { *self_ = nullptr; }

uint64_t VirtioConsole::DeviceFeatures() const {
  uint64_t features = 1ull << VIRTIO_CONSOLE_F_MULTIPORT;
  if (config_.emergency_write) features |= 1ull << VIRTIO_CONSOLE_F_EMERG_WRITE;
  return features;
}

std::span<const uint8_t> VirtioConsole::ConfigSpace() {
  return {reinterpret_cast<const uint8_t*>(&space_), sizeof space_};
}

// 5.3.4: works before any feature is negotiated.
void VirtioConsole::ConfigWritten(unsigned offset, std::span<const uint8_t> bytes,
                                  VirtioInterface /*by*/) {
  if (offset != offsetof(Space, emerg_wr) || !config_.emergency_write) return;
  env_.loop.Post([self = self_, byte = bytes[0]] {
    if (!*self) return;
    Port* port = (*self)->FindPort(0);
    if (port && port->end) port->end->Write(std::span(&byte, 1));
  });
}

bool VirtioConsole::multiport() const { return Negotiated(VIRTIO_CONSOLE_F_MULTIPORT); }

// ---- ports

Result<uint32_t> VirtioConsole::AddPort(const ConsolePortConfig& config, host::Chardev* chardev) {
  LockGuard guard(lock());
  uint32_t number = config.nr;
  if (number == ConsolePortConfig::kAnyNumber) {
    // 5.3.5: port 0 is for a console.
    number = config.console ? 0 : 1;
    while (number < ports_.size() && ports_[number]) ++number;
    if (number >= ports_.size())
      return Fail(ErrorCode::kNoSpace, "all ports of the bus are taken: raise its max_ports");
  }
  if (number >= ports_.size()) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("nr={}: the bus has numbers up to {}", number, ports_.size() - 1));
  }
  if (number == 0 && !config.console) {
    return Fail(ErrorCode::kInvalid, "nr=0: port 0 is reserved for a virtconsole");
  }
  if (ports_[number])
    return Fail(ErrorCode::kBusy, fmt::format("nr={}: another port has this number", number));
  auto port = std::make_unique<Port>(*this, number, config);
  if (chardev) port->end = TRY(chardev->Connect(*port));
  ports_[number] = std::move(port);
  if (driver_ready_) Tell(number, VIRTIO_CONSOLE_PORT_ADD, 1);
  return number;
}

void VirtioConsole::RemovePort(uint32_t number) {
  std::unique_ptr<Port> port;  // its chardev may say something while it goes
  {
    LockGuard guard(lock());
    port = std::move(ports_[number]);
    if (driver_ready_) Tell(number, VIRTIO_CONSOLE_PORT_REMOVE, 1);
  }
}

size_t VirtioConsole::Port::CanReceive() {
  LockGuard guard(console.lock());
  if (!console.serving() || (console.multiport() && !guest_open)) return 0;
  Virtqueue& ring = console.queue(ReceiveQueue(number));
  do {
    Virtqueue::Position before = ring.position();
    if (ring.Pop(&console.element_)) {
      ring.Rewind(before);
      ring.DisableKicks();
      return std::min<uint64_t>(console.element_.writable_bytes, kChunk);
    }
  } while (ring.EnableKicks());
  return 0;
}

void VirtioConsole::Port::Receive(std::span<const uint8_t> data) {
  LockGuard guard(console.lock());
  unsigned index = ReceiveQueue(number);
  Virtqueue& ring = console.queue(index);
  while (!data.empty() && console.serving() && ring.Pop(&console.element_)) {
    size_t placed = console.element_.CopyIn(0, data.data(), data.size());
    ring.Fill(console.element_, static_cast<uint32_t>(placed));
    data = data.subspan(placed);
    if (placed == 0) break;
  }
  console.FinishQueue(index);
}

void VirtioConsole::Port::CharEventArrived(host::CharEvent event) {
  if (event != host::CharEvent::kOpened && event != host::CharEvent::kClosed) return;
  LockGuard guard(console.lock());
  if (config.console || !console.driver_ready_) return;
  console.Tell(number, VIRTIO_CONSOLE_PORT_OPEN, event == host::CharEvent::kOpened);
}

// The chardev calls back at once, so not under the lock.
void VirtioConsole::AskForInput(uint32_t number) {
  env_.loop.Post([self = self_, number] {
    Port* port = *self ? (*self)->FindPort(number) : nullptr;
    if (port && port->end) port->end->AcceptInput();
  });
}

// ---- queues

void VirtioConsole::QueueKicked(unsigned index) {
  if (index == kControlReceive) return SendControl();
  if (index == kControlTransmit) {
    return ServeQueue(index, &element_, [&](const VirtqElement& element) {
      HandleControl(element);
      queue(kControlTransmit).Fill(element, 0);
      return true;
    });
  }
  uint32_t number = index < 2 ? 0 : index / 2 - 1;
  if (index % 2 == 0) {
    queue(index).DisableKicks();
    AskForInput(number);
  } else {
    Transmit(number);
  }
}

void VirtioConsole::Transmit(uint32_t number) {
  unsigned index = ReceiveQueue(number) + 1;
  Virtqueue& ring = queue(index);
  Port* port = FindPort(number);
  if (port && port->blocked) return;
  Virtqueue::Position before = ring.position();
  ServeQueue(index, &element_, [&](const VirtqElement& element) {
    uint8_t chunk[kChunk];
    while (port && port->end) {
      size_t size = element.CopyOut(port->sent, chunk, sizeof chunk);
      size_t taken = port->end->Write(std::span(chunk, size));
      port->sent += taken;
      if (taken < size) {
        // The rest stays in the ring until there is room.
        ring.Rewind(before);
        port->blocked = true;
        return false;
      }
      if (size < sizeof chunk) break;
    }
    if (port) port->sent = 0;
    ring.Fill(element, 0);
    before = ring.position();
    return true;
  });
}

// ---- control queues (5.3.6.2)

void VirtioConsole::Tell(uint32_t id, uint16_t event, uint16_t value, std::string text) {
  if (!multiport()) return;
  if (messages_.size() >= kMaxMessages) return NeedReset("control messages are not read");
  messages_.push_back({id, event, value, std::move(text)});
  if (serving()) {
    SendControl();
    FinishQueue(kControlReceive);
  }
}

void VirtioConsole::SendControl() {
  Virtqueue& ring = queue(kControlReceive);
  ring.DisableKicks();
  while (!messages_.empty()) {
    if (!ring.Pop(&control_element_)) {
      if (ring.EnableKicks()) continue;
      return;
    }
    const ControlMessage& message = messages_.front();
    WireControl wire{message.id, message.event, message.value};
    size_t size = control_element_.CopyIn(0, &wire, sizeof wire);
    size += control_element_.CopyIn(sizeof wire, message.text.data(), message.text.size());
    ring.Fill(control_element_, static_cast<uint32_t>(size));
    messages_.pop_front();
  }
}

void VirtioConsole::HandleControl(const VirtqElement& element) {
  WireControl wire;
  if (element.CopyOut(0, &wire, sizeof wire) != sizeof wire) return;
  if (wire.event == VIRTIO_CONSOLE_DEVICE_READY) {
    driver_ready_ = wire.value != 0;
    if (!driver_ready_) return;
    for (const auto& port : ports_) {
      if (port) Tell(port->number, VIRTIO_CONSOLE_PORT_ADD, 1);
    }
    return;
  }
  Port* port = FindPort(wire.id);
  if (!port) return;
  if (wire.event == VIRTIO_CONSOLE_PORT_READY && wire.value) return PortIsReady(*port);
  if (wire.event == VIRTIO_CONSOLE_PORT_OPEN) {
    port->guest_open = wire.value != 0;
    if (port->guest_open) AskForInput(port->number);
  }
}

void VirtioConsole::PortIsReady(Port& port) {
  if (port.config.console) Tell(port.number, VIRTIO_CONSOLE_CONSOLE_PORT, 1);
  if (!port.config.name.empty()) Tell(port.number, VIRTIO_CONSOLE_PORT_NAME, 1, port.config.name);
  if (port.host_open()) Tell(port.number, VIRTIO_CONSOLE_PORT_OPEN, 1);
}

// ---- reset, state

void VirtioConsole::Started() {
  for (uint32_t i = 0; i < ports_.size(); ++i) AskForInput(i);
}

void VirtioConsole::DeviceReset() {
  driver_ready_ = false;
  messages_.clear();
  for (const auto& port : ports_) {
    if (!port) continue;
    port->guest_open = port->blocked = false;
    port->sent = 0;
  }
}

void VirtioConsole::VisitDevice(StateVisitor& v) {
  v.Version(1);
  v.Field("driver_ready", driver_ready_);
  for (const auto& port : ports_) {
    if (!port) continue;
    v.Section(fmt::format("port{}", port->number), [&] {
      v.Field("guest_open", port->guest_open);
      v.Field("sent", port->sent);
      if (v.loading()) port->blocked = false;
    });
  }
  auto count = static_cast<uint32_t>(messages_.size());
  v.Field("messages", count);
  v.Bounded("messages", count, 0, kMaxMessages);
  if (v.failed()) return;
  messages_.resize(count);
  for (uint32_t i = 0; i < count; ++i) {
    v.Section(fmt::format("message{}", i), [&] {
      v.Field("id", messages_[i].id);
      v.Field("event", messages_[i].event);
      v.Field("value", messages_[i].value);
      v.Field("text", messages_[i].text, 256);
    });
  }
}

}  // namespace kvartz
