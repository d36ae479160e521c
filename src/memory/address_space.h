// Address spaces: which RAM block, ROM or device answers at a guest-physical address or an I/O
// port.
//
// An AddressSpace is changed by the control plane (boards, BAR moves) and publishes immutable
// FlatViews. A reader (vCPU, I/O thread) holds a ViewCache: one relaxed load tells it whether its
// FlatView is still the newest, so lookups take no lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/sync.h"
#include "memory/gpa.h"
#include "memory/ram.h"

namespace kvartz {

// What a device offers to the bus. Called with the region's lock held; `size` is 1, 2, 4 or 8,
// accesses never cross the end of the region. Reads return the value in the low `size` bytes.
class IoHandler {
 public:
  virtual ~IoHandler() = default;
  virtual uint64_t IoRead(uint64_t offset, unsigned size) = 0;
  virtual void IoWrite(uint64_t offset, unsigned size, uint64_t value) = 0;
};

// A write of `value` (or any value) to `offset` signals the descriptor instead of calling the
// handler: what KVM calls an ioeventfd. Both engines honour it.
struct Doorbell {
  uint64_t offset = 0;
  unsigned size = 0;  // 0: any size
  bool match_value = false;
  uint64_t value = 0;
  int event_fd = -1;
};

enum class RegionKind : uint8_t {
  kRam,  // read, write, execute
  kRom,  // read, execute; writes are dropped, or go to the handler if there is one (flash)
  kIo,   // every access goes to the handler
};

// One region of the map. Immutable once added, but for `doorbells` (SetDoorbells).
struct Region {
  std::string name;
  RegionKind kind = RegionKind::kIo;
  uint64_t base = 0;
  uint64_t size = 0;
  // Overlaps: the higher priority wins; within one, the later added.
  int priority = 0;
  std::shared_ptr<RamBlock> ram = {};  // kRam, kRom
  uint64_t ram_offset = 0;
  IoHandler* handler = nullptr;
  Mutex* lock = nullptr;  // taken around the handler; null: the handler locks for itself
  // The bus splits wider accesses, and widens narrower ones to the aligned min_access bytes around
  // them: a read takes its bytes out of those, a write has zeros in the others. Powers of two;
  // `size` is a multiple of min_access.
  unsigned min_access = 1;
  unsigned max_access = 8;
  std::vector<Doorbell> doorbells = {};
  // Writes may reach the handler late, in order, before the next access of any other kind (frame
  // buffers in planes, packet memory): KVM collects them.
  bool collect_writes = false;
};

// A part of a region that is visible: [base, base + size) of the space is region offset
// `region_offset`.
struct FlatRange {
  uint64_t base = 0;
  uint64_t size = 0;
  uint64_t region_offset = 0;
  std::shared_ptr<const Region> region;

  uint64_t end() const { return base + size; }
  // Host address of `address`, for kRam and kRom.
  uint8_t* Host(uint64_t address) const {
    return region->ram->host() + region->ram_offset + region_offset + (address - base);
  }
};

// Sorted, without overlaps. Immutable.
class FlatView {
 public:
  explicit FlatView(std::vector<FlatRange> ranges) : ranges_(std::move(ranges)) {}
  const FlatRange* Find(uint64_t address) const;  // null: nothing answers there
  const std::vector<FlatRange>& ranges() const { return ranges_; }

 private:
  std::vector<FlatRange> ranges_;
};

// Guarded by its lock; generation() and the published views are free of it.
class AddressSpace {
 public:
  using RegionId = uint64_t;
  // Told of every change, under the space's lock, after the new view was published (KVM: memory
  // slots and ioeventfds).
  class Listener {
   public:
    virtual ~Listener() = default;
    virtual void ViewChanged(const FlatView& before, const FlatView& after) = 0;
  };

  // `limit`: first address beyond the space (65536 for ports).
  AddressSpace(std::string name, uint64_t limit);

  RegionId Add(Region region);
  // After Remove returned, no *new* access reaches the handler; accesses under way finish under the
  // region's lock. A vCPU may be between its look at the map and the lock: whoever destroys the
  // handler stops the vCPUs first.
  void Remove(RegionId id);
  // Several changes, one publication.
  class Batch {
   public:
    explicit Batch(AddressSpace& space);
    ~Batch();

   private:
    AddressSpace& space_;
  };
  void SetDoorbells(RegionId id, std::vector<Doorbell> doorbells);

  // The listener is told at once of what is there (before: empty).
  void AddListener(Listener* listener);
  void RemoveListener(Listener* listener);

  uint64_t generation() const { return generation_.load(std::memory_order_acquire); }
  std::shared_ptr<const FlatView> view() const;
  const std::string& name() const { return name_; }
  uint64_t limit() const { return limit_; }

 private:
  void Publish() REQUIRES(mutex_);
  const std::string name_;
  const uint64_t limit_;
  mutable Mutex mutex_;
  mutable Mutex view_mutex_;  // guards only the pointer copy
  std::atomic<uint64_t> generation_{0};
  std::shared_ptr<const FlatView> view_ GUARDED_BY(view_mutex_);
  struct Entry {
    RegionId id;
    std::shared_ptr<const Region> region;
  };
  std::vector<Entry> entries_ GUARDED_BY(mutex_);
  std::vector<Listener*> listeners_ GUARDED_BY(mutex_);
  RegionId next_id_ GUARDED_BY(mutex_) = 1;
  int batch_depth_ GUARDED_BY(mutex_) = 0;
  bool batch_changed_ GUARDED_BY(mutex_) = false;
};

// A reader's window on a space. Owned by one thread (vCPU, loop).
class ViewCache {
 public:
  explicit ViewCache(const AddressSpace& space) : space_(space) {}
  const FlatView& Get() {
    if (generation_ != space_.generation()) [[unlikely]]
      Refresh();
    return *view_;
  }
  const std::shared_ptr<const FlatView>& Hold() {
    Get();
    return view_;
  }
  const AddressSpace& space() const { return space_; }

 private:
  void Refresh();
  const AddressSpace& space_;
  std::shared_ptr<const FlatView> view_;
  uint64_t generation_ = ~0ull;
};

// One access as the bus sees it, by a vCPU: RAM is copied, ROM writes dropped, devices called under
// their lock in accesses they take, doorbells signalled; unassigned addresses read all ones.
// `size`: 1, 2, 4, 8; may cross ranges (split).
uint64_t BusRead(ViewCache& view, uint64_t address, unsigned size);
void BusWrite(ViewCache& view, uint64_t address, unsigned size, uint64_t value);

}  // namespace kvartz
