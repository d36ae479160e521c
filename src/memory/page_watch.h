// Which 4 KiB pages of a RAM block hold code that an engine has decoded, and whether it was written
// since.
#pragma once

#include <atomic>
#include <cstdint>

namespace kvartz {

// One word a page: bit 0: watched; bit 1: some CPU may write without telling (it holds a writable
// translation); bits 2 to 5: writes that still have to tell, since the page was code a moment ago;
// above: the page's generation. Any thread; words are accessed with __atomic
// builtins. Words of pages that nobody watches cost no memory.
class PageWatch {
 public:
  static constexpr uint32_t kWatched = 1, kWritable = 2, kTell = 4, kTellMask = 0x3c,
                            kGeneration = 0x40;

  explicit PageWatch(uint64_t size_bytes);
  ~PageWatch();
  PageWatch(const PageWatch&) = delete;
  PageWatch& operator=(const PageWatch&) = delete;

  // Told when the generation of a watched page changes; on the writer's thread.
  class Listener {
   public:
    virtual ~Listener() = default;
    virtual void CodeWritten(const uint32_t* word) = 0;
  };
  // There is one; it outlives the watch's use.
  void SetListener(Listener* listener) { listener_.store(listener, std::memory_order_release); }

  uint32_t* word(uint64_t offset) { return &words_[offset / 4096]; }

  // The bytes of [offset, offset + length) were or are about to be changed.
  void NoteWrite(uint64_t offset, uint64_t length) {
    for (uint64_t page = offset / 4096; page <= (offset + length - 1) / 4096; page++) {
      if (__atomic_load_n(&words_[page], __ATOMIC_SEQ_CST) & kWatched) Bump(&words_[page]);
    }
  }
  void Bump(uint32_t* word);

 private:
  uint32_t* words_;
  uint64_t size_bytes_;
  std::atomic<Listener*> listener_{nullptr};
};

}  // namespace kvartz
