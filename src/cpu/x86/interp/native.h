// Vector and x87 instructions run on the host's own units: guest and host speak the same
// instruction set, so the reference for what ADDPS does is ADDPS. A stub holds the instruction with
// its operands renamed to fixed registers and a fixed memory slot of a NativeFrame; the interpreter
// copies operands in, calls the stub, and commits what came out. So a fault or an unmasked SIMD
// exception commits nothing, and no guest address ever reaches host code.
//
// Stubs are shared by all CPUs of the process and keyed by row, form and immediate: their number is
// bounded.
#pragma once

#include <cstdint>

#include "base/result.h"
#include "cpu/x86/decode/insn.h"

namespace kvartz::cpu::x86 {

// What a stub reads and writes. Offsets are known to the emitter.
struct alignas(64) NativeFrame {
  // By operand field: 0 the implicit XMM0, 1 ModRM.reg, 2 ModRM.rm, 3 VEX.vvvv, 4 immediate bits
  // 7:4. MMX: low 8 bytes.
  uint8_t vector[5][32];
  uint8_t padding[32];
  uint8_t memory[64];
  uint64_t gpr;            // the general register operand
  uint64_t rax, rdx, rcx;  // implicit operands of PCMPxSTRx
  uint64_t flags;
  uint32_t mxcsr;
  uint32_t host_mxcsr = 0x1f80;
};

using NativeStub = void (*)(NativeFrame* frame, XsaveArea* fpu);

// Gets the memory that stubs are built in. Errors: the host gives no executable memory.
Result<> PrepareStubs();
// The stub of an instruction whose row is NATIVE. Built at first use; PrepareStubs succeeded
// before.
NativeStub FindStub(const Insn& insn);

// Which control bits decide whether an instruction may run (SDM vol. 3 tables 2-3, 13-1).
enum class VectorClass : uint8_t { kX87, kMmx, kSse, kAvx };
// Raises #UD or #NM if the class isn't enabled.
void CheckVectorEnabled(Cpu& cpu, VectorClass vector_class);
// Raises #MF if an unmasked x87 exception is pending.
void CheckX87Pending(Cpu& cpu);
// Makes `top` the top of the stack without moving a register: ST(i) are other registers then.
void TurnX87(XsaveArea& fpu, unsigned top);
// Turns the register file as MMX instructions do: physical order, TOP 0, all tags valid.
void EnterMmx(XsaveArea& fpu);
// Calls a stub that uses MXCSR: under the guest's masks, so that the host's CPU itself decides what
// an unmasked exception does. False if one was raised: then nothing was stored. `frame.mxcsr` has
// the exceptions that came up.
bool CallWithMxcsr(NativeStub stub, NativeFrame& frame, XsaveArea& fpu);

}  // namespace kvartz::cpu::x86
