// The own engine's CPU: working state, and the contract between its parts.
//
//   decode/   bytes -> Insn, from the instruction tables (*.def)
//   interp/   what an Insn does: integer*.cpp, string.cpp, vector.cpp (SSE, AVX, x87), system*.cpp
//   mmu.*     linear -> physical, the software TLB, memory accesses
//   fault.*   exceptions, interrupts and their delivery; segmentation and far transfers in
//   segment.* engine.*  Accel and Vcpu: the run loop, threads, HLT, INIT/SIPI;  lapic.*  the local
//   APIC
//
// The outer loop (engine.cpp) handles requests, interrupts and faults; RunBlocks and
// StepInstruction (the block cache's) run code.
//
// Faults leave an instruction by longjmp to the run loop (Raise): an Exec function does everything
// that can fault before it changes state, and holds no object with a destructor while it calls
// something that may fault.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstring>

#include "cpu/x86_state.h"

namespace kvartz::cpu::x86 {

struct Insn;
class Tlb;
class Lapic;
class SoftVcpu;

namespace rflags {
constexpr uint64_t kCf = 1, kPf = 4, kAf = 0x10, kZf = 0x40, kSf = 0x80, kTf = 0x100, kIf = 0x200,
                   kDf = 0x400, kOf = 0x800, kIopl = 0x3000, kNt = 0x4000, kRf = 0x10000,
                   kVm = 0x20000, kAc = 0x40000, kVif = 0x80000, kVip = 0x100000, kId = 0x200000;
constexpr uint64_t kStatus = kCf | kPf | kAf | kZf | kSf | kOf;
}  // namespace rflags

namespace cr0 {
constexpr uint64_t kPe = 1, kMp = 2, kEm = 4, kTs = 8, kEt = 0x10, kNe = 0x20, kWp = 0x10000,
                   kAm = 0x40000, kNw = 1u << 29, kCd = 1u << 30, kPg = 1u << 31;
}
namespace cr4 {
constexpr uint64_t kVme = 1, kPvi = 2, kTsd = 4, kDe = 8, kPse = 0x10, kPae = 0x20, kMce = 0x40,
                   kPge = 0x80, kPce = 0x100, kOsfxsr = 0x200, kOsxmmexcpt = 0x400, kUmip = 0x800,
                   kLa57 = 0x1000, kFsgsbase = 0x10000, kPcide = 0x20000, kOsxsave = 0x40000,
                   kSmep = 0x100000, kSmap = 0x200000, kPke = 0x400000;
}
namespace efer {
constexpr uint64_t kSce = 1, kLme = 0x100, kLma = 0x400, kNxe = 0x800;
}

// Why the outer loop should look up.
namespace request {
constexpr uint32_t
    kInterrupt = 1,  // a maskable interrupt may be deliverable: local APIC, PIC, or IF was set
    kNmi = 2, kInit = 4, kSipi = 8,  //
    kKick = 0x10,                    // leave Run
    kSafepoint = 0x20,               // another CPU wants the world stopped
    kFlushTlb = 0x40,                // the memory map or dirty tracking changed
    kTimer = 0x80,                   // the APIC timer's deadline passed
    kShadow = 0x100,  // this instruction began an interrupt shadow (STI, MOV SS, POP SS)
    kStep = 0x200,    // stays set while every instruction needs a look: TF, instruction breakpoints
    kDebugTrap = 0x400,  // data or I/O breakpoint hit: #DB after this instruction
    kHalt = 0x800,       // HLT was executed
    kCodeWritten =
        0x1000,  // a page that holds decoded code was written (perhaps by the present block)
    kFlushCode = 0x2000;  // memory that may hold decoded code is gone from the map
}  // namespace request

enum Vector : uint8_t {
  kDE,
  kDB,
  kNMI,
  kBP,
  kOF,
  kBR,
  kUD,
  kNM,
  kDF,
  kTS = 10,
  kNP,
  kSS,
  kGP,
  kPF,
  kMF = 16,
  kAC,
  kMC,
  kXM,
};

enum class CodeMode : uint8_t { k16, k32, k64 };  // of CS: default operand and address size

// XSAVE area, standard format: legacy region, header, AVX at 576 (SDM vol. 1 ch. 13). Guest vector
// and x87 state lives here.
struct alignas(64) XsaveArea {
  uint16_t fcw = 0x37f, fsw = 0;
  uint8_t ftw = 0, reserved = 0;  // abridged tag word: bit set = not empty
  uint16_t fop = 0;
  uint64_t fip = 0, fdp = 0;
  uint32_t mxcsr = 0x1f80, mxcsr_mask = 0xffff;
  uint8_t st[8][16] = {};  // ST(i), physical order relative to TOP, 10 bytes each
  uint8_t xmm[16][16] = {};
  uint8_t unused[96] = {};
  uint64_t xstate_bv = 0, xcomp_bv = 0;
  uint8_t header_reserved[48] = {};
  uint8_t ymm_high[16][16] = {};
};
static_assert(sizeof(XsaveArea) == 832);

// One CPU's working state. Owned by its vCPU thread; other threads only set bits in `requests`.
struct Cpu {
  uint64_t gpr[16] = {};
  uint64_t rip = 0;  // while an Exec function runs: the address of the NEXT instruction (within CS)
  uint64_t zero =
      0;  // never written: register 17 of address computations, for "no base" and "no index"
  uint64_t insn_rip = 0;  // that of the instruction itself; faults report it
  uint64_t rflags = 2;    // always complete, no lazy part
  uint64_t insn_count = 0;

  // Bits of `request`: something for the outer loop to look at before the next block. Set by this
  // and by other threads with
  // __atomic_fetch_or; RunBlocks returns when it sees it non-zero.
  uint32_t requests = 0;

  // Derived from CS, SS, CR0, EFER, RFLAGS whenever these change (UpdateMode, segment.h).
  CodeMode code_mode = CodeMode::k16;
  uint8_t cpl = 0;
  uint8_t stack_size = 2;  // bytes of the stack pointer that push and pop use: 2, 4, 8
  bool flat_segments =
      false;  // DS, ES, SS, CS have base 0 and no limit that matters (always true in 64-bit mode)
  uint8_t flat_read = 0,
          flat_write =
              0;  // bit SegReg: accesses of that kind need no segment check and have base 0
  // Outside of 64-bit mode: an access by addresses of 32 or [1] of 16 bits, to read or [1] to
  // write, needs no other check of that segment if it ends at or below this offset.
  uint64_t segment_end[2][2][kSegCount] = {};
  // IF was clear when an interrupt was looked for: who sets IF asks for another look.
  bool interrupt_waiting = false;
  bool no_trap =
      false;  // this instruction ends without the single-step trap (INT n, SYSCALL, task switch)

  XsaveArea fpu;

  Segment seg[kSegCount];
  Segment ldtr, tr;
  TableRegister gdtr, idtr;
  uint64_t cr0 = 0, cr2 = 0, cr3 = 0, cr4 = 0, efer = 0, xcr0 = 1, apic_base = 0;
  uint64_t dr[8] = {};
  PendingEvents events;
  MpState mp_state = MpState::kRunnable;

  Tlb* tlb = nullptr;
  SoftVcpu* vcpu = nullptr;  // engine side: MSRs, CPUID table, local APIC, time, bus
  jmp_buf* fault_exit = nullptr;

  uint8_t pending_dr6 = 0;  // data and I/O breakpoints that the present instruction hit (bits 0-3)
  void* blocks = nullptr;   // the block cache's, see interp/

  // The exception that Raise left for the run loop.
  struct {
    uint8_t vector = 0;
    bool has_error = false;
    uint32_t error = 0;
  } fault;

  bool protected_mode() const { return (cr0 & cr0::kPe) != 0; }
  bool virtual_8086() const { return (rflags & rflags::kVm) != 0; }
  bool long_mode() const { return (efer & efer::kLma) != 0; }
};

inline void SetRequest(Cpu& cpu, uint32_t bits) {
  __atomic_fetch_or(&cpu.requests, bits, __ATOMIC_SEQ_CST);
}
inline void ClearRequest(Cpu& cpu, uint32_t bits) {
  __atomic_fetch_and(&cpu.requests, ~bits, __ATOMIC_SEQ_CST);
}

// ---- interp/: the block cache's two doors. Both set insn_rip, rip and insn_count for each
// instruction; an undefined encoding raises #UD. Called with cpu.fault_exit set. Runs blocks until
// cpu.requests is not 0. An instruction that set a request is the last one that runs: blocks end
// after instructions that may (I/O, STI, MOV SS, POPF, IRET, MOV CR, WRMSR, HLT...: attribute in
// the table), and are left after a write that set kCodeWritten.
void RunBlocks(Cpu& cpu);
// Exactly one instruction (a REP string instruction: one iteration), whatever requests say.
void StepInstruction(Cpu& cpu);
// Drops every decoded block of this CPU (the memory map changed).
void FlushBlocks(Cpu& cpu);

// ---- fault.h: leave the present instruction with an exception; registers must be as before it
// (rip is put back). ----
[[noreturn]] void Raise(Cpu& cpu, Vector vector);                  // without error code
[[noreturn]] void Raise(Cpu& cpu, Vector vector, uint32_t error);  // with
[[noreturn]] void RaisePageFault(Cpu& cpu, uint64_t linear, uint32_t error);

// ---- mmu.h: memory as an instruction sees it: segment checks, canonical checks, alignment check,
// paging, devices. ---- An access may cross pages; both are checked before any byte is written. T:
// uint8_t .. uint64_t.
template <typename T>
T ReadMem(Cpu& cpu, SegReg seg, uint64_t offset);
template <typename T>
void WriteMem(Cpu& cpu, SegReg seg, uint64_t offset, T value);
// Any size up to 64 bytes (vector operands, descriptors, FXSAVE in pieces).
void ReadMemBytes(Cpu& cpu, SegReg seg, uint64_t offset, void* data, unsigned size);
void WriteMemBytes(Cpu& cpu, SegReg seg, uint64_t offset, const void* data, unsigned size);
// Raises what a write of `size` bytes there would raise; writes nothing.
void CheckWrite(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size);
// Host address of `size` bytes that may be read and written now (RAM, within one page,
// write-checked, dirty-marked); null if the access must go the slow way (device, page crossing):
// then use ReadMem and WriteMem under BusLock. Code pages: the caller's write is noticed by the
// block cache.
void* MapForWrite(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size);
// Read-only sibling, for string instructions and vector loads.
const void* MapForRead(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size);
// Stop-the-world for locked accesses that MapForWrite can't serve. Unlocked automatically when the
// instruction faults.
void BusLock(Cpu& cpu);
void BusUnlock(Cpu& cpu);
// System accesses (descriptor tables, TSS): supervisor privilege, linear address.
template <typename T>
T ReadSystem(Cpu& cpu, uint64_t linear);
template <typename T>
void WriteSystem(Cpu& cpu, uint64_t linear, T value);

// ---- mmu.h: instruction bytes.
// Host address of the code byte at linear address `linear`, valid to the end of that page; null if
// no memory answers there (then FetchBytes, and don't cache). Raises #PF or #GP. Blocks are keyed
// by this address (and the mode), never by linear one.
const uint8_t* FetchCode(Cpu& cpu, uint64_t linear);
void FetchBytes(Cpu& cpu, uint64_t linear, uint8_t* data, unsigned size);
// Announces that the page of `host` (from FetchCode) is about to be decoded: from now on a write to
// it by any CPU or device changes *word. Decoded code is valid while *word == value: compare when a
// block is entered.
struct CodeWatch {
  const uint32_t* word;  // read with __atomic_load_n
  uint32_t value;
};
CodeWatch WatchCode(Cpu& cpu, const uint8_t* host);

// ---- segment.h: to be called after any change of CS, SS, CR0, CR4, EFER, RFLAGS.{VM,TF,AC,RF};
// cheap.
void UpdateMode(Cpu& cpu);
// RFLAGS for POPF and IRET-like writers that change TF, AC or IF: also sets kStep, kInterrupt and
// the TLB's class.
void SetRflags(Cpu& cpu, uint64_t rflags);

// ---- decode/insn.h: effective address of an Insn's memory operand (offset within its segment,
// truncated to the address size)
uint64_t EffectiveAddress(const Cpu& cpu, const Insn& insn);

// What an instruction does. Returns with cpu.rip at the next instruction to run.
using ExecFn = void (*)(Cpu& cpu, const Insn& insn);

}  // namespace kvartz::cpu::x86
