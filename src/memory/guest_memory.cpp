#include "memory/guest_memory.h"

#include <algorithm>

namespace kvartz {

// Calls piece(range, host, size) for [gpa, gpa + size) piece by piece until it returns false. False
// also if a byte isn't reachable.
template <typename Piece>
bool GuestMemory::ForEachPiece(Gpa gpa, uint64_t size, Access access, Piece piece) {
  if (size > UINT64_MAX - gpa.value) return false;
  const FlatView& view = view_.Get();
  uint64_t at = gpa.value;
  while (size > 0) {
    const FlatRange* range = view.Find(at);
    if (!range || range->region->kind == RegionKind::kIo) return false;
    if (access == Access::kWrite && range->region->kind != RegionKind::kRam) return false;
    uint64_t length = std::min(size, range->end() - at);
    if (!piece(*range, at, length)) return false;
    at += length;
    size -= length;
  }
  return true;
}

namespace {

void MarkPiece(const FlatRange& range, uint64_t at, uint64_t length) {
  const Region& region = *range.region;
  region.ram->dirty().Mark(region.ram_offset + range.region_offset + (at - range.base), length);
}

}  // namespace

bool GuestMemory::Read(Gpa gpa, void* data, uint64_t size) {
  auto* to = static_cast<uint8_t*>(data);
  return ForEachPiece(gpa, size, Access::kRead,
                      [&](const FlatRange& range, uint64_t at, uint64_t length) {
                        std::memcpy(to, range.Host(at), length);
                        to += length;
                        return true;
                      });
}

bool GuestMemory::Write(Gpa gpa, const void* data, uint64_t size) {
  // All or nothing: the range is walked once before anything is written.
  if (!ForEachPiece(gpa, size, Access::kWrite, [](auto&&...) { return true; })) return false;
  auto* from = static_cast<const uint8_t*>(data);
  return ForEachPiece(gpa, size, Access::kWrite,
                      [&](const FlatRange& range, uint64_t at, uint64_t length) {
                        std::memcpy(range.Host(at), from, length);
                        MarkPiece(range, at, length);
                        from += length;
                        return true;
                      });
}

bool GuestMemory::Map(Gpa gpa, uint64_t size, Access access, std::vector<iovec>* out) {
  size_t before = out->size();
  bool ok =
      ForEachPiece(gpa, size, access, [&](const FlatRange& range, uint64_t at, uint64_t length) {
        if (access == Access::kWrite) MarkPiece(range, at, length);
        uint8_t* host = range.Host(at);
        if (out->size() > before) {
          iovec& last = out->back();
          if (static_cast<uint8_t*>(last.iov_base) + last.iov_len == host) {
            last.iov_len += length;
            return true;
          }
        }
        out->push_back({host, length});
        return true;
      });
  if (!ok) out->resize(before);
  return ok;
}

uint8_t* GuestMemory::MapContiguous(Gpa gpa, uint64_t size, Access access) {
  uint8_t* start = nullptr;
  uint64_t mapped = 0;
  bool ok =
      ForEachPiece(gpa, size, access, [&](const FlatRange& range, uint64_t at, uint64_t length) {
        uint8_t* host = range.Host(at);
        if (!start) start = host;
        if (host != start + mapped) return false;
        mapped += length;
        if (access == Access::kWrite) MarkPiece(range, at, length);
        return true;
      });
  return ok ? start : nullptr;
}

void GuestMemory::MarkDirty(Gpa gpa, uint64_t size) {
  ForEachPiece(gpa, size, Access::kWrite, [](const FlatRange& range, uint64_t at, uint64_t length) {
    MarkPiece(range, at, length);
    return true;
  });
}

bool GuestMemory::LoadAcquire16(Gpa gpa, uint16_t* value) {
  const uint8_t* host = MapContiguous(gpa, 2, Access::kRead);
  if (!host || reinterpret_cast<uintptr_t>(host) % 2 != 0) return false;
  *value = __atomic_load_n(reinterpret_cast<const uint16_t*>(host), __ATOMIC_ACQUIRE);
  return true;
}

bool GuestMemory::StoreRelease16(Gpa gpa, uint16_t value) {
  uint8_t* host = MapContiguous(gpa, 2, Access::kWrite);
  if (!host || reinterpret_cast<uintptr_t>(host) % 2 != 0) return false;
  __atomic_store_n(reinterpret_cast<uint16_t*>(host), value, __ATOMIC_RELEASE);
  return true;
}

}  // namespace kvartz
