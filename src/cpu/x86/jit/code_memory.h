// Memory for translated code, mapped twice: written at one address, run at another. Never both in
// one mapping.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/result.h"
#include "cpu/x86/jit/assembler.h"

namespace kvartz::cpu::x86::jit {

// Takes host memory as far as it is used. Owned by one thread.
class CodeMemory {
 public:
  CodeMemory() = default;
  ~CodeMemory();
  CodeMemory(const CodeMemory&) = delete;
  CodeMemory& operator=(const CodeMemory&) = delete;
  // Errors: the host gives no executable memory.
  Result<> Map(size_t bytes);

  size_t size() const { return size_; }
  ptrdiff_t delta() const { return run_ - write_; }
  bool Contains(const uint8_t* run) const { return run >= run_ && run < run_ + size_; }
  Assembler At(size_t offset) { return {write_ + offset, write_ + size_, delta(), state_}; }
  // Where the code finds State (assembler.h).
  void SetState(int32_t state) { state_ = state; }
  size_t OffsetOf(const uint8_t* write) const { return static_cast<size_t>(write - write_); }
  // Asks the host for what lies up to `offset`, and some more, in one go.
  void Populate(size_t offset);
  // Gives the host back what lies from `offset` on.
  void Discard(size_t offset);

 private:
  uint8_t* write_ = nullptr;
  uint8_t* run_ = nullptr;
  size_t size_ = 0;
  size_t populated_ = 0;
  int32_t state_ = 0;
};

}  // namespace kvartz::cpu::x86::jit
