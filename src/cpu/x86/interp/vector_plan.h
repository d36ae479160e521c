// What the interpreter moves in and out of a NATIVE row's stub: a digest of the row, made once.
#pragma once

#include "cpu/x86/interp/native.h"

namespace kvartz::cpu::x86 {

// Immutable.
struct VectorPlan {
  enum class File : uint8_t { kVector, kMmx, kGpr };
  enum class Field : uint8_t { kReg, kRm, kVvvv, kIs4, kXmm0 };
  struct Register {
    File file;
    Field field;
    uint8_t slot;  // NativeFrame::vector
    bool is_rm;    // absent if the instruction has a memory operand
    unsigned Number(const Insn& insn) const {
      switch (field) {
        case Field::kReg:
          return insn.reg;
        case Field::kRm:
          return insn.rm;
        case Field::kVvvv:
          return insn.vvvv;
        case Field::kIs4:
          return static_cast<unsigned>(insn.imm >> 4) & 15;
        case Field::kXmm0:
          return 0;
      }
      return 0;
    }
  };

  explicit VectorPlan(const Row& row);
  static const VectorPlan& Of(const Row& row);
  unsigned MemorySize(const Insn& insn) const {
    switch (memory_size) {
      case kSizeW:
        return insn.w() ? 8 : 4;
      case kSizeRegOrByte:
        return 1;
      case kSizeRegOrWord:
        return 2;
      default:
        return memory_size;
    }
  }

  VectorClass vector_class = VectorClass::kSse;
  bool mmx_in_rm =
      false;  // the MMX register may be memory instead (CVTPI2PS): then the x87 unit isn't touched
  bool x87 = false, mmx = false, vex = false, fp = false, align = false;
  bool memory_written = false;   // the memory operand is the destination
  bool writes_register = false;  // inputs[0] is the destination
  bool flags_written = false;
  bool string_lengths = false, string_index = false, string_mask = false;
  uint8_t memory_size = 0;  // bytes, or a kSize... code
  uint8_t input_count = 0;
  Register inputs[5];
};

}  // namespace kvartz::cpu::x86
