// virtio over memory-mapped registers: virtio 1.2 ch. 4.2 (version 2).
#pragma once

#include <memory>
#include <vector>

#include "device/virtio/virtio_device.h"

namespace kvartz {

// Guarded by its slot. 512 bytes; the configuration space begins at 0x100.
class VirtioMmio final : public MmioDevice, public VirtioTransport {
 public:
  static constexpr uint64_t kSize = 0x200;
  // Errors: the host has no more descriptors.
  static Result<std::unique_ptr<VirtioMmio>> Create(const DeviceEnv& env,
                                                    std::unique_ptr<VirtioDevice> device,
                                                    IrqLine irq);
  ~VirtioMmio() override;

  uint64_t IoRead(uint64_t offset, unsigned size) override;
  void IoWrite(uint64_t offset, unsigned size, uint64_t value) override;
  void Reset(ResetPhase phase) override;
  void VisitState(StateVisitor& visitor) override;
  void Quiesce() override { device_->Quiesce(); }
  void Resume() override { device_->Resume(); }

  // What kicks look like, for the region that this device is mapped in.
  std::vector<Doorbell> Doorbells() const;
  VirtioDevice& virtio_device() override { return *device_; }

 private:
  VirtioMmio(const DeviceEnv& env, std::unique_ptr<VirtioDevice> device, IrqLine irq);
  Mutex& transport_lock() override { return lock(); }
  void SignalQueue(unsigned queue) override;
  void SignalConfig() override;
  void SetIsr(uint32_t isr);
  uint32_t ReadRegister(unsigned offset);
  void WriteRegister(unsigned offset, uint32_t value);
  void WriteQueueRegister(unsigned offset, uint32_t value);

  std::unique_ptr<VirtioDevice> device_;
  const IrqLine irq_;
  uint32_t isr_ = 0;
};

}  // namespace kvartz
