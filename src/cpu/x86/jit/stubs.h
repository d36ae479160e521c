// The fixed pieces of host code around translated units.
#pragma once

#include <cstdint>

#include "cpu/x86/jit/state.h"

namespace kvartz::cpu::x86::jit {

class Assembler;

// Addresses as they run. S0, S1: scratch registers. But for `enter` they expect the guest's
// registers in place and status flags, where live, in State::saved_flags.
struct Stubs {
  using Enter = void (*)(void* state, const uint8_t* target);
  Enter enter = nullptr;          // from C++: loads registers and goes to the target
  const uint8_t* exit = nullptr;  // back to C++; everything is in Cpu
  // Called; behind the call lie a jump back and a Site. They fill its slot, or go elsewhere. By
  // class and whether it is for writes. S0: the linear address less the slot's page; fill_at: the
  // address.
  using Fill = const uint8_t* [kClassCount][2];
  Fill fill = {}, fill_at = {};
  // Called; S0: the target; S1: a slot of code_pages, and the unit's mode from bit 16 on. Returns
  // if the code's page lies there, which is entered then; else goes to the dispatcher. Of CPL 0 to
  // 2, and of 3.
  const uint8_t* enter_page[2] = {};
  const uint8_t* execute = nullptr;      // call. S1: ExecuteSite*
  const uint8_t* execute_end = nullptr;  // jump. The same, and the unit ends
  const uint8_t* interpret = nullptr;    // jump. S1: Site*
  const uint8_t* dispatch = nullptr;     // jump. S0: the target
  const uint8_t* link = nullptr;         // jump. S0: the target; S1: number of the exit
  const uint8_t* link_same = nullptr;    // jump. S1: number of the exit; host flags valid if live
  const uint8_t* leave = nullptr;        // call, in place of a unit's body. Goes to the dispatcher
  const uint8_t* read_tsc = nullptr;   // call. To RDX:RAX; vectors and x87 are stored; spoils flags
  const uint8_t* read_tscp = nullptr;  // the same; TSC_AUX is in Cpu::gpr[1]
  const uint8_t* load_vectors = nullptr;  // call
  const uint8_t* load_x87 = nullptr;      // call; spoils flags
};

// Emits them. Aborts only on a bug: `assembler` must have 8 KiB of room.
Stubs EmitStubs(Assembler& assembler, const struct StubTargets& targets);

// C++ that the stubs call: (State*, S0, S1), the result is where to go on; 0: back to the unit.
using Helper = uint64_t (*)(void* state, uint64_t s0, uint64_t s1);
struct StubTargets {
  Helper fill, execute, execute_end, interpret, dispatch, link, link_same, leave;
  uint64_t (*read_tsc)(void* state);
  uint64_t (*read_tscp)(void* state);
  bool avx;
  bool xsave;  // else x87 is left to the interpreter
};

}  // namespace kvartz::cpu::x86::jit
