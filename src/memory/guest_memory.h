// How devices reach guest RAM (DMA). Addresses come from the guest: every access is checked against
// the map.
#pragma once

#include <sys/uio.h>

#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "memory/address_space.h"

namespace kvartz {

// Owned by one loop; cheap to make. Only RAM (and, for reads, ROM) is reachable: devices can't be
// made to write to devices.
class GuestMemory {
 public:
  explicit GuestMemory(const AddressSpace& space) : view_(space) {}

  // False if any byte of the range isn't RAM; then nothing was written / the buffer is unspecified.
  bool Read(Gpa gpa, void* data, uint64_t size);
  bool Write(Gpa gpa, const void* data, uint64_t size);

  template <typename T>
    requires std::is_trivially_copyable_v<T>
  bool ReadObject(Gpa gpa, T* object) {
    return Read(gpa, object, sizeof(T));
  }
  template <typename T>
    requires std::is_trivially_copyable_v<T>
  bool WriteObject(Gpa gpa, const T& object) {
    return Write(gpa, &object, sizeof(T));
  }

  enum class Access { kRead, kWrite };
  // The host memory behind [gpa, gpa + size), zero-copy, appended to `out` in pieces. Keep `Hold()`
  // as long as the pieces are in use. Pages of kWrite pieces are marked dirty now and must be
  // marked again (MarkDirty) when the data has arrived.
  bool Map(Gpa gpa, uint64_t size, Access access, std::vector<iovec>* out);
  // A contiguous range, or null if it isn't RAM or is not contiguous.
  uint8_t* MapContiguous(Gpa gpa, uint64_t size, Access access);
  void MarkDirty(Gpa gpa, uint64_t size);
  std::shared_ptr<const FlatView> Hold() { return view_.Hold(); }
  uint64_t generation() const { return view_.space().generation(); }

  // Naturally aligned 16-bit loads and stores with the ordering that virtqueue indices need
  // (acquire, release).
  bool LoadAcquire16(Gpa gpa, uint16_t* value);
  bool StoreRelease16(Gpa gpa, uint16_t value);

 private:
  template <typename Piece>
  bool ForEachPiece(Gpa gpa, uint64_t size, Access access, Piece piece);
  ViewCache view_;
};

}  // namespace kvartz
