// A machine of its own for random programs of one shape, used over and over: between two programs
// only what they touch is put back.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "cpu/x86/guest_case.h"
#include "cpu/x86/jit/program.h"
#include "cpu/x86/oracle/insn_encoder.h"
#include "memory/guest_memory.h"

namespace kvartz::cpu::x86::programs {

// How a program ended.
struct End {
  int vector = -1;  // -1: at OUT 0xf4; kEndVector: at its last INT; others: an exception
  bool stopped = false, triple_fault = false;
  uint32_t error = 0;
  uint64_t rip = 0, rsp = 0, rflags = 0;  // of the program, when it ended
  uint16_t cs = 0, ss = 0;
  uint64_t cr2 = 0;
};

class ProgramBoard {
 public:
  ProgramBoard(Shape shape, const SoftOptions& soft);

  enum class Interruptions { kNone, kSome };
  // Runs the program from its start. `data`: all data pages' contents. kSome: with NMIs and kicks
  // from another thread, if the program is one that is to be interrupted.
  End Run(const Program& program, const Image& image, std::span<const uint8_t> data,
          Interruptions interruptions);
  const Cpu& cpu() { return guest_.board.cpu(); }
  BareBoard& board() { return guest_.board; }
  // The memory that programs reach: code, data, stack, last-level page table.
  struct Area {
    const char* name;
    uint64_t linear;
    std::span<uint8_t> bytes;
  };
  std::vector<Area> Areas();

 private:
  void MapPages();
  void SetHandlers();
  void SetDescriptors();
  void SetDescriptor(uint16_t selector, uint64_t base, uint64_t limit, unsigned type,
                     unsigned flags);
  bool Interruptible(const Program& program) const;
  int RunInterrupted(uint64_t seed);
  void MapArea(uint64_t linear, uint64_t pages, uint64_t flags, bool aliased);
  void Put(uint64_t physical, std::span<const uint8_t> bytes);
  void LoadMemory(const Program& program, const Image& image, std::span<const uint8_t> data);
  void LoadCpu(const Program& program, uint64_t entry);
  void SetKind(Program::Segment kind, Segment* segment) const;
  End Finish();
  void ReadFrame(End* end);
  void TranslateStack(uint64_t* address) const;
  // The linear address of the last byte that is put back between programs.
  uint64_t LastByte() const {
    return (layout_.is16() ? layout_.data + kDataBytes : layout_.stack + kStackBytes) - 1;
  }

  const Layout layout_;
  GuestCase guest_;
  GuestMemory memory_;
  std::vector<uint8_t> page_table_;  // as it is at a program's start
  std::vector<uint8_t> low_stacks_;  // with paging: the page of exceptions' stacks
  std::vector<uint8_t> low_memory_;  // without paging: tables and stubs, and what lies between
  std::vector<uint8_t> stack_;
  bool code_writable_ = false;
  unsigned cpl_ = 0;
};

}  // namespace kvartz::cpu::x86::programs
