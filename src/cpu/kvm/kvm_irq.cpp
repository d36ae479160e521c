#include "cpu/kvm/kvm_irq.h"

#include <fmt/core.h>

#include <algorithm>
#include <cstring>

#include "base/log.h"
#include "cpu/kvm/kvm_api.h"

namespace kvartz::cpu::kvm {
namespace {

constexpr unsigned kMaxGsi = 4096;  // KVM_MAX_IRQ_ROUTES
constexpr unsigned kIsaLines = 16;
constexpr unsigned kTimerPin = 2;        // ISA line 0 is IOAPIC pin 2, as every PC's MADT says
constexpr uint32_t kMsiLevel = 1 << 15;  // data: trigger mode level (SDM vol. 3 sec. 11.11.2)

kvm_irq_routing_entry ChipRoute(unsigned gsi, uint32_t chip, uint32_t pin) {
  kvm_irq_routing_entry entry{};
  entry.gsi = gsi;
  entry.type = KVM_IRQ_ROUTING_IRQCHIP;
  entry.u.irqchip.irqchip = chip;
  entry.u.irqchip.pin = pin;
  return entry;
}

}  // namespace

kvm_irq_routing_entry Interrupts::MsiRoute(unsigned gsi, uint64_t address, uint32_t data) {
  kvm_irq_routing_entry entry{};
  entry.gsi = gsi;
  entry.type = KVM_IRQ_ROUTING_MSI;
  entry.u.msi.address_lo = static_cast<uint32_t>(address);
  entry.u.msi.address_hi = static_cast<uint32_t>(address >> 32);
  entry.u.msi.data = data;
  return entry;
}

Result<> Interrupts::Init() {
  LockGuard guard(mutex_);
  if (mode_ != IrqchipMode::kKernel) return {};
  for (unsigned gsi = 0; gsi < kPins; ++gsi) {
    if (gsi < 8) routes_.push_back(ChipRoute(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
    if (gsi >= 8 && gsi < kIsaLines) {
      routes_.push_back(ChipRoute(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8));
    }
    if (gsi == kTimerPin) continue;
    routes_.push_back(ChipRoute(gsi, KVM_IRQCHIP_IOAPIC, gsi == 0 ? kTimerPin : gsi));
  }
  return Apply();
}

Result<> Interrupts::Apply() {
  std::vector<char> bytes(sizeof(kvm_irq_routing) + routes_.size() * sizeof(routes_[0]));
  auto* table = new (bytes.data()) kvm_irq_routing{};
  table->nr = static_cast<uint32_t>(routes_.size());
  if (!routes_.empty()) {
    std::memcpy(bytes.data() + sizeof(kvm_irq_routing), routes_.data(),
                routes_.size() * sizeof(routes_[0]));
  }
  TRY(KVM_CALL(vm_fd_, KVM_SET_GSI_ROUTING, table));
  return {};
}

void Interrupts::Erase(unsigned gsi) {
  std::erase_if(routes_, [gsi](const kvm_irq_routing_entry& each) { return each.gsi == gsi; });
}

// KVM reports the end of an interrupt only for vectors that a reserved route of the split IOAPIC
// names: the message gets one before it is sent for the first time.
void Interrupts::NoteLevel(uint64_t address, uint32_t data) {
  LockGuard guard(mutex_);
  for (const LevelMessage& each : level_) {
    if (each.used && each.address == address && each.data == data) return;
  }
  unsigned gsi = next_level_;
  next_level_ = (next_level_ + 1) % kPins;
  level_[gsi] = {address, data, true};
  Erase(gsi);
  routes_.push_back(MsiRoute(gsi, address, data));
  if (Result<> result = Apply(); !result) KLOG(kError, "interrupt route: {}", result.error().what);
}

void Interrupts::SendMsi(uint64_t address, uint32_t data) {
  if (mode_ == IrqchipMode::kUser && (data & kMsiLevel) != 0) NoteLevel(address, data);
  kvm_msi message{};
  message.address_lo = static_cast<uint32_t>(address);
  message.address_hi = static_cast<uint32_t>(address >> 32);
  message.data = data;
  // 0: the guest blocked it, which is its right.
  int result = Ioctl(vm_fd_, KVM_SIGNAL_MSI, &message);
  if (result < 0) KLOG_GUEST("MSI {:#x} to {:#x}: {}", data, address, strerror(-result));
}

void Interrupts::SetGsi(unsigned gsi, bool level) {
  kvm_irq_level line{};
  line.irq = gsi;
  line.level = level;
  int result = Ioctl(vm_fd_, KVM_IRQ_LINE, &line);
  if (result < 0) KLOG(kError, "interrupt line {}: {}", gsi, strerror(-result));
}

Result<uint64_t> Interrupts::AddIrqFd(int event_fd, uint64_t msi_address, uint32_t msi_data) {
  LockGuard guard(mutex_);
  unsigned gsi = kPins;
  while (std::ranges::any_of(sources_, [gsi](const auto& s) { return s.second.gsi == gsi; })) ++gsi;
  if (gsi >= kMaxGsi) {
    return Fail(ErrorCode::kNoSpace,
                fmt::format("KVM: all {} interrupt routes are in use", kMaxGsi));
  }
  routes_.push_back(MsiRoute(gsi, msi_address, msi_data));
  Result<> applied = Apply();
  kvm_irqfd request{};
  request.fd = static_cast<uint32_t>(event_fd);
  request.gsi = gsi;
  Result<int> made = applied ? KVM_CALL(vm_fd_, KVM_IRQFD, &request)
                             : Result<int>(std::unexpected(applied.error()));
  if (!made) {
    Erase(gsi);
    return std::unexpected(made.error());
  }
  sources_[next_id_] = {event_fd, gsi, true};
  return next_id_++;
}

Result<uint64_t> Interrupts::AddLineFd(int event_fd, int resample_fd, unsigned gsi) {
  if (mode_ != IrqchipMode::kKernel || gsi >= kPins) {
    return Fail(
        ErrorCode::kUnsupported,
        "KVM: a descriptor on an interrupt line needs kernel-irqchip=on and a line below 24");
  }
  LockGuard guard(mutex_);
  kvm_irqfd request{};
  request.fd = static_cast<uint32_t>(event_fd);
  request.gsi = gsi;
  if (resample_fd >= 0) {
    request.flags = KVM_IRQFD_FLAG_RESAMPLE;
    request.resamplefd = static_cast<uint32_t>(resample_fd);
  }
  TRY(KVM_CALL(vm_fd_, KVM_IRQFD, &request));
  sources_[next_id_] = {event_fd, gsi, false};
  return next_id_++;
}

void Interrupts::RemoveIrqFd(uint64_t id) {
  LockGuard guard(mutex_);
  auto it = sources_.find(id);
  if (it == sources_.end()) return;
  Source source = it->second;
  kvm_irqfd request{};
  request.fd = static_cast<uint32_t>(source.event_fd);
  request.gsi = source.gsi;
  request.flags = KVM_IRQFD_FLAG_DEASSIGN;
  if (int result = Ioctl(vm_fd_, KVM_IRQFD, &request); result < 0) {
    KLOG(kError, "interrupt descriptor of route {}: {}", source.gsi, strerror(-result));
  }
  // The route stays in the kernel's table until the next change of that: nothing points there any
  // more.
  if (source.has_route) Erase(source.gsi);
  sources_.erase(it);
}

}  // namespace kvartz::cpu::kvm
