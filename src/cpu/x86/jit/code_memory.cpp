#include "cpu/x86/jit/code_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

namespace kvartz::cpu::x86::jit {

namespace {

constexpr size_t kHugePage = 2 << 20;
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

// Addresses that begin with a huge page. Null: errno.
uint8_t* Reserve(size_t bytes) {
  void* at = mmap(nullptr, bytes + kHugePage, PROT_NONE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  auto* begin = static_cast<uint8_t*>(at);
  const size_t front = -reinterpret_cast<uintptr_t>(at) % kHugePage;
  if (front != 0) munmap(begin, front);
  if (front != kHugePage) munmap(begin + front + bytes, kHugePage - front);
  return begin + front;
}

}  // namespace

Result<> CodeMemory::Map(size_t bytes) {
  write_ = Reserve(bytes);
  size_ = bytes;
  // Not a memfd: perf takes code in one for a file's, and looks for no map of names.
  if (write_ == nullptr ||
      mmap(write_, bytes, PROT_READ | PROT_WRITE,
           MAP_FIXED | MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) == MAP_FAILED)
    return Fail(ErrnoError(errno, "cannot map memory for translated code"));
  // An old size of 0 maps the same pages once more (mremap(2)).
  void* at = Reserve(bytes);
  void* run =
      at == nullptr ? MAP_FAILED : mremap(write_, 0, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, at);
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

// Page by page, each would cost two faults; and code in small pages is slow to find. What the host
// can't do so (before Linux 5.14, 6.1), it does by faults.
void CodeMemory::Populate(size_t offset) {
  while (populated_ < offset && populated_ < size_) {
    const size_t bytes = std::min(kHugePage - populated_ % kHugePage, size_ - populated_);
    madvise(write_ + populated_, bytes, MADV_POPULATE_WRITE);
    madvise(write_ + populated_, bytes, MADV_COLLAPSE);
    madvise(run_ + populated_, bytes, MADV_COLLAPSE);
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
