// Interrupts into the VM: messages, lines of the in-kernel controllers, and descriptors that raise
// either without a VMM thread. Linux Documentation/virt/kvm/api.rst: KVM_SET_GSI_ROUTING,
// KVM_SIGNAL_MSI, KVM_IRQ_LINE, KVM_IRQFD.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "base/result.h"
#include "base/sync.h"
#include "cpu/accel.h"
#include "cpu/kvm/kvm_uapi.h"

namespace kvartz::cpu::kvm {

// Guarded by its lock; a message without the level bit takes none.
class Interrupts {
 public:
  static constexpr unsigned kPins = 24;  // of the IOAPIC, in the kernel or a device

  Interrupts(int vm_fd, IrqchipMode mode) : vm_fd_(vm_fd), mode_(mode) {}
  // Routes of the in-kernel controllers. Once, after they were made.
  Result<> Init();

  void SendMsi(uint64_t address, uint32_t data);
  void SetGsi(unsigned gsi, bool level);

  Result<uint64_t> AddIrqFd(int event_fd, uint64_t msi_address, uint32_t msi_data);
  // A signal pulls the line of `gsi` up (kKernel); its end of interrupt puts it down and signals
  // `resample_fd`. With resample_fd -1: an edge.
  Result<uint64_t> AddLineFd(int event_fd, int resample_fd, unsigned gsi);
  void RemoveIrqFd(uint64_t id);

 private:
  struct Source {
    int event_fd = -1;
    unsigned gsi = 0;
    bool has_route = false;
  };
  static kvm_irq_routing_entry MsiRoute(unsigned gsi, uint64_t address, uint32_t data);
  void NoteLevel(uint64_t address, uint32_t data);
  Result<> Apply() REQUIRES(mutex_);
  void Erase(unsigned gsi) REQUIRES(mutex_);

  const int vm_fd_;
  const IrqchipMode mode_;
  Mutex mutex_;
  std::vector<kvm_irq_routing_entry> routes_ GUARDED_BY(mutex_);
  std::map<uint64_t, Source> sources_ GUARDED_BY(mutex_);
  uint64_t next_id_ GUARDED_BY(mutex_) = 1;
  // kUser: the level-triggered messages whose end of interrupt KVM reports, a ring.
  struct LevelMessage {
    uint64_t address = 0;
    uint32_t data = 0;
    bool used = false;
  };
  LevelMessage level_[kPins] GUARDED_BY(mutex_);
  unsigned next_level_ GUARDED_BY(mutex_) = 0;
};

}  // namespace kvartz::cpu::kvm
