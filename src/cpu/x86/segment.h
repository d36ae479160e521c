// Segmentation: descriptors, segment loads, and what derives from them (SDM vol. 3 ch. 3 and 5).
#pragma once

#include "cpu/x86/cpu.h"

namespace kvartz::cpu::x86 {

// A descriptor as it lies in a table. `high` is only there for 16-byte system descriptors of long
// mode.
struct Descriptor {
  uint64_t low = 0, high = 0;
  uint64_t address = 0;  // linear, where it was read

  unsigned type() const { return low >> 40 & 0xf; }
  bool system() const { return !(low >> 44 & 1); }
  unsigned dpl() const { return low >> 45 & 3; }
  bool present() const { return low >> 47 & 1; }
  bool is_long() const { return low >> 53 & 1; }
  bool big() const { return low >> 54 & 1; }
  bool code() const { return !system() && (type() & 8); }
  bool conforming() const { return code() && (type() & 4); }
  bool writable_data() const { return !system() && (type() & 0xa) == 2; }
  bool readable() const { return !system() && (!(type() & 8) || (type() & 2)); }
  uint32_t limit() const {
    auto raw = static_cast<uint32_t>((low & 0xffff) | (low >> 32 & 0xf0000));
    return low >> 55 & 1 ? raw << 12 | 0xfff : raw;
  }
  uint32_t base() const {
    return static_cast<uint32_t>((low >> 16 & 0xffffff) | (low >> 32 & 0xff000000));
  }
  uint64_t base64() const { return base() | high << 32; }
  uint32_t attributes() const { return low >> 40 & 0xf0ff; }
  // Gates.
  uint16_t gate_selector() const { return low >> 16 & 0xffff; }
  uint32_t gate_offset() const {
    return static_cast<uint32_t>((low & 0xffff) | (low >> 32 & 0xffff0000));
  }
  uint64_t gate_offset64() const { return gate_offset() | high << 32; }
  unsigned gate_count() const { return low >> 32 & 0x1f; }
};

enum SystemType : uint8_t {
  kTss16 = 1,
  kLdt = 2,
  kTss16Busy = 3,
  kCallGate16 = 4,
  kTaskGate = 5,
  kIntGate16 = 6,
  kTrapGate16 = 7,
  kTss32 = 9,
  kTss32Busy = 11,
  kCallGate32 = 12,
  kIntGate32 = 14,
  kTrapGate32 = 15,
};

inline bool IsNull(uint16_t selector) { return (selector & 0xfffc) == 0; }
// Error code that names a selector.
inline uint32_t SelectorError(uint16_t selector) { return selector & 0xfffc; }

// False: the selector lies beyond its table.
bool ReadDescriptor(Cpu& cpu, uint16_t selector, Descriptor* descriptor);
// Also the upper half (call gates, LDT and TSS descriptors in long mode).
bool ReadDescriptor16(Cpu& cpu, uint16_t selector, Descriptor* descriptor);
Segment ToSegment(uint16_t selector, const Descriptor& descriptor);
// Sets the accessed bit in memory (and in the descriptor) if it isn't set.
void MarkAccessed(Cpu& cpu, Descriptor* descriptor);
void SetBusy(Cpu& cpu, const Descriptor& descriptor, bool busy);

// MOV, POP, LxS to a data or stack segment register, in any mode. Raises #GP, #SS, #NP. Also
// UpdateMode; no interrupt shadow.
void LoadSegment(Cpu& cpu, SegReg seg, uint16_t selector);
// As real mode and virtual-8086 mode do.
void LoadRealSegment(Cpu& cpu, SegReg seg, uint16_t selector);
void LoadNullSegment(Cpu& cpu, SegReg seg, uint16_t selector);
// A stack segment for privilege level `cpl`; `vector` (#GP for LSS, #TS for stack switches) for all
// errors but "not present". `ext`: ORed to error codes.
Descriptor CheckStackSegment(Cpu& cpu, uint16_t selector, unsigned cpl, Vector vector,
                             uint32_t ext);
// Sets CS (RPL := cpl) and the CPL.
void SetCs(Cpu& cpu, uint16_t selector, const Descriptor& descriptor, unsigned cpl);
void SetCpl(Cpu& cpu, unsigned cpl);

// A stack that may not be the present one yet: pushes and pops check limit and paging at `cpl`'s
// privilege and change nothing but memory; the caller commits sp.
struct Stack {
  Segment ss;
  uint64_t sp = 0;
  unsigned cpl = 0;
  bool is64 = false;
  uint32_t ext = 0;    // for #SS error codes of a new stack: selector | ext
  bool fresh = false;  // errors carry the selector

  uint64_t mask() const {
    return is64 ? ~0ull : ss.attributes & Segment::kDb ? 0xffffffff : 0xffff;
  }
};
Stack PresentStack(Cpu& cpu);
void Push(Cpu& cpu, Stack& stack, unsigned size, uint64_t value);
uint64_t Pop(Cpu& cpu, Stack& stack, unsigned size);
// Stores the stack pointer with the stack's width.
void CommitSp(Cpu& cpu, const Stack& stack);

// ---- far transfers (far.cpp): `size` is the operand size
void FarJump(Cpu& cpu, uint16_t selector, uint64_t offset, unsigned size);
void FarCall(Cpu& cpu, uint16_t selector, uint64_t offset, unsigned size);
void FarReturn(Cpu& cpu, unsigned size, unsigned release);
void InterruptReturn(Cpu& cpu, unsigned size);

// ---- task.cpp
enum class TaskSwitch { kJump, kCall, kReturn, kEvent };
// Switches to the TSS of `selector` (its descriptor was checked for type and presence).
// `has_error`: pushed on the new stack.
void SwitchTask(Cpu& cpu, uint16_t selector, const Descriptor& tss, TaskSwitch kind,
                bool has_error = false, uint32_t error = 0, uint32_t ext = 0);

}  // namespace kvartz::cpu::x86
