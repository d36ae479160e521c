#include "cpu/x86/jit/code_memory.h"

#include <sys/mman.h>

#include <cerrno>

#include "base/fd.h"

namespace kvartz::cpu::x86::jit {

Result<> CodeMemory::Map(size_t bytes) {
  UniqueFd fd = TRY(CreateMemFd("kvartz-code", bytes));
  void* write = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (write == MAP_FAILED) return Fail(ErrnoError(errno, "cannot map memory for translated code"));
  write_ = static_cast<uint8_t*>(write);
  size_ = bytes;
  void* run = mmap(nullptr, bytes, PROT_READ | PROT_EXEC, MAP_SHARED, fd.get(), 0);
  if (run == MAP_FAILED) {
    return Fail(ErrnoError(errno, "the host allows no executable memory for translated code "
                                  "(-accel kvartz,jit=off does without)"));
  }
  run_ = static_cast<uint8_t*>(run);
  return {};
}

CodeMemory::~CodeMemory() {
  if (write_ != nullptr) munmap(write_, size_);
  if (run_ != nullptr) munmap(run_, size_);
}

void CodeMemory::Discard(size_t offset) {
  offset = (offset + 4095) & ~size_t{4095};
  if (offset < size_) madvise(write_ + offset, size_ - offset, MADV_REMOVE);
}

}  // namespace kvartz::cpu::x86::jit
