// virtio over PCI: virtio 1.2 ch. 4.1, with the legacy interface of 4.1.4.10 for transitional
// devices.
#pragma once

#include <memory>
#include <vector>

#include "device/pci/pci_device.h"
#include "device/virtio/virtio_device.h"

namespace kvartz {

// Guarded by its slot.
//   BAR 0  I/O, legacy registers (transitional devices)
//   BAR 1  MSI-X table
//   BAR 4  memory: common, ISR, device and notification structures, 4 KiB each
class VirtioPci final : public PciDevice, public VirtioTransport {
 public:
  enum class Interfaces { kTransitional, kModernOnly, kLegacyOnly };
  // Errors: the host has no more descriptors.
  static Result<std::unique_ptr<VirtioPci>> Create(const DeviceEnv& env,
                                                   std::unique_ptr<VirtioDevice> device,
                                                   Interfaces interfaces);
  ~VirtioPci() override;

  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;
  void Quiesce() override { device_->Quiesce(); }
  void Resume() override { device_->Resume(); }
  uint32_t ConfigRead(unsigned offset, unsigned size) override;
  void ConfigWrite(unsigned offset, unsigned size, uint32_t value) override;

  VirtioDevice& virtio_device() override { return *device_; }

 protected:
  void ConfigWritten(unsigned offset, unsigned size) override;

 private:
  struct LegacyBar final : IoHandler {
    explicit LegacyBar(VirtioPci& owner) : pci(owner) {}
    uint64_t IoRead(uint64_t offset, unsigned size) override {
      return pci.LegacyRead(offset, size);
    }
    void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
      pci.LegacyWrite(offset, size, value);
    }
    VirtioPci& pci;
  };
  struct ModernBar final : IoHandler {
    explicit ModernBar(VirtioPci& owner) : pci(owner) {}
    uint64_t IoRead(uint64_t offset, unsigned size) override {
      return pci.ModernRead(offset, size);
    }
    void IoWrite(uint64_t offset, unsigned size, uint64_t value) override {
      pci.ModernWrite(offset, size, value);
    }
    VirtioPci& pci;
  };

  VirtioPci(const DeviceEnv& env, std::unique_ptr<VirtioDevice> device, Interfaces interfaces);
  void AddModernBar();
  void AddLegacyBar();
  Mutex& transport_lock() override { return lock(); }
  void SignalQueue(unsigned queue) override;
  void SignalConfig() override;
  void Signal(uint16_t vector, uint8_t isr_bit);

  uint32_t LegacyRead(uint64_t offset, unsigned size);
  void LegacyWrite(uint64_t offset, unsigned size, uint32_t value);
  void WriteLegacyQueueAddress(uint32_t page);
  uint32_t ModernRead(uint64_t offset, unsigned size);
  void ModernWrite(uint64_t offset, unsigned size, uint32_t value);
  uint32_t CommonRead(unsigned offset);
  void CommonWrite(unsigned offset, uint32_t value);
  void WriteQueueRegister(unsigned offset, uint32_t value);
  uint8_t ReadIsr();
  void WriteStatus(uint8_t value, VirtioInterface by);
  uint16_t CheckedVector(uint32_t vector) const;
  uint16_t* SelectedVector();
  void Kick(unsigned queue);
  // The window of the PCI configuration access capability: whether it shows something, and what.
  bool Window(uint32_t* offset, uint32_t* size);

  std::unique_ptr<VirtioDevice> device_;
  const Interfaces interfaces_;
  LegacyBar legacy_bar_{*this};
  ModernBar modern_bar_{*this};
  uint8_t window_cap_ = 0;
  unsigned vectors_ = 0;
  uint8_t isr_ = 0;
  uint16_t config_vector_ = Virtqueue::kNoVector;
  std::vector<uint16_t> queue_vectors_;
};

}  // namespace kvartz
