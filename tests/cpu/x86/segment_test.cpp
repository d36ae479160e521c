// Far transfers, gates, tasks, virtual-8086 mode, fast system calls. SDM vol. 2 and vol. 3 ch. 5,
// 7, 20.
#include "cpu/x86/segment.h"

#include "cpu/x86/guest_case.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr uint64_t kIopl3 = 0x3000;

// ---- between modes of code

GUEST_CODE(seg_to_compat, R"(
  push $8
  lea 1f(%rip), %rax
  push %rax
  lretq
  .code32
1: mov $0x80000000, %eax
  inc %eax
  ljmp $0x18, $2f-seg_to_compat_begin+0x8000
  .code64
2: mov %rax, %rbx
  shl $1, %rbx
  out %al, $0xf4)")

TEST(Segment, CompatibilityModeAndBack) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(seg_to_compat));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRbx], 0x100000002u);
  EXPECT_EQ(end.state.seg[kCs].selector, kCode64);
}

// From reset-like real mode to protected mode to long mode, as boot code does.
GUEST_CODE(seg_boot, R"(
  .code16
  lgdtl 0x9000
  mov %cr0, %eax
  or $1, %al
  mov %eax, %cr0
  ljmpl $8, $1f-seg_boot_begin+0x8000
  .code32
1: mov $0x10, %eax
  mov %eax, %ds
  mov %eax, %ss
  mov %cr4, %eax
  or $0x20, %eax
  mov %eax, %cr4
  mov $0x10000, %eax
  mov %eax, %cr3
  mov $0xc0000080, %ecx
  rdmsr
  or $0x100, %eax
  wrmsr
  mov %cr0, %eax
  bts $31, %eax
  mov %eax, %cr0
  rdmsr
  mov %eax, %esi
  ljmp $0x18, $2f-seg_boot_begin+0x8000
  .code64
2: mov $0x123456789abc, %rdi
  out %al, $0xf4)")

TEST(Segment, FromRealModeToLongMode) {
  GuestCase guest(Mode::kReal16);
  guest.Put<uint16_t>(0x9000, 0xff);
  guest.Put<uint32_t>(0x9002, kGdtAt);
  guest.Load(CODE_OF(seg_boot));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRdi], 0x123456789abcu);
  EXPECT_EQ(end.state.gpr[kRsi], 0x500u);  // LMA follows PG
  EXPECT_EQ(end.state.efer & 0x500, 0x500u);
}

GUEST_CODE(seg_big_real, R"(
  .code16
  lgdtl 0x9000
  cli
  mov %cr0, %eax
  or $1, %al
  mov %eax, %cr0
  mov $0x10, %bx
  mov %bx, %ds
  and $0xfe, %al
  mov %eax, %cr0
  xor %bx, %bx
  mov %bx, %ds
  movl $0x200000, %esi
  movl (%esi), %edi
  out %al, $0xf4)")

TEST(Segment, BigRealMode) {
  GuestCase guest(Mode::kReal16);
  guest.Put<uint16_t>(0x9000, 0xff);
  guest.Put<uint32_t>(0x9002, kGdtAt);
  guest.Put<uint32_t>(0x200000, 0xfeedf00d);
  guest.Load(CODE_OF(seg_big_real));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRdi], 0xfeedf00du);
}

// ---- gates

uint64_t CallGate32(uint16_t selector, uint32_t offset, unsigned count, unsigned dpl) {
  return (offset & 0xffff) | uint64_t{selector} << 16 | uint64_t{count} << 32 |
         uint64_t{0x8c | dpl << 5} << 40 | uint64_t{offset >> 16} << 48;
}

GUEST_CODE(seg_call_gate, R"(
  .code32
  push $0x11111111
  push $0x22222222
  lcall $0x8b, $0
  out %al, $0xf4)")
GUEST_CODE(seg_gate_target, R"(
  .code32
  mov %cs, %eax
  mov 8(%esp), %ebx             # the later parameter
  mov 12(%esp), %ecx
  mov 16(%esp), %esi            # the caller's ESP
  mov 20(%esp), %edi            # and SS
  lret $8)")

TEST(Segment, CallGateWithParameters) {
  GuestCase guest(Mode::kFlat32, 3);
  guest.initial.rflags |= kIopl3;
  guest.SetGdt(kCallGateSelector, CallGate32(kCode32, 0xa000, 2, 3));
  guest.Load(CODE_OF(seg_call_gate));
  guest.Load(CODE_OF(seg_gate_target), 0xa000);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRax], kCode32);
  EXPECT_EQ(end.state.gpr[kRbx], 0x22222222u);
  EXPECT_EQ(end.state.gpr[kRcx], 0x11111111u);
  EXPECT_EQ(end.state.gpr[kRsi], kUserStack - 8);
  EXPECT_EQ(end.state.gpr[kRdi], kUserData);
  EXPECT_EQ(end.state.gpr[kRsp], kUserStack);  // the return released both sides
  EXPECT_EQ(end.state.seg[kCs].selector, kUserCode32);
  EXPECT_EQ(end.state.seg[kSs].dpl(), 3u);
}

TEST(Segment, CallGatePrivilege) {
  GuestCase guest(Mode::kFlat32, 3);
  guest.SetGdt(kCallGateSelector, CallGate32(kCode32, 0xa000, 2, 0));
  guest.Load(CODE_OF(seg_call_gate));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kGP);
  EXPECT_EQ(end.error, kCallGateSelector);
}

// A return to an outer level nulls segments that it may not use.
GUEST_CODE(seg_return_outer, R"(
  .code32
  mov $0x10, %eax
  mov %eax, %ds
  mov %eax, %es
  mov $0x2b, %eax
  mov %eax, %fs
  push $0x2b
  push $0xb000
  push $0x23
  push $1f-seg_return_outer_begin+0x8000
  lret
1: mov %ds, %eax
  mov %fs, %ebx
  out %al, $0xf4)")

TEST(Segment, ReturnToOuterLevel) {
  GuestCase guest(Mode::kFlat32);
  guest.initial.rflags |= kIopl3;
  guest.Load(CODE_OF(seg_return_outer));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRax], 0u);
  EXPECT_EQ(end.state.gpr[kRbx], kUserData);
  EXPECT_EQ(end.state.seg[kCs].selector, kUserCode32);
}

GUEST_CODE(seg_stack_bad, ".code32; int $0x30")

TEST(Segment, BadInnerStackIsInvalidTss) {
  GuestCase guest(Mode::kFlat32, 3);
  guest.SetGate(0x30, 0xe, 3, kCode32, GuestCase::Stub(0x30));
  guest.Put<uint16_t>(kTssAt + 8, kReadOnlyData);
  // #TS itself needs a stack: a task would do; here a conforming segment keeps the privilege.
  guest.SetGate(kTS, 0xe, 0, kConforming, GuestCase::Stub(kTS));
  guest.initial.rflags |= kIopl3;
  guest.Load(CODE_OF(seg_stack_bad));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kTS);
  EXPECT_EQ(end.error, kReadOnlyData);
}

// ---- inspection of descriptors

GUEST_CODE(seg_inspect, R"(
  .code32
  mov $0x10, %edx
  lar %edx, %eax
  setz %ch
  lsl %edx, %ebx
  mov $0x7f8, %edx
  lsl %edx, %esi
  setz %cl
  mov $0x60, %edx
  verr %dx
  setz %dh
  mov $0x68, %esi
  verw %si
  setz %dl
  mov $0x10, %edi
  mov $3, %ebp
  arpl %bp, %di
  out %al, $0xf4)")

TEST(Segment, Inspection) {
  GuestCase guest(Mode::kFlat32);
  guest.Load(CODE_OF(seg_inspect));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRax], 0xcf9300u);
  EXPECT_EQ(end.state.gpr[kRbx], 0xffffffffu);
  EXPECT_EQ(end.state.gpr[kRcx] & 0xffff, 0x100u);
  EXPECT_EQ(end.state.gpr[kRdx] & 0xffff, 0u);  // execute-only can't be read, read-only not written
  EXPECT_EQ(end.state.gpr[kRdi], 0x13u);
}

// ---- tasks

uint64_t TssDescriptor(uint32_t base, unsigned type) {
  return 0x0000800000000067 | uint64_t{type} << 40 | uint64_t{base & 0xffffff} << 16;
}

void MakeTask(GuestCase& guest, uint32_t base, uint32_t eip) {
  guest.Put<uint32_t>(base + 28, static_cast<uint32_t>(guest.initial.cr3));
  guest.Put<uint32_t>(base + 32, eip);
  guest.Put<uint32_t>(base + 36, 2);
  guest.Put<uint32_t>(base + 40, 0xaaaa);  // EAX
  guest.Put<uint32_t>(base + 56, 0x6000);  // ESP
  for (unsigned i = 0; i < 6; i++)
    guest.Put<uint32_t>(base + 72 + i * 4, i == 1 ? kCode32 : kData32);
}

GUEST_CODE(seg_task_call, R"(
  .code32
  mov $0x1234, %ebx
  lcall $0x78, $0
  mov $0x5678, %esi
  out %al, $0xf4)")
GUEST_CODE(seg_task_body, R"(
  .code32
  mov %eax, 0x9000
  str %ax
  mov %eax, 0x9004
  pushf
  pop %eax
  mov %eax, 0x9008
  mov %cr0, %eax
  mov %eax, 0x900c
  clts
  iret)")

TEST(Segment, TaskCallAndReturn) {
  GuestCase guest(Mode::kFlat32);
  guest.SetGdt(kTss2, TssDescriptor(0xc000, 9));
  MakeTask(guest, 0xc000, 0xa000);
  guest.Load(CODE_OF(seg_task_call));
  guest.Load(CODE_OF(seg_task_body), 0xa000);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(guest.Get<uint32_t>(0x9000), 0xaaaau);
  EXPECT_EQ(guest.Get<uint32_t>(0x9004), kTss2);
  EXPECT_TRUE(guest.Get<uint32_t>(0x9008) & rflags::kNt);
  EXPECT_TRUE(guest.Get<uint32_t>(0x900c) & cr0::kTs);
  EXPECT_EQ(guest.Get<uint16_t>(0xc000), kTssSelector);  // the link
  EXPECT_EQ(end.state.gpr[kRbx], 0x1234u);
  EXPECT_EQ(end.state.gpr[kRsi], 0x5678u);
  EXPECT_EQ(end.state.tr.selector, kTssSelector);
  EXPECT_EQ(guest.Get<uint8_t>(kGdtAt + kTss2 + 5) & 0xf, 9);  // not busy any more
  EXPECT_EQ(guest.Get<uint8_t>(kGdtAt + kTssSelector + 5) & 0xf, 0xb);
}

GUEST_CODE(seg_task_jump, ".code32; ljmp $0x78, $0")
GUEST_CODE(seg_task_end, ".code32; out %al, $0xf4")

TEST(Segment, TaskJump) {
  GuestCase guest(Mode::kFlat32);
  guest.SetGdt(kTss2, TssDescriptor(0xc000, 9));
  MakeTask(guest, 0xc000, 0xa000);
  guest.Load(CODE_OF(seg_task_jump));
  guest.Load(CODE_OF(seg_task_end), 0xa000);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.tr.selector, kTss2);
  EXPECT_FALSE(end.state.rflags & rflags::kNt);
  EXPECT_EQ(guest.Get<uint8_t>(kGdtAt + kTssSelector + 5) & 0xf, 9);
  EXPECT_EQ(guest.Get<uint8_t>(kGdtAt + kTss2 + 5) & 0xf, 0xb);
  // The old task's registers are in its TSS.
  EXPECT_EQ(guest.Get<uint32_t>(kTssAt + 32), kCode + 7);
}

TEST(Segment, BusyTaskIsRefused) {
  GuestCase guest(Mode::kFlat32);
  guest.SetGdt(kTss2, TssDescriptor(0xc000, 0xb));
  guest.Load(CODE_OF(seg_task_jump));
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kGP);
  EXPECT_EQ(end.error, kTss2);
}

// An exception through a task gate: the error code is on the new task's stack.
GUEST_CODE(seg_gp, ".code32; mov $0x7f8, %eax; mov %eax, %ds")
GUEST_CODE(seg_task_handler, ".code32; pop %ebx; out %al, $0xf4")

TEST(Segment, ExceptionThroughTaskGate) {
  GuestCase guest(Mode::kFlat32);
  guest.SetGdt(kTss2, TssDescriptor(0xc000, 9));
  MakeTask(guest, 0xc000, 0xa000);
  guest.SetGate(kGP, 5, 0, kTss2, 0);
  guest.Load(CODE_OF(seg_gp));
  guest.Load(CODE_OF(seg_task_handler), 0xa000);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRbx], 0x7f8u);
  EXPECT_EQ(end.state.gpr[kRsp], 0x6000u);
  EXPECT_EQ(guest.Get<uint32_t>(kTssAt + 32), kCode + 5);  // the faulting instruction
}

// ---- virtual-8086 mode

GUEST_CODE(seg_enter_vm86, R"(
  .code32
  push $0x44                    # GS FS DS ES
  push $0x33
  push $0x22
  push $0x11
  push $0x0                     # SS:SP
  push $0xb000
  pushl 0x9000                  # flags
  push $0xa00                   # CS:IP = 0xa00:0
  push $0
  iret)")
GUEST_CODE(seg_vm86_int, ".code16; mov $0x77, %ax; int $0x30")
GUEST_CODE(seg_vm86_cli, ".code16; cli; hlt")
GUEST_CODE(seg_vm86_pushf, ".code16; sti; pushf; pop %bx; int $0x30")

void EnterVm86(GuestCase& guest, std::span<const uint8_t> code, uint32_t flags) {
  guest.Put<uint32_t>(0x9000, flags | rflags::kVm | 2);
  guest.Load(CODE_OF(seg_enter_vm86));
  guest.Load(code, 0xa000);
  guest.SetGate(0x30, 0xe, 3, kCode32, GuestCase::Stub(0x30));
}

TEST(Segment, Vm86InterruptThroughGate) {
  GuestCase guest(Mode::kFlat32);
  EnterVm86(guest, CODE_OF(seg_vm86_int), kIopl3);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, 0x30);
  EXPECT_EQ(end.cs, 0xa00);
  EXPECT_EQ(end.rip, 5u);
  EXPECT_TRUE(end.flags & rflags::kVm);
  EXPECT_EQ(end.sp, 0xb000u);
  // Above SS: ES DS FS GS; the registers are null now.
  uint64_t frame = end.state.gpr[kRsp];
  EXPECT_EQ(frame, kInnerStack - 9 * 4);
  for (unsigned i = 0; i < 4; i++)
    EXPECT_EQ(guest.Get<uint32_t>(frame + 20 + i * 4), 0x11u * (i + 1));
  EXPECT_EQ(end.state.seg[kDs].selector, 0);
  EXPECT_FALSE(end.state.rflags & rflags::kVm);
}

TEST(Segment, Vm86NeedsIoplForInterruptsAndCli) {
  GuestCase guest(Mode::kFlat32);
  EnterVm86(guest, CODE_OF(seg_vm86_int), 0);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kGP);
  EXPECT_EQ(end.error, 0u);
  EnterVm86(guest, CODE_OF(seg_vm86_cli), 0);
  EXPECT_EQ(guest.Run().vector, kGP);
}

TEST(Segment, Vm86VirtualInterruptFlag) {
  GuestCase guest(Mode::kFlat32);
  guest.initial.cr4 |= cr4::kVme;
  EnterVm86(guest, CODE_OF(seg_vm86_pushf), 0);
  // Redirection bitmap: 32 bytes before the I/O bitmap; INT 0x30 stays with the monitor, whose IOPL
  // check says no.
  guest.Put<uint16_t>(kTssAt + 0x66, 0x88);
  memset(guest.at(kTssAt + 0x68), 0xff, 32);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kGP);
  EXPECT_EQ(end.state.gpr[kRbx] & 0x3200, 0x3200u);  // IF shows VIF, IOPL reads 3
  EXPECT_TRUE(end.flags & rflags::kVif);
  EXPECT_FALSE(end.flags & rflags::kIf);
}

TEST(Segment, Vm86RedirectedInterrupt) {
  GuestCase guest(Mode::kFlat32);
  guest.initial.cr4 |= cr4::kVme;
  EnterVm86(guest, CODE_OF(seg_vm86_int), 0);
  guest.Put<uint16_t>(kTssAt + 0x66, 0x88);
  memset(guest.at(kTssAt + 0x68), 0, 32);
  guest.Put<uint32_t>(0x30 * 4, 0x0a000010);  // the task's own vector: 0xa00:0x10
  static constexpr uint8_t kHlt[] = {0xf4};
  guest.Load(kHlt, 0xa010);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, kGP);  // HLT there
  EXPECT_EQ(end.cs, 0xa00);
  EXPECT_EQ(end.rip, 0x10u);
  EXPECT_EQ(guest.Get<uint16_t>(0xb000 - 6), 5u);  // pushed IP
}

// ---- system calls

GUEST_CODE(seg_syscall, R"(
  syscall
  .byte 0x90
  out %al, $0xf4)")
GUEST_CODE(seg_syscall_target, R"(
  mov %cs, %ebx
  mov %ss, %esi
  pushf
  pop %rdi
  mov %rcx, %rbp
  sysretq)")

TEST(Segment, SyscallAndSysret) {
  GuestCase guest(Mode::kLong64, 3);
  guest.initial.rflags |= kIopl3 | rflags::kIf | rflags::kCf;
  guest.initial.msrs[0xc0000081] = uint64_t{0x20 | 3} << 48 | uint64_t{kCode64} << 32;
  guest.initial.msrs[0xc0000082] = 0xa000;
  guest.initial.msrs[0xc0000084] = rflags::kIf;
  guest.initial.gpr[kRsp] = kUserStack;
  guest.Load(CODE_OF(seg_syscall));
  guest.Load(CODE_OF(seg_syscall_target), 0xa000);
  guest.SetPte(0xa000, 0xa003);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRbx], kCode64);
  EXPECT_EQ(end.state.gpr[kRsi], kCode64 + 8u);
  EXPECT_EQ(end.state.gpr[kRdi] & (rflags::kIf | rflags::kCf), rflags::kCf);
  EXPECT_EQ(end.state.gpr[kRbp], kCode + 2);
  EXPECT_EQ(end.state.seg[kCs].selector, 0x33);
  EXPECT_EQ(end.state.seg[kSs].selector, 0x2b);
  EXPECT_TRUE(end.state.rflags & rflags::kIf);
}

GUEST_CODE(seg_sysenter, ".code32; mov $0x9abc, %edx; sysenter")
GUEST_CODE(seg_sysenter_target,
           ".code32; mov %esp, %esi; mov $0xa800, %edx; mov $0xb000, %ecx; sysexit")
GUEST_CODE(seg_sysexit_target,
           ".code32; mov %cs, %eax; mov %ss, %ebx; mov %esp, %edi; out %al, $0xf4")

TEST(Segment, SysenterAndSysexit) {
  GuestCase guest(Mode::kFlat32, 3);
  guest.initial.rflags |= kIopl3;
  guest.initial.msrs[0x174] = 0x08;
  guest.initial.msrs[0x175] = 0x6000;
  guest.initial.msrs[0x176] = 0xa000;
  guest.Load(CODE_OF(seg_sysenter));
  guest.Load(CODE_OF(seg_sysenter_target), 0xa000);
  guest.Load(CODE_OF(seg_sysexit_target), 0xa800);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.gpr[kRsi], 0x6000u);
  EXPECT_EQ(end.state.gpr[kRax], 0x1bu);
  EXPECT_EQ(end.state.gpr[kRbx], 0x23u);
  EXPECT_EQ(end.state.gpr[kRdi], 0xb000u);
}

GUEST_CODE(seg_iret64, R"(
  mov %rsp, %rbx
  push $0x2b
  push $0xb000
  pushq $0x3002
  push $0x33
  push $0xa000
  iretq)")
GUEST_CODE(seg_user_end, "out %al, $0xf4")

TEST(Segment, IretToUserMode) {
  GuestCase guest(Mode::kLong64);
  guest.Load(CODE_OF(seg_iret64));
  guest.Load(CODE_OF(seg_user_end), 0xa000);
  Outcome end = guest.Run();
  EXPECT_EQ(end.vector, -1);
  EXPECT_EQ(end.state.seg[kCs].selector, kUserCode64);
  EXPECT_EQ(end.state.gpr[kRsp], 0xb000u);
  EXPECT_EQ(end.state.seg[kDs].selector, 0);  // was of DPL 0
}

}  // namespace
}  // namespace kvartz::cpu::x86
