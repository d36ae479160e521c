#include "device/virtio/virtio_device.h"

#include <fmt/core.h>
#include <linux/virtio_config.h>
#define VIRTIO_RING_NO_LEGACY  // its functions are not C++
#include <linux/virtio_ring.h>

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/log.h"

namespace kvartz {

void RunOnLoop(EventLoop& loop, const std::function<void()>& task) {
  if (loop.InLoopThread()) return task();
  Mutex mutex;
  CondVar finished;
  bool done = false;
  loop.Post([&] {
    task();
    LockGuard guard(mutex);
    done = true;
    finished.NotifyAll();
  });
  LockGuard guard(mutex);
  finished.Wait(guard, [&] { return done; });
}

VirtioDevice* VirtioDeviceOf(Device& device) {
  auto* transport = dynamic_cast<VirtioTransport*>(&device);
  return transport ? &transport->virtio_device() : nullptr;
}

VirtioDevice::VirtioDevice(const DeviceEnv& env, uint16_t device_id, const VirtioConfig& config,
                           const std::vector<uint16_t>& queue_sizes)
    : env_(env), device_id_(device_id), options_(config) {
  for (uint16_t size : queue_sizes) {
    Queue queue;
    queue.queue = std::make_unique<Virtqueue>(env.memory, size);
    queues_.push_back(std::move(queue));
  }
}

VirtioDevice::~VirtioDevice() {
  for (const Queue& queue : queues_) VERIFY(!queue.watched);
}

Result<> VirtioDevice::Connect(VirtioTransport& transport) {
  transport_ = &transport;
  for (Queue& queue : queues_) queue.doorbell = TRY(EventFd::Create());
  for (unsigned i = 0; i < queues_.size(); ++i) {
    RunOnLoop(QueueLoop(i), [&] {
      QueueLoop(i).Watch(queues_[i].doorbell.fd(), FdEvents::kRead,
                         [this, i](FdEvents) { DoorbellRang(i); });
    });
    queues_[i].watched = true;
  }
  return {};
}

void VirtioDevice::Disconnect() {
  for (unsigned i = 0; i < queues_.size(); ++i) {
    if (!queues_[i].watched) continue;
    RunOnLoop(QueueLoop(i), [&] { QueueLoop(i).Unwatch(queues_[i].doorbell.fd()); });
    queues_[i].watched = false;
  }
  DropRequests();
  DrainRequests();
}

// ---- features and status (3.1.1)

uint64_t VirtioDevice::OfferedFeatures() const {
  uint64_t features = DeviceFeatures() | 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_F_ANY_LAYOUT;
  if (options_.packed) features |= 1ull << VIRTIO_F_RING_PACKED;
  if (options_.event_idx) features |= 1ull << VIRTIO_RING_F_EVENT_IDX;
  if (options_.indirect_desc) features |= 1ull << VIRTIO_RING_F_INDIRECT_DESC;
  return features;
}

uint32_t VirtioDevice::SelectedDeviceFeatures() const {
  return select.device_features > 1
             ? 0
             : static_cast<uint32_t>(OfferedFeatures() >> 32 * select.device_features);
}

uint32_t VirtioDevice::SelectedDriverFeatures() const {
  return select.driver_features > 1
             ? 0
             : static_cast<uint32_t>(driver_features_ >> 32 * select.driver_features);
}

void VirtioDevice::WriteDriverFeatures(unsigned word, uint32_t value, VirtioInterface by) {
  // Final once they were accepted (or, by a legacy driver, put to use).
  if (word > 1 || (status_ & (VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK))) return;
  uint64_t mask = 0xffffffffull << (32 * word);
  driver_features_ = (driver_features_ & ~mask) | (uint64_t{value} << (32 * word));
  if (by == VirtioInterface::kLegacy) driver_features_ &= OfferedFeatures() & 0xffffffff;
}

uint8_t VirtioDevice::ReadStatus() const {
  if (status_ == 0 && RequestsUnderWay()) return VIRTIO_CONFIG_S_NEEDS_RESET;
  return status_;
}

void VirtioDevice::WriteStatus(uint8_t value, VirtioInterface by) {
  if (value == 0) return Reset();
  uint8_t added = value & ~status_;
  if (by == VirtioInterface::kModern && (added & VIRTIO_CONFIG_S_FEATURES_OK)) {
    bool acceptable =
        (driver_features_ & ~OfferedFeatures()) == 0 && Negotiated(VIRTIO_F_VERSION_1);
    if (!acceptable) {
      KLOG_GUEST("{}: driver features {:#x} refused (offered: {:#x})", env_.id, driver_features_,
                 OfferedFeatures());
      value &= ~VIRTIO_CONFIG_S_FEATURES_OK;
    }
  }
  bool settle = (value & ~status_) & (VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
  // The driver can't take bits back but by a reset.
  status_ |= value & ~VIRTIO_CONFIG_S_NEEDS_RESET;
  if (settle) SettleFeatures();
  UpdateLive();
}

void VirtioDevice::SettleFeatures() {
  for (Queue& queue : queues_) queue.queue->SetFeatures(driver_features_);
  FeaturesSettled();
}

void VirtioDevice::UpdateLive() {
  bool started = (status_ & VIRTIO_CONFIG_S_DRIVER_OK) || early_legacy_kick_;
  bool was_live = live_;
  live_ = started && dma_allowed_ && !(status_ & VIRTIO_CONFIG_S_NEEDS_RESET);
  for (Queue& queue : queues_) queue.queue->SetLive(live_);
  if (live_ && !was_live && !quiesced_) {
    Started();
    for (unsigned i = 0; i < queues_.size(); ++i) {
      if (queues_[i].queue->registers.enabled) RingDoorbell(i);
    }
  }
}

void VirtioDevice::SetDmaAllowed(bool allowed) {
  if (dma_allowed_ == allowed) return;
  dma_allowed_ = allowed;
  UpdateLive();
}

void VirtioDevice::NeedReset(const char* why) {
  if (status_ & VIRTIO_CONFIG_S_NEEDS_RESET) return;
  KLOG_GUEST("{}: the driver broke the rules ({}); it must reset the device", env_.id, why);
  status_ |= VIRTIO_CONFIG_S_NEEDS_RESET;
  // 2.1.2: told only to a driver that has taken the device into use.
  if (status_ & VIRTIO_CONFIG_S_DRIVER_OK) ConfigChanged();
  UpdateLive();
}

void VirtioDevice::Reset() {
  status_ = 0;
  driver_features_ = 0;
  early_legacy_kick_ = false;
  select = {};
  for (Queue& queue : queues_) {
    queue.queue->Reset();
    queue.queue->SetFeatures(0);
  }
  UpdateLive();
  DeviceReset();
}

// ---- configuration space

void VirtioDevice::ConfigChanged() {
  ++config_generation_;
  if (live_) transport_->SignalConfig();
}

uint32_t VirtioDevice::ReadConfig(unsigned offset, unsigned size) {
  std::span<const uint8_t> space = ConfigSpace();
  uint32_t value = 0;
  for (unsigned i = 0; i < size; ++i) {
    if (offset + i < space.size()) value |= uint32_t{space[offset + i]} << (8 * i);
  }
  return value;
}

void VirtioDevice::WriteConfig(unsigned offset, unsigned size, uint32_t value, VirtioInterface by) {
  if (offset + size > ConfigSpace().size()) return;
  uint8_t bytes[4];
  for (unsigned i = 0; i < size; ++i) bytes[i] = static_cast<uint8_t>(value >> (8 * i));
  ConfigWritten(offset, std::span(bytes, size), by);
}

// ---- queues

void VirtioDevice::EnableQueue(unsigned index) {
  Virtqueue& queue = *queues_[index].queue;
  queue.registers.enabled = true;
  queue.SetFeatures(driver_features_);
  queue.SetLive(live_);
  if (live_) RingDoorbell(index);
}

void VirtioDevice::ResetQueue(unsigned index) {
  // What is with the host would come back to a queue that knows nothing of it.
  if (queues_[index].queue->in_flight() > 0 && RequestsUnderWay())
    return NeedReset("queue stopped with requests under way");
  queues_[index].queue->Reset();
}

void VirtioDevice::DoorbellRang(unsigned index) {
  if (!queues_[index].doorbell.Consume()) return;
  LockGuard guard(lock());
  // 3.1.2: legacy drivers may use the device before DRIVER_OK.
  if (!live_ && (status_ & VIRTIO_CONFIG_S_DRIVER) && !(status_ & VIRTIO_CONFIG_S_FEATURES_OK) &&
      queues_[index].queue->registers.enabled) {
    early_legacy_kick_ = true;
    SettleFeatures();
    UpdateLive();
  }
  if (!serving() || !queues_[index].queue->usable()) return;
  QueueKicked(index);
  FinishQueue(index);
}

void VirtioDevice::FinishQueue(unsigned index) {
  Virtqueue& queue = *queues_[index].queue;
  queue.Publish();
  if (queue.broken()) return NeedReset(queue.why_broken());
  if (queue.ShouldNotify()) transport_->SignalQueue(index);
}

// ---- stopping, state

void VirtioDevice::Quiesce() {
  {
    LockGuard guard(lock());
    quiesced_ = true;
  }
  DrainRequests();
}

void VirtioDevice::Resume() {
  LockGuard guard(lock());
  if (!std::exchange(quiesced_, false) || !live_) return;
  Started();
  for (unsigned i = 0; i < queues_.size(); ++i) RingDoorbell(i);
}

void VirtioDevice::VisitState(StateVisitor& v) {
  v.Section("virtio", [&] {
    v.Version(1);
    v.Field("status", status_);
    v.Field("driver_features", driver_features_);
    v.Field("config_generation", config_generation_);
    v.Field("device_feature_select", select.device_features);
    v.Field("driver_feature_select", select.driver_features);
    v.Field("queue_select", select.queue);
    v.Field("early_legacy_kick", early_legacy_kick_);
    for (unsigned i = 0; i < queues_.size(); ++i) {
      v.Section(fmt::format("queue{}", i), [&] { queues_[i].queue->VisitState(v); });
    }
    if (!v.loading()) return;
    bool accepted = status_ & (VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
    if (accepted && (driver_features_ & ~OfferedFeatures()) != 0) {
      v.Reject(fmt::format("the guest uses features {:#x} that this device doesn't have",
                           driver_features_ & ~OfferedFeatures()));
    }
  });
  if (v.loading()) SettleFeatures();
  v.Section("device", [&] { VisitDevice(v); });
  if (!v.loading()) return;
  live_ = false;
  UpdateLive();
}

}  // namespace kvartz
