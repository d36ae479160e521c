// What translated code keeps beside the CPU: one block of memory a vCPU, below 2 GiB where the host
// has room there (then code names it absolutely), else found through the GS base.
//
// Translated code runs with the guest's registers in the host's: RAX, RCX, RDX, RBX, RBP, RSI, RDI,
// R8, R9, R12, R13, R14 are themselves, the guest's RSP is the host's R15; the guest's R10, R11 and
// R15 stay in Cpu::gpr. The host's R10 and R11 are free for the translator, RSP is the host's own
// stack. Host status flags are the guest's unless the translator put them aside (saved_flags).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/x86/cpu.h"
#include "cpu/x86/mmu.h"

namespace kvartz::cpu::x86::jit {

// A translation that one place in the code used last: the linear page, and host address - linear
// address. Cleared ones hold 0x8080... twice: no canonical address matches, and where a
// non-canonical one does, the sum is no address of the host's either, so the host faults and the
// guest gets its #GP.
struct Slot {
  uint64_t page, addend;
};
constexpr uint8_t kSlotClear = 0x80;

// Data classes as in Tlb::Class: user, supervisor, supervisor with AC set. Code of each has slots
// and a jump table of its own, so that CPL changes invalidate nothing.
constexpr unsigned kClassCount = 3;
constexpr unsigned kSlots = 16384;                // a class
constexpr unsigned kWriteSlots = kSlots * 5 / 8;  // from here on: for what writes, and nothing else
constexpr unsigned kSlotChunkBits = 6;            // slots are cleared by chunks
static_assert(kWriteSlots % (1u << kSlotChunkBits) == 0);
constexpr unsigned kSlotChunks = kSlots >> kSlotChunkBits;
constexpr unsigned kCodeSlots = 8192;  // pages of translated code
constexpr unsigned kEntered = 4096;    // a half
constexpr unsigned kEnteredHash = 4096;
constexpr unsigned kJumpEntries = 65536;  // a class

constexpr unsigned kSingles = 1024, kSingleShift = 3;  // of a site's address, for its hash

// In State::code_pages: what no target is away from by an offset. (A page may begin at any RIP
// where CS isn't aligned.)
constexpr uint64_t kNoPage = 0x8000000000000001;

// Where to go on when the common check at a site fails: the body of a unit with a check for each
// access.
struct SingleUnit {
  uint64_t site, body;
};

// Owned by the vCPU's thread.
struct State {
  Cpu cpu;

  // RIP where the page that runs begins: RIP is that and an offset. Its linear address, but for
  // CS's base. The page may begin before CS does: then this is negative.
  uint64_t page = 0;
  uint32_t running_mode = 0;  // mode.h
  uint16_t saved_flags = 0;   // low byte: OF as 0 or 1; high byte: as LAHF
  // Slots of the chunk were filled since they were cleared.
  alignas(8) uint8_t used[kClassCount * kSlotChunks] = {};
  uint8_t lower_in_supervisor = 0;  // slots of that class may hold pages of the lower half
  uint8_t vector_live = 0;          // the guest's vector registers and MXCSR are in the host's
  uint8_t x87_live = 0;  // so are its x87 and MMX registers, control, status and tags; not FIP...
  // ... which are kept here meanwhile: of the x87 instruction that ran last its page and offset,
  // its opcode, and the address of the last memory operand. The host's own are of no use.
  uint16_t x87_offset = 0, x87_opcode = 0;
  uint64_t x87_page = 0, x87_address = 0;
  uint64_t jump_to = 0, host_rsp = 0;
  const void* site = nullptr;  // of a slow path: Site, ExecuteSite (translator.h)
  uint64_t spare = 0;          // a branch target across a push
  uint64_t branch = 0;         // Branch: the indirect branch that ran last
  uint32_t host_mxcsr = 0x1f80;
  State* self = nullptr;
  void* engine = nullptr;  // Engine

  uint64_t asid[2] = {};       // as the TLB's tags have them: lower, upper half
  uint64_t addends[128] = {};  // of a unit's groups that ask the TLB, while it runs
  // kSlots of each class, one class after the other.
  Slot slots[kClassCount * kSlots];
  uint8_t misses[kClassCount * kSlots];   // how often a slot was filled from the TLB, modulo 256
  uint32_t checks[kClassCount * kSlots];  // how often it was asked, by units that count it
  SingleUnit singles[kSingles];           // by hash of the site
  // The page (as `page` above) under which a page of code was last entered, if it was: it need not
  // be checked again until the address space changes.
  uint64_t code_pages[kCodeSlots];
  const uint8_t* code_hosts[kCodeSlots];  // where the host has the page
  // Those that were entered, of the lower and the upper half of the address space; and which linear
  // pages that may be (hashed).
  uint32_t entered_count[2] = {};
  uint16_t entered[2][kEntered];
  uint8_t entered_pages[kEnteredHash];
  // Where translated code for a target starts, or the stub that asks.
  uint64_t jumps[kClassCount][kJumpEntries];
  alignas(64) TlbEntry tlb[Tlb::kClassCount][Tlb::kEntries];
};

}  // namespace kvartz::cpu::x86::jit
