// BusRead and BusWrite: one access of a vCPU on its way to RAM or a device.
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/check.h"
#include "memory/address_space.h"

namespace kvartz {
namespace {

uint64_t Mask(unsigned size) { return size >= 8 ? ~0ull : (1ull << size * 8) - 1; }

// Aligned accesses of a vCPU are seen whole or not at all by the others.
template <typename T>
uint64_t LoadAs(const uint8_t* host) {
  if (reinterpret_cast<uintptr_t>(host) % sizeof(T) == 0) {
    return __atomic_load_n(reinterpret_cast<const T*>(host), __ATOMIC_RELAXED);
  }
  T value;
  std::memcpy(&value, host, sizeof(T));
  return value;
}

template <typename T>
void StoreAs(uint8_t* host, uint64_t value) {
  T narrow = static_cast<T>(value);
  if (reinterpret_cast<uintptr_t>(host) % sizeof(T) == 0) {
    __atomic_store_n(reinterpret_cast<T*>(host), narrow, __ATOMIC_RELAXED);
  } else {
    std::memcpy(host, &narrow, sizeof(T));
  }
}

uint64_t Load(const uint8_t* host, unsigned size) {
  switch (size) {
    case 1:
      return LoadAs<uint8_t>(host);
    case 2:
      return LoadAs<uint16_t>(host);
    case 4:
      return LoadAs<uint32_t>(host);
    default:
      return LoadAs<uint64_t>(host);
  }
}

void Store(uint8_t* host, unsigned size, uint64_t value) {
  switch (size) {
    case 1:
      return StoreAs<uint8_t>(host, value);
    case 2:
      return StoreAs<uint16_t>(host, value);
    case 4:
      return StoreAs<uint32_t>(host, value);
    default:
      return StoreAs<uint64_t>(host, value);
  }
}

uint64_t HandlerRead(const Region& region, uint64_t offset, unsigned size) {
  if (size < region.min_access) {
    uint64_t start = offset & ~uint64_t{region.min_access - 1};
    unsigned lane = static_cast<unsigned>(offset - start);
    // A misaligned narrow access may reach into the next register.
    if (lane + size > region.min_access) {
      unsigned first = region.min_access - lane;
      uint64_t low = HandlerRead(region, offset, first);
      return low | HandlerRead(region, offset + first, size - first) << first * 8;
    }
    return region.handler->IoRead(start, region.min_access) >> lane * 8 & Mask(size);
  }
  unsigned width = std::min(size, region.max_access);
  uint64_t value = 0;
  for (unsigned done = 0; done < size; done += width) {
    value |= (region.handler->IoRead(offset + done, width) & Mask(width)) << done * 8;
  }
  return value;
}

void HandlerWrite(const Region& region, uint64_t offset, unsigned size, uint64_t value) {
  if (size < region.min_access) {
    uint64_t start = offset & ~uint64_t{region.min_access - 1};
    unsigned lane = static_cast<unsigned>(offset - start);
    if (lane + size > region.min_access) {
      unsigned first = region.min_access - lane;
      HandlerWrite(region, offset, first, value & Mask(first));
      HandlerWrite(region, offset + first, size - first, value >> first * 8);
      return;
    }
    region.handler->IoWrite(start, region.min_access, (value & Mask(size)) << lane * 8);
    return;
  }
  unsigned width = std::min(size, region.max_access);
  for (unsigned done = 0; done < size; done += width) {
    region.handler->IoWrite(offset + done, width, value >> done * 8 & Mask(width));
  }
}

bool RingDoorbell(const Region& region, uint64_t offset, unsigned size, uint64_t value) {
  for (const Doorbell& bell : region.doorbells) {
    if (bell.offset != offset || (bell.size != 0 && bell.size != size) ||
        (bell.match_value && bell.value != value)) {
      continue;
    }
    uint64_t one = 1;
    [[maybe_unused]] ssize_t n = write(bell.event_fd, &one, sizeof(one));
    return true;
  }
  return false;
}

uint64_t ReadPiece(const FlatRange& range, uint64_t address, unsigned size) {
  const Region& region = *range.region;
  if (region.kind != RegionKind::kIo) return Load(range.Host(address), size);
  uint64_t offset = range.region_offset + (address - range.base);
  if (!region.lock) return HandlerRead(region, offset, size);
  LockGuard guard(*region.lock);
  return HandlerRead(region, offset, size);
}

void WritePiece(const FlatRange& range, uint64_t address, unsigned size, uint64_t value) {
  const Region& region = *range.region;
  uint64_t offset = range.region_offset + (address - range.base);
  value &= Mask(size);
  if (region.kind == RegionKind::kRam) {
    Store(range.Host(address), size, value);
    region.ram->dirty().Mark(region.ram_offset + offset, size);
    return;
  }
  if (!region.handler || RingDoorbell(region, offset, size, value)) return;
  if (!region.lock) return HandlerWrite(region, offset, size, value);
  LockGuard guard(*region.lock);
  HandlerWrite(region, offset, size, value);
}

// Cuts an access where a range begins or ends, into pieces of 1, 2, 4 or 8 bytes.
template <typename Piece>
void ForEachPiece(const FlatView& view, uint64_t address, unsigned size, Piece piece) {
  for (unsigned done = 0; done < size;) {
    uint64_t at = address + done;
    const FlatRange* range = view.Find(at);
    unsigned length = range ? size - done : 1;
    if (range && range->end() - at < length) {
      length = std::bit_floor(static_cast<unsigned>(range->end() - at));
    }
    length = std::bit_floor(length);
    piece(range, at, done, length);
    done += length;
  }
}

}  // namespace

uint64_t BusRead(ViewCache& cache, uint64_t address, unsigned size) {
  VERIFY(std::has_single_bit(size) && size <= 8);
  // Held: a handler may move regions, and with that replace the cache's view under our feet.
  std::shared_ptr<const FlatView> view = cache.Hold();
  uint64_t value = 0;
  ForEachPiece(*view, address, size,
               [&](const FlatRange* range, uint64_t at, unsigned done, unsigned length) {
                 uint64_t part = range ? ReadPiece(*range, at, length) : Mask(length);
                 value |= (part & Mask(length)) << done * 8;
               });
  return value;
}

void BusWrite(ViewCache& cache, uint64_t address, unsigned size, uint64_t value) {
  VERIFY(std::has_single_bit(size) && size <= 8);
  std::shared_ptr<const FlatView> view = cache.Hold();
  ForEachPiece(*view, address, size,
               [&](const FlatRange* range, uint64_t at, unsigned done, unsigned length) {
                 if (range) WritePiece(*range, at, length, value >> done * 8);
               });
}

}  // namespace kvartz
