#include "cpu/kvm/kvm_memory.h"

#include <fmt/core.h>

#include <algorithm>

#include "base/log.h"
#include "cpu/kvm/kvm_api.h"
#include "memory/gpa.h"

namespace kvartz::cpu::kvm {

MemorySlots::MemorySlots(int vm_fd, bool dirty_ring) : vm_fd_(vm_fd), dirty_ring_(dirty_ring) {}

// Parts of a page can't be slots: accesses there leave the guest and the bus serves them.
std::vector<MemorySlots::Slot> MemorySlots::SlotsOf(const FlatView& view) {
  std::vector<Slot> slots;
  for (const FlatRange& range : view.ranges()) {
    if (range.region->kind == RegionKind::kIo) continue;
    uint64_t base = (range.base + kPageSize - 1) & ~(kPageSize - 1);
    uint64_t end = range.end() & ~(kPageSize - 1);
    if (base >= end) continue;
    Slot slot;
    slot.gpa = base;
    slot.size = end - base;
    slot.host = range.Host(base);
    if (reinterpret_cast<uintptr_t>(slot.host) % kPageSize != 0) continue;
    slot.read_only = range.region->kind == RegionKind::kRom;
    slot.ram = range.region->ram;
    slot.ram_offset = static_cast<uint64_t>(slot.host - slot.ram->host());
    slots.push_back(std::move(slot));
  }
  return slots;
}

void MemorySlots::ViewChanged(const FlatView&, const FlatView& after) {
  LockGuard guard(mutex_);
  std::vector<Slot> wanted = SlotsOf(after);
  auto contains = [](const std::vector<Slot>& slots, const Slot& slot) {
    return std::ranges::any_of(slots, [&](const Slot& each) { return each.SameAs(slot); });
  };
  // Slots may not overlap: what goes, goes first. A vCPU that meets the gap leaves the guest, and
  // the bus finds the memory in the new view.
  for (uint32_t id = 0; id < slots_.size(); ++id) {
    if (slots_[id].size != 0 && !contains(wanted, slots_[id])) Remove(id);
  }
  for (Slot& slot : wanted) {
    if (!contains(slots_, slot)) Add(std::move(slot));
  }
}

Result<> MemorySlots::Put(uint32_t id, const Slot& slot, uint64_t size) {
  kvm_userspace_memory_region region{};
  region.slot = id;
  region.flags =
      (slot.read_only ? KVM_MEM_READONLY : 0) | (Tracked(slot) ? KVM_MEM_LOG_DIRTY_PAGES : 0);
  region.guest_phys_addr = slot.gpa;
  region.memory_size = size;
  region.userspace_addr = reinterpret_cast<uintptr_t>(slot.host);
  TRY(KVM_CALL(vm_fd_, KVM_SET_USER_MEMORY_REGION, &region));
  return {};
}

void MemorySlots::Add(Slot slot) {
  auto free = std::ranges::find(slots_, 0u, &Slot::size);
  auto id = static_cast<uint32_t>(free - slots_.begin());
  if (Result<> result = Put(id, slot, slot.size); !result) {
    return Note(std::move(result.error())
                    .In(fmt::format("{} bytes of '{}' at guest address {:#x}", slot.size,
                                    slot.ram->name(), slot.gpa)));
  }
  if (Tracked(slot) && !slot.ram->dirty().enabled()) slot.ram->dirty().SetEnabled(true);
  if (free == slots_.end()) {
    slots_.push_back(std::move(slot));
  } else {
    *free = std::move(slot);
  }
}

void MemorySlots::Remove(uint32_t id) {
  if (Tracked(slots_[id]) && !dirty_ring_) {
    if (Result<> result = Fetch(id); !result) Note(std::move(result.error()));
  }
  if (Result<> result = Put(id, slots_[id], 0); !result) Note(std::move(result.error()));
  slots_[id] = {};
}

void MemorySlots::Note(Error error) {
  KLOG(kError, "guest memory: {}", error.what);
  if (!error_) error_ = std::move(error);
}

std::optional<Error> MemorySlots::TakeError() {
  LockGuard guard(mutex_);
  return std::exchange(error_, std::nullopt);
}

Result<> MemorySlots::SetTracking(bool enabled) {
  LockGuard guard(mutex_);
  if (enabled == tracking_) return {};
  if (enabled && !dirty_ring_ && !manual_protect_) {
    // Pages are protected anew only when their bit is cleared: KVM_GET_DIRTY_LOG alone stays cheap.
    int offered = Extension(vm_fd_, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
    if ((offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) != 0) {
      TRY(Enable(vm_fd_, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
                 "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"));
      manual_protect_ = true;
    }
  }
  tracking_ = enabled;
  for (uint32_t id = 0; id < slots_.size(); ++id) {
    Slot& slot = slots_[id];
    if (slot.size == 0 || slot.read_only) continue;
    if (slot.ram->dirty().enabled() != enabled) slot.ram->dirty().SetEnabled(enabled);
    TRY(Put(id, slot, slot.size));
  }
  return {};
}

Result<> MemorySlots::Fetch(uint32_t id) {
  const Slot& slot = slots_[id];
  uint64_t pages = slot.size / kPageSize;
  log_.assign((pages + 63) / 64, 0);
  kvm_dirty_log log{};
  log.slot = id;
  log.dirty_bitmap = log_.data();
  TRY(KVM_CALL(vm_fd_, KVM_GET_DIRTY_LOG, &log));
  if (std::ranges::all_of(log_, [](uint64_t word) { return word == 0; })) return {};
  slot.ram->dirty().Merge(log_.data(), slot.ram_offset / kPageSize, pages);
  if (!manual_protect_) return {};
  kvm_clear_dirty_log clear{};
  clear.slot = id;
  clear.num_pages = static_cast<uint32_t>(pages);
  clear.dirty_bitmap = log_.data();
  TRY(KVM_CALL(vm_fd_, KVM_CLEAR_DIRTY_LOG, &clear));
  return {};
}

Result<> MemorySlots::Sync() {
  LockGuard guard(mutex_);
  if (!tracking_ || dirty_ring_) return {};
  for (uint32_t id = 0; id < slots_.size(); ++id) {
    if (slots_[id].size != 0 && Tracked(slots_[id])) TRY(Fetch(id));
  }
  return {};
}

void MemorySlots::MarkDirty(uint32_t id, uint64_t page) {
  LockGuard guard(mutex_);
  if (id >= slots_.size() || page >= slots_[id].size / kPageSize)
    return;  // the slot went meanwhile
  Slot& slot = slots_[id];
  slot.ram->dirty().Mark(slot.ram_offset + page * kPageSize, kPageSize);
}

}  // namespace kvartz::cpu::kvm
