// PCI functions: configuration space, BARs, capabilities, INTx, MSI and MSI-X. PCI Local Bus 3.0;
// PCI Express 5.0 ch. 7.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "device/core/device.h"

namespace kvartz {

class PciBus;

struct PciIdentity {
  uint16_t vendor = 0;
  uint16_t device = 0;
  uint8_t revision = 0;
  uint32_t class_code = 0;  // 24 bits: class, subclass, interface
  uint16_t subsystem_vendor = 0;
  uint16_t subsystem = 0;
  uint8_t interrupt_pin = 0;  // 0: none, 1: INTA
  bool multifunction = false;
};

enum class PciBarKind : uint8_t { kIo, kMemory32, kMemory64, kMemory64Prefetch };

// Configuration bytes with, for each bit, whether the guest may write it or clears it by writing 1.
class PciConfigSpace {
 public:
  static constexpr unsigned kSize = 256;
  uint32_t Read(unsigned offset, unsigned size) const;
  void Write(unsigned offset, unsigned size, uint32_t value);  // as the guest: honours the masks
  void Set(unsigned offset, unsigned size, uint32_t value);    // as the device: ignores them
  void SetWritable(unsigned offset, unsigned size, uint32_t mask);
  void SetWriteOneToClear(unsigned offset, unsigned size, uint32_t mask);
  std::array<uint8_t, kSize>& bytes() { return bytes_; }
  // Bits that the guest can change (written, or cleared by writing 1) go to zero.
  void ResetGuestBits();
  // Takes the guest's bits from `saved`; what the guest can't write stays.
  void LoadGuestBits(const std::array<uint8_t, kSize>& saved);

 private:
  std::array<uint8_t, kSize> bytes_{};
  std::array<uint8_t, kSize> writable_{};
  std::array<uint8_t, kSize> w1c_{};
};

// One function. Guarded by its slot (configuration accesses take the same lock). A derived class
// sets up its BARs and capabilities in its constructor, overrides Reset/VisitState and calls
// PciDevice's first.
class PciDevice : public Device {
 public:
  PciDevice(const DeviceEnv& env, const PciIdentity& identity);
  ~PciDevice() override;

  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;

  // By the bus, under lock(). Offset + size <= 256, naturally aligned.
  virtual uint32_t ConfigRead(unsigned offset, unsigned size);
  virtual void ConfigWrite(unsigned offset, unsigned size, uint32_t value);

  // By the bus when the function is plugged and unplugged.
  void Attach(PciBus& bus, uint8_t devfn);
  void Detach();
  uint8_t devfn() const { return devfn_; }
  // Others may be in its slot: of function 0. Before it is plugged.
  void SetMultifunction();
  bool multifunction() const;

  // A BAR as declared; size_bytes 0: there is none. For firmware that assigns addresses.
  struct BarInfo {
    PciBarKind kind = PciBarKind::kMemory32;
    uint64_t size_bytes = 0;
  };
  BarInfo bar_info(unsigned index) const;

  PciConfigSpace& config() { return config_; }

 protected:
  // Declares BAR `index` of `size_bytes` (a power of two; at least 4 for I/O, 16 for memory, 4096
  // is advised).
  void AddBar(unsigned index, PciBarKind kind, uint64_t size_bytes, IoHandler* handler,
              unsigned max_access = 8);
  // Doorbells inside a BAR; offsets from the BAR's start. Honoured wherever the guest maps it.
  void SetBarDoorbells(unsigned index, std::vector<Doorbell> doorbells);
  // Base address that the guest gave a BAR, if it is decoded now.
  bool BarAddress(unsigned index, uint64_t* base) const;
  // Appends a capability of `size` bytes (id and next pointer included); returns its offset.
  uint8_t AddCapability(uint8_t id, uint8_t size);
  // `vectors` MSI-X vectors; table and pending bits live in BAR `bar`, which this call declares.
  void AddMsix(unsigned bar, unsigned vectors);
  void AddMsi(unsigned vectors_log2);

  bool msix_enabled() const;
  bool msi_enabled() const;
  // Signals a vector of MSI-X (pending bit if masked) or MSI. Any thread, with or without lock().
  void NotifyMsix(unsigned vector);
  void NotifyMsi(unsigned vector);
  // Level of the INTx pin; honours the command register's disable bit, mirrors the status bit. Any
  // thread, as above.
  void SetIntx(bool level);
  bool bus_master() const;  // DMA allowed
  // After the guest wrote the command register, a capability or anything else; `offset`, `size` as
  // written.
  virtual void ConfigWritten(unsigned offset, unsigned size) {}

 private:
  struct Bar;
  struct Signals;
  class MsixTable;
  void UpdateMappings();
  bool DecodedBase(const Bar& bar, unsigned index, uint64_t* base) const;
  void UpdateSignals();
  PciConfigSpace config_;
  std::array<std::unique_ptr<Bar>, 6> bars_;
  std::unique_ptr<Signals> signals_;
  std::unique_ptr<MsixTable> msix_;
  uint8_t msix_cap_ = 0;
  uint8_t msi_cap_ = 0;
  uint8_t next_cap_ = 0x40;
  uint8_t last_cap_ = 0;
  PciBus* bus_ = nullptr;
  uint8_t devfn_ = 0;
};

// One bus; outlives its functions. Finds functions by devfn and routes INTx. Guarded by its lock.
class PciBus {
 public:
  // `intx` gets lines 0..3: (pin - 1 + slot) & 3, counted over the functions that pull them.
  explicit PciBus(IrqSink& intx) : intx_(intx) {}
  // Plugs at `devfn`, or into the first free slot if devfn < 0. Errors: slot taken, bus full, a
  // slot of several functions whose function 0 doesn't say so.
  Result<uint8_t> Plug(PciDevice& device, int devfn);
  void Unplug(PciDevice& device);
  PciDevice* Find(uint8_t devfn);
  // Configuration access by the host bridge; absent functions read all ones.
  uint32_t ConfigRead(uint8_t devfn, unsigned offset, unsigned size);
  void ConfigWrite(uint8_t devfn, unsigned offset, unsigned size, uint32_t value);
  // Called by the function on a change of its pin's level. A leaf.
  void SetIntx(uint8_t devfn, unsigned pin, bool level);

 private:
  Result<> CheckFunctions(const PciDevice& device, int devfn) const;
  IrqSink& intx_;
  Mutex mutex_;  // held across configuration accesses, before the function's lock
  std::array<PciDevice*, 256> functions_{};
  Mutex intx_mutex_;
  std::array<int, 4> asserted_{};
};

}  // namespace kvartz
