// Exceptions with their error codes, and how they are delivered. Expected values: SDM vol. 3
// ch. 4.7 and 6.
#include "cpu/x86/fault.h"

#include "cpu/x86/guest_case.h"

namespace kvartz::cpu::x86 {
namespace {

GUEST_CODE(ud, "ud2")
GUEST_CODE(divide, "xor %ecx, %ecx; mov $1, %eax; xor %edx, %edx; div %ecx")
GUEST_CODE(breakpoint, "int3")
GUEST_CODE(overflow, ".code32; mov $0x7fffffff, %eax; inc %eax; into")
GUEST_CODE(bounds, ".code32; movl $5, 0x9000; movl $9, 0x9004; mov $4, %eax; bound %eax, 0x9000")
GUEST_CODE(noncanonical, "mov $0x800000000000, %rax; mov (%rax), %rbx")
GUEST_CODE(noncanonical_stack, "mov $0x800000000008, %rsp; push %rax")
GUEST_CODE(read_page, "mov 0x100000, %eax; out %al, $0xf4")
GUEST_CODE(write_page, "movl $1, 0x100000; out %al, $0xf4")
GUEST_CODE(rmw_page, "addl $1, 0x100000; out %al, $0xf4")
GUEST_CODE(jump_page, "mov $0x100000, %eax; jmp *%rax")
GUEST_CODE(cross_page, "movq $1, 0x100ffc; out %al, $0xf4")
GUEST_CODE(read_page32, ".code32; mov 0x100000, %eax; out %al, $0xf4")
GUEST_CODE(write_page32, ".code32; movl $1, 0x100000; out %al, $0xf4")
GUEST_CODE(stac_read, "stac; mov 0x100000, %eax; clac; out %al, $0xf4")
GUEST_CODE(stac_load_segment, "stac; mov $4, %eax; mov %eax, %ds; out %al, $0xf4")
GUEST_CODE(misaligned, "pushfq; orl $0x40000, (%rsp); popfq; mov 0x9001, %eax; out %al, $0xf4")
GUEST_CODE(int_80, "int $0x80")
GUEST_CODE(load_absent, "mov $0x58, %eax; mov %eax, %ds")
GUEST_CODE(load_absent_stack, "mov $0x58, %eax; mov %eax, %ss")
GUEST_CODE(load_beyond, "mov $0x7f8, %eax; mov %eax, %ds")
GUEST_CODE(load_execute_only, "mov $0x60, %eax; mov %eax, %ds")
GUEST_CODE(load_read_only_stack, "mov $0x68, %eax; mov %eax, %ss")
GUEST_CODE(write_read_only, ".code32; mov $0x68, %eax; mov %eax, %ds; movl $1, 0x9000")
GUEST_CODE(real_limit, ".code16; movl %ds:0xfffe, %eax")
GUEST_CODE(real_stack_limit, ".code16; mov $1, %sp; push %ax")
GUEST_CODE(real_divide, ".code16; xor %cl, %cl; div %cl")

enum Setup : uint32_t {
  kNone = 0,
  kAbsent = 1,        // the test page isn't present
  kReadOnly = 2,      // ... is read-only
  kUserPage = 4,      // ... has U/S set
  kNoExecute = 8,     // ... has NX set
  kReservedBit = 16,  // ... has a reserved bit set
  kWp = 32,
  kSmep = 64,
  kSmap = 128,
  kAlignment = 256,   // CR0.AM
  kNextAbsent = 512,  // the page after the test page isn't present
  kTestLdt = 1024,    // an LDT in the test page
};

struct Row {
  const char* name;
  Mode mode;
  unsigned cpl;
  std::span<const uint8_t> code;
  uint32_t setup;
  int vector;
  uint32_t error;
  uint64_t cr2 = 0;
};

void Prepare(GuestCase& guest, uint32_t setup) {
  uint64_t entry = kTestPage | 1;
  if (setup & kAbsent) entry &= ~1ull;
  if (!(setup & kReadOnly)) entry |= 2;
  if (setup & kUserPage) entry |= 4;
  if (setup & kNoExecute) entry |= 1ull << 63;
  if (setup & kReservedBit) entry |= 1ull << 51;
  guest.SetPte(kTestPage, entry);
  if (setup & kNextAbsent) guest.SetPte(kOtherPage, 0);
  if (setup & kTestLdt)
    guest.initial.ldtr = {
        .base = kTestPage, .limit = 0xff, .attributes = 0x82, .selector = kLdtSelector};
  if (setup & kWp) guest.initial.cr0 |= cr0::kWp;
  if (setup & kAlignment) guest.initial.cr0 |= cr0::kAm;
  if (setup & kSmep) guest.initial.cr4 |= cr4::kSmep;
  if (setup & kSmap) guest.initial.cr4 |= cr4::kSmap;
  // Code, data and stack are user pages, too: not for a supervisor under SMEP or SMAP.
  if (setup & (kSmep | kSmap)) {
    for (uint64_t page = 0x8000; page <= 0xb000; page += 0x1000) guest.SetPte(page, page | 3);
  }
}

TEST(Fault, ErrorCodes) {
  constexpr Mode k64 = Mode::kLong64, k32 = Mode::kFlat32, kPae = Mode::kPae32,
                 kTwoLevel = Mode::kPaged32;
  const Row rows[] = {
      {"undefined", k64, 0, CODE_OF(ud), 0, kUD, 0},
      {"divide error", k64, 3, CODE_OF(divide), 0, kDE, 0},
      {"overflow trap, gate of DPL 0 at CPL 0", k32, 0, CODE_OF(overflow), 0, kOF, 0},
      {"bound", k32, 0, CODE_OF(bounds), 0, kBR, 0},
      {"not canonical", k64, 0, CODE_OF(noncanonical), 0, kGP, 0},
      {"not canonical, stack", k64, 0, CODE_OF(noncanonical_stack), 0, kSS, 0},
      {"read, absent", k64, 0, CODE_OF(read_page), kAbsent, kPF, 0, kTestPage},
      {"write, absent", k64, 0, CODE_OF(write_page), kAbsent, kPF, 2, kTestPage},
      {"read-modify-write, absent, is a write", k64, 0, CODE_OF(rmw_page), kAbsent, kPF, 2,
       kTestPage},
      {"user read, absent", k64, 3, CODE_OF(read_page), kAbsent, kPF, 4, kTestPage},
      {"user write, absent", k64, 3, CODE_OF(write_page), kAbsent, kPF, 6, kTestPage},
      {"user read of a supervisor page", k64, 3, CODE_OF(read_page), 0, kPF, 5, kTestPage},
      {"user write of a supervisor page", k64, 3, CODE_OF(write_page), 0, kPF, 7, kTestPage},
      {"user write of a read-only page", k64, 3, CODE_OF(write_page), kUserPage | kReadOnly, kPF, 7,
       kTestPage},
      {"supervisor write of a read-only page, WP", k64, 0, CODE_OF(write_page), kReadOnly | kWp,
       kPF, 3, kTestPage},
      {"supervisor write of a read-only page, no WP", k64, 0, CODE_OF(write_page), kReadOnly, -1,
       0},
      {"fetch, absent", k64, 0, CODE_OF(jump_page), kAbsent, kPF, 0x10, kTestPage},
      {"fetch, NX", k64, 0, CODE_OF(jump_page), kNoExecute, kPF, 0x11, kTestPage},
      {"user fetch, NX", k64, 3, CODE_OF(jump_page), kUserPage | kNoExecute, kPF, 0x15, kTestPage},
      {"user fetch of a supervisor page", k64, 3, CODE_OF(jump_page), 0, kPF, 0x15, kTestPage},
      {"reserved bit", k64, 0, CODE_OF(read_page), kReservedBit, kPF, 9, kTestPage},
      {"reserved bit, user write", k64, 3, CODE_OF(write_page), kReservedBit | kUserPage, kPF, 0xf,
       kTestPage},
      {"write into the next page", k64, 0, CODE_OF(cross_page), kNextAbsent, kPF, 2, kOtherPage},
      {"SMEP", k64, 0, CODE_OF(jump_page), kUserPage | kSmep, kPF, 0x11, kTestPage},
      {"SMAP, read", k64, 0, CODE_OF(read_page), kUserPage | kSmap, kPF, 1, kTestPage},
      {"SMAP, write", k64, 0, CODE_OF(write_page), kUserPage | kSmap, kPF, 3, kTestPage},
      {"SMAP with AC", k64, 0, CODE_OF(stac_read), kUserPage | kSmap, -1, 0},
      {"SMAP, implicit access despite AC", k64, 0, CODE_OF(stac_load_segment),
       kUserPage | kTestLdt | kSmap, kPF, 1, kTestPage},
      {"alignment, user", k64, 3, CODE_OF(misaligned), kAlignment, kAC, 0},
      {"alignment, supervisor", k64, 0, CODE_OF(misaligned), kAlignment, -1, 0},
      {"INT n through a gate of DPL 0", k64, 3, CODE_OF(int_80), 0, kGP, 0x80 * 8 + 2},
      {"INT3 through a gate of DPL 0", k64, 3, CODE_OF(breakpoint), 0, kGP, 3 * 8 + 2},
      {"DS not present", k64, 0, CODE_OF(load_absent), 0, kNP, kAbsentData},
      {"SS not present", k64, 0, CODE_OF(load_absent_stack), 0, kSS, kAbsentData},
      {"selector beyond the GDT", k64, 0, CODE_OF(load_beyond), 0, kGP, 0x7f8},
      {"DS execute-only", k64, 0, CODE_OF(load_execute_only), 0, kGP, kExecuteOnly},
      {"SS read-only", k64, 0, CODE_OF(load_read_only_stack), 0, kGP, kReadOnlyData},
      {"write to a read-only segment", k32, 0, CODE_OF(write_read_only), 0, kGP, 0},
      {"PAE: read, absent", kPae, 0, CODE_OF(read_page32), kAbsent, kPF, 0, kTestPage},
      {"PAE: reserved bit", kPae, 0, CODE_OF(read_page32), kReservedBit, kPF, 9, kTestPage},
      {"PAE: user write of a supervisor page", kPae, 3, CODE_OF(write_page32), 0, kPF, 7,
       kTestPage},
      {"two levels: write, absent", kTwoLevel, 0, CODE_OF(write_page32), kAbsent, kPF, 2,
       kTestPage},
      {"two levels: user read of a supervisor page", kTwoLevel, 3, CODE_OF(read_page32), 0, kPF, 5,
       kTestPage},
      {"two levels: WP", kTwoLevel, 0, CODE_OF(write_page32), kReadOnly | kWp, kPF, 3, kTestPage},
      {"real mode: limit", Mode::kReal16, 0, CODE_OF(real_limit), 0, kGP, 0},
      {"real mode: stack limit", Mode::kReal16, 0, CODE_OF(real_stack_limit), 0, kSS, 0},
      {"real mode: divide error", Mode::kReal16, 0, CODE_OF(real_divide), 0, kDE, 0},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    GuestCase guest(row.mode, row.cpl);
    guest.initial.rflags |= row.cpl == 3 ? 0x3000 : 0;  // IOPL 3: may end itself
    Prepare(guest, row.setup);
    guest.Load(row.code);
    if (row.vector == kSS && row.mode != Mode::kLong64) {
      // The stub needs a stack: real mode's #SS can't be delivered on a stack of 1 byte.
      guest.Run();
      EXPECT_EQ(guest.board.triple_faults, 1);
      continue;
    }
    if (row.vector == kSS && row.mode == Mode::kLong64)
      guest.SetGate(kSS, 0xe, 0, kCode64, GuestCase::Stub(kSS), 1);
    Outcome end = guest.Run();
    EXPECT_EQ(end.vector, row.vector);
    EXPECT_EQ(end.error, row.error);
    if (row.vector == kPF) {
      EXPECT_EQ(end.state.cr2, row.cr2);
    }
    EXPECT_EQ(guest.board.triple_faults, 0);
  }
}

// Faults report the instruction, traps the next one; RF is pushed set for faults only.
TEST(Fault, PushedFrame) {
  GuestCase fault(Mode::kLong64, 3);
  fault.Load(CODE_OF(ud));
  Outcome end = fault.Run();
  EXPECT_EQ(end.rip, kCode);
  EXPECT_EQ(end.cs, kUserCode64);
  EXPECT_EQ(end.ss, kUserData);
  EXPECT_EQ(end.sp, kUserStack);
  EXPECT_TRUE(end.flags & rflags::kRf);
  EXPECT_EQ(end.state.seg[kCs].selector, kCode64);
  EXPECT_EQ(end.state.seg[kSs].selector, 0);  // null, RPL 0
  EXPECT_EQ(end.state.gpr[kRsp], kInnerStack - 40);

  GuestCase trap(Mode::kLong64);
  trap.Load(CODE_OF(breakpoint));
  end = trap.Run();
  EXPECT_EQ(end.vector, kBP);
  EXPECT_EQ(end.rip, kCode + 1);
  EXPECT_FALSE(end.flags & rflags::kRf);
}

TEST(Fault, InterruptStackTable) {
  GuestCase guest(Mode::kLong64);
  guest.SetGate(kUD, 0xf, 0, kCode64, GuestCase::Stub(kUD), 1);
  guest.initial.rflags |= rflags::kIf;
  guest.Load(CODE_OF(ud));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kUD);
  EXPECT_EQ(end.state.gpr[kRsp], kIstStack - 40);
  EXPECT_EQ(end.sp, kStackTop);
  EXPECT_TRUE(end.state.rflags & rflags::kIf);  // a trap gate leaves it
}

TEST(Fault, DoubleAndTriple) {
  {
    GuestCase guest(Mode::kLong64);  // #GP whose gate isn't present: #NP, contributory again
    guest.SetGate(kGP, 0xe, 0, kCode64, GuestCase::Stub(kGP), 0, false);
    guest.Load(CODE_OF(noncanonical));
    Outcome end = guest.Run();
    EXPECT_EQ(end.vector, kDF);
    EXPECT_EQ(end.error, 0u);
  }
  {
    GuestCase guest(
        Mode::kLong64);  // #UD is benign: the #NP of its gate is delivered, EXT and IDT set
    guest.SetGate(kUD, 0xe, 0, kCode64, GuestCase::Stub(kUD), 0, false);
    guest.Load(CODE_OF(ud));
    Outcome end = guest.Run();
    EXPECT_EQ(end.vector, kNP);
    EXPECT_EQ(end.error, kUD * 8u + 3);
    EXPECT_EQ(end.rip, kCode);
  }
  {
    GuestCase guest(Mode::kLong64, 3);  // page fault while a page fault pushes its frame
    guest.SetPte(kInnerStack & ~0xfffull, 0);
    guest.SetGate(kDF, 0xe, 0, kCode64, GuestCase::Stub(kDF), 1);
    guest.Put<uint64_t>(kTssAt + 36, 0xf000);
    guest.Load(CODE_OF(read_page));
    Outcome end = guest.Run();
    EXPECT_EQ(end.vector, kDF);
  }
  {
    GuestCase guest(Mode::kLong64);
    guest.initial.idtr.limit = 0;
    guest.Load(CODE_OF(ud));
    guest.Run();
    EXPECT_EQ(guest.board.triple_faults, 1);
  }
}

// ---- debug exceptions (SDM vol. 3 ch. 17)

GUEST_CODE(single_step, "pushfq; orl $0x100, (%rsp); popfq; nop; nop")
GUEST_CODE(nops, "nop; nop; nop; out %al, $0xf4")
GUEST_CODE(write_data, "movl $7, 0x9004; nop; out %al, $0xf4")
GUEST_CODE(read_data, "mov 0x9004, %eax; nop; out %al, $0xf4")
GUEST_CODE(out_port, "out %al, $0x80; nop; out %al, $0xf4")
GUEST_CODE(touch_dr, "nop; mov %dr0, %rax; nop")
GUEST_CODE(step_mov_ss, "mov %ss, %ecx; pushfq; orl $0x100, (%rsp); popfq; mov %ecx, %ss; nop; nop")

TEST(Fault, SingleStep) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(single_step));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kDB);
  EXPECT_EQ(end.rip, kCode + 1 + 7 + 1 + 1);  // after the instruction that follows POPF
  EXPECT_EQ(end.state.dr[6], 0xffff4ff0u);
  EXPECT_FALSE(end.state.rflags & rflags::kTf);
  EXPECT_TRUE(end.flags & rflags::kTf);
}

TEST(Fault, SingleStepWaitsForTheInstructionAfterMovSs) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(step_mov_ss));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kDB);
  EXPECT_EQ(end.rip, kCode + 2 + 1 + 7 + 1 + 2 + 1);
}

struct BreakpointRow {
  const char* name;
  std::span<const uint8_t> code;
  uint64_t address, dr7;
  bool hit;
  uint64_t rip;
};

TEST(Fault, Breakpoints) {
  const BreakpointRow rows[] = {
      {"instruction", CODE_OF(nops), kCode + 1, 0x401, true, kCode + 1},
      {"instruction, disabled", CODE_OF(nops), kCode + 1, 0x400, false, 0},
      {"data write", CODE_OF(write_data), 0x9004, 0x401 | 0xd0000, true, kCode + 11},
      {"data write, one byte watched", CODE_OF(write_data), 0x9006, 0x401 | 0x10000, true,
       kCode + 11},
      {"data write, next to it", CODE_OF(write_data), 0x9008, 0x401 | 0xd0000, false, 0},
      {"read of a write breakpoint", CODE_OF(read_data), 0x9004, 0x401 | 0xd0000, false, 0},
      {"read of an access breakpoint", CODE_OF(read_data), 0x9004, 0x401 | 0xf0000, true,
       kCode + 7},
      {"port", CODE_OF(out_port), 0x80, 0x401 | 0x20000, true, kCode + 2},
  };
  for (const BreakpointRow& row : rows) {
    SCOPED_TRACE(row.name);
    GuestCase guest(Mode::kLong64);
    guest.initial.cr4 |= cr4::kDe;
    guest.initial.dr[0] = row.address;
    guest.initial.dr[7] = row.dr7;
    guest.Load(row.code);
    Outcome end = guest.Run();
    EXPECT_EQ(end.vector, row.hit ? kDB : -1);
    if (!row.hit) continue;
    EXPECT_EQ(end.rip, row.rip);
    EXPECT_EQ(end.state.dr[6], 0xffff0ff1u);
  }
}

TEST(Fault, ResumeFlagSkipsTheBreakpointOnce) {
  GuestCase guest(Mode::kLong64);
  guest.initial.dr[0] = kCode;
  guest.initial.dr[7] = 0x401;
  guest.initial.rflags |= rflags::kRf;
  guest.Load(CODE_OF(nops));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_FALSE(end.state.rflags & rflags::kRf);
}

TEST(Fault, GeneralDetect) {
  GuestCase guest(Mode::kLong64);
  guest.initial.dr[7] = 0x2400;
  guest.Load(CODE_OF(touch_dr));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kDB);
  EXPECT_EQ(end.rip, kCode + 1);
  EXPECT_EQ(end.state.dr[6], 0xffff2ff0u);
  EXPECT_EQ(end.state.dr[7], 0x400u);
}

}  // namespace
}  // namespace kvartz::cpu::x86
