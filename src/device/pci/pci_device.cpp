#include "device/pci/pci_device.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "base/check.h"
#include "device/pci/pci_config.h"

namespace kvartz {

using namespace pci;

struct PciDevice::Bar {
  PciBarKind kind;
  uint64_t size;
  IoHandler* handler;
  unsigned max_access;
  std::vector<Doorbell> doorbells;
  bool mapped = false;
  uint64_t base = 0;
  AddressSpace::RegionId region = 0;

  bool io() const { return kind == PciBarKind::kIo; }
  bool is_64bit() const {
    return kind == PciBarKind::kMemory64 || kind == PciBarKind::kMemory64Prefetch;
  }
};

// What interrupts need to know, apart from the configuration bytes: signals come from any thread,
// without the device's lock. Its lock is a leaf but for the bus's INTx lock and the sinks.
struct PciDevice::Signals {
  struct Vector {
    uint64_t address = 0;
    uint32_t data = 0;
    uint32_t control = 1;  // bit 0: masked
  };
  Mutex mutex;
  bool master = false;
  bool msix_on = false, msix_masked = false;
  std::vector<Vector> vectors;
  std::vector<uint8_t> pending;  // one bit a vector, little endian, whole qwords
  bool msi_on = false;
  uint64_t msi_address = 0;
  uint32_t msi_data = 0, msi_mask = 0, msi_pending = 0;
  unsigned msi_vectors_log2 = 0;
  bool intx_wanted = false;    // what the device asked for
  bool intx_disabled = false;  // command register, or message signalling took over
  bool intx_driven = false;    // what the bus was told

  void SetPending(unsigned vector, bool on) {
    uint8_t bit = 1 << (vector % 8);
    pending[vector / 8] = on ? pending[vector / 8] | bit : pending[vector / 8] & ~bit;
  }
  bool IsPending(unsigned vector) const { return pending[vector / 8] >> (vector % 8) & 1; }
  bool Blocked(unsigned vector) const { return msix_masked || (vectors[vector].control & 1); }
  // Sends what became unmasked.
  void Flush(MsiSink& msi) {
    if (msix_on && master) {
      for (unsigned i = 0; i < vectors.size(); i++) {
        if (!IsPending(i) || Blocked(i)) continue;
        SetPending(i, false);
        msi.SendMsi(vectors[i].address, vectors[i].data);
      }
    }
    if (msi_on && master) {
      for (unsigned i = 0; i < 32 && (msi_pending & ~msi_mask); i++) {
        uint32_t bit = 1u << i;
        if (!(msi_pending & ~msi_mask & bit)) continue;
        msi_pending &= ~bit;
        SendMsiVector(msi, i);
      }
    }
  }
  void SendMsiVector(MsiSink& msi, unsigned vector) {
    uint32_t low = (1u << msi_vectors_log2) - 1;
    msi.SendMsi(msi_address, (msi_data & ~low) | (vector & low));
  }
};

// The BAR with MSI-X table and pending bits. PCI 3.0, 6.8.2. Accesses of 4 and 8 bytes; others read
// zero.
class PciDevice::MsixTable final : public IoHandler {
 public:
  MsixTable(PciDevice& device, unsigned vectors) : device_(device), vectors_(vectors) {}

  uint64_t pba_offset() const { return std::max<uint64_t>(0x800, std::bit_ceil(vectors_ * 16ull)); }
  uint64_t bar_size() const { return std::max<uint64_t>(kPageSize, pba_offset() * 2); }

  uint64_t IoRead(uint64_t offset, unsigned size) override {
    uint64_t value = Dword(offset & ~3ull);
    if (size == 8) return value | uint64_t{Dword((offset & ~3ull) + 4)} << 32;
    return value >> (8 * (offset & 3));
  }

  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
    if (size < 4 || (offset & 3)) return;
    LockGuard guard(device_.signals_->mutex);
    for (unsigned i = 0; i < size; i += 4) SetDword(offset + i, value >> (8 * i));
    device_.signals_->Flush(device_.env_.msi);
  }

 private:
  uint32_t Dword(uint64_t offset) {
    Signals& s = *device_.signals_;
    LockGuard guard(s.mutex);
    if (offset / 16 < vectors_) {
      const Signals::Vector& v = s.vectors[offset / 16];
      switch (offset % 16) {
        case 0:
          return v.address;
        case 4:
          return v.address >> 32;
        case 8:
          return v.data;
        default:
          return v.control;
      }
    }
    uint64_t bit = offset - pba_offset();
    uint32_t value = 0;
    if (offset >= pba_offset() && bit + 4 <= s.pending.size()) {
      for (unsigned i = 0; i < 4; i++) value |= uint32_t{s.pending[bit + i]} << (8 * i);
    }
    return value;
  }
  void SetDword(uint64_t offset, uint32_t value) {
    Signals& s = *device_.signals_;
    if (offset / 16 >= vectors_) return;  // pending bits are read-only
    Signals::Vector& v = s.vectors[offset / 16];
    switch (offset % 16) {
      case 0:
        v.address = (v.address & ~0xffffffffull) | (value & ~3u);
        break;
      case 4:
        v.address = (v.address & 0xffffffffull) | uint64_t{value} << 32;
        break;
      case 8:
        v.data = value;
        break;
      default:
        v.control = value & 1;
        break;
    }
  }

  PciDevice& device_;
  const unsigned vectors_;
};

PciDevice::PciDevice(const DeviceEnv& env, const PciIdentity& identity)
    : Device(env), signals_(std::make_unique<Signals>()) {
  config_.Set(kVendorId, 2, identity.vendor);
  config_.Set(kDeviceId, 2, identity.device);
  config_.Set(kRevision, 1, identity.revision);
  config_.Set(kClass, 3, identity.class_code);
  config_.Set(kHeaderType, 1, identity.multifunction ? kMultifunction : 0);
  config_.Set(kSubsystemVendor, 2, identity.subsystem_vendor);
  config_.Set(kSubsystem, 2, identity.subsystem);
  config_.Set(kInterruptPin, 1, identity.interrupt_pin);
  config_.SetWritable(kCommand, 2,
                      kCommandIo | kCommandMemory | kCommandMaster | kCommandParity | kCommandSerr |
                          kCommandIntxDisable);
  config_.SetWriteOneToClear(kStatus, 2, 0xf900);
  config_.SetWritable(kCacheLine, 2, 0xffff);
  config_.SetWritable(kInterruptLine, 1, 0xff);
}

void PciDevice::SetMultifunction() { config_.Set(kHeaderType, 1, kMultifunction); }
bool PciDevice::multifunction() const { return config_.Read(kHeaderType, 1) & kMultifunction; }

PciDevice::~PciDevice() {
  if (bus_) bus_->Unplug(*this);
}

void PciDevice::Reset(ResetPhase phase) {
  if (phase == ResetPhase::kHold) SetIntx(false);
  if (phase != ResetPhase::kEnter) return;
  config_.ResetGuestBits();
  {
    LockGuard guard(signals_->mutex);
    for (Signals::Vector& v : signals_->vectors) v = {};
    std::fill(signals_->pending.begin(), signals_->pending.end(), 0);
    signals_->msi_pending = 0;
  }
  UpdateSignals();
  UpdateMappings();
}

void PciDevice::VisitState(StateVisitor& visitor) {
  visitor.Section("pci", [&] {
    visitor.Version(1);
    std::array<uint8_t, PciConfigSpace::kSize> bytes = config_.bytes();
    visitor.Field("config", bytes);
    std::vector<uint8_t> table, pending;
    bool intx;
    uint32_t msi_pending;
    {
      LockGuard guard(signals_->mutex);
      intx = signals_->intx_wanted;
      msi_pending = signals_->msi_pending;
      pending = signals_->pending;
      table.resize(signals_->vectors.size() * 16);
      for (size_t i = 0; i < signals_->vectors.size(); i++) {
        const Signals::Vector& v = signals_->vectors[i];
        std::memcpy(&table[16 * i], &v.address, 8);
        std::memcpy(&table[16 * i + 8], &v.data, 4);
        std::memcpy(&table[16 * i + 12], &v.control, 4);
      }
    }
    visitor.Field("intx", intx);
    if (msi_cap_) visitor.Field("msi_pending", msi_pending);
    if (msix_) {
      visitor.FixedBytes("msix_table", table);
      visitor.FixedBytes("msix_pending", pending);
    }
    if (!visitor.loading() || visitor.failed()) return;
    config_.LoadGuestBits(bytes);
    {
      LockGuard guard(signals_->mutex);
      signals_->msi_pending = msi_pending;
      signals_->pending = pending;
      for (size_t i = 0; i < signals_->vectors.size(); i++) {
        Signals::Vector& v = signals_->vectors[i];
        std::memcpy(&v.address, &table[16 * i], 8);
        std::memcpy(&v.data, &table[16 * i + 8], 4);
        std::memcpy(&v.control, &table[16 * i + 12], 4);
        v.address &= ~3ull;
        v.control &= 1;
      }
    }
    UpdateSignals();
    UpdateMappings();
    SetIntx(intx);
  });
}

uint32_t PciDevice::ConfigRead(unsigned offset, unsigned size) {
  uint32_t value = config_.Read(offset, size);
  if (offset <= kStatus && offset + size > kStatus) {
    LockGuard guard(signals_->mutex);
    if (signals_->intx_wanted) value |= uint32_t{kStatusInterrupt} << (8 * (kStatus - offset));
  }
  return value;
}

void PciDevice::ConfigWrite(unsigned offset, unsigned size, uint32_t value) {
  config_.Write(offset, size, value);
  UpdateSignals();
  UpdateMappings();
  ConfigWritten(offset, size);
}

void PciDevice::Attach(PciBus& bus, uint8_t devfn) {
  bus_ = &bus;
  devfn_ = devfn;
}

void PciDevice::Detach() {
  if (!bus_) return;
  SetIntx(false);
  config_.ResetGuestBits();
  UpdateSignals();
  UpdateMappings();
  bus_ = nullptr;
}

void PciDevice::AddBar(unsigned index, PciBarKind kind, uint64_t size_bytes, IoHandler* handler,
                       unsigned max_access) {
  auto bar = std::make_unique<Bar>(kind, size_bytes, handler, max_access);
  VERIFY(index < 6 && !bars_[index] && std::has_single_bit(size_bytes));
  VERIFY(size_bytes >= (bar->io() ? 4 : 16) && (!bar->io() || size_bytes <= 256));
  unsigned offset = kBar0 + 4 * index;
  uint64_t mask = ~(size_bytes - 1);
  config_.SetWritable(offset, 4, mask);
  if (bar->is_64bit()) {
    VERIFY(index < 5 && !bars_[index + 1]);
    config_.SetWritable(offset + 4, 4, mask >> 32);
  } else {
    VERIFY(size_bytes <= 1ull << 31);
  }
  constexpr uint8_t kType[] = {0x1, 0x0, 0x4, 0xc};
  config_.Set(offset, 4, kType[static_cast<unsigned>(kind)]);
  bars_[index] = std::move(bar);
}

void PciDevice::SetBarDoorbells(unsigned index, std::vector<Doorbell> doorbells) {
  VERIFY(index < 6 && bars_[index]);
  Bar& bar = *bars_[index];
  bar.doorbells = std::move(doorbells);
  if (bar.mapped) (bar.io() ? env_.ports : env_.memory).SetDoorbells(bar.region, bar.doorbells);
}

bool PciDevice::BarAddress(unsigned index, uint64_t* base) const {
  if (index >= 6 || !bars_[index] || !bars_[index]->mapped) return false;
  *base = bars_[index]->base;
  return true;
}

PciDevice::BarInfo PciDevice::bar_info(unsigned index) const {
  if (index >= 6 || !bars_[index]) return {};
  return {bars_[index]->kind, bars_[index]->size};
}

uint8_t PciDevice::AddCapability(uint8_t id, uint8_t size) {
  uint8_t offset = next_cap_;
  VERIFY(offset + size <= static_cast<int>(PciConfigSpace::kSize));
  config_.Set(last_cap_ ? last_cap_ + 1 : kCapabilities, 1, offset);
  config_.Set(offset, 2, id);
  config_.Set(kStatus, 2, config_.Read(kStatus, 2) | kStatusCapabilities);
  last_cap_ = offset;
  next_cap_ = (offset + size + 3) & ~3;
  return offset;
}

void PciDevice::AddMsix(unsigned bar, unsigned vectors) {
  VERIFY(!msix_ && vectors >= 1 && vectors <= 2048);
  msix_ = std::make_unique<MsixTable>(*this, vectors);
  AddBar(bar, PciBarKind::kMemory32, msix_->bar_size(), msix_.get());
  msix_cap_ = AddCapability(kCapMsix, 12);
  config_.Set(msix_cap_ + 2, 2, vectors - 1);
  config_.SetWritable(msix_cap_ + 2, 2, 0xc000);
  config_.Set(msix_cap_ + 4, 4, bar);
  config_.Set(msix_cap_ + 8, 4, msix_->pba_offset() | bar);
  signals_->vectors.resize(vectors);
  signals_->pending.resize((vectors + 63) / 64 * 8);
}

void PciDevice::AddMsi(unsigned vectors_log2) {
  VERIFY(!msi_cap_ && vectors_log2 <= 5);
  msi_cap_ = AddCapability(kCapMsi, 24);
  config_.Set(msi_cap_ + 2, 2, vectors_log2 << 1 | 1 << 7 | 1 << 8);  // 64-bit, maskable
  config_.SetWritable(msi_cap_ + 2, 2, 0x71);
  config_.SetWritable(msi_cap_ + 4, 4, ~3u);
  config_.SetWritable(msi_cap_ + 8, 4, ~0u);
  config_.SetWritable(msi_cap_ + 12, 2, 0xffff);
  config_.SetWritable(msi_cap_ + 16, 4, ~0u >> (32 - (1u << vectors_log2)));
}

bool PciDevice::msix_enabled() const {
  LockGuard guard(signals_->mutex);
  return signals_->msix_on;
}

bool PciDevice::msi_enabled() const {
  LockGuard guard(signals_->mutex);
  return signals_->msi_on;
}

bool PciDevice::bus_master() const {
  LockGuard guard(signals_->mutex);
  return signals_->master;
}

void PciDevice::NotifyMsix(unsigned vector) {
  LockGuard guard(signals_->mutex);
  if (!signals_->msix_on || vector >= signals_->vectors.size()) return;
  signals_->SetPending(vector, true);
  if (!signals_->Blocked(vector)) {
    if (signals_->master)
      env_.msi.SendMsi(signals_->vectors[vector].address, signals_->vectors[vector].data);
    signals_->SetPending(vector, false);
  }
}

void PciDevice::NotifyMsi(unsigned vector) {
  LockGuard guard(signals_->mutex);
  if (!signals_->msi_on || !signals_->master || vector >= 32) return;
  if (signals_->msi_mask >> vector & 1) {
    signals_->msi_pending |= 1u << vector;
  } else {
    signals_->SendMsiVector(env_.msi, vector);
  }
}

void PciDevice::SetIntx(bool level) {
  LockGuard guard(signals_->mutex);
  signals_->intx_wanted = level;
  bool drive = level && !signals_->intx_disabled;
  if (drive == signals_->intx_driven || !bus_) return;
  signals_->intx_driven = drive;
  bus_->SetIntx(devfn_, config_.Read(kInterruptPin, 1), drive);
}

// Brings the interrupt state in line with the configuration bytes. Under lock().
void PciDevice::UpdateSignals() {
  uint16_t command = config_.Read(kCommand, 2);
  bool wanted;
  {
    LockGuard guard(signals_->mutex);
    Signals& s = *signals_;
    s.master = command & kCommandMaster;
    if (msix_) {
      uint16_t control = config_.Read(msix_cap_ + 2, 2);
      s.msix_on = control & 0x8000;
      s.msix_masked = control & 0x4000;
    }
    if (msi_cap_) {
      uint16_t control = config_.Read(msi_cap_ + 2, 2);
      s.msi_on = control & 1;
      s.msi_vectors_log2 = std::min(control >> 4 & 7, control >> 1 & 7);
      s.msi_address = config_.Read(msi_cap_ + 4, 4) | uint64_t{config_.Read(msi_cap_ + 8, 4)} << 32;
      s.msi_data = config_.Read(msi_cap_ + 12, 2);
      s.msi_mask = config_.Read(msi_cap_ + 16, 4);
      if (!s.msi_on) s.msi_pending = 0;
    }
    // PCI 3.0, 6.8: a function that signals by messages doesn't use its pin.
    s.intx_disabled = (command & kCommandIntxDisable) || s.msix_on || s.msi_on;
    s.Flush(env_.msi);
    if (msi_cap_) config_.Set(msi_cap_ + 20, 4, s.msi_pending);
    wanted = s.intx_wanted;
  }
  SetIntx(wanted);
}

// The address at which the guest wants the BAR decoded; false: nowhere. A BAR at zero, or one that
// would wrap around its space (as while the guest finds out sizes), is not decoded.
bool PciDevice::DecodedBase(const Bar& bar, unsigned index, uint64_t* base) const {
  uint16_t command = config_.Read(kCommand, 2);
  if (!bus_ || !(command & (bar.io() ? kCommandIo : kCommandMemory))) return false;
  unsigned offset = kBar0 + 4 * index;
  uint64_t address = config_.Read(offset, 4);
  if (bar.is_64bit()) address |= uint64_t{config_.Read(offset + 4, 4)} << 32;
  address &= ~(bar.size - 1);
  uint64_t last = address + bar.size - 1;
  uint64_t end = bar.io()         ? env_.ports.limit() - 1
                 : bar.is_64bit() ? env_.memory.limit() - 1
                                  : 0xfffffffeull;
  if (address == 0 || last < address || last > end) return false;
  *base = address;
  return true;
}

void PciDevice::UpdateMappings() {
  for (unsigned i = 0; i < 6; i++) {
    if (!bars_[i]) continue;
    Bar& bar = *bars_[i];
    AddressSpace& space = bar.io() ? env_.ports : env_.memory;
    uint64_t base = 0;
    bool wanted = DecodedBase(bar, i, &base);
    if (wanted == bar.mapped && (!wanted || base == bar.base)) continue;
    AddressSpace::Batch batch(space);
    if (bar.mapped) space.Remove(bar.region);
    bar.mapped = wanted;
    bar.base = base;
    if (!wanted) continue;
    Region region;
    region.name = id() + ".bar" + std::to_string(i);
    region.base = base;
    region.size = bar.size;
    region.priority = -1;  // RAM and the board's fixed devices win
    region.handler = bar.handler;
    region.lock = &lock_;
    region.max_access = bar.max_access;
    region.doorbells = bar.doorbells;
    bar.region = space.Add(std::move(region));
  }
}

}  // namespace kvartz
