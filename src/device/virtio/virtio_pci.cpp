#include "device/virtio/virtio_pci.h"

#include <fmt/core.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_pci.h>

#include <algorithm>

#include "base/check.h"
#include "device/pci/pci_config.h"

namespace kvartz {
namespace {

constexpr uint16_t kVendor = 0x1af4;
constexpr uint16_t kModernDeviceBase = 0x1040;
// Of devices that have no legacy interface; transitional ones have their virtio id there
// (4.1.2.1, 4.1.2.3).
constexpr uint16_t kModernSubsystem = 0x1100;

struct PciKind {
  uint16_t virtio_id;
  uint16_t transitional_id;
  uint32_t class_code;
};
constexpr PciKind kKinds[] = {
    {VIRTIO_ID_NET, 0x1000, 0x020000},     {VIRTIO_ID_BLOCK, 0x1001, 0x010000},
    {VIRTIO_ID_BALLOON, 0x1002, 0x00ff00}, {VIRTIO_ID_CONSOLE, 0x1003, 0x078000},
    {VIRTIO_ID_RNG, 0x1005, 0x00ff00},
};

PciIdentity IdentityOf(const VirtioDevice& device, VirtioPci::Interfaces interfaces) {
  auto kind = std::ranges::find(kKinds, device.device_id(), &PciKind::virtio_id);
  VERIFY(kind != std::end(kKinds));
  bool modern_only = interfaces == VirtioPci::Interfaces::kModernOnly;
  PciIdentity identity;
  identity.vendor = kVendor;
  identity.device = modern_only ? kModernDeviceBase + kind->virtio_id : kind->transitional_id;
  identity.revision = modern_only ? 1 : 0;
  identity.class_code = kind->class_code;
  identity.subsystem_vendor = kVendor;
  identity.subsystem = modern_only ? kModernSubsystem : kind->virtio_id;
  identity.interrupt_pin = 1;
  return identity;
}

constexpr unsigned kLegacyBarIndex = 0, kMsixBarIndex = 1, kModernBarIndex = 4;
constexpr uint64_t kLegacyBarSize = 128;
constexpr uint64_t kModernBarSize = 0x4000;
// Structures of BAR 4.
constexpr uint32_t kCommon = 0x0000, kIsr = 0x1000, kDeviceSpecific = 0x2000, kNotify = 0x3000,
                   kStructSize = 0x1000;
constexpr uint32_t kNotifyMultiplier = 4;
constexpr uint64_t kLegacyRingAlign = VIRTIO_PCI_VRING_ALIGN;

}  // namespace

Result<std::unique_ptr<VirtioPci>> VirtioPci::Create(const DeviceEnv& env,
                                                     std::unique_ptr<VirtioDevice> device,
                                                     Interfaces interfaces) {
  std::unique_ptr<VirtioPci> pci(new VirtioPci(env, std::move(device), interfaces));
  TRY(pci->device_->Connect(*pci));
  if (interfaces != Interfaces::kModernOnly) pci->AddLegacyBar();
  if (interfaces != Interfaces::kLegacyOnly) pci->AddModernBar();
  return pci;
}

VirtioPci::VirtioPci(const DeviceEnv& env, std::unique_ptr<VirtioDevice> device,
                     Interfaces interfaces)
    : PciDevice(env, IdentityOf(*device, interfaces)),
      device_(std::move(device)),
      interfaces_(interfaces) {
  unsigned queues = device_->queue_count();
  VERIFY(queues * kNotifyMultiplier <= kStructSize);
  queue_vectors_.assign(queues, Virtqueue::kNoVector);
  vectors_ = device_->options().vectors;
  if (vectors_ == VirtioConfig::kAutoVectors) vectors_ = std::min(queues + 1, 65u);
  if (vectors_ > 0) AddMsix(kMsixBarIndex, vectors_);
}

VirtioPci::~VirtioPci() { device_->Disconnect(); }

void VirtioPci::AddModernBar() {
  AddBar(kModernBarIndex, PciBarKind::kMemory64Prefetch, kModernBarSize, &modern_bar_, 4);
  auto add = [&](uint8_t type, uint8_t size, uint32_t offset, uint32_t length) {
    uint8_t at = AddCapability(pci::kCapVendor, size);
    config().Set(at + VIRTIO_PCI_CAP_LEN, 1, size);
    config().Set(at + VIRTIO_PCI_CAP_CFG_TYPE, 1, type);
    config().Set(at + VIRTIO_PCI_CAP_BAR, 1, kModernBarIndex);
    config().Set(at + VIRTIO_PCI_CAP_OFFSET, 4, offset);
    config().Set(at + VIRTIO_PCI_CAP_LENGTH, 4, length);
    return at;
  };
  add(VIRTIO_PCI_CAP_COMMON_CFG, sizeof(virtio_pci_cap), kCommon, kStructSize);
  add(VIRTIO_PCI_CAP_ISR_CFG, sizeof(virtio_pci_cap), kIsr, kStructSize);
  add(VIRTIO_PCI_CAP_DEVICE_CFG, sizeof(virtio_pci_cap), kDeviceSpecific, kStructSize);
  uint8_t notify =
      add(VIRTIO_PCI_CAP_NOTIFY_CFG, sizeof(virtio_pci_notify_cap), kNotify, kStructSize);
  config().Set(notify + VIRTIO_PCI_NOTIFY_CAP_MULT, 4, kNotifyMultiplier);
  window_cap_ = add(VIRTIO_PCI_CAP_PCI_CFG, sizeof(virtio_pci_cfg_cap), 0, 0);
  config().Set(window_cap_ + VIRTIO_PCI_CAP_BAR, 1, 0);
  config().SetWritable(window_cap_ + VIRTIO_PCI_CAP_BAR, 1, 0xff);
  config().SetWritable(window_cap_ + VIRTIO_PCI_CAP_OFFSET, 4, ~0u);
  config().SetWritable(window_cap_ + VIRTIO_PCI_CAP_LENGTH, 4, ~0u);
  config().SetWritable(window_cap_ + sizeof(virtio_pci_cap), 4, ~0u);
  if (!device_->options().ioeventfd) return;
  std::vector<Doorbell> doorbells;
  for (unsigned i = 0; i < device_->queue_count(); ++i) {
    doorbells.push_back(
        {.offset = kNotify + kNotifyMultiplier * i, .event_fd = device_->doorbell(i).fd()});
  }
  SetBarDoorbells(kModernBarIndex, std::move(doorbells));
}

void VirtioPci::AddLegacyBar() {
  AddBar(kLegacyBarIndex, PciBarKind::kIo, kLegacyBarSize, &legacy_bar_, 4);
  if (!device_->options().ioeventfd) return;
  std::vector<Doorbell> doorbells;
  for (unsigned i = 0; i < device_->queue_count(); ++i) {
    doorbells.push_back({.offset = VIRTIO_PCI_QUEUE_NOTIFY,
                         .size = 2,
                         .match_value = true,
                         .value = i,
                         .event_fd = device_->doorbell(i).fd()});
  }
  SetBarDoorbells(kLegacyBarIndex, std::move(doorbells));
}

void VirtioPci::Reset(ResetPhase phase) {
  PciDevice::Reset(phase);
  if (phase != ResetPhase::kEnter) return;
  device_->SetDmaAllowed(false);
  WriteStatus(0, VirtioInterface::kModern);
}

// ---- interrupts

void VirtioPci::Signal(uint16_t vector, uint8_t isr_bit) {
  if (msix_enabled()) {
    if (vector != Virtqueue::kNoVector) NotifyMsix(vector);
    return;
  }
  isr_ |= isr_bit;
  SetIntx(true);
}

void VirtioPci::SignalQueue(unsigned queue) { Signal(queue_vectors_[queue], 1); }
void VirtioPci::SignalConfig() { Signal(config_vector_, VIRTIO_PCI_ISR_CONFIG); }

uint8_t VirtioPci::ReadIsr() {
  uint8_t value = isr_;
  isr_ = 0;
  SetIntx(false);
  return value;
}

uint16_t VirtioPci::CheckedVector(uint32_t vector) const {
  return vector < vectors_ ? static_cast<uint16_t>(vector) : Virtqueue::kNoVector;
}

uint16_t* VirtioPci::SelectedVector() {
  return device_->select.queue < queue_vectors_.size() ? &queue_vectors_[device_->select.queue]
                                                       : nullptr;
}

void VirtioPci::WriteStatus(uint8_t value, VirtioInterface by) {
  device_->WriteStatus(value, by);
  if (value != 0) return;
  isr_ = 0;
  SetIntx(false);
  config_vector_ = Virtqueue::kNoVector;
  std::ranges::fill(queue_vectors_, Virtqueue::kNoVector);
}

// Where no doorbell catches the write (or it was switched off).
void VirtioPci::Kick(unsigned queue) {
  if (queue < device_->queue_count()) device_->doorbell(queue).Signal();
}

// ---- legacy registers (4.1.4.10)

uint32_t VirtioPci::LegacyRead(uint64_t offset, unsigned size) {
  Virtqueue* queue = device_->selected_queue();
  bool msix = msix_enabled();
  unsigned device_config = VIRTIO_PCI_CONFIG_OFF(msix);
  if (offset >= device_config) return device_->ReadConfig(offset - device_config, size);
  switch (offset) {
    case VIRTIO_PCI_HOST_FEATURES:
      return static_cast<uint32_t>(device_->OfferedFeatures());
    case VIRTIO_PCI_GUEST_FEATURES:
      return static_cast<uint32_t>(device_->driver_features());
    case VIRTIO_PCI_QUEUE_PFN:
      return queue && queue->registers.enabled
                 ? queue->registers.desc.value >> VIRTIO_PCI_QUEUE_ADDR_SHIFT
                 : 0;
    case VIRTIO_PCI_QUEUE_NUM:
      return queue ? queue->max_size() : 0;
    case VIRTIO_PCI_QUEUE_SEL:
      return device_->select.queue;
    case VIRTIO_PCI_STATUS:
      return device_->ReadStatus();
    case VIRTIO_PCI_ISR:
      return ReadIsr();
    case VIRTIO_MSI_CONFIG_VECTOR:
      return config_vector_;
    case VIRTIO_MSI_QUEUE_VECTOR:
      return SelectedVector() ? *SelectedVector() : Virtqueue::kNoVector;
    default:
      return 0;
  }
}

void VirtioPci::LegacyWrite(uint64_t offset, unsigned size, uint32_t value) {
  unsigned device_config = VIRTIO_PCI_CONFIG_OFF(msix_enabled());
  if (offset >= device_config) {
    return device_->WriteConfig(offset - device_config, size, value, VirtioInterface::kLegacy);
  }
  switch (offset) {
    case VIRTIO_PCI_GUEST_FEATURES:
      return device_->WriteDriverFeatures(0, value, VirtioInterface::kLegacy);
    case VIRTIO_PCI_QUEUE_PFN:
      return WriteLegacyQueueAddress(value);
    case VIRTIO_PCI_QUEUE_SEL:
      device_->select.queue = static_cast<uint16_t>(value);
      return;
    case VIRTIO_PCI_QUEUE_NOTIFY:
      return Kick(value & 0xffff);
    case VIRTIO_PCI_STATUS:
      return WriteStatus(static_cast<uint8_t>(value), VirtioInterface::kLegacy);
    case VIRTIO_MSI_CONFIG_VECTOR:
      config_vector_ = CheckedVector(value);
      return;
    case VIRTIO_MSI_QUEUE_VECTOR:
      if (SelectedVector()) *SelectedVector() = CheckedVector(value);
      return;
    default:
      return;
  }
}

// 2.7.2: one page-aligned piece holds table, available ring and, from the next page on, the used
// ring.
void VirtioPci::WriteLegacyQueueAddress(uint32_t page) {
  Virtqueue* queue = device_->selected_queue();
  if (!queue) return;
  if (page == 0) return device_->ResetQueue(device_->select.queue);
  uint64_t size = queue->max_size();
  Gpa base(uint64_t{page} << VIRTIO_PCI_QUEUE_ADDR_SHIFT);
  uint64_t used = (16 * size + 6 + 2 * size + kLegacyRingAlign - 1) & ~(kLegacyRingAlign - 1);
  queue->registers = {.size = queue->max_size(),
                      .enabled = false,
                      .desc = base,
                      .driver = base + 16 * size,
                      .device = base + used};
  device_->EnableQueue(device_->select.queue);
}

// ---- modern structures (4.1.4)

uint32_t VirtioPci::ModernRead(uint64_t offset, unsigned size) {
  if (offset < kIsr) return CommonRead(static_cast<unsigned>(offset));
  if (offset < kDeviceSpecific) return offset == kIsr ? ReadIsr() : 0;
  if (offset < kNotify) return device_->ReadConfig(offset - kDeviceSpecific, size);
  return 0;
}

void VirtioPci::ModernWrite(uint64_t offset, unsigned size, uint32_t value) {
  if (offset < kIsr) return CommonWrite(static_cast<unsigned>(offset), value);
  if (offset < kDeviceSpecific) return;
  if (offset < kNotify)
    return device_->WriteConfig(offset - kDeviceSpecific, size, value, VirtioInterface::kModern);
  Kick((offset - kNotify) / kNotifyMultiplier);
}

uint32_t VirtioPci::CommonRead(unsigned offset) {
  switch (offset) {
    case VIRTIO_PCI_COMMON_DFSELECT:
      return device_->select.device_features;
    case VIRTIO_PCI_COMMON_DF:
      return device_->SelectedDeviceFeatures();
    case VIRTIO_PCI_COMMON_GFSELECT:
      return device_->select.driver_features;
    case VIRTIO_PCI_COMMON_GF:
      return device_->SelectedDriverFeatures();
    case VIRTIO_PCI_COMMON_MSIX:
      return config_vector_;
    case VIRTIO_PCI_COMMON_NUMQ:
      return device_->queue_count();
    case VIRTIO_PCI_COMMON_STATUS:
      return device_->ReadStatus();
    case VIRTIO_PCI_COMMON_CFGGENERATION:
      return device_->config_generation();
    case VIRTIO_PCI_COMMON_Q_SELECT:
      return device_->select.queue;
    default:
      break;
  }
  Virtqueue* queue = device_->selected_queue();
  if (!queue) return 0;  // queue_size 0: there is no such queue
  const Virtqueue::Registers& r = queue->registers;
  switch (offset) {
    case VIRTIO_PCI_COMMON_Q_SIZE:
      return r.size;
    case VIRTIO_PCI_COMMON_Q_MSIX:
      return *SelectedVector();
    case VIRTIO_PCI_COMMON_Q_ENABLE:
      return r.enabled;
    case VIRTIO_PCI_COMMON_Q_NOFF:
      return device_->select.queue;
    case VIRTIO_PCI_COMMON_Q_DESCLO:
      return r.desc.value;
    case VIRTIO_PCI_COMMON_Q_DESCHI:
      return r.desc.value >> 32;
    case VIRTIO_PCI_COMMON_Q_AVAILLO:
      return r.driver.value;
    case VIRTIO_PCI_COMMON_Q_AVAILHI:
      return r.driver.value >> 32;
    case VIRTIO_PCI_COMMON_Q_USEDLO:
      return r.device.value;
    case VIRTIO_PCI_COMMON_Q_USEDHI:
      return r.device.value >> 32;
    default:
      return 0;
  }
}

void VirtioPci::CommonWrite(unsigned offset, uint32_t value) {
  switch (offset) {
    case VIRTIO_PCI_COMMON_DFSELECT:
      device_->select.device_features = value;
      return;
    case VIRTIO_PCI_COMMON_GFSELECT:
      device_->select.driver_features = value;
      return;
    case VIRTIO_PCI_COMMON_GF:
      return device_->WriteDriverFeatures(device_->select.driver_features, value,
                                          VirtioInterface::kModern);
    case VIRTIO_PCI_COMMON_MSIX:
      config_vector_ = CheckedVector(value & 0xffff);
      return;
    case VIRTIO_PCI_COMMON_STATUS:
      return WriteStatus(static_cast<uint8_t>(value), VirtioInterface::kModern);
    case VIRTIO_PCI_COMMON_Q_SELECT:
      device_->select.queue = static_cast<uint16_t>(value);
      return;
    default:
      return WriteQueueRegister(offset, value);
  }
}

void VirtioPci::WriteQueueRegister(unsigned offset, uint32_t value) {
  Virtqueue* queue = device_->selected_queue();
  if (!queue) return;
  Virtqueue::Registers& r = queue->registers;
  if (offset == VIRTIO_PCI_COMMON_Q_MSIX) {
    *SelectedVector() = CheckedVector(value & 0xffff);
    return;
  }
  // 4.1.4.3.2: the rest is the driver's only until it enables the queue.
  if (r.enabled) return;
  switch (offset) {
    case VIRTIO_PCI_COMMON_Q_SIZE:
      if (value != 0 && value <= queue->max_size()) r.size = static_cast<uint16_t>(value);
      return;
    case VIRTIO_PCI_COMMON_Q_ENABLE:
      if (value == 1) device_->EnableQueue(device_->select.queue);
      return;
    case VIRTIO_PCI_COMMON_Q_DESCLO:
      return SetLow32(&r.desc, value);
    case VIRTIO_PCI_COMMON_Q_DESCHI:
      return SetHigh32(&r.desc, value);
    case VIRTIO_PCI_COMMON_Q_AVAILLO:
      return SetLow32(&r.driver, value);
    case VIRTIO_PCI_COMMON_Q_AVAILHI:
      return SetHigh32(&r.driver, value);
    case VIRTIO_PCI_COMMON_Q_USEDLO:
      return SetLow32(&r.device, value);
    case VIRTIO_PCI_COMMON_Q_USEDHI:
      return SetHigh32(&r.device, value);
    default:
      return;
  }
}

// ---- PCI configuration space

// 4.1.4.9
bool VirtioPci::Window(uint32_t* offset, uint32_t* size) {
  *offset = config().Read(window_cap_ + VIRTIO_PCI_CAP_OFFSET, 4);
  *size = config().Read(window_cap_ + VIRTIO_PCI_CAP_LENGTH, 4);
  return config().Read(window_cap_ + VIRTIO_PCI_CAP_BAR, 1) == kModernBarIndex &&
         (*size == 1 || *size == 2 || *size == 4) && *offset % *size == 0 &&
         *offset < kModernBarSize;
}

uint32_t VirtioPci::ConfigRead(unsigned offset, unsigned size) {
  unsigned data = window_cap_ + sizeof(virtio_pci_cap);
  uint32_t at, length;
  if (window_cap_ && offset < data + 4 && offset + size > data && Window(&at, &length)) {
    config().Set(data, 4, ModernRead(at, length));
  }
  return PciDevice::ConfigRead(offset, size);
}

void VirtioPci::ConfigWrite(unsigned offset, unsigned size, uint32_t value) {
  PciDevice::ConfigWrite(offset, size, value);
  unsigned data = window_cap_ + sizeof(virtio_pci_cap);
  uint32_t at, length;
  if (window_cap_ && offset < data + 4 && offset + size > data && Window(&at, &length)) {
    ModernWrite(at, length, config().Read(data, length));
  }
}

void VirtioPci::ConfigWritten(unsigned /*offset*/, unsigned /*size*/) {
  device_->SetDmaAllowed(bus_master());
}

void VirtioPci::VisitState(StateVisitor& v) {
  PciDevice::VisitState(v);
  v.Section("virtio_pci", [&] {
    v.Version(1);
    v.Field("isr", isr_);
    v.Field("config_vector", config_vector_);
    v.FixedBytes("queue_vectors", std::span(reinterpret_cast<uint8_t*>(queue_vectors_.data()),
                                            queue_vectors_.size() * 2));
    if (!v.loading()) return;
    config_vector_ = CheckedVector(config_vector_);
    for (uint16_t& vector : queue_vectors_) vector = CheckedVector(vector);
  });
  if (v.loading()) device_->SetDmaAllowed(bus_master());
  device_->VisitState(v);
}

}  // namespace kvartz
