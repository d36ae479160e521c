#include "memory/page_watch.h"

#include <sys/mman.h>

#include "base/check.h"

namespace kvartz {

PageWatch::PageWatch(uint64_t size_bytes) : size_bytes_(size_bytes / 4096 * sizeof(uint32_t)) {
  void* map = mmap(nullptr, size_bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  VERIFY(map != MAP_FAILED);
  words_ = static_cast<uint32_t*>(map);
}

PageWatch::~PageWatch() { munmap(words_, size_bytes_); }

void PageWatch::Bump(uint32_t* word) {
  uint32_t before = __atomic_load_n(word, __ATOMIC_SEQ_CST);
  uint32_t after;
  do {
    after = (before + kGeneration) & ~kWatched;
  } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST));
  if (Listener* listener = listener_.load(std::memory_order_acquire)) listener->CodeWritten(word);
}

}  // namespace kvartz
