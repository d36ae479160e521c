// Guest memory as KVM sees it: a slot for each piece of RAM and ROM in the flat view, and the dirty
// log of them. Linux Documentation/virt/kvm/api.rst: KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG,
// KVM_CLEAR_DIRTY_LOG.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/sync.h"
#include "memory/address_space.h"

namespace kvartz::cpu::kvm {

// Guarded by its lock.
class MemorySlots final : public AddressSpace::Listener {
 public:
  // `dirty_ring`: pages are reported by MarkDirty, not by the log.
  MemorySlots(int vm_fd, bool dirty_ring);

  void ViewChanged(const FlatView& before, const FlatView& after) override;

  // The kernel refused a slot since the last call: what and why.
  std::optional<Error> TakeError();

  Result<> SetTracking(bool enabled);
  // Fetches the log of every slot into the RAM blocks' bitmaps.
  Result<> Sync();
  // One entry of a dirty ring.
  void MarkDirty(uint32_t slot, uint64_t page);

 private:
  struct Slot {
    uint64_t gpa = 0, size = 0;
    uint8_t* host = nullptr;
    bool read_only = false;
    std::shared_ptr<RamBlock> ram;  // keeps the memory as long as the slot is there
    uint64_t ram_offset = 0;
    bool SameAs(const Slot& other) const {
      return gpa == other.gpa && size == other.size && host == other.host &&
             read_only == other.read_only;
    }
  };

  static std::vector<Slot> SlotsOf(const FlatView& view);
  bool Tracked(const Slot& slot) const REQUIRES(mutex_) { return tracking_ && !slot.read_only; }
  Result<> Put(uint32_t id, const Slot& slot, uint64_t size) REQUIRES(mutex_);
  void Add(Slot slot) REQUIRES(mutex_);
  void Remove(uint32_t id) REQUIRES(mutex_);
  Result<> Fetch(uint32_t id) REQUIRES(mutex_);
  void Note(Error error) REQUIRES(mutex_);

  const int vm_fd_;
  const bool dirty_ring_;
  bool manual_protect_ = false;
  Mutex mutex_;
  bool tracking_ GUARDED_BY(mutex_) = false;
  std::vector<Slot> slots_ GUARDED_BY(mutex_);  // by slot id; size 0: free
  std::vector<uint64_t> log_ GUARDED_BY(mutex_);
  std::optional<Error> error_ GUARDED_BY(mutex_);
};

}  // namespace kvartz::cpu::kvm
