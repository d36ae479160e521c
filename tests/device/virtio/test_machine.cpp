#include "device/virtio/test_machine.h"

#include <cstring>

#include "base/check.h"
#include "memory/ram.h"

namespace kvartz::test {
namespace {

template <typename T>
void Put(uint8_t* at, T value) {
  std::memcpy(at, &value, sizeof value);
}
template <typename T>
T Get(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

constexpr uint16_t kNext = 1, kWrite = 2, kIndirect = 4;
constexpr uint16_t kAvail = 1 << 7, kUsed = 1 << 15;

}  // namespace

TestMachine::TestMachine() : clock_(MonotonicClock::Instance()) {
  loop_ = std::move(EventLoop::Create(EventLoop::Backend::kEpoll).value());
  ram_ = RamBlock::Create("ram", kRamBytes).value();
  Region region;
  region.name = "ram";
  region.kind = RegionKind::kRam;
  region.size = kRamBytes;
  region.ram = ram_;
  memory_.Add(region);
}

TestMachine::~TestMachine() { Unplug(); }

void TestMachine::Unplug() {
  if (mmio_region_) memory_.Remove(std::exchange(mmio_region_, 0));
  devices_.clear();
}

Result<std::unique_ptr<Device>> TestMachine::Build(const std::string& driver,
                                                   const Properties& properties) {
  DeviceEnv env{"test" + std::to_string(devices_.size()),
                memory_,
                ports_,
                *loop_,
                clock_,
                *this,
                *this,
                this};
  const DeviceType* type = TRY(FindDeviceType(driver));
  DeviceRequest request{
      .env = env, .properties = properties, .irq = IrqLine(*this, 5), .devices = devices_};
  std::unique_ptr<Device> device = TRY(type->make(request));
  doorbells_ = request.doorbells;
  return device;
}

Device* TestMachine::MakeAnother(const std::string& driver, const Properties& properties) {
  Result<std::unique_ptr<Device>> device = Build(driver, properties);
  if (!device) {
    error = device.error().what;
    return nullptr;
  }
  devices_.push_back(std::move(*device));
  return devices_.back().get();
}

Device* TestMachine::Make(const std::string& driver, const Properties& properties) {
  Unplug();
  return MakeAnother(driver, properties);
}

Device* TestMachine::PlugMmio(const std::string& driver, const Properties& properties) {
  auto* device = dynamic_cast<MmioDevice*>(Make(driver, properties));
  if (!device) return nullptr;
  Region region;
  region.name = "virtio-mmio";
  region.base = kMmio;
  region.size = 0x200;
  region.handler = device;
  region.lock = &device->lock();
  region.doorbells = doorbells_;
  mmio_region_ = memory_.Add(region);
  return device;
}

PciDevice* TestMachine::Plug(const std::string& driver, const Properties& properties) {
  auto* pci = static_cast<PciDevice*>(Make(driver, properties));
  if (!pci) return nullptr;
  devfn_ = bus_.Plug(*pci, 3 << 3).value();
  ConfigWrite(0x10, 4, kLegacyPort);
  ConfigWrite(0x14, 4, kMsixBar);
  ConfigWrite(0x20, 4, kModernBar);
  ConfigWrite(0x24, 4, 0);
  ConfigWrite(0x04, 2, 7);
  return pci;
}

bool TestMachine::TurnUntil(const std::function<bool()>& done) {
  int64_t end = MonotonicClock::Instance().NowNs() + 5'000'000'000;
  while (!done()) {
    if (MonotonicClock::Instance().NowNs() > end) return false;
    loop_->RunOnce(10'000'000);
  }
  return true;
}

void TestMachine::Settle() {
  for (int i = 0; i < 4; ++i) loop_->RunOnce(0);
}

uint8_t* TestMachine::Allocate(uint64_t bytes, uint64_t* gpa, uint64_t align) {
  allocated_ = (allocated_ + align - 1) & ~(align - 1);
  *gpa = allocated_;
  allocated_ += bytes;
  VERIFY(allocated_ <= kRamBytes);
  return ram(*gpa);
}

// ---- rings

DriverRing::DriverRing(TestMachine& machine, Format format, uint16_t size, bool event_index)
    : machine_(machine),
      format_(format),
      size_(size),
      event_index_(event_index),
      free_(size),
      next_(size),
      length_(size) {
  bool packed = format == Format::kPacked;
  std::memset(machine.Allocate(16 * size, &desc, 4096), 0, 16 * size);
  std::memset(machine.Allocate(packed ? 4 : 6 + 2 * size, &driver, 4), 0,
              packed ? 4 : 6 + 2 * size);
  std::memset(machine.Allocate(packed ? 4 : 6 + 8 * size, &device, 4), 0,
              packed ? 4 : 6 + 8 * size);
  for (uint16_t i = size; i > 0; --i) free_ids_.push_back(i - 1);
}

uint16_t DriverRing::Add(const std::vector<Piece>& pieces, bool indirect) {
  VERIFY(free_ >= (indirect ? 1 : pieces.size()));
  return format_ == Format::kPacked ? AddPacked(pieces, indirect) : AddSplit(pieces, indirect);
}

std::optional<Used> DriverRing::Take() {
  return format_ == Format::kPacked ? TakePacked() : TakeSplit();
}

uint16_t DriverRing::AddSplit(const std::vector<Piece>& pieces, bool indirect) {
  auto put = [&](uint8_t* entry, const Piece& piece, bool more, uint16_t next) {
    Put<uint64_t>(entry, piece.gpa);
    Put<uint32_t>(entry + 8, piece.size);
    Put<uint16_t>(entry + 12, (more ? kNext : 0) | (piece.device_writes ? kWrite : 0));
    Put<uint16_t>(entry + 14, next);
  };
  uint16_t head = free_ids_.back();
  if (indirect) {
    uint64_t table;
    uint8_t* entries = machine_.Allocate(16 * pieces.size(), &table);
    for (uint16_t i = 0; i < pieces.size(); ++i)
      put(entries + 16 * i, pieces[i], i + 1u < pieces.size(), i + 1);
    put(at(desc) + 16 * head, {table, static_cast<uint32_t>(16 * pieces.size()), false}, false, 0);
    Put<uint16_t>(at(desc) + 16 * head + 12, kIndirect);
    free_ids_.pop_back();
    length_[head] = 1;
  } else {
    uint16_t id = head;
    for (size_t i = 0; i < pieces.size(); ++i) {
      free_ids_.pop_back();
      bool more = i + 1 < pieces.size();
      next_[id] = more ? free_ids_.back() : 0;
      put(at(desc) + 16 * id, pieces[i], more, next_[id]);
      id = next_[id];
    }
    length_[head] = static_cast<uint16_t>(pieces.size());
  }
  free_ -= length_[head];
  Put<uint16_t>(at(driver) + 4 + 2 * (avail_ % size_), head);
  before_add_ = avail_++;
  __atomic_store_n(reinterpret_cast<uint16_t*>(at(driver) + 2), avail_, __ATOMIC_RELEASE);
  return head;
}

std::optional<Used> DriverRing::TakeSplit() {
  if (__atomic_load_n(reinterpret_cast<uint16_t*>(at(device) + 2), __ATOMIC_ACQUIRE) == used_)
    return std::nullopt;
  const uint8_t* entry = at(device) + 4 + 8 * (used_ % size_);
  Used used{static_cast<uint16_t>(Get<uint32_t>(entry)), Get<uint32_t>(entry + 4)};
  ++used_;
  VERIFY(used.id < size_ && length_[used.id] > 0);
  for (uint16_t id = used.id, left = length_[used.id]; left > 0; --left, id = next_[id])
    free_ids_.push_back(id);
  free_ += length_[used.id];
  length_[used.id] = 0;
  return used;
}

uint16_t DriverRing::AddPacked(const std::vector<Piece>& pieces, bool indirect) {
  uint16_t id = free_ids_.back();
  free_ids_.pop_back();
  auto put = [&](uint8_t* entry, uint64_t gpa, uint32_t length) {
    Put<uint64_t>(entry, gpa);
    Put<uint32_t>(entry + 8, length);
    Put<uint16_t>(entry + 12, id);
  };
  uint16_t first = avail_, first_flags = 0;
  std::vector<Piece> slots = pieces;
  if (indirect) {
    uint64_t table;
    uint8_t* entries = machine_.Allocate(16 * pieces.size(), &table);
    for (size_t i = 0; i < pieces.size(); ++i) {
      put(entries + 16 * i, pieces[i].gpa, pieces[i].size);
      Put<uint16_t>(entries + 16 * i + 14, pieces[i].device_writes ? kWrite : 0);
    }
    slots = {{table, static_cast<uint32_t>(16 * pieces.size()), false}};
  }
  for (size_t i = 0; i < slots.size(); ++i) {
    uint8_t* entry = at(desc) + 16 * avail_;
    put(entry, slots[i].gpa, slots[i].size);
    uint16_t flags = (avail_wrap_ ? kAvail : kUsed) | (i + 1 < slots.size() ? kNext : 0) |
                     (slots[i].device_writes ? kWrite : 0) | (indirect ? kIndirect : 0);
    if (i == 0) {
      first_flags = flags;
    } else {
      Put<uint16_t>(entry + 14, flags);
    }
    if (++avail_ == size_) {
      avail_ = 0;
      avail_wrap_ = !avail_wrap_;
    }
  }
  length_[id] = static_cast<uint16_t>(slots.size());
  free_ -= length_[id];
  __atomic_store_n(reinterpret_cast<uint16_t*>(at(desc) + 16 * first + 14), first_flags,
                   __ATOMIC_RELEASE);
  return id;
}

std::optional<Used> DriverRing::TakePacked() {
  const uint8_t* entry = at(desc) + 16 * used_;
  uint16_t flags = __atomic_load_n(reinterpret_cast<const uint16_t*>(entry + 14), __ATOMIC_ACQUIRE);
  if (((flags & kUsed) != 0) != used_wrap_ || ((flags & kAvail) != 0) != used_wrap_)
    return std::nullopt;
  Used used{Get<uint16_t>(entry + 12), Get<uint32_t>(entry + 8)};
  VERIFY(used.id < size_ && length_[used.id] > 0);
  used_ += length_[used.id];
  if (used_ >= size_) {
    used_ -= size_;
    used_wrap_ = !used_wrap_;
  }
  free_ += length_[used.id];
  length_[used.id] = 0;
  free_ids_.push_back(used.id);
  return used;
}

void DriverRing::WantEventAfter(uint16_t count) {
  if (format_ == Format::kSplit) {
    Put<uint16_t>(at(driver) + 4 + 2 * size_, static_cast<uint16_t>(used_ + count - 1));
    return;
  }
  uint16_t place = used_ + count - 1;
  bool wrap = used_wrap_;
  if (place >= size_) {
    place -= size_;
    wrap = !wrap;
  }
  Put<uint16_t>(at(driver), static_cast<uint16_t>(place | (wrap ? 1 << 15 : 0)));
  Put<uint16_t>(at(driver) + 2, uint16_t{2});
}

void DriverRing::SetInterrupts(bool on) {
  if (format_ == Format::kSplit) {
    Put<uint16_t>(at(driver), on ? 0 : 1);
  } else {
    Put<uint16_t>(at(driver) + 2, on ? 0 : 1);
  }
}

bool DriverRing::DeviceWantsKick() const {
  if (format_ == Format::kPacked) return Get<uint16_t>(at(device) + 2) != 1;
  if (!event_index_) return !(Get<uint16_t>(at(device)) & 1);
  uint16_t event = Get<uint16_t>(at(device) + 4 + 8 * size_);
  return static_cast<uint16_t>(avail_ - event - 1) < static_cast<uint16_t>(avail_ - before_add_);
}

// ---- the driver

ModernDriver::ModernDriver(TestMachine& machine) : machine_(machine) {
  for (uint8_t at = static_cast<uint8_t>(machine.ConfigRead(0x34, 1)); at != 0;
       at = static_cast<uint8_t>(machine.ConfigRead(at + 1, 1))) {
    if (machine.ConfigRead(at, 1) != 9) continue;
    uint64_t address = TestMachine::kModernBar + machine.ConfigRead(at + 8, 4);
    switch (machine.ConfigRead(at + 3, 1)) {
      case 1:
        common_ = address;
        break;
      case 2:
        notify_ = address;
        multiplier_ = machine.ConfigRead(at + 16, 4);
        break;
      case 3:
        isr_ = address;
        break;
      case 4:
        device_ = address;
        break;
      default:
        break;
    }
  }
}

uint32_t ModernDriver::Common(unsigned offset, unsigned size) {
  return static_cast<uint32_t>(machine_.Read(common_ + offset, size));
}
void ModernDriver::SetCommon(unsigned offset, unsigned size, uint64_t value) {
  machine_.Write(common_ + offset, size, value);
}
uint8_t ModernDriver::status() { return static_cast<uint8_t>(Common(20, 1)); }
void ModernDriver::SetStatus(uint8_t value) { SetCommon(20, 1, value); }
uint8_t ModernDriver::ReadIsr() { return static_cast<uint8_t>(machine_.Read(isr_, 1)); }
uint64_t ModernDriver::ReadConfig(unsigned offset, unsigned size) {
  return machine_.Read(device_ + offset, size);
}
void ModernDriver::WriteConfig(unsigned offset, unsigned size, uint64_t value) {
  machine_.Write(device_ + offset, size, value);
}

bool ModernDriver::Negotiate(uint64_t wanted) {
  SetStatus(0);
  if (!machine_.TurnUntil([&] { return status() == 0; })) return false;
  rings_.clear();
  SetStatus(1);
  SetStatus(3);
  SetCommon(0, 4, 0);
  offered_ = Common(4, 4);
  SetCommon(0, 4, 1);
  offered_ |= uint64_t{Common(4, 4)} << 32;
  features_ = offered_ & (wanted | 1ull << 32);
  SetCommon(8, 4, 0);
  SetCommon(12, 4, static_cast<uint32_t>(features_));
  SetCommon(8, 4, 1);
  SetCommon(12, 4, features_ >> 32);
  SetStatus(11);
  return status() & 8;
}

DriverRing& ModernDriver::SetUpQueue(uint16_t index, uint16_t size) {
  SetCommon(22, 2, index);
  if (size == 0) size = static_cast<uint16_t>(Common(24, 2));
  SetCommon(24, 2, size);
  if (rings_.size() <= index) rings_.resize(index + 1u);
  auto format = features_ >> 34 & 1 ? DriverRing::Format::kPacked : DriverRing::Format::kSplit;
  rings_[index] = std::make_unique<DriverRing>(machine_, format, size, features_ >> 29 & 1);
  DriverRing& ring = *rings_[index];
  SetCommon(26, 2, index);
  SetCommon(32, 4, ring.desc);
  SetCommon(36, 4, 0);
  SetCommon(40, 4, ring.driver);
  SetCommon(44, 4, 0);
  SetCommon(48, 4, ring.device);
  SetCommon(52, 4, 0);
  SetCommon(28, 2, 1);
  return ring;
}

void ModernDriver::Start() { SetStatus(15); }

void ModernDriver::Kick(uint16_t queue) {
  SetCommon(22, 2, queue);
  machine_.Write(notify_ + uint64_t{Common(30, 2)} * multiplier_, 2, queue);
}

std::optional<uint32_t> ModernDriver::Transact(uint16_t queue, const std::vector<Piece>& pieces,
                                               bool indirect) {
  uint16_t id = ring(queue).Add(pieces, indirect);
  Kick(queue);
  std::optional<Used> used;
  if (!machine_.TurnUntil([&] { return (used = ring(queue).Take()).has_value() || needs_reset(); }))
    return std::nullopt;
  if (!used || used->id != id) return std::nullopt;
  return used->length;
}

}  // namespace kvartz::test
