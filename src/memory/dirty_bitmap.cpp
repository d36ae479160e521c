#include "memory/dirty_bitmap.h"

#include <algorithm>
#include <bit>

#include "memory/gpa.h"

namespace kvartz {

DirtyBitmap::DirtyBitmap(uint64_t size_bytes)
    : page_count_((size_bytes + kPageSize - 1) / kPageSize) {}

DirtyBitmap::~DirtyBitmap() { delete watch_.load(); }

PageWatch& DirtyBitmap::Watch() {
  PageWatch* watch = watch_.load(std::memory_order_acquire);
  if (watch) return *watch;
  auto fresh = std::make_unique<PageWatch>(page_count_ * kPageSize);
  if (watch_.compare_exchange_strong(watch, fresh.get())) {
    watch = fresh.release();
  }
  active_.fetch_or(kWatching, std::memory_order_release);
  return *watch;
}

void DirtyBitmap::SetEnabled(bool enabled) {
  if (enabled) {
    uint64_t word_count = (page_count_ + 63) / 64;
    if (!words_) words_ = std::make_unique<std::atomic<uint64_t>[]>(word_count);
    for (uint64_t i = 0; i < word_count; i++) words_[i].store(0, std::memory_order_relaxed);
  }
  if (enabled) {
    active_.fetch_or(kCollecting, std::memory_order_release);
  } else {
    active_.fetch_and(static_cast<uint8_t>(~kCollecting), std::memory_order_release);
  }
}

void DirtyBitmap::MarkSlow(uint64_t offset, uint64_t length) {
  // Again, now with the ordering that makes words_ and the watch visible.
  uint8_t active = active_.load(std::memory_order_acquire);
  if (length == 0) return;
  if (active & kWatching) {
    watch_.load(std::memory_order_relaxed)->NoteWrite(offset, length);
  }
  if (!(active & kCollecting)) return;
  uint64_t first = offset / kPageSize;
  uint64_t last = std::min((offset + length - 1) / kPageSize, page_count_ - 1);
  for (uint64_t page = first; page <= last;) {
    uint64_t bits = std::min<uint64_t>(64 - page % 64, last - page + 1);
    uint64_t mask = (bits == 64 ? ~0ull : (1ull << bits) - 1) << page % 64;
    auto& word = words_[page / 64];
    if ((word.load(std::memory_order_relaxed) & mask) != mask) {
      word.fetch_or(mask, std::memory_order_release);
    }
    page += bits;
  }
}

void DirtyBitmap::Collect(const std::function<void(uint64_t page_index)>& page) {
  if (!words_) return;
  for (uint64_t i = 0; i < (page_count_ + 63) / 64; i++) {
    if (words_[i].load(std::memory_order_relaxed) == 0) continue;
    uint64_t bits = words_[i].exchange(0, std::memory_order_acq_rel);
    for (; bits != 0; bits &= bits - 1)
      page(i * 64 + static_cast<uint64_t>(std::countr_zero(bits)));
  }
}

void DirtyBitmap::Merge(const uint64_t* words, uint64_t first_page, uint64_t page_count) {
  if (!(active_.load(std::memory_order_acquire) & kCollecting)) return;
  page_count = std::min(page_count, page_count_ - std::min(first_page, page_count_));
  for (uint64_t i = 0; i < page_count; i += 64) {
    uint64_t bits = words[i / 64];
    if (page_count - i < 64) bits &= (1ull << (page_count - i)) - 1;
    if (bits == 0) continue;
    uint64_t page = first_page + i;
    words_[page / 64].fetch_or(bits << page % 64, std::memory_order_release);
    uint64_t rest = page % 64 ? bits >> (64 - page % 64) : 0;
    if (rest) words_[page / 64 + 1].fetch_or(rest, std::memory_order_release);
  }
}

}  // namespace kvartz
