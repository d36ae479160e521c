#include "cpu/x86/jit/code_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

namespace kvartz::cpu::x86::jit {

Result<> CodeMemory::Map(size_t bytes) {
  // Not a memfd: perf takes code in one for a file's, and looks for no map of names.
  void* write = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (write == MAP_FAILED) return Fail(ErrnoError(errno, "cannot map memory for translated code"));
  write_ = static_cast<uint8_t*>(write);
  size_ = bytes;
  // An old size of 0 maps the same pages once more (mremap(2)).
  void* run = mremap(write, 0, bytes, MREMAP_MAYMOVE);
  if (run == MAP_FAILED) return Fail(ErrnoError(errno, "cannot map translated code a second time"));
  run_ = static_cast<uint8_t*>(run);
  if (mprotect(run, bytes, PROT_READ | PROT_EXEC) != 0) {
    return Fail(ErrnoError(errno,
                           "the host allows no executable memory for translated code "
                           "(-accel kvartz,jit=off does without)"));
  }
  return {};
}

CodeMemory::~CodeMemory() {
  if (write_ != nullptr) munmap(write_, size_);
  if (run_ != nullptr) munmap(run_, size_);
}

// Page by page, each would cost two faults. What the host can't do so (before Linux 5.14), it does
// by faults.
void CodeMemory::Populate(size_t offset) {
  constexpr size_t kChunk = 256 << 10;
  while (populated_ < offset && populated_ < size_) {
    const size_t bytes = std::min(kChunk, size_ - populated_);
    madvise(write_ + populated_, bytes, MADV_POPULATE_WRITE);
    madvise(run_ + populated_, bytes, MADV_POPULATE_READ);
    populated_ += bytes;
  }
}

void CodeMemory::Discard(size_t offset) {
  offset = (offset + 4095) & ~size_t{4095};
  populated_ = std::min(populated_, offset);
  if (offset < size_) madvise(write_ + offset, size_ - offset, MADV_REMOVE);
}

}  // namespace kvartz::cpu::x86::jit
