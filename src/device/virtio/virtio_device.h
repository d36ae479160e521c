// What all virtio devices have in common, whatever the transport: status, features, queues,
// doorbells, configuration space (virtio 1.2 ch. 2 and 3), and their options.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/fd.h"
#include "device/core/device.h"
#include "device/core/properties.h"
#include "device/virtio/virtqueue.h"

namespace kvartz {

// Options that every virtio device has.
struct VirtioConfig {
  static constexpr uint32_t kAutoVectors = UINT32_MAX;
  bool packed = false;
  bool event_idx = true;
  bool indirect_desc = true;
  bool iommu_platform = false;
  bool ioeventfd = true;
  // Over PCI only:
  uint32_t vectors = kAutoVectors;
  OnOffAuto disable_legacy = OnOffAuto::kAuto;
  bool disable_modern = false;
  std::string romfile;
  uint32_t rombar = 1;
};

// Rows of these for the table of a device whose config struct has a `VirtioConfig virtio`.
#define VIRTIO_PROPERTIES(Config)                                                               \
  PROPERTY(Config, "packed", virtio.packed, "offer packed virtqueues"),                         \
      PROPERTY(Config, "event_idx", virtio.event_idx, "offer notification by event index"),     \
      PROPERTY(Config, "indirect_desc", virtio.indirect_desc, "offer indirect descriptors"),    \
      PROPERTY(Config, "iommu_platform", virtio.iommu_platform, "DMA goes through an IOMMU"),   \
      PROPERTY(Config, "ioeventfd", virtio.ioeventfd, "kicks are served by the device's loop"), \
      PROPERTY(Config, "vectors", virtio.vectors, "MSI-X vectors (PCI; 0: none)"),              \
      PROPERTY(Config, "disable-legacy", virtio.disable_legacy, "no legacy interface (PCI)"),   \
      PROPERTY(Config, "disable-modern", virtio.disable_modern, "no virtio 1 interface (PCI)"), \
      PROPERTY(Config, "romfile", virtio.romfile, "option ROM (only the empty one: none)"),     \
      PROPERTY(Config, "rombar", virtio.rombar, "0: no option ROM")

class VirtioDevice;

// The other side of a VirtioDevice: the Device that the guest finds it behind. Called under its
// lock.
class VirtioTransport {
 public:
  virtual ~VirtioTransport() = default;
  virtual VirtioDevice& virtio_device() = 0;

 private:
  friend class VirtioDevice;
  virtual Mutex& transport_lock() = 0;
  virtual void SignalQueue(unsigned queue) = 0;
  virtual void SignalConfig() = 0;
};

enum class VirtioInterface { kLegacy, kModern };

// Guarded by its transport's lock: accesses of the guest hold it already; doorbells and a device's
// host callbacks take it with a LockGuard at their top. A doorbell is served on its queue's loop.
class VirtioDevice {
 public:
  VirtioDevice(const DeviceEnv& env, uint16_t device_id, const VirtioConfig& config,
               const std::vector<uint16_t>& queue_sizes);
  virtual ~VirtioDevice();
  VirtioDevice(const VirtioDevice&) = delete;
  VirtioDevice& operator=(const VirtioDevice&) = delete;

  // Called once by the transport, before the guest runs. Errors: the host has no more descriptors.
  Result<> Connect(VirtioTransport& transport);
  // Called once by the transport, before it goes away; without the lock.
  void Disconnect();

  // ---- for transports, under the lock
  uint16_t device_id() const { return device_id_; }
  const VirtioConfig& options() const { return options_; }
  uint64_t OfferedFeatures() const;
  uint64_t driver_features() const { return driver_features_; }
  // The words that the select registers choose.
  uint32_t SelectedDeviceFeatures() const;
  uint32_t SelectedDriverFeatures() const;
  void WriteDriverFeatures(unsigned word, uint32_t value, VirtioInterface by);
  uint8_t ReadStatus() const;
  void WriteStatus(uint8_t value, VirtioInterface by);
  uint8_t config_generation() const { return config_generation_; }
  uint32_t ReadConfig(unsigned offset, unsigned size);
  void WriteConfig(unsigned offset, unsigned size, uint32_t value, VirtioInterface by);
  unsigned queue_count() const { return static_cast<unsigned>(queues_.size()); }
  Virtqueue& queue(unsigned index) { return *queues_[index].queue; }
  // Null beyond the last one.
  Virtqueue* selected_queue() {
    return select.queue < queues_.size() ? queues_[select.queue].queue.get() : nullptr;
  }
  // The driver's word that a queue is set up (it stays so until a reset).
  void EnableQueue(unsigned index);
  // The driver gives one queue up.
  void ResetQueue(unsigned index);
  const EventFd& doorbell(unsigned index) const { return queues_[index].doorbell; }
  void SetDmaAllowed(bool allowed);
  void Reset();
  void VisitState(StateVisitor& visitor);
  // As Device's: without the lock.
  void Quiesce();
  void Resume();

  // Registers that choose what others show.
  struct Select {
    uint32_t device_features = 0;
    uint32_t driver_features = 0;
    uint16_t queue = 0;
  } select;

 protected:
  // ---- what a device is; all but DrainRequests, DropRequests and
  // QueueLoop under the lock
  virtual uint64_t DeviceFeatures() const = 0;
  // Its configuration space, little-endian, as it is now.
  virtual std::span<const uint8_t> ConfigSpace() = 0;
  virtual void ConfigWritten(unsigned /*offset*/, std::span<const uint8_t> /*bytes*/,
                             VirtioInterface /*by*/) {}
  // Elements may be there. Called on the queue's loop.
  virtual void QueueKicked(unsigned queue) = 0;
  // The features are final.
  virtual void FeaturesSettled() {}
  // The device may act (or, after it was stopped by Quiesce, again).
  virtual void Started() {}
  // Back to the state of power-on. Elements that are still with the host are never given back.
  virtual void DeviceReset() = 0;
  virtual void VisitDevice(StateVisitor& visitor) = 0;
  // Requests of before a reset still reach guest memory: the status keeps off 0 until they are done
  // (2.4.2).
  virtual bool RequestsUnderWay() const { return false; }
  // Returns when no request is under way.
  virtual void DrainRequests() {}
  // The device goes away: requests that only the machine's going on would end do so now.
  virtual void DropRequests() {}
  virtual EventLoop& QueueLoop(unsigned /*queue*/) { return env_.loop; }

  // ---- for devices, under the lock
  Mutex& lock() { return transport_->transport_lock(); }
  // Whether queues may be looked at now.
  bool serving() const { return live_ && !quiesced_; }
  bool Negotiated(unsigned feature) const { return (driver_features_ >> feature) & 1; }
  // Interrupts the driver if it wants that; a broken queue makes the device need a reset.
  void FinishQueue(unsigned queue);
  // The configuration space changed.
  void ConfigChanged();
  // The driver did what no driver may do.
  void NeedReset(const char* why);
  // Pops elements until there are none (then a kick is asked for), `handle` returns false (kicks
  // stay off), or the others' turn has come (then the doorbell rings again).
  template <typename Handle>
  void ServeQueue(unsigned index, VirtqElement* element, Handle handle) {
    Virtqueue& ring = queue(index);
    unsigned budget = 2u * ring.registers.size;
    do {
      ring.DisableKicks();
      while (ring.Pop(element)) {
        if (!handle(*element)) return;
        if (--budget == 0) return RingDoorbell(index);
      }
    } while (ring.EnableKicks());
  }
  void RingDoorbell(unsigned index) { queues_[index].doorbell.Signal(); }

  const DeviceEnv env_;

 private:
  struct Queue {
    std::unique_ptr<Virtqueue> queue;
    EventFd doorbell;
    bool watched = false;
  };
  void DoorbellRang(unsigned index);
  void SettleFeatures();
  void UpdateLive();

  const uint16_t device_id_;
  const VirtioConfig options_;
  VirtioTransport* transport_ = nullptr;
  std::vector<Queue> queues_;
  uint64_t driver_features_ = 0;
  uint8_t status_ = 0;
  uint8_t config_generation_ = 0;
  bool dma_allowed_ = false;
  bool early_legacy_kick_ = false;
  bool live_ = false;
  bool quiesced_ = false;
};

// The virtio device behind a Device; null: it isn't one.
VirtioDevice* VirtioDeviceOf(Device& device);

// Runs `task` on the loop's thread and returns when it is done. The loop runs, or is this thread's.
void RunOnLoop(EventLoop& loop, const std::function<void()>& task);

}  // namespace kvartz
