// Each virtio device behind its PCI registers: a driver that writes anything anywhere, rings
// included, and a host that sends frames and bytes meanwhile.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "block/disk.h"
#include "device/virtio/test_machine.cpp"
#include "host/chardev/chardev.h"
#include "host/net/net_backend.h"

namespace kvartz::test {
namespace {

class Cable final : public host::NetBackend {
 public:
  bool Send(std::span<const iovec>) override { return !(busy = !busy); }
  void ReceiverReady() override {}
  bool has_vnet_header() const override { return vnet_header; }
  std::string Describe() const override { return "cable"; }
  void Receive(size_t size) {
    static std::vector<uint8_t> frame(65536, 0xff);
    if (receiver_) receiver_->ReceiveFrame(std::span(frame).first(size));
  }
  void Ready() {
    if (receiver_) receiver_->SendReady();
  }
  bool vnet_header = false;
  bool busy = false;
};

// What outlives one input.
struct World {
  World() {
    int fd = memfd_create("disk", 0);
    if (ftruncate(fd, 1 << 20) != 0) abort();
    block::ImageOptions options;
    options.path = "/proc/self/fd/" + std::to_string(fd);
    options.format = "raw";
    options.locking = block::ImageOptions::Locking::kOff;
    disk.ReplaceNode(block::OpenImage(machine.loop(), options).value());
    machine.disk_port.disk = &disk;
    host::ChardevConfig config;
    config.kind = host::ChardevConfig::Kind::kRingbuf;
    chardev = host::Chardev::Create(config, machine.loop()).value();
    machine.chardev = chardev.get();
    machine.netdev = &cable;
  }
  Cable cable;
  TestMachine machine;
  block::Disk disk{machine.loop(), "d0"};
  std::unique_ptr<host::Chardev> chardev;
};

struct Input {
  uint8_t Byte() { return at < size ? data[at++] : 0; }
  uint16_t Word() { return static_cast<uint16_t>(Byte() | Byte() << 8); }
  uint32_t Long() { return Word() | uint32_t{Word()} << 16; }
  bool empty() const { return at >= size; }
  const uint8_t* data;
  size_t size;
  size_t at = 0;
};

constexpr uint64_t kRings = 1 << 20, kRingStride = 1 << 14, kDriverOffset = 0x1000,
                   kDeviceOffset = 0x2000;

void SetUp(TestMachine& machine, uint64_t features, unsigned queues) {
  uint64_t common = TestMachine::kModernBar;
  machine.Write(common + 20, 1, 0);
  machine.Write(common + 20, 1, 3);
  for (uint32_t word = 0; word < 2; ++word) {
    machine.Write(common, 4, word);
    uint64_t offered = machine.Read(common + 4, 4);
    machine.Write(common + 8, 4, word);
    machine.Write(common + 12, 4, offered & (features >> 32 * word | word));
  }
  machine.Write(common + 20, 1, 11);
  for (unsigned i = 0; i < queues; ++i) {
    machine.Write(common + 22, 2, i);
    machine.Write(common + 24, 2, 16);
    uint64_t ring = kRings + i * kRingStride;
    machine.Write(common + 32, 4, ring);
    machine.Write(common + 40, 4, ring + kDriverOffset);
    machine.Write(common + 48, 4, ring + kDeviceOffset);
    machine.Write(common + 28, 2, 1);
  }
  machine.Write(common + 20, 1, 15);
}

// One buffer in a split ring: pieces of up to 64 KiB, most of them in RAM, filled from the input.
void AddBuffer(TestMachine& machine, Input& input) {
  unsigned queue = input.Byte() % 6;
  uint64_t ring = kRings + queue * kRingStride;
  uint8_t shape = input.Byte();
  unsigned count = 1 + (shape & 3);
  for (unsigned i = 0; i < count; ++i) {
    uint8_t* entry = machine.ram(ring) + 16 * i;
    uint64_t address = (2u << 20) + input.Word();
    uint32_t length = input.Byte() & 1 ? input.Byte() : input.Word();
    uint16_t flags =
        static_cast<uint16_t>((i + 1 < count ? 1 : 0) | (shape >> (4 + i) & 1 ? 2 : 0));
    uint16_t next = static_cast<uint16_t>(i + 1);
    std::memcpy(entry, &address, 8);
    std::memcpy(entry + 8, &length, 4);
    std::memcpy(entry + 12, &flags, 2);
    std::memcpy(entry + 14, &next, 2);
    for (unsigned byte = input.Byte() % 40, j = 0; j < byte; ++j)
      machine.ram(address)[j] = input.Byte();
  }
  uint8_t* avail = machine.ram(ring + kDriverOffset);
  uint16_t index;
  std::memcpy(&index, avail + 2, 2);
  avail[4 + 2 * (index % 16)] = 0;
  ++index;
  std::memcpy(avail + 2, &index, 2);
  machine.Write(TestMachine::kModernBar + 0x3000 + 4 * queue, 2, queue);
}

void Step(World& world, Input& input) {
  TestMachine& machine = world.machine;
  Device* device = machine.device();
  switch (input.Byte() % 12) {
    case 0:
      machine.Write(TestMachine::kModernBar + input.Word() % 0x4000, 1u << input.Byte() % 4,
                    input.Long());
      break;
    case 1:
      machine.Read(TestMachine::kModernBar + input.Word() % 0x4000, 1u << input.Byte() % 4);
      break;
    case 2:
      machine.Out(TestMachine::kLegacyPort + input.Byte() % 128, 1u << input.Byte() % 3,
                  input.Long());
      break;
    case 3:
      machine.In(TestMachine::kLegacyPort + input.Byte() % 128, 1u << input.Byte() % 3);
      break;
    case 4: {
      unsigned size = 1u << input.Byte() % 3;
      unsigned offset = input.Byte() / size * size;
      // The BARs stay, so that the rest of the input means something.
      if (offset >= 0x40 || offset < 8) machine.ConfigWrite(offset, size, input.Long());
      machine.ConfigRead(offset, size);
      break;
    }
    case 5: {
      uint64_t to = kRings + input.Long() % (7 * kRingStride);
      for (unsigned count = input.Byte() % 32; count > 0; --count)
        machine.ram(to++)[0] = input.Byte();
      break;
    }
    case 6:
      SetUp(machine, input.Long() | uint64_t{input.Byte()} << 32, input.Byte() % 7);
      break;
    case 7:
    case 8:
      AddBuffer(machine, input);
      break;
    case 9:
      world.cable.Receive(input.Word());
      world.cable.Ready();
      world.chardev->RingbufWrite(std::string(input.Byte(), 'x'));
      break;
    case 10:
      device->Quiesce();
      device->Resume();
      break;
    default:
      machine.loop().RunOnce(0);
      break;
  }
}

void Run(Input input) {
  static World world;
  TestMachine& machine = world.machine;
  static const char* const kDrivers[] = {"virtio-blk-pci", "virtio-net-pci", "virtio-rng-pci",
                                         "virtio-serial-pci", "virtio-balloon-pci"};
  uint8_t choice = input.Byte();
  const std::string driver = kDrivers[choice % std::size(kDrivers)];
  world.cable.vnet_header = choice & 0x80;
  Properties properties{{"packed", "on"}};
  if (driver == "virtio-blk-pci") properties.Set("drive", "d0");
  if (driver == "virtio-net-pci") properties.Set("netdev", "n");
  if (driver == "virtio-balloon-pci") properties.Set("free-page-reporting", "on");
  if (!machine.Plug(driver, properties)) abort();
  if (driver == "virtio-serial-pci") {
    machine.MakeAnother("virtconsole", {{"chardev", "c"}});
    machine.MakeAnother("virtserialport", {{"name", "p"}});
  }
  std::memset(machine.ram(kRings), 0, 7 * kRingStride);
  while (!input.empty()) Step(world, input);
  machine.Settle();
  // Whatever happened, a driver that resets it finds a working device.
  machine.ConfigWrite(4, 2, 7);
  machine.Write(TestMachine::kModernBar + 20, 1, 0);
  machine.device()->Quiesce();
  if (machine.Read(TestMachine::kModernBar + 20, 1) != 0) abort();
  machine.Unplug();
  machine.messages.clear();
}

}  // namespace
}  // namespace kvartz::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvartz::test::Run({data, size});
  return 0;
}
