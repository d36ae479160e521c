// A machine of nothing but RAM, a PCI bus and an event loop, and the driver's side of virtio on it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/event_loop.h"
#include "device/core/backends.h"
#include "device/core/device_types.h"
#include "device/pci/pci_device.h"
#include "memory/address_space.h"
#include "memory/guest_memory.h"

namespace kvartz::test {

constexpr uint64_t kRamBytes = 16 << 20;

// Single-threaded: the test is vCPU and main loop in turn.
class TestMachine : private MsiSink, private IrqSink, private MachineControl, public HostBackends {
 public:
  TestMachine();
  ~TestMachine() override;

  EventLoop& loop() { return *loop_; }
  AddressSpace& memory() { return memory_; }
  uint8_t* ram(uint64_t gpa) { return ram_->host() + gpa; }
  RamBlock& ram_block() { return *ram_; }
  // Makes a device of devices.def; null on an error (see `error`).
  Device* Make(const std::string& driver, const Properties& properties);
  // One more, beside the first (a port on a bus).
  Device* MakeAnother(const std::string& driver, const Properties& properties);
  // Maps a device of the virtio-mmio kind at kMmio.
  Device* PlugMmio(const std::string& driver, const Properties& properties);
  // Plugs it, and gives its BARs addresses.
  PciDevice* Plug(const std::string& driver, const Properties& properties);
  void Unplug();
  void RemoveLast() { devices_.pop_back(); }
  Device* device() { return devices_.front().get(); }
  uint32_t ConfigRead(unsigned offset, unsigned size) {
    return bus_.ConfigRead(devfn_, offset, size);
  }
  void ConfigWrite(unsigned offset, unsigned size, uint32_t value) {
    bus_.ConfigWrite(devfn_, offset, size, value);
  }
  uint64_t Read(uint64_t address, unsigned size) { return BusRead(memory_view_, address, size); }
  void Write(uint64_t address, unsigned size, uint64_t value) {
    BusWrite(memory_view_, address, size, value);
  }
  uint64_t In(uint16_t port, unsigned size) { return BusRead(port_view_, port, size); }
  void Out(uint16_t port, unsigned size, uint64_t value) {
    BusWrite(port_view_, port, size, value);
  }
  // Turns the loop until `done`, for at most five seconds; whether it was.
  bool TurnUntil(const std::function<bool()>& done);
  // Turns it while there is something to do at once.
  void Settle();

  uint8_t* Allocate(uint64_t bytes, uint64_t* gpa, uint64_t align = 16);

  static constexpr uint16_t kLegacyPort = 0xc000;
  static constexpr uint64_t kMmio = 0xfd000000;
  static constexpr uint64_t kMsixBar = 0xfe000000, kModernBar = 0xfe100000;

  std::string error;
  std::vector<std::pair<uint64_t, uint32_t>> messages;  // MSIs
  bool intx = false;
  // The disk of any drive=; null: there is none.
  DiskPort disk_port;
  host::NetBackend* netdev = nullptr;
  host::Chardev* chardev = nullptr;

 private:
  void SendMsi(uint64_t address, uint32_t data) override { messages.emplace_back(address, data); }
  void SetIrq(unsigned, bool level) override { intx = level; }
  void Ask(Request, const std::string&) override {}
  void ExitProcess(int) override {}
  Result<DiskPort*> ConnectDisk(const DiskWish& wish) override {
    if (disk_port.disk && wish.drive == "d0") return &disk_port;
    return Fail(ErrorCode::kNotFound, "drive=" + wish.drive + ": there is no such disk");
  }
  host::NetBackend* FindNetdev(const std::string&) override { return netdev; }
  host::Chardev* FindChardev(const std::string&) override { return chardev; }

  std::unique_ptr<EventLoop> loop_;
  VmClock clock_;
  AddressSpace memory_{"memory", 1ull << 40};
  AddressSpace ports_{"ports", 65536};
  std::shared_ptr<RamBlock> ram_;
  ViewCache memory_view_{memory_};
  ViewCache port_view_{ports_};
  PciBus bus_{*this};
  Result<std::unique_ptr<Device>> Build(const std::string& driver, const Properties& properties);
  std::vector<std::unique_ptr<Device>> devices_;
  std::vector<Doorbell> doorbells_;
  AddressSpace::RegionId mmio_region_ = 0;
  uint8_t devfn_ = 0;
  uint64_t allocated_ = 1 << 20;
};

// A piece of a buffer as the driver describes it.
struct Piece {
  uint64_t gpa;
  uint32_t size;
  bool device_writes;
};

struct Used {
  uint16_t id;
  uint32_t length;
};

// The driver's half of a virtqueue, split or packed, made from the specification.
class DriverRing {
 public:
  enum class Format { kSplit, kPacked };
  DriverRing(TestMachine& machine, Format format, uint16_t size, bool event_index);

  // Makes a buffer available; returns its id.
  uint16_t Add(const std::vector<Piece>& pieces, bool indirect = false);
  // The next used element, if there is one.
  std::optional<Used> Take();
  // Interrupt me when `count` more elements are used (event index).
  void WantEventAfter(uint16_t count);
  void SetInterrupts(bool on);
  bool DeviceWantsKick() const;

  uint64_t desc = 0, driver = 0, device = 0;
  uint16_t size() const { return size_; }
  Format format() const { return format_; }
  uint16_t free_slots() const { return free_; }

 private:
  uint16_t AddSplit(const std::vector<Piece>& pieces, bool indirect);
  uint16_t AddPacked(const std::vector<Piece>& pieces, bool indirect);
  std::optional<Used> TakeSplit();
  std::optional<Used> TakePacked();
  uint8_t* at(uint64_t gpa) const { return machine_.ram(gpa); }

  TestMachine& machine_;
  const Format format_;
  const uint16_t size_;
  const bool event_index_;
  uint16_t free_;
  uint16_t avail_ = 0, used_ = 0;  // split: free-running; packed: places
  uint16_t before_add_ = 0;        // split: avail_ before the last Add
  bool avail_wrap_ = true, used_wrap_ = true;
  std::vector<uint16_t> free_ids_;
  std::vector<uint16_t> next_;    // split: the chain
  std::vector<uint16_t> length_;  // of the chain with this id
};

// A modern (virtio 1) driver over PCI.
class ModernDriver {
 public:
  explicit ModernDriver(TestMachine& machine);
  // Reset, then up to FEATURES_OK with `wanted` (as far as offered, and VIRTIO_F_VERSION_1). False:
  // refused.
  bool Negotiate(uint64_t wanted);
  uint64_t features() const { return features_; }
  uint64_t offered() const { return offered_; }
  DriverRing& SetUpQueue(uint16_t index, uint16_t size = 0);
  void Start();
  void Kick(uint16_t queue);
  uint8_t status();
  void SetStatus(uint8_t value);
  uint64_t ReadConfig(unsigned offset, unsigned size);
  void WriteConfig(unsigned offset, unsigned size, uint64_t value);
  uint8_t ReadIsr();
  DriverRing& ring(uint16_t index) { return *rings_[index]; }
  // One buffer, through the queue and back; the bytes that the device says it wrote.
  std::optional<uint32_t> Transact(uint16_t queue, const std::vector<Piece>& pieces,
                                   bool indirect = false);
  uint32_t Common(unsigned offset, unsigned size);
  void SetCommon(unsigned offset, unsigned size, uint64_t value);
  bool needs_reset() { return status() & 0x40; }

 private:
  TestMachine& machine_;
  uint64_t common_ = 0, isr_ = 0, device_ = 0, notify_ = 0;
  uint32_t multiplier_ = 0;
  uint64_t offered_ = 0, features_ = 0;
  std::vector<std::unique_ptr<DriverRing>> rings_;
};

}  // namespace kvartz::test
