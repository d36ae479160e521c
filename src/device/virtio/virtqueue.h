// Virtqueues as the device sees them: split (virtio 1.2 ch. 2.7) and packed (ch. 2.8), with
// indirect descriptors and event suppression. What the driver wrote is copied before it is checked;
// a ring that breaks the rules breaks the queue (the device goes to DEVICE_NEEDS_RESET), never the
// VMM.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "base/state_visitor.h"
#include "memory/guest_memory.h"

namespace kvartz {

// The halves of an address as drivers write them to registers.
inline void SetLow32(Gpa* gpa, uint32_t value) {
  gpa->value = (gpa->value & ~0xffffffffull) | value;
}
inline void SetHigh32(Gpa* gpa, uint32_t value) {
  gpa->value = (gpa->value & 0xffffffff) | uint64_t{value} << 32;
}

// One buffer of the driver: first what the device reads, then what it writes, both in place in
// guest RAM. Kept and used again by its owner, so that its vectors allocate only while they grow.
struct VirtqElement {
  struct Range {
    Gpa gpa;
    uint32_t size = 0;
  };
  std::vector<iovec> readable;
  std::vector<iovec> writable;
  uint64_t readable_bytes = 0;
  uint64_t writable_bytes = 0;
  // The guest's view of `writable`, for dirty tracking.
  std::vector<Range> writable_ranges;
  uint16_t id = 0;     // head of the chain (split), buffer id (packed)
  uint16_t slots = 0;  // places in the descriptor ring (packed)
  // The memory map that the pieces point into; keeps it alive.
  std::shared_ptr<const FlatView> hold;

  // Copies the first bytes of `readable`, or to the start of `writable`, at `offset`. Returns how
  // much there was.
  size_t CopyOut(uint64_t offset, void* data, size_t size) const;
  size_t CopyIn(uint64_t offset, const void* data, size_t size) const;
};

// Guarded by the lock of its device.
class Virtqueue {
 public:
  static constexpr uint16_t kSizeLimit = 32768;
  static constexpr uint16_t kNoVector = 0xffff;
  // Descriptors in one element, those of an indirect table included.
  static constexpr unsigned kMaxChain = 1024;

  // What the driver sets up through the transport.
  struct Registers {
    uint16_t size = 0;
    bool enabled = false;
    Gpa desc;    // descriptor table or ring
    Gpa driver;  // available ring, or driver event suppression
    Gpa device;  // used ring, or device event suppression
  };

  Virtqueue(const AddressSpace& memory, uint16_t max_size);

  Registers registers;
  uint16_t max_size() const { return max_size_; }
  // The ring's format, from the negotiated features; when the device starts and after a load.
  void SetFeatures(uint64_t features);
  // Whether the device may touch the ring now (DRIVER_OK, DMA allowed).
  void SetLive(bool live) { live_ = live; }
  bool usable() const { return registers.enabled && live_ && !broken(); }
  void Reset();

  // The next element, if the driver has made one available. False also for a queue that is broken
  // or not enabled.
  bool Pop(VirtqElement* element);
  // Where Pop stands; going back to it makes what was popped since then available again (none of it
  // pushed meanwhile).
  struct Position {
    uint16_t next = 0;
    bool wrap = false;
    uint16_t in_flight = 0;
  };
  Position position() const { return {next_, next_wrap_, in_flight_}; }
  void Rewind(const Position& position);

  // Gives an element back; `written` bytes of its writable part were filled from the start. The
  // driver sees elements at the next Publish, all at once.
  void Fill(const VirtqElement& element, uint32_t written);
  void Publish();
  void Push(const VirtqElement& element, uint32_t written) {
    Fill(element, written);
    Publish();
  }
  // Whether the driver wants to be interrupted for what was published since it was last asked.
  bool ShouldNotify();

  // Asks the driver to leave out kicks, as far as it heeds that.
  void DisableKicks();
  // Asks for a kick at the next element; true if elements are there already: go on popping.
  bool EnableKicks();

  bool broken() const { return why_broken_ != nullptr; }
  const char* why_broken() const { return why_broken_; }
  uint16_t in_flight() const { return in_flight_; }

  void VisitState(StateVisitor& visitor);

 private:
  struct Descriptor;
  void Break(const char* why);
  bool MapRings();
  bool HasNext();
  bool PopSplit(VirtqElement* element);
  bool PopPacked(VirtqElement* element);
  bool AddSegment(VirtqElement* element, const Descriptor& descriptor);
  bool AddIndirectTable(VirtqElement* element, const Descriptor& descriptor);
  bool CountDescriptor();
  void FillSplit(const VirtqElement& element, uint32_t written);
  void FillPacked(const VirtqElement& element, uint32_t written);
  bool DriverWantsSplit();
  bool DriverWantsPacked();
  void StoreEvent(Gpa area, uint8_t* host, uint64_t offset, uint16_t value);

  GuestMemory memory_;
  const uint16_t max_size_;
  bool packed_ = false;
  bool event_index_ = false;
  bool indirect_ = false;
  bool live_ = false;
  const char* why_broken_ = nullptr;

  // Free-running indices (split), or places in the ring with their wrap counters (packed).
  uint16_t next_ = 0;
  uint16_t used_ = 0;
  bool next_wrap_ = true;
  bool used_wrap_ = true;
  uint16_t in_flight_ = 0;
  // Published since the driver was last interrupted; saturates.
  uint16_t since_notify_ = 0;

  // Filled, not yet published.
  uint16_t unpublished_ = 0;        // entries
  uint16_t unpublished_slots_ = 0;  // packed: places
  uint16_t first_place_ = 0;        // packed: where the first of them goes, and its flags
  uint16_t first_flags_ = 0;

  unsigned chain_length_ = 0;

  // The rings in host memory, valid while the map's generation is `mapped_generation_`.
  static constexpr uint64_t kNotMapped = ~0ull;
  uint64_t mapped_generation_ = kNotMapped;
  std::shared_ptr<const FlatView> hold_;
  uint8_t* desc_ = nullptr;
  uint8_t* driver_ = nullptr;
  uint8_t* device_ = nullptr;
};

}  // namespace kvartz
