#include "device/virtio/virtio_mmio.h"

#include <linux/virtio_mmio.h>

namespace kvartz {
namespace {

constexpr uint32_t kMagic = 0x74726976;  // "virt"
constexpr uint32_t kVersion = 2;
constexpr uint32_t kVendor = 0x1af4;
// There is no shared memory: a length of all ones (4.2.2.1).
constexpr uint32_t kNoSharedMemory = 0xffffffff;

}  // namespace

Result<std::unique_ptr<VirtioMmio>> VirtioMmio::Create(const DeviceEnv& env,
                                                       std::unique_ptr<VirtioDevice> device,
                                                       IrqLine irq) {
  std::unique_ptr<VirtioMmio> mmio(new VirtioMmio(env, std::move(device), irq));
  TRY(mmio->device_->Connect(*mmio));
  // Nothing stands between this bus and memory.
  mmio->device_->SetDmaAllowed(true);
  return mmio;
}

VirtioMmio::VirtioMmio(const DeviceEnv& env, std::unique_ptr<VirtioDevice> device, IrqLine irq)
    : MmioDevice(env), device_(std::move(device)), irq_(irq) {}

VirtioMmio::~VirtioMmio() { device_->Disconnect(); }

std::vector<Doorbell> VirtioMmio::Doorbells() const {
  std::vector<Doorbell> doorbells;
  if (!device_->options().ioeventfd) return doorbells;
  for (unsigned i = 0; i < device_->queue_count(); ++i) {
    doorbells.push_back({.offset = VIRTIO_MMIO_QUEUE_NOTIFY,
                         .size = 4,
                         .match_value = true,
                         .value = i,
                         .event_fd = device_->doorbell(i).fd()});
  }
  return doorbells;
}

void VirtioMmio::Reset(ResetPhase phase) {
  if (phase == ResetPhase::kEnter) device_->Reset();
  if (phase == ResetPhase::kHold) SetIsr(0);
}

void VirtioMmio::SetIsr(uint32_t isr) {
  isr_ = isr;
  irq_.Set(isr_ != 0);
}

void VirtioMmio::SignalQueue(unsigned /*queue*/) { SetIsr(isr_ | VIRTIO_MMIO_INT_VRING); }
void VirtioMmio::SignalConfig() { SetIsr(isr_ | VIRTIO_MMIO_INT_CONFIG); }

uint64_t VirtioMmio::IoRead(uint64_t offset, unsigned size) {
  if (offset >= VIRTIO_MMIO_CONFIG) {
    auto at = static_cast<unsigned>(offset - VIRTIO_MMIO_CONFIG);
    if (size < 8) return device_->ReadConfig(at, size);
    return device_->ReadConfig(at, 4) | uint64_t{device_->ReadConfig(at + 4, 4)} << 32;
  }
  return size == 4 ? ReadRegister(static_cast<unsigned>(offset)) : 0;
}

void VirtioMmio::IoWrite(uint64_t offset, unsigned size, uint64_t value) {
  if (offset >= VIRTIO_MMIO_CONFIG && size <= 4) {
    device_->WriteConfig(static_cast<unsigned>(offset - VIRTIO_MMIO_CONFIG), size,
                         static_cast<uint32_t>(value), VirtioInterface::kModern);
  } else if (size == 4) {
    WriteRegister(static_cast<unsigned>(offset), static_cast<uint32_t>(value));
  }
}

uint32_t VirtioMmio::ReadRegister(unsigned offset) {
  const Virtqueue* queue = device_->selected_queue();
  switch (offset) {
    case VIRTIO_MMIO_MAGIC_VALUE:
      return kMagic;
    case VIRTIO_MMIO_VERSION:
      return kVersion;
    case VIRTIO_MMIO_DEVICE_ID:
      return device_->device_id();
    case VIRTIO_MMIO_VENDOR_ID:
      return kVendor;
    case VIRTIO_MMIO_DEVICE_FEATURES:
      return device_->SelectedDeviceFeatures();
    case VIRTIO_MMIO_QUEUE_NUM_MAX:
      return queue ? queue->max_size() : 0;
    case VIRTIO_MMIO_QUEUE_READY:
      return queue && queue->registers.enabled;
    case VIRTIO_MMIO_INTERRUPT_STATUS:
      return isr_;
    case VIRTIO_MMIO_STATUS:
      return device_->ReadStatus();
    case VIRTIO_MMIO_SHM_LEN_LOW:
    case VIRTIO_MMIO_SHM_LEN_HIGH:
    case VIRTIO_MMIO_SHM_BASE_LOW:
    case VIRTIO_MMIO_SHM_BASE_HIGH:
      return kNoSharedMemory;
    case VIRTIO_MMIO_CONFIG_GENERATION:
      return device_->config_generation();
    default:
      return 0;
  }
}

void VirtioMmio::WriteRegister(unsigned offset, uint32_t value) {
  switch (offset) {
    case VIRTIO_MMIO_DEVICE_FEATURES_SEL:
      device_->select.device_features = value;
      return;
    case VIRTIO_MMIO_DRIVER_FEATURES:
      return device_->WriteDriverFeatures(device_->select.driver_features, value,
                                          VirtioInterface::kModern);
    case VIRTIO_MMIO_DRIVER_FEATURES_SEL:
      device_->select.driver_features = value;
      return;
    case VIRTIO_MMIO_QUEUE_SEL:
      device_->select.queue = static_cast<uint16_t>(value);
      return;
    case VIRTIO_MMIO_QUEUE_NOTIFY:
      if (value < device_->queue_count()) device_->doorbell(value).Signal();
      return;
    case VIRTIO_MMIO_INTERRUPT_ACK:
      return SetIsr(isr_ & ~value);
    case VIRTIO_MMIO_STATUS:
      device_->WriteStatus(static_cast<uint8_t>(value), VirtioInterface::kModern);
      if ((value & 0xff) == 0) SetIsr(0);
      return;
    default:
      return WriteQueueRegister(offset, value);
  }
}

void VirtioMmio::WriteQueueRegister(unsigned offset, uint32_t value) {
  Virtqueue* queue = device_->selected_queue();
  if (!queue) return;
  Virtqueue::Registers& r = queue->registers;
  if (offset == VIRTIO_MMIO_QUEUE_READY) {
    if (value == 1 && !r.enabled) device_->EnableQueue(device_->select.queue);
    if (value == 0 && r.enabled) device_->ResetQueue(device_->select.queue);
    return;
  }
  // 4.2.2.2: the rest is the driver's only until the queue is ready.
  if (r.enabled) return;
  switch (offset) {
    case VIRTIO_MMIO_QUEUE_NUM:
      if (value != 0 && value <= queue->max_size()) r.size = static_cast<uint16_t>(value);
      return;
    case VIRTIO_MMIO_QUEUE_DESC_LOW:
      return SetLow32(&r.desc, value);
    case VIRTIO_MMIO_QUEUE_DESC_HIGH:
      return SetHigh32(&r.desc, value);
    case VIRTIO_MMIO_QUEUE_AVAIL_LOW:
      return SetLow32(&r.driver, value);
    case VIRTIO_MMIO_QUEUE_AVAIL_HIGH:
      return SetHigh32(&r.driver, value);
    case VIRTIO_MMIO_QUEUE_USED_LOW:
      return SetLow32(&r.device, value);
    case VIRTIO_MMIO_QUEUE_USED_HIGH:
      return SetHigh32(&r.device, value);
    default:
      return;
  }
}

void VirtioMmio::VisitState(StateVisitor& v) {
  v.Section("virtio_mmio", [&] {
    v.Version(1);
    v.Field("isr", isr_);
  });
  if (v.loading()) {
    device_->SetDmaAllowed(true);
    SetIsr(isr_ & (VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG));
  }
  device_->VisitState(v);
}

}  // namespace kvartz
