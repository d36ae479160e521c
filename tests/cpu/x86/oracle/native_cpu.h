// Runs one instruction on the host's CPU, in this process, with chosen registers, and tells what
// became of it: the oracle for user-mode instructions.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "cpu/x86/cpu.h"

namespace kvartz::cpu::x86::oracle {

// Where code and data lie, in the process and in the guest alike. Beyond the last page of each
// nothing is mapped.
constexpr uint64_t kCode = 0x10000000, kCodeSize = 0x2000;  // filled with INT3
constexpr uint64_t kData = 0x20000000;
constexpr uint64_t kDataWritable = 0x3000;  // then one read-only page, then nothing
constexpr uint64_t kDataReadOnly = 0x1000;
constexpr uint64_t kDataSize = kDataWritable + kDataReadOnly;
constexpr uint64_t kGsBase = 0x1000;

struct Registers {
  std::array<uint64_t, 16> gpr{};
  uint64_t rip = 0;
  uint64_t rflags = 2;
  XsaveArea fpu;
};

constexpr unsigned kNoFault = 256;

struct Outcome {
  Registers registers;
  unsigned fault = kNoFault;  // vector
  uint32_t error = 0;
  uint64_t fault_address = 0;  // of a page fault
};

enum class Mode { k64, k32 };

// One a process: it owns the fixed addresses and the signal handlers.
class NativeCpu {
 public:
  NativeCpu();
  ~NativeCpu();
  // Puts `code` at `address` within the code pages, the rest of which is INT3.
  void SetCode(uint64_t address, std::span<const uint8_t> code);
  uint8_t* data() { return reinterpret_cast<uint8_t*>(kData); }
  // Fills the data pages, the read-only one too.
  void SetData(const uint8_t* bytes);
  // Runs from registers.rip until a fault, a breakpoint or (TF set) the end of one instruction.
  Outcome Run(const Registers& registers, Mode mode);

 private:
  uint64_t last_code_ = kCode;
  size_t last_code_size_ = 0;
};

}  // namespace kvartz::cpu::x86::oracle
