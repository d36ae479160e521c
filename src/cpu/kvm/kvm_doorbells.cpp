#include "cpu/kvm/kvm_doorbells.h"

#include <fmt/core.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/log.h"
#include "cpu/kvm/kvm_api.h"

namespace kvartz::cpu::kvm {

bool Doorbells::Switch(const Bell& bell, bool on) {
  kvm_ioeventfd request{};
  request.addr = bell.address;
  request.len = bell.size;
  request.datamatch = bell.value;
  request.fd = bell.event_fd;
  request.flags = (bell.match ? KVM_IOEVENTFD_FLAG_DATAMATCH : 0) |
                  (space_ == Space::kPorts ? KVM_IOEVENTFD_FLAG_PIO : 0) |
                  (on ? 0 : KVM_IOEVENTFD_FLAG_DEASSIGN);
  int result = Ioctl(vm_fd_, KVM_IOEVENTFD, &request);
  if (result < 0) KLOG(kDebug, "doorbell at {:#x}: {}", bell.address, strerror(-result));
  return result >= 0;
}

bool Doorbells::Switch(const Zone& zone, bool on) {
  kvm_coalesced_mmio_zone request{};
  request.addr = zone.base;
  request.size = static_cast<uint32_t>(zone.size);
  request.pio = space_ == Space::kPorts;
  int result = on ? Ioctl(vm_fd_, KVM_REGISTER_COALESCED_MMIO, &request)
                  : Ioctl(vm_fd_, KVM_UNREGISTER_COALESCED_MMIO, &request);
  if (result < 0) KLOG(kDebug, "collected writes at {:#x}: {}", zone.base, strerror(-result));
  return result >= 0;
}

template <typename T>
void Doorbells::Replace(std::vector<T>* active, const std::vector<T>& wanted) {
  std::vector<T> kept;
  for (const T& each : *active) {
    if (std::ranges::find(wanted, each) != wanted.end()) {
      kept.push_back(each);
    } else {
      Switch(each, false);
    }
  }
  *active = std::move(kept);
  for (const T& each : wanted) {
    if (std::ranges::find(*active, each) == active->end() && Switch(each, true)) {
      active->push_back(each);
    }
  }
}

void Doorbells::ViewChanged(const FlatView&, const FlatView& after) {
  std::vector<Bell> bells;
  std::vector<Zone> zones;
  for (const FlatRange& range : after.ranges()) {
    const Region& region = *range.region;
    if (region.collect_writes && range.size <= UINT32_MAX)
      zones.push_back({range.base, range.size});
    for (const Doorbell& bell : region.doorbells) {
      bool inside =
          bell.offset >= range.region_offset && bell.offset - range.region_offset < range.size;
      if (!inside) continue;
      bells.push_back({range.base + (bell.offset - range.region_offset), bell.size,
                       bell.match_value, bell.value, bell.event_fd});
    }
  }
  LockGuard guard(mutex_);
  Replace(&bells_, bells);
  Replace(&zones_, zones);
  collects_ = !zones_.empty();
}

void CollectedWrites::Drain(kvm_coalesced_mmio_ring* ring, ViewCache& memory, ViewCache& ports) {
  LockGuard guard(mutex_);
  constexpr size_t kEntries = (4096 - sizeof(kvm_coalesced_mmio_ring)) / sizeof(kvm_coalesced_mmio);
  uint32_t first = std::atomic_ref(ring->first).load(std::memory_order_relaxed);
  while (first != std::atomic_ref(ring->last).load(std::memory_order_acquire)) {
    const kvm_coalesced_mmio& entry = ring->coalesced_mmio[first % kEntries];
    uint64_t value = 0;
    unsigned size = std::min<unsigned>(entry.len, sizeof(value));
    std::memcpy(&value, entry.data, size);
    WriteAny(entry.pio ? ports : memory, entry.phys_addr, size, value);
    first = (first + 1) % kEntries;
    std::atomic_ref(ring->first).store(first, std::memory_order_release);
  }
}

static uint64_t MaskOf(unsigned size) { return size >= 8 ? ~0ull : (1ull << 8 * size) - 1; }

uint64_t ReadAny(ViewCache& view, uint64_t address, unsigned size) {
  uint64_t value = 0;
  for (unsigned done = 0; done < size;) {
    unsigned part = std::bit_floor(size - done);
    value |= (BusRead(view, address + done, part) & MaskOf(part)) << 8 * done;
    done += part;
  }
  return value;
}

void WriteAny(ViewCache& view, uint64_t address, unsigned size, uint64_t value) {
  for (unsigned done = 0; done < size;) {
    unsigned part = std::bit_floor(size - done);
    BusWrite(view, address + done, part, value >> 8 * done & MaskOf(part));
    done += part;
  }
}

}  // namespace kvartz::cpu::kvm
