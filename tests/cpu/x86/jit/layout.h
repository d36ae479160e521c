// Where a random program's code, data and stack lie, in each of the modes that programs run in.
#pragma once

#include <cstdint>

#include "cpu/x86/decode/insn.h"
#include "cpu/x86/guest_case.h"

namespace kvartz::cpu::x86::programs {

enum class Shape {
  k64,
  kCompat32,
  kPae32,
  kPaged32,
  kFlat32,
  kPaged16,
  kReal16,
  kSegmented32,  // no segment begins at 0, CS not at a page either
  kUnaligned16,  // nor there; data segments of 4 GiB
  kUnreal16,     // real mode with data segments beyond 64 KiB
  kVm86,
  kCount
};

// Data pages by number. Those not named are ordinary writable memory.
constexpr unsigned kReadOnlyPage = 4, kSupervisorPage = 6, kAbsentPage = 8, kDemandPage = 10,
                   kNoMemoryPage = 12, kControlPage = 14, kStackPage16 = 15;
constexpr uint64_t kPage = 0x1000;
constexpr uint64_t kCodePages = 5, kDataPages = 16, kStackPages = 2;
constexpr uint64_t kCodeBytes = kCodePages * kPage, kDataBytes = kDataPages * kPage,
                   kStackBytes = kStackPages * kPage;
// In the control page: counters of loops, a word to save a register in, targets of indirect jumps.
constexpr uint64_t kCountersAt = kControlPage * kPage, kSaveAt = kCountersAt + 0x400,
                   kJumpTableAt = kCountersAt + 0x800;
// Code and data are mapped a second time, this far up (paged modes).
constexpr uint64_t kAlias = 0x60000;
// The last-level page table, for programs that edit it (CPL 0).
constexpr uint64_t kPageTableLinear = 0x1f0000;
constexpr uint64_t kHighHalf = 0xffff800000000000;
constexpr uint64_t kFsBase = 0x1000, kGsBase = 0x2000;  // above the data segment's base
constexpr uint8_t kEndVector = 0x81;                    // INT kEndVector ends a program
// Descriptors besides GuestCase's; with 8 | 3 added those of user mode. Protected mode only.
constexpr uint16_t kAliasCode = 0xa0,  // CS from kAliasShift below the program's
    kOtherCode = 0xb0,  // from the first code page on, with operands of the other size
    kTightData = 0xc0,  // like the program's data segments, but it ends within the data
    kDownData = 0xd0,   // expands down
    kOwnData = 0xe0,    // the program's data segments
    kOwnCode = 0xf0;    // the program's CS
constexpr uint64_t kAliasShift = 0x1230;

struct Layout {
  Mode mode;
  CodeMode code_mode;
  bool paged;
  uint64_t code, data, stack;     // linear
  uint64_t physical_offset;       // of all three
  uint64_t code_base, data_base;  // of CS, and of the other segments
  unsigned width;                 // bytes of a general register in ordinary use
  uint64_t data_offset() const { return data - data_base; }
  uint64_t stack_offset() const { return stack - data_base; }
  bool is16() const { return code_mode == CodeMode::k16; }
  bool is64() const { return code_mode == CodeMode::k64; }
  // Segment registers hold addresses / 16.
  bool real_segments = false;
  // Addresses of 16 bits reach the data.
  bool near_data() const { return data_offset() < 0x10000; }
};

inline Layout LayoutOf(Shape shape) {
  const bool real = shape == Shape::kReal16 || shape == Shape::kUnreal16;
  const bool small =
      real || shape == Shape::kPaged16 || shape == Shape::kUnaligned16 || shape == Shape::kVm86;
  Layout layout{.mode = Mode::kLong64,
                .code_mode = small ? CodeMode::k16 : CodeMode::k32,
                .paged = shape != Shape::kFlat32 && !real,
                .code = 0x100000,
                .data = 0x120000,
                .stack = 0x140000,
                .physical_offset = 0,
                .code_base = 0,
                .data_base = 0,
                .width = small ? 2u : 4u};
  if (shape == Shape::k64) layout.code_mode = CodeMode::k64, layout.width = 8;
  if (shape == Shape::kCompat32) layout.mode = Mode::kCompat32;
  if (shape == Shape::kPae32) layout.mode = Mode::kPae32;
  if (shape == Shape::kPaged32 || shape == Shape::kSegmented32 || (small && !real))
    layout.mode = Mode::kPaged32;
  if (shape == Shape::kFlat32) layout.mode = Mode::kFlat32;
  if (real) layout.mode = Mode::kReal16;
  layout.real_segments = real || shape == Shape::kVm86;
  if (small) {
    layout.code = layout.code_base = 0x40000;
    layout.data = layout.data_base = 0x20000;
    layout.stack = layout.data + kStackPage16 * kPage;
  }
  if (shape == Shape::kUnaligned16 || shape == Shape::kUnreal16) layout.code_base -= 0x650;
  if (shape == Shape::kSegmented32) {
    layout.code_base = layout.code - 0x643;
    layout.data_base = layout.data;
  }
  if (layout.paged) layout.physical_offset = 0x400000;
  return layout;
}

}  // namespace kvartz::cpu::x86::programs
