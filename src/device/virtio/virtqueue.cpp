#include "device/virtio/virtqueue.h"

#include <linux/virtio_config.h>
#define VIRTIO_RING_NO_LEGACY  // its functions are not C++
#include <linux/virtio_ring.h>

#include <algorithm>
#include <atomic>
#include <bit>

#include "base/check.h"
#include "base/endian.h"

namespace kvartz {

// Split (2.7.5) and packed (2.8.13) descriptors differ in the last four bytes only.
struct Virtqueue::Descriptor {
  Le64 address;
  Le32 length;
  Le16 flags_or_id;
  Le16 next_or_flags;

  uint16_t split_flags() const { return flags_or_id; }
  uint16_t split_next() const { return next_or_flags; }
  uint16_t packed_id() const { return flags_or_id; }
  uint16_t packed_flags() const { return next_or_flags; }
  bool writable = false;
};

namespace {

constexpr unsigned kDescriptorSize = 16;
constexpr unsigned kPackedFlagsOffset = 14;
constexpr uint16_t kPackedAvail = 1 << VRING_PACKED_DESC_F_AVAIL;
constexpr uint16_t kPackedUsed = 1 << VRING_PACKED_DESC_F_USED;
// Split rings (2.7.6, 2.7.8): flags, idx, entries, event.
constexpr unsigned kIdxOffset = 2;
constexpr unsigned kEntriesOffset = 4;
// Event suppression areas (2.8.14): offset and wrap, flags.
constexpr unsigned kEventOffset = 0;
constexpr unsigned kEventFlags = 2;
constexpr uint64_t kMaxElementBytes = 1ull << 32;

uint16_t LoadAcquire(const uint8_t* p) {
  return std::atomic_ref(*reinterpret_cast<uint16_t*>(const_cast<uint8_t*>(p)))
      .load(std::memory_order_acquire);
}
uint16_t LoadRelaxed(const uint8_t* p) {
  return std::atomic_ref(*reinterpret_cast<uint16_t*>(const_cast<uint8_t*>(p)))
      .load(std::memory_order_relaxed);
}
void StoreRelease(uint8_t* p, uint16_t value) {
  std::atomic_ref(*reinterpret_cast<uint16_t*>(p)).store(value, std::memory_order_release);
}
static_assert(std::endian::native == std::endian::little, "ring indices are little-endian");

void FullFence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// Whether moving from `now - moved` to `now` passed `event` (2.7.7.2).
bool Passed(uint16_t event, uint16_t now, uint16_t moved) {
  return static_cast<uint16_t>(now - event - 1) < moved;
}

size_t CopyPieces(const std::vector<iovec>& pieces, uint64_t offset, size_t size, auto copy) {
  size_t done = 0;
  for (const iovec& piece : pieces) {
    if (done == size) break;
    if (offset >= piece.iov_len) {
      offset -= piece.iov_len;
      continue;
    }
    size_t part = std::min<size_t>(piece.iov_len - offset, size - done);
    copy(static_cast<uint8_t*>(piece.iov_base) + offset, done, part);
    done += part;
    offset = 0;
  }
  return done;
}

}  // namespace

size_t VirtqElement::CopyOut(uint64_t offset, void* data, size_t size) const {
  return CopyPieces(readable, offset, size, [&](const uint8_t* guest, size_t at, size_t part) {
    std::memcpy(static_cast<uint8_t*>(data) + at, guest, part);
  });
}

size_t VirtqElement::CopyIn(uint64_t offset, const void* data, size_t size) const {
  return CopyPieces(writable, offset, size, [&](uint8_t* guest, size_t at, size_t part) {
    std::memcpy(guest, static_cast<const uint8_t*>(data) + at, part);
  });
}

Virtqueue::Virtqueue(const AddressSpace& memory, uint16_t max_size)
    : memory_(memory), max_size_(max_size) {
  VERIFY(max_size > 0 && max_size <= kSizeLimit && std::has_single_bit(max_size));
  Reset();
}

void Virtqueue::SetFeatures(uint64_t features) {
  packed_ = (features >> VIRTIO_F_RING_PACKED) & 1;
  event_index_ = (features >> VIRTIO_RING_F_EVENT_IDX) & 1;
  indirect_ = (features >> VIRTIO_RING_F_INDIRECT_DESC) & 1;
  mapped_generation_ = kNotMapped;
}

void Virtqueue::Reset() {
  registers = {.size = max_size_, .enabled = false, .desc = {}, .driver = {}, .device = {}};
  live_ = false;
  why_broken_ = nullptr;
  next_ = used_ = 0;
  next_wrap_ = used_wrap_ = true;
  in_flight_ = 0;
  since_notify_ = 0;
  unpublished_ = unpublished_slots_ = 0;
  mapped_generation_ = kNotMapped;
  hold_.reset();
}

void Virtqueue::Break(const char* why) {
  if (!why_broken_) why_broken_ = why;
}

bool Virtqueue::MapRings() {
  if (mapped_generation_ == memory_.generation()) return true;
  const Registers& r = registers;
  if (r.size == 0 || r.size > max_size_ || (!packed_ && !std::has_single_bit(r.size)) ||
      (packed_ && (next_ >= r.size || used_ >= r.size))) {
    Break("queue size");
    return false;
  }
  uint64_t driver_bytes = packed_ ? 4 : 6 + 2 * uint64_t{r.size};
  uint64_t device_bytes = packed_ ? 4 : 6 + 8 * uint64_t{r.size};
  if (r.desc.value % 16 != 0 || r.driver.value % (packed_ ? 4 : 2) != 0 ||
      r.device.value % 4 != 0) {
    Break("ring alignment");
    return false;
  }
  do {
    mapped_generation_ = memory_.generation();
    desc_ =
        memory_.MapContiguous(r.desc, uint64_t{r.size} * kDescriptorSize,
                              packed_ ? GuestMemory::Access::kWrite : GuestMemory::Access::kRead);
    driver_ = memory_.MapContiguous(r.driver, driver_bytes, GuestMemory::Access::kRead);
    device_ = memory_.MapContiguous(r.device, device_bytes, GuestMemory::Access::kWrite);
    hold_ = memory_.Hold();
  } while (mapped_generation_ != memory_.generation());
  if (!desc_ || !driver_ || !device_) {
    mapped_generation_ = kNotMapped;
    Break("ring outside of RAM");
    return false;
  }
  return true;
}

// ---- taking elements

// Whether the driver has made an element available. The ring is mapped.
bool Virtqueue::HasNext() {
  if (packed_) {
    uint16_t flags = LoadAcquire(desc_ + next_ * kDescriptorSize + kPackedFlagsOffset);
    bool avail = flags & kPackedAvail;
    bool used = flags & kPackedUsed;
    return avail == next_wrap_ && used != next_wrap_;
  }
  uint16_t ahead = static_cast<uint16_t>(LoadAcquire(driver_ + kIdxOffset) - next_);
  if (ahead > registers.size) {
    Break("available index");
    return false;
  }
  return ahead != 0;
}

bool Virtqueue::Pop(VirtqElement* element) {
  if (!usable() || !MapRings() || !HasNext()) return false;
  if (in_flight_ >= registers.size) {
    Break("more elements in flight than the queue holds");
    return false;
  }
  element->readable.clear();
  element->writable.clear();
  element->writable_ranges.clear();
  element->readable_bytes = element->writable_bytes = 0;
  chain_length_ = 0;
  if (!(packed_ ? PopPacked(element) : PopSplit(element))) {
    VERIFY(broken());
    return false;
  }
  element->hold = hold_;
  // The map moved while the pieces were gathered: hold the newer one too (pieces of both stay
  // valid: RAM blocks that are in either view live).
  if (mapped_generation_ != memory_.generation()) element->hold = memory_.Hold();
  ++in_flight_;
  return true;
}

bool Virtqueue::CountDescriptor() {
  if (++chain_length_ <= kMaxChain) return true;
  Break("descriptor chain too long");
  return false;
}

bool Virtqueue::AddSegment(VirtqElement* element, const Descriptor& descriptor) {
  uint32_t length = descriptor.length;
  if (length == 0) return true;
  Gpa gpa(descriptor.address);
  if (descriptor.writable) {
    element->writable_bytes += length;
    element->writable_ranges.push_back({gpa, length});
  } else {
    if (!element->writable.empty()) {
      Break("readable descriptor after a writable one");
      return false;
    }
    element->readable_bytes += length;
  }
  if (element->readable_bytes + element->writable_bytes > kMaxElementBytes) {
    Break("element larger than 4 GiB");
    return false;
  }
  auto access = descriptor.writable ? GuestMemory::Access::kWrite : GuestMemory::Access::kRead;
  if (!memory_.Map(gpa, length, access,
                   descriptor.writable ? &element->writable : &element->readable)) {
    Break("buffer outside of RAM");
    return false;
  }
  return true;
}

// 2.7.5.3 and 2.8.7. In a split ring the table's entries are chained; in a packed one they follow
// each other.
bool Virtqueue::AddIndirectTable(VirtqElement* element, const Descriptor& descriptor) {
  uint32_t bytes = descriptor.length;
  uint32_t count = bytes / kDescriptorSize;
  if (!indirect_ || count == 0 || bytes % kDescriptorSize != 0 || count > 65536) {
    Break("indirect descriptor");
    return false;
  }
  const uint8_t* table =
      memory_.MapContiguous(Gpa(descriptor.address), bytes, GuestMemory::Access::kRead);
  if (!table) {
    Break("indirect table outside of RAM");
    return false;
  }
  for (uint32_t at = 0;;) {
    if (!CountDescriptor()) return false;
    Descriptor entry;
    std::memcpy(static_cast<void*>(&entry), table + uint64_t{at} * kDescriptorSize,
                kDescriptorSize);
    uint16_t flags = packed_ ? entry.packed_flags() : entry.split_flags();
    if (flags & VRING_DESC_F_INDIRECT) {
      Break("indirect descriptor within an indirect table");
      return false;
    }
    entry.writable = flags & VRING_DESC_F_WRITE;
    if (!AddSegment(element, entry)) return false;
    if (packed_) {
      if (++at == count) return true;
      continue;
    }
    if (!(flags & VRING_DESC_F_NEXT)) return true;
    at = entry.split_next();
    if (at >= count) {
      Break("descriptor index");
      return false;
    }
  }
}

bool Virtqueue::PopSplit(VirtqElement* element) {
  uint16_t mask = registers.size - 1;
  uint16_t at = LoadRelaxed(driver_ + kEntriesOffset + 2 * (next_ & mask));
  element->id = at;
  element->slots = 1;
  for (;;) {
    if (at >= registers.size) {
      Break("descriptor index");
      return false;
    }
    if (!CountDescriptor()) return false;
    Descriptor entry;
    std::memcpy(static_cast<void*>(&entry), desc_ + at * kDescriptorSize, kDescriptorSize);
    uint16_t flags = entry.split_flags();
    if (flags & VRING_DESC_F_INDIRECT) {
      if (flags & VRING_DESC_F_NEXT) {
        Break("indirect descriptor with a next one");
        return false;
      }
      if (!AddIndirectTable(element, entry)) return false;
      break;
    }
    entry.writable = flags & VRING_DESC_F_WRITE;
    if (!AddSegment(element, entry)) return false;
    if (!(flags & VRING_DESC_F_NEXT)) break;
    at = entry.split_next();
  }
  ++next_;
  return true;
}

bool Virtqueue::PopPacked(VirtqElement* element) {
  uint16_t at = next_;
  bool wrap = next_wrap_;
  uint16_t slots = 0;
  for (bool more = true; more;) {
    if (++slots > registers.size) {
      Break("descriptor chain longer than the ring");
      return false;
    }
    if (!CountDescriptor()) return false;
    Descriptor entry;
    std::memcpy(static_cast<void*>(&entry), desc_ + at * kDescriptorSize, kDescriptorSize);
    uint16_t flags = entry.packed_flags();
    more = flags & VRING_DESC_F_NEXT;
    element->id = entry.packed_id();
    if (flags & VRING_DESC_F_INDIRECT) {
      if (more) {
        Break("indirect descriptor with a next one");
        return false;
      }
      if (!AddIndirectTable(element, entry)) return false;
    } else {
      entry.writable = flags & VRING_DESC_F_WRITE;
      if (!AddSegment(element, entry)) return false;
    }
    if (++at == registers.size) {
      at = 0;
      wrap = !wrap;
    }
  }
  if (in_flight_ + slots > registers.size) {
    Break("more descriptors in flight than the ring holds");
    return false;
  }
  element->slots = slots;
  next_ = at;
  next_wrap_ = wrap;
  return true;
}

void Virtqueue::Rewind(const Position& position) {
  next_ = position.next;
  next_wrap_ = position.wrap;
  in_flight_ = position.in_flight;
}

// ---- giving elements back

void Virtqueue::Fill(const VirtqElement& element, uint32_t written) {
  uint64_t left = std::min<uint64_t>(written, element.writable_bytes);
  for (const VirtqElement::Range& range : element.writable_ranges) {
    if (left == 0) break;
    uint64_t part = std::min<uint64_t>(left, range.size);
    memory_.MarkDirty(range.gpa, part);
    left -= part;
  }
  if (in_flight_ > 0) --in_flight_;
  if (!usable() || !MapRings()) return;
  if (packed_) {
    FillPacked(element, written);
  } else {
    FillSplit(element, written);
  }
  ++unpublished_;
}

void Virtqueue::FillSplit(const VirtqElement& element, uint32_t written) {
  struct UsedEntry {
    Le32 id;
    Le32 length;
  };
  UsedEntry entry{uint32_t{element.id}, written};
  uint64_t offset =
      kEntriesOffset + 8 * (static_cast<uint16_t>(used_ + unpublished_) & (registers.size - 1));
  std::memcpy(device_ + offset, &entry, sizeof entry);
  memory_.MarkDirty(registers.device + offset, sizeof entry);
}

void Virtqueue::FillPacked(const VirtqElement& element, uint32_t written) {
  uint8_t* place = desc_ + used_ * kDescriptorSize;
  Le32 length = written;
  Le16 id = element.id;
  std::memcpy(place + 8, &length, 4);
  std::memcpy(place + 12, &id, 2);
  uint16_t flags = used_wrap_ ? kPackedAvail | kPackedUsed : 0;
  if (written != 0) flags |= VRING_DESC_F_WRITE;
  if (unpublished_ == 0) {
    first_place_ = used_;
    first_flags_ = flags;
  } else {
    StoreRelease(place + kPackedFlagsOffset, flags);
  }
  memory_.MarkDirty(registers.desc + used_ * kDescriptorSize, kDescriptorSize);
  used_ += element.slots;
  unpublished_slots_ += element.slots;
  if (used_ >= registers.size) {
    used_ -= registers.size;
    used_wrap_ = !used_wrap_;
  }
}

void Virtqueue::Publish() {
  if (unpublished_ == 0) return;
  uint32_t moved = unpublished_;
  if (usable() && MapRings()) {
    if (packed_) {
      moved = unpublished_slots_;
      StoreRelease(desc_ + first_place_ * kDescriptorSize + kPackedFlagsOffset, first_flags_);
    } else {
      used_ += unpublished_;
      StoreRelease(device_ + kIdxOffset, used_);
      memory_.MarkDirty(registers.device + kIdxOffset, 2);
    }
  }
  since_notify_ = static_cast<uint16_t>(std::min<uint32_t>(0xffff, since_notify_ + moved));
  unpublished_ = unpublished_slots_ = 0;
}

bool Virtqueue::ShouldNotify() {
  if (since_notify_ == 0 || !usable() || !MapRings()) return false;
  // The used entries must be visible before the driver's wish is read (2.7.7.2, 2.8.20.2).
  FullFence();
  bool wanted = packed_ ? DriverWantsPacked() : DriverWantsSplit();
  // With the event index, what was passed over counts only once.
  since_notify_ = 0;
  return wanted;
}

bool Virtqueue::DriverWantsSplit() {
  if (!event_index_) return !(LoadRelaxed(driver_) & VRING_AVAIL_F_NO_INTERRUPT);
  uint16_t event = LoadRelaxed(driver_ + kEntriesOffset + 2 * registers.size);
  return Passed(event, used_, since_notify_);
}

bool Virtqueue::DriverWantsPacked() {
  uint16_t flags = LoadRelaxed(driver_ + kEventFlags) & 3;
  if (flags == VRING_PACKED_EVENT_FLAG_DISABLE) return false;
  if (flags != VRING_PACKED_EVENT_FLAG_DESC || !event_index_) return true;
  uint16_t off_wrap = LoadRelaxed(driver_ + kEventOffset);
  uint16_t event = off_wrap & 0x7fff;
  if (((off_wrap >> VRING_PACKED_EVENT_F_WRAP_CTR) != 0) != used_wrap_) event -= registers.size;
  return Passed(event, used_, since_notify_);
}

// ---- kicks

void Virtqueue::StoreEvent(Gpa area, uint8_t* host, uint64_t offset, uint16_t value) {
  StoreRelease(host + offset, value);
  memory_.MarkDirty(area + offset, 2);
}

void Virtqueue::DisableKicks() {
  if (!usable() || !MapRings()) return;
  if (packed_) {
    StoreEvent(registers.device, device_, kEventFlags, VRING_PACKED_EVENT_FLAG_DISABLE);
  } else if (!event_index_) {
    StoreEvent(registers.device, device_, 0, VRING_USED_F_NO_NOTIFY);
  }
}

bool Virtqueue::EnableKicks() {
  if (!usable() || !MapRings()) return false;
  if (packed_) {
    if (event_index_) {
      uint16_t wrap = next_wrap_ ? 1 << VRING_PACKED_EVENT_F_WRAP_CTR : 0;
      StoreEvent(registers.device, device_, kEventOffset, next_ | wrap);
    }
    StoreEvent(registers.device, device_, kEventFlags,
               event_index_ ? VRING_PACKED_EVENT_FLAG_DESC : VRING_PACKED_EVENT_FLAG_ENABLE);
  } else if (event_index_) {
    StoreEvent(registers.device, device_, kEntriesOffset + 8 * uint64_t{registers.size}, next_);
  } else {
    StoreEvent(registers.device, device_, 0, 0);
  }
  // The wish must be visible before the ring is looked at again (2.7.10.1, 2.8.21).
  FullFence();
  return HasNext();
}

// ---- state

void Virtqueue::VisitState(StateVisitor& v) {
  v.Version(1);
  v.Field("size", registers.size);
  v.Field("enabled", registers.enabled);
  v.Field("desc", registers.desc.value);
  v.Field("driver", registers.driver.value);
  v.Field("device", registers.device.value);
  v.Field("next", next_);
  v.Field("next_wrap", next_wrap_);
  v.Field("used", used_);
  v.Field("used_wrap", used_wrap_);
  bool was_broken = broken();
  v.Field("broken", was_broken);
  if (!v.loading()) return;
  v.Bounded("size", registers.size, 0, max_size_);
  why_broken_ = was_broken ? "broken when it was saved" : nullptr;
  in_flight_ = 0;
  since_notify_ = 0xffff;
  unpublished_ = unpublished_slots_ = 0;
  mapped_generation_ = kNotMapped;
}

}  // namespace kvartz
