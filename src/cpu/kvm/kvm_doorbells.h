// Writes that KVM takes without leaving the guest: doorbells signal an eventfd, collected writes
// queue up in a ring. Linux Documentation/virt/kvm/api.rst: KVM_IOEVENTFD,
// KVM_REGISTER_COALESCED_MMIO.
#pragma once

#include <cstdint>
#include <vector>

#include "base/sync.h"
#include "memory/address_space.h"

struct kvm_coalesced_mmio_ring;

namespace kvartz::cpu::kvm {

// Guarded by its lock. What the kernel refuses goes the slow way: the bus serves it.
class Doorbells final : public AddressSpace::Listener {
 public:
  enum class Space { kMemory, kPorts };
  Doorbells(int vm_fd, Space space) : vm_fd_(vm_fd), space_(space) {}

  void ViewChanged(const FlatView& before, const FlatView& after) override;
  // Collected ranges are in use: the ring must be looked at.
  bool collects() const { return collects_; }

 private:
  struct Bell {
    uint64_t address;
    unsigned size;
    bool match;
    uint64_t value;
    int event_fd;
    bool operator==(const Bell&) const = default;
  };
  struct Zone {
    uint64_t base, size;
    bool operator==(const Zone&) const = default;
  };
  bool Switch(const Bell& bell, bool on) REQUIRES(mutex_);
  bool Switch(const Zone& zone, bool on) REQUIRES(mutex_);
  template <typename T>
  void Replace(std::vector<T>* active, const std::vector<T>& wanted) REQUIRES(mutex_);

  const int vm_fd_;
  const Space space_;
  std::atomic<bool> collects_{false};
  Mutex mutex_;
  std::vector<Bell> bells_ GUARDED_BY(mutex_);
  std::vector<Zone> zones_ GUARDED_BY(mutex_);
};

// Takes the VM's ring of collected writes empty. Guarded by its lock.
class CollectedWrites {
 public:
  // Hands what is queued to the devices, on a vCPU thread. `ring`: in every vCPU's mapping, the
  // same memory.
  void Drain(kvm_coalesced_mmio_ring* ring, ViewCache& memory, ViewCache& ports);

 private:
  Mutex mutex_;
};

// An access of any size up to 8 that the guest's CPU made (three bytes before a page's end, say),
// in bus accesses.
uint64_t ReadAny(ViewCache& view, uint64_t address, unsigned size);
void WriteAny(ViewCache& view, uint64_t address, unsigned size, uint64_t value);

}  // namespace kvartz::cpu::kvm
