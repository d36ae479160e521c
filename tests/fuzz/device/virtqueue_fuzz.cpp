// A ring that a hostile driver writes, split or packed, while the device takes and gives elements.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "device/virtio/virtqueue.h"
#include "memory/ram.h"

namespace kvartz {
namespace {

constexpr uint64_t kRam = 64 << 10;
constexpr uint64_t kDesc = 0x0000, kDriver = 0x1000, kDevice = 0x2000;

struct World {
  World() {
    ram = RamBlock::Create("ram", kRam).value();
    Region region;
    region.name = "ram";
    region.kind = RegionKind::kRam;
    region.size = kRam;
    region.ram = ram;
    memory.Add(region);
  }
  std::shared_ptr<RamBlock> ram;
  AddressSpace memory{"memory", 1ull << 40};
};

struct Input {
  uint8_t Byte() { return at < size ? data[at++] : 0; }
  uint16_t Word() { return static_cast<uint16_t>(Byte() | Byte() << 8); }
  bool empty() const { return at >= size; }
  const uint8_t* data;
  size_t size;
  size_t at = 0;
};

void Run(Input input) {
  static World world;
  std::memset(world.ram->host(), 0, kRam);
  Virtqueue queue(world.memory, 16);
  uint8_t mode = input.Byte();
  uint64_t features =
      uint64_t{mode & 1u} << 34 | uint64_t{mode >> 1 & 1u} << 29 | uint64_t{mode >> 2 & 1u} << 28;
  auto start = [&] {
    queue.Reset();
    queue.registers = {static_cast<uint16_t>(1u << (mode >> 3 & 3) << 1), true, Gpa(kDesc),
                       Gpa(kDriver), Gpa(kDevice)};
    queue.SetFeatures(features);
    queue.SetLive(true);
  };
  start();
  std::vector<VirtqElement> held;
  while (!input.empty()) {
    switch (input.Byte() % 9) {
      case 0: {  // the driver writes
        uint64_t to = input.Word() % (kRam - 32);
        uint8_t count = input.Byte() % 32;
        for (uint8_t i = 0; i < count; ++i) world.ram->host()[to + i] = input.Byte();
        break;
      }
      case 1: {  // a descriptor, so that good ones are frequent
        uint8_t* entry = world.ram->host() + input.Byte() % 16 * 16;
        uint64_t address = input.Word();
        uint32_t length = input.Word();
        std::memcpy(entry, &address, 8);
        std::memcpy(entry + 8, &length, 4);
        for (int i = 12; i < 16; ++i) entry[i] = input.Byte();
        break;
      }
      case 2: {  // split: another element is available
        uint16_t index;
        std::memcpy(&index, world.ram->host() + kDriver + 2, 2);
        world.ram->host()[kDriver + 4 + 2 * (index % 16)] = input.Byte() % 20;
        ++index;
        std::memcpy(world.ram->host() + kDriver + 2, &index, 2);
        break;
      }
      case 3: {
        VirtqElement element;
        if (!queue.Pop(&element)) break;
        uint64_t bytes = 0;
        for (const iovec& piece : element.readable) bytes += piece.iov_len;
        VERIFY(bytes == element.readable_bytes);
        uint8_t buffer[64] = {};
        element.CopyOut(input.Byte(), buffer, sizeof buffer);
        element.CopyIn(input.Byte(), buffer, sizeof buffer);
        held.push_back(std::move(element));
        break;
      }
      case 4:
        if (held.empty()) break;
        std::swap(held[input.Byte() % held.size()], held.back());
        queue.Fill(held.back(), input.Word());
        held.pop_back();
        if (input.Byte() & 1) queue.Publish();
        break;
      case 5:
        queue.Publish();
        queue.ShouldNotify();
        break;
      case 6:
        if (input.Byte() & 1) {
          queue.DisableKicks();
        } else {
          queue.EnableKicks();
        }
        break;
      case 7: {
        Virtqueue::Position position = queue.position();
        VirtqElement element;
        for (int i = 0; i < 4 && queue.Pop(&element); ++i) {
        }
        queue.Rewind(position);
        break;
      }
      default:
        held.clear();
        start();
        break;
    }
    VERIFY(queue.in_flight() <= 32);
  }
}

}  // namespace
}  // namespace kvartz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvartz::Run({data, size});
  return 0;
}
