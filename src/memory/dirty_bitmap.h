// Which 4 KiB pages of a RAM block were written since they were last collected.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "memory/page_watch.h"

namespace kvartz {

// Any thread. Costs one relaxed load a write while it is off. Also the place where writers tell of
// changed code: an engine that decodes it switches the watch on.
class DirtyBitmap {
 public:
  explicit DirtyBitmap(uint64_t size_bytes);
  ~DirtyBitmap();
  void SetEnabled(bool enabled);
  bool enabled() const { return active_.load(std::memory_order_relaxed) & kCollecting; }
  // The block's code watch; switched on by the first call, for good.
  PageWatch& Watch();
  // Marks the pages of [offset, offset + length).
  void Mark(uint64_t offset, uint64_t length) {
    if (active_.load(std::memory_order_relaxed)) MarkSlow(offset, length);
  }
  // Calls `page(index)` for each marked page and unmarks it.
  void Collect(const std::function<void(uint64_t page_index)>& page);
  // Adds the pages of a KVM dirty log (one bit a page, little-endian words), starting with page
  // `first_page`.
  void Merge(const uint64_t* words, uint64_t first_page, uint64_t page_count);

 private:
  void MarkSlow(uint64_t offset, uint64_t length);
  uint64_t page_count_;
  static constexpr uint8_t kCollecting = 1, kWatching = 2;
  std::atomic<uint8_t> active_{0};
  std::atomic<PageWatch*> watch_{nullptr};
  std::unique_ptr<std::atomic<uint64_t>[]> words_;  // allocated when first enabled, kept
};

}  // namespace kvartz
