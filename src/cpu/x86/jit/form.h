// How the rows of the instruction tables are translated: a digest of each, made once.
#pragma once

#include <cstdint>

#include "cpu/x86/decode/insn.h"

namespace kvartz::cpu::x86::jit {

enum class Form : uint8_t {
  kInterpret,  // a call of the row's Exec function; kEndsBlock and kBranch rows end the unit with
               // it
  kNothing,    // NOP and its like
  kCopy,       // the same instruction, with registers renamed and memory operands rewritten
  kLea,
  kMoveFromSegment,  // MOV r, Sreg
  kReadTsc,          // RDTSC, RDTSCP
  kClearInterrupts,
  kSetInterrupts,
  kPushFlags,
  kPush,
  kPop,
  kLeave,
  kCall,
  kReturn,
  kJump,
  kJcc,
  kJcxz,
  kLoop,
};
// A direct branch that may not be taken.
constexpr bool IsConditional(Form form) {
  return form == Form::kJcc || form == Form::kJcxz || form == Form::kLoop;
}

// What becomes of a register whose value was known up to a constant.
enum class Arithmetic : uint8_t {
  kOther,
  kAddImmediate,
  kSubImmediate,
  kIncrement,
  kDecrement,
  kMove
};

// Immutable.
struct RowForm {
  RowForm() = default;  // interpreted
  explicit RowForm(const Row& row);
  static const RowForm& Of(const Row& row);

  Form form = Form::kInterpret;
  bool vector = false;        // uses vector registers or MXCSR
  bool x87 = false;           // uses x87 or MMX registers, or control, status or tags of theirs
  bool x87_pointers = false;  // sets FIP, FOP and, with a memory operand, FDP
  bool may_trap = false;      // the host may raise #DE, #GP (alignment), #MF or #XM for it
  bool writes_first = false;  // the first operand is written
  bool reads_first = true;    // ... and read
  bool writes_second = false;
  bool keeps_flags_sometimes = false;  // a count of 0 or an exception leaves the flags alone
  Arithmetic arithmetic = Arithmetic::kOther;
  bool results_in_ax_dx = false;  // that aren't among the operands
  bool zeroes_vectors = false;    // VZEROUPPER, VZEROALL
  bool bit_of_string = false;     // BT and its like with a register: beside memory, any bit there
  int8_t memory_operand = -1;     // index of the operand that may be memory
  uint8_t takes_source = 0;       // of a row with an immediate: the opcode that takes r/m instead
  // Which ModRM fields name general registers, and the operands' indices then (else -1).
  bool reg_is_gpr = false, rm_is_gpr = false, vvvv_is_gpr = false;
  int8_t reg_operand = -1, rm_operand = -1, vvvv_operand = -1;
};

}  // namespace kvartz::cpu::x86::jit
