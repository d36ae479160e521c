// The payloads. Registers: a handler keeps all of them. Vectors from 0x30 to 0x3f come through the
// 8259 pair, others from 0x20 up through the local APIC; vectors below are exceptions: they are
// logged, and the program goes on at the address that it left at SHARED, in ring 0.
//
// Shared words (from 0x9000): +0 resume address, +8 x2APIC in use, +0x10 entries of the log,
// +0x20.. parameters.
#include "cpu/kvm/payloads.h"

// clang-format off
asm(R"asm(
.section .rodata.payloads, "a"
.balign 4096
.global payload_image, payload_image_end
payload_image:
.code64

.set RESUME, 0x9000
.set X2APIC, 0x9008
.set LOGGED, 0x9010
.set P0, 0x9020
.set P1, 0x9028
.set P2, 0x9030
.set P3, 0x9038
.set P4, 0x9040
.set P5, 0x9048
.set COUNT, 0x9100
.set BASE, 0x10000
.set MMIO, 0xd0000000
.set PAGES, 0x400000
.set PT, 0x5000

.macro ENTRY name
  .global \name
  .balign 16, 0x90
\name:
.endm
.macro REPORT reg
  mov \reg, %eax
  mov $0x504, %dx
  out %eax, %dx
.endm
.macro DONE value
  mov \value, %eax
  mov $0x500, %dx
  out %eax, %dx
77: hlt
  jmp 77b
.endm
# The next fault continues at `label`.
.macro FAULT_TO label
  lea \label(%rip), %rax
  mov %rax, RESUME
.endm
# Runs `label` in ring 3 (with ports); it leaves by a fault, which continues behind this.
.macro USER label
  FAULT_TO 78f
  pushq $0x2b
  pushq $0xd000
  pushq $0x3002
  pushq $0x33
  lea \label(%rip), %rax
  push %rax
  iretq
78:
.endm

ENTRY pl_stubs
.set i, 0
.rept 256
  .balign 16
  .if (i == 8) || ((i >= 10) && (i <= 14)) || (i == 17) || (i == 21)
  .else
    pushq $0
  .endif
  pushq $i
  jmp handler
  .set i, i + 1
.endr

handler:
  push %rax
  push %rbx
  push %rcx
  push %rdx
  # 32 vector, 40 error, 48 rip, 56 cs, 64 rflags, 72 rsp, 80 ss
  mov 32(%rsp), %rax
  lock incq COUNT(,%rax,8)
  mov $1, %ebx
  lock xadd %rbx, LOGGED
  cmp $63, %rbx
  ja 1f
  shl $6, %rbx
  add $0xa000, %rbx
  mov %rax, (%rbx)
  mov 40(%rsp), %rcx
  mov %rcx, 8(%rbx)
  mov 48(%rsp), %rcx
  mov %rcx, 16(%rbx)
  mov 56(%rsp), %rcx
  mov %rcx, 24(%rbx)
  mov 64(%rsp), %rcx
  mov %rcx, 32(%rbx)
  mov 72(%rsp), %rcx
  mov %rcx, 40(%rbx)
  mov %cr2, %rcx
  mov %rcx, 48(%rbx)
  mov 80(%rsp), %rcx
  mov %rcx, 56(%rbx)
1:
  cmp $32, %rax
  jae 4f
  mov RESUME, %rcx
  test %rcx, %rcx
  jnz 3f
  cmp $3, %rax          # #DB, NMI, #BP return by themselves
  jbe 2f
  or $0xdead0000, %eax
  mov $0x500, %dx
  out %eax, %dx
2:
  test %rax, %rax
  jnz 6f
  mov $0xdead0000, %eax
  mov $0x500, %dx
  out %eax, %dx
3:
  movq $0, RESUME
  mov %rcx, 48(%rsp)
  testb $3, 56(%rsp)
  jz 5f
  movq $0x10, 56(%rsp)
  movq $0xf000, 72(%rsp)
  movq $0x18, 80(%rsp)
5:
  andq $~0x100, 64(%rsp)
  jmp 6f
4:
  cmp $0x30, %rax
  jb 7f
  cmp $0x40, %rax
  jae 7f
  mov %eax, %ecx
  mov $0x20, %al
  cmp $0x38, %ecx
  jb 8f
  out %al, $0xa0
8:
  out %al, $0x20
  jmp 6f
7:
  cmpq $0, X2APIC
  jne 9f
  mov $0xfee000b0, %ebx
  movl $0, (%rbx)
  jmp 6f
9:
  mov $0x80b, %ecx
  xor %eax, %eax
  xor %edx, %edx
  wrmsr
6:
  pop %rdx
  pop %rcx
  pop %rbx
  pop %rax
  add $16, %rsp
  iretq

# Software-enables the local APIC (spurious vector 0xff); masks the 8259 pair, which has every line on LINT0 otherwise.
apic_on:
  mov $0xff, %al
  out %al, $0x21
  out %al, $0xa1
  mov $0xfee000f0, %ebx
  movl $0x1ff, (%rbx)
  ret
# Waits with interrupts on until counter %rdi is %rsi or more.
await:
  sti
1: pause
  mov COUNT(,%rdi,8), %rax
  cmp %rsi, %rax
  jb 1b
  cli
  ret
await_halted:
  cli
  mov COUNT(,%rdi,8), %rax
  cmp %rsi, %rax
  jae 1f
  sti
  hlt
  jmp await_halted
1: ret

ENTRY pl_done
  DONE $0x600d

# From reset's real mode by itself: 16-bit, 32-bit without paging, 64-bit. CS = BASE >> 4.
.code16
ENTRY pl_real
  cli
  xor %ax, %ax
  mov %ax, %ds
  mov $0x16, %eax
  mov $0x504, %dx
  out %eax, %dx
  lgdtl 0x9f00
  mov %cr0, %eax
  or $1, %eax
  mov %eax, %cr0
  ljmpl $8, $(BASE + 1f - payload_image)
.code32
1:
  mov $0x18, %ax
  mov %ax, %ds
  mov %ax, %ss
  mov $0xf000, %esp
  push %eax
  pop %ecx
  mov $0x32, %eax
  mov $0x504, %dx
  out %eax, %dx
  mov $0x620, %eax
  mov %eax, %cr4
  mov $0x1000, %eax
  mov %eax, %cr3
  mov $0xc0000080, %ecx
  mov $0x900, %eax
  xor %edx, %edx
  wrmsr
  mov $0x80010033, %eax
  mov %eax, %cr0
  ljmpl $0x10, $(BASE + 2f - payload_image)
.code64
2:
  mov $0x100000000, %rbx
  shr $26, %rbx
  REPORT %ebx
  DONE $1

# 32-bit paging (without long mode): page directory at 0x2000 of the RAM by the test. CS = BASE >> 4.
.code16
ENTRY pl_real32
  cli
  xor %ax, %ax
  mov %ax, %ds
  lgdtl 0x9f00
  mov %cr0, %eax
  or $1, %eax
  mov %eax, %cr0
  ljmpl $8, $(BASE + 1f - payload_image)
.code32
1:
  mov $0x18, %ax
  mov %ax, %ds
  mov $0x10, %eax
  mov %eax, %cr4
  mov P0, %eax
  mov %eax, %cr3
  mov %cr0, %eax
  or $0x80000000, %eax
  mov %eax, %cr0
  jmp 2f
2:
  mov $0x3232, %eax
  mov $0x500, %dx
  out %eax, %dx
3: hlt
  jmp 3b
.code64

# Faults of ring 0, in the order that the test expects.
ENTRY pl_faults
  FAULT_TO 1f
  ud2
1:FAULT_TO 1f
  mov $0x8000000000000000, %rbx
  mov (%rbx), %rax
1:FAULT_TO 1f
  mov $0x7e, %ax
  mov %ax, %ds
1:FAULT_TO 1f
  xor %edx, %edx
  mov $1, %eax
  xor %ecx, %ecx
  div %ecx
1:mov $PAGES, %ebx
  movq $0, PT               # page 0: absent
  invlpg (%rbx)
  FAULT_TO 1f
  mov 8(%rbx), %rax
1:FAULT_TO 1f
  mov %rax, 16(%rbx)
1:movq $(PAGES + 0x1000 + 1), PT + 8  # page 1: read-only
  lea 0x1000(%rbx), %rbx
  invlpg (%rbx)
  mov (%rbx), %rax
  FAULT_TO 1f
  mov %rax, (%rbx)
1:mov $0x8000000000000000, %rcx     # page 2: no execution
  or $(PAGES + 0x2000 + 3), %rcx
  mov %rcx, PT + 16
  lea 0x1000(%rbx), %rbx
  invlpg (%rbx)
  movb $0xc3, (%rbx)
  FAULT_TO 1f
  call *%rbx
1:DONE $2

# The same from ring 3; the last is what the test puts into the user page at PAGES.
ENTRY pl_user_faults
  USER 10f
  USER 11f
  USER 12f
  movq $(PAGES + 0x1000 + 3), PT + 8  # page 1: supervisor
  movq $0, PT + 16                    # page 2: absent
  mov $0x8000000000000000, %rcx       # page 3: no execution
  or $(PAGES + 0x3000 + 7), %rcx
  mov %rcx, PT + 24
  mov %cr3, %rax
  mov %rax, %cr3
  USER 13f
  USER 14f
  USER 15f
  USER 16f
  DONE $3
10:ud2
11:lgdt 0x9f00
12:xor %edx, %edx
  xor %ecx, %ecx
  div %ecx
13:mov PAGES + 0x1000, %rax
14:mov %rax, PAGES + 0x2008
15:mov $(PAGES + 0x3000), %eax
  jmp *%rax
16:int3
  ud2

# Accessed and dirty bits, INVLPG, the alias at -2 GiB.
ENTRY pl_paging
  mov $PAGES, %ebx
  mov PT, %rax
  and $~0x60, %rax
  mov %rax, PT
  mov PT + 8, %rax
  and $~0x60, %rax
  mov %rax, PT + 8
  mov %cr3, %rax
  mov %rax, %cr3
  mov (%rbx), %rax
  movq $5, 0x1000(%rbx)
  mov PT, %rax
  and $0x60, %rax
  REPORT %eax
  mov PT + 8, %rax
  and $0x60, %rax
  REPORT %eax
  movq $0xaaaa, 0x2000(%rbx)
  movq $0xbbbb, 0x3000(%rbx)
  mov 0x2000(%rbx), %rcx
  REPORT %ecx
  movq $(PAGES + 0x3000 + 7), PT + 16
  lea 0x2000(%rbx), %rbx
  invlpg (%rbx)
  mov (%rbx), %rcx
  REPORT %ecx
  mov $0xffffffff80000000 + P0, %rbx
  mov (%rbx), %rcx
  REPORT %ecx
  lea 1f(%rip), %rax
  add $0xffffffff80000000, %rax
  jmp *%rax
1:lea 0(%rip), %rcx
  shr $32, %rcx
  REPORT %ecx
  DONE $4

ENTRY pl_ports
  mov $0x510, %dx
  mov $0x11223344, %eax
  out %al, %dx
  out %ax, %dx
  out %eax, %dx
  inc %dx
  xor %eax, %eax
  in %dx, %al
  mov %eax, P0
  inc %dx
  in %dx, %ax
  mov %eax, P1
  mov $0x514, %dx
  in %dx, %eax
  mov %eax, P2
  cld
  lea 1f(%rip), %rsi
  mov $5, %ecx
  mov $0x511, %dx
  rep outsb
  mov $P3, %edi
  mov $3, %ecx
  mov $0x512, %dx
  rep insw
  DONE $5
1:.ascii "hello"

ENTRY pl_mmio
  mov $MMIO, %ebx
  movb $0x11, (%rbx)
  movw $0x2222, 2(%rbx)
  movl $0x33333333, 4(%rbx)
  mov $0x4444555566667777, %rax
  mov %rax, 8(%rbx)
  movzbl 1(%rbx), %eax
  mov %rax, P0
  movzwl 2(%rbx), %eax
  mov %rax, P1
  mov 4(%rbx), %eax
  mov %rax, P2
  mov 8(%rbx), %rax
  mov %rax, P3
  mov $0x0102030405060708, %rax
  mov %rax, 0xffd(%rbx)     # three bytes before the end of the page
  lea 1f(%rip), %rsi
  lea 0x40(%rbx), %rdi
  mov $2, %ecx
  cld
  rep movsl
  movups 1f(%rip), %xmm0
  movups %xmm0, 0x80(%rbx)
  DONE $6
1:.long 0xa1a1a1a1, 0xb2b2b2b2, 0xc3c3c3c3, 0xd4d4d4d4

# Ten writes to 0xd0002000 (collected), then one elsewhere.
ENTRY pl_collected
  mov $(MMIO + 0x2000), %ebx
  mov $1, %ecx
1:mov %ecx, (%rbx,%rcx,4)
  inc %ecx
  cmp $10, %ecx
  jbe 1b
  mov $MMIO, %ebx
  movl $0x5555, (%rbx)
  DONE $7

# Doorbells at 0xd0003000: +0 any length, +8 four bytes of 7; port 0x520 two bytes of 9, port 0x524 any.
ENTRY pl_doorbells
  mov $(MMIO + 0x3000), %ebx
  movl $1, (%rbx)
  movb $1, (%rbx)
  movl $7, 8(%rbx)
  movl $8, 8(%rbx)          # no match
  mov $0x520, %dx
  mov $9, %ax
  out %ax, %dx
  mov $10, %ax              # no match
  out %ax, %dx
  mov $0x524, %dx
  out %al, %dx
  DONE $8

# Reports 1 and waits for counter P0 to be P1.
ENTRY pl_wait
  call apic_on
  REPORT $1
  mov P0, %rdi
  mov P1, %rsi
  call await
  DONE $9
ENTRY pl_halt_wait
  call apic_on
  REPORT $1
  mov P0, %rdi
  mov P1, %rsi
  call await_halted
  DONE $10

ENTRY pl_spin
  REPORT $1
1:incq P0
  jmp 1b
ENTRY pl_halt
  REPORT $1
1:sti
  hlt
  incq P0
  jmp 1b
ENTRY pl_user_spin
  USER 1f
  DONE $0xbad
1:mov $1, %eax
  mov $0x504, %dx
  out %eax, %dx
2:incq P0
  jmp 2b

ENTRY pl_self_ipi
  call apic_on
  mov $0xfee00300, %ebx
  movl $0x40041, (%rbx)     # self, vector 0x41
  mov $0x41, %edi
  mov $1, %esi
  call await
  mov $0xfee00030, %ebx
  mov (%rbx), %ecx
  REPORT %ecx
  DONE $11

ENTRY pl_x2apic
  movq $1, X2APIC
  mov $0x1b, %ecx
  rdmsr
  or $0xc00, %eax
  wrmsr
  mov $0x80f, %ecx
  mov $0x1ff, %eax
  xor %edx, %edx
  wrmsr
  mov $0x83f, %ecx          # self IPI
  mov $0x42, %eax
  wrmsr
  mov $0x42, %edi
  mov $1, %esi
  call await
  mov $0x802, %ecx
  rdmsr
  REPORT %eax
  DONE $12

# Periodic, vector 0x43, three ticks.
ENTRY pl_apic_timer
  call apic_on
  mov $0xfee003e0, %ebx
  movl $0xb, (%rbx)         # divide by 1
  mov $0xfee00320, %ebx
  movl $0x20043, (%rbx)
  mov $0xfee00380, %ebx
  movl $2000000, (%rbx)
  mov $0x43, %edi
  mov $3, %esi
  call await
  mov $0xfee00320, %ebx
  movl $0x10000, (%rbx)
  DONE $13

ENTRY pl_tsc_deadline
  call apic_on
  mov $0xfee00320, %ebx
  movl $0x40044, (%rbx)
  rdtsc
  add $1000000, %eax
  adc $0, %edx
  mov $0x6e0, %ecx
  wrmsr
  mov $0x44, %edi
  mov $1, %esi
  call await_halted
  mov $0x6e0, %ecx          # disarmed
  rdmsr
  REPORT %eax
  DONE $14

# 8259 pair at 0x30 and 0x38, all masked but %bl, %bh.
pic_init:
  mov $0x11, %al
  out %al, $0x20
  out %al, $0xa0
  mov $0x30, %al
  out %al, $0x21
  mov $0x38, %al
  out %al, $0xa1
  mov $4, %al
  out %al, $0x21
  mov $2, %al
  out %al, $0xa1
  mov $1, %al
  out %al, $0x21
  out %al, $0xa1
  mov %bl, %al
  out %al, $0x21
  mov %bh, %al
  out %al, $0xa1
  # LINT0: ExtINT
  mov $0xfee00350, %ebx
  movl $0x700, (%rbx)
  ret

# PIT channel 0 at about 1 kHz through the 8259: five ticks.
ENTRY pl_pit
  call apic_on
  mov $0xfffe, %bx
  call pic_init
  mov $0x34, %al
  out %al, $0x43
  mov $0xa9, %al
  out %al, $0x40
  mov $0x04, %al
  out %al, $0x40
  mov $0x30, %edi
  mov $5, %esi
  call await
  mov $0x30, %al            # one-shot, never loaded: silent
  out %al, $0x43
  DONE $15

# Lines 4 and 12 of the 8259 pair.
ENTRY pl_pic
  call apic_on
  mov $0xefeb, %bx
  call pic_init
  REPORT $1
  mov $0x34, %edi
  mov $1, %esi
  call await
  REPORT $2
  mov $0x3c, %edi
  mov $1, %esi
  call await
  DONE $16

# IOAPIC pin 9: level, vector 0x49; pin 5: edge, vector 0x45. Each P1 times.
ENTRY pl_ioapic
  call apic_on
  mov $0xfec00000, %ebx
  movl $0x22, (%rbx)        # pin 9
  movl $0x8049, 0x10(%rbx)
  movl $0x23, (%rbx)
  movl $0, 0x10(%rbx)
  movl $0x1a, (%rbx)        # pin 5
  movl $0x0045, 0x10(%rbx)
  movl $0x1b, (%rbx)
  movl $0, 0x10(%rbx)
  movl $0x14, (%rbx)        # pin 2: where ISA line 0 is
  movl $0x0050, 0x10(%rbx)
  movl $0x15, (%rbx)
  movl $0, 0x10(%rbx)
  REPORT $1
  mov $0x45, %edi
  mov P1, %rsi
  call await
  REPORT $2
  mov $0x49, %edi
  mov P1, %rsi
  call await
  REPORT $3
  mov $0x50, %edi
  mov $1, %esi
  call await
  DONE $17

# The PIC is outside: vectors 0x60 and 0x61 as ExtINT, the first held back by CLI.
ENTRY pl_extint
  call apic_on
  mov $0xfee00350, %ebx
  movl $0x700, (%rbx)
  REPORT $1
  mov $200, %ecx
1:pause
  loop 1b
  mov COUNT + 8*0x60, %rcx
  REPORT %ecx
  mov $0x60, %edi
  mov $1, %esi
  call await
  REPORT $2
  mov $0x61, %edi
  mov $1, %esi
  call await_halted
  DONE $18

# Level-triggered messages of an IOAPIC outside: vector 0x4a; then an access that leaves the guest.
ENTRY pl_level
  call apic_on
  REPORT $1
  mov $0x4a, %edi
  mov $1, %esi
  call await
  REPORT $2
  mov $0x4a, %edi
  mov $2, %esi
  call await
  DONE $19

# Writes to pages 0 and 3 of PAGES in ring 0, page 7 in ring 3; at each command of the test (P0 rises).
ENTRY pl_dirty
  mov $PAGES, %ebx
1:movq $1, (%rbx)
  movq $1, 0x3000(%rbx)
  USER 10f
  REPORT $1
  mov P1, %rcx
2:pause
  cmp P0, %rcx
  je 2b
  mov P0, %rax
  mov %rax, P1
  mov $PAGES, %ebx
  cmp $2, %rax
  jae 3f
  movq $2, 0x9000(%rbx)
  REPORT $2
  mov P1, %rcx
  jmp 2b
3:DONE $20
10:movq $1, PAGES + 0x7000
  ud2

# A write to each of P0 pages from 0x600000, some instructions apart (an emulator looks at the ring only now and then).
ENTRY pl_touch_all
  mov P0, %rcx
  mov $0x600000, %ebx
1:movl $1, (%rbx)
  add $0x1000, %ebx
  .rept 24
  nop
  .endr
  loop 1b
  DONE $21

# Memory that comes and goes at 0x40000000 (mapped at PAGES + page 16 by the test).
ENTRY pl_hot
  mov $(PAGES + 0x10000), %ebx
  mov (%rbx), %rcx
  movl $0x1234, (%rbx)
  REPORT %ecx
1:pause
  cmpq $1, P0
  jb 1b
  mov (%rbx), %rcx
  REPORT %ecx
2:pause
  cmpq $2, P0
  jb 2b
  mov (%rbx), %rcx
  REPORT %ecx
  DONE $22
ENTRY pl_hot_spin
  REPORT $1
  mov $(PAGES + 0x11000), %ebx
1:incq (%rbx)
  cmpq $0, P0
  je 1b
  DONE $23

# ROM at PAGES + page 18: reads, a write (dropped, or its handler's), reads again, runs.
ENTRY pl_rom
  mov $(PAGES + 0x12000), %ebx
  mov (%rbx), %rcx
  REPORT %ecx
  movl $0x77777777, (%rbx)
  mov (%rbx), %rcx
  REPORT %ecx
  lea 0x100(%rbx), %rax
  call *%rax
  REPORT %ecx
  DONE $24

# Wakes CPU 1 by INIT and SIPI; both count P0 up P1 times under LOCK; IPIs there and back.
ENTRY pl_smp
  call apic_on
  mov $0xfee00310, %ebx
  movl $0x01000000, (%rbx)
  mov $0xfee00300, %ecx
  movl $0x4500, (%rcx)      # INIT
  movl $0x01000000, (%rbx)
  movl $0x4640, (%rcx)      # start at 0x40000
1:pause
  cmpq $1, P2               # it is up
  jne 1b
  mov P1, %rcx
2:lock incq P0
  dec %rcx
  jnz 2b
  movl $0x01000000, (%rbx)
  mov $0xfee00300, %ecx
  movl $0x4051, (%rcx)      # IPI 0x51 to CPU 1
  mov $0x52, %edi           # it answers with 0x52
  mov $1, %esi
  call await_halted
3:pause
  cmpq $2, P2
  jne 3b
  DONE $25
smp_other:
  mov $0xe000, %esp
  lidt 0x9e00
  call apic_on
  movq $1, P2
  mov P1, %rcx
2:lock incq P0
  dec %rcx
  jnz 2b
  mov $0x51, %edi
  mov $1, %esi
  call await_halted
  mov $0xfee00310, %ebx
  movl $0, (%rbx)
  mov $0xfee00300, %ebx
  movl $0x4052, (%rbx)
  movq $2, P2
1:hlt
  jmp 1b

# At kSipiPage, CS = 0x4000, IP = 0.
.code16
ENTRY pl_ap_start
  cli
  xor %ax, %ax
  mov %ax, %ds
  lgdtl 0x9f00
  mov $0x620, %eax
  mov %eax, %cr4
  mov $0x1000, %eax
  mov %eax, %cr3
  mov $0xc0000080, %ecx
  mov $0x900, %eax
  xor %edx, %edx
  wrmsr
  mov $0x80010033, %eax     # protected mode and paging at once
  mov %eax, %cr0
  ljmpl $0x10, $(BASE + 1f - payload_image)
.code64
1:mov $0x18, %ax
  mov %ax, %ds
  mov %ax, %ss
  jmp smp_other

# The clock page at 0x500000: version must be even and the multiplier set.
ENTRY pl_kvmclock
  mov $0x4b564d01, %ecx
  mov $0x500001, %eax
  xor %edx, %edx
  wrmsr
  mov 0x500018, %ecx        # tsc_to_system_mul
  REPORT %ecx
  mov 0x500010, %ecx
  REPORT %ecx
  DONE $26

# An MSR that doesn't exist: #GP(0) both ways.
ENTRY pl_msr
  FAULT_TO 1f
  mov $0x12345678, %ecx
  rdmsr
1:FAULT_TO 1f
  mov $0x12345678, %ecx
  mov $5, %eax
  xor %edx, %edx
  wrmsr
1:DONE $27

# 32-bit code in ring 3 under long mode; it leaves by UD2.
ENTRY pl_compat
  FAULT_TO 1f
  pushq $0x2b
  pushq $0xd000
  pushq $0x3002
  pushq $0x23
  lea 2f(%rip), %rax
  push %rax
  iretq
1:DONE $28
.code32
2:mov $0xffffffff, %eax
  inc %eax                  # 40 would be REX in 64-bit code
  mov %eax, P0
  .byte 0x40
  mov %eax, P1
  mov %esp, P2
  ud2
.code64

# To be moved while it runs: a periodic APIC timer (vector 0x46) counts in ring 0, ring 3 holds values in vector, x87 and
# segment registers and checks them all the time.
ENTRY pl_move
  call apic_on
  mov $0xfee003e0, %ebx
  movl $0xb, (%rbx)
  mov $0xfee00320, %ebx
  movl $0x20046, (%rbx)
  mov $0xfee00380, %ebx
  movl $3000000, (%rbx)
  mov $0xc0000100, %ecx     # FS base
  mov $0x9180, %eax
  xor %edx, %edx
  wrmsr
  FAULT_TO 9f
  pushq $0x2b
  pushq $0xd000
  pushq $0x3202
  pushq $0x33
  lea 1f(%rip), %rax
  push %rax
  iretq
9:mov P2, %ecx
  REPORT %ecx
  DONE $29
1:movups 8f(%rip), %xmm7
  fninit
  fldpi
  fld1
  mov $0x1122334455667788, %r15
  cmpq $0, P5               # AVX?
  je 2f
  vbroadcastss 8f(%rip), %ymm9
2:mov $1, %eax
  mov $0x504, %dx
  out %eax, %dx
3:incq P0
  movups 8f(%rip), %xmm0
  pcmpeqb %xmm7, %xmm0
  pmovmskb %xmm0, %eax
  mov $1, %ecx
  cmp $0xffff, %eax
  jne 7f
  mov $2, %ecx
  mov $0x1122334455667788, %rax
  cmp %rax, %r15
  jne 7f
  mov $3, %ecx
  fld %st(1)
  fldpi
  fcompp
  fnstsw %ax
  and $0x4700, %eax
  cmp $0x4000, %eax
  jne 7f
  mov $4, %ecx
  mov $0x5aa5, %eax
  cmp %fs:0, %rax           # the word at 0x9180
  jne 7f
  cmpq $0, P5
  je 4f
  mov $5, %ecx
  vextractf128 $1, %ymm9, %xmm1
  pcmpeqb %xmm1, %xmm1
  vbroadcastss 8f(%rip), %ymm2
  vpxor %xmm9, %xmm2, %xmm3
  vptest %xmm3, %xmm3
  jnz 7f
  vextractf128 $1, %ymm9, %xmm3
  vextractf128 $1, %ymm2, %xmm4
  vpxor %xmm3, %xmm4, %xmm3
  vptest %xmm3, %xmm3
  jnz 7f
4:cmpq $0, P1               # the test says that it is enough
  je 3b
  mov $0x900d, %ecx
7:mov %rcx, P2
  ud2
8:.long 0x3f8ccccd, 0x11223344, 0x55667788, 0x99aabbcc

ENTRY pl_step
  nop
  mov $5, %ecx
  add $6, %ecx
  nop
.global pl_step_end
pl_step_end:
  REPORT %ecx
  DONE $30

# POPCNT in ring 0: what an emulator lacks.
ENTRY pl_popcnt
  mov $0xf0f0, %ebx
  mov $77, %eax
  popcnt %rbx, %rax
.global pl_popcnt_after
pl_popcnt_after:
  REPORT %eax
  DONE $31

ENTRY pl_triple
  lidt 0x9e10               # limit 0
  ud2

ENTRY pl_syscall
  mov $0xc0000080, %ecx
  rdmsr
  or $1, %eax
  wrmsr
  mov $0xc0000081, %ecx
  xor %eax, %eax
  mov $0x00230010, %edx
  wrmsr
  mov $0xc0000082, %ecx
  lea 2f(%rip), %rax
  xor %edx, %edx
  wrmsr
  mov $0xc0000084, %ecx
  xor %eax, %eax
  wrmsr
  USER 1f
  DONE $0xbad
1:syscall
2:mov %cs, %ecx             # ring 0 in its own page: reached with CS 10
  mov $0xf000, %esp
  REPORT %ecx
  DONE $32

ENTRY pl_int3
  int3
  REPORT $1
  DONE $33

ENTRY pl_cpuid
  mov P0, %eax
  mov P1, %ecx
  cpuid
  mov %eax, P2
  mov %ebx, P3
  mov %ecx, P4
  mov %edx, P5
  DONE $34

# What a reset leaves behind: APIC base, PAT, EFER.
ENTRY pl_reset_probe
  movq $1, X2APIC
  mov $0x1b, %ecx
  rdmsr
  or $0xc00, %eax
  wrmsr
  mov $0x277, %ecx
  mov $0x06060606, %eax
  mov $0x06060606, %edx
  wrmsr
  xor %edx, %edx
  mov $0xc0000102, %ecx
  wrmsr
  mov $0x20, %al
  out %al, $0x21
  DONE $35

# IOAPIC pin 10, level, vector 0x4b, P1 times.
ENTRY pl_irqfd_line
  call apic_on
  mov $0xfec00000, %ebx
  movl $0x24, (%rbx)
  movl $0x804b, 0x10(%rbx)
  movl $0x25, (%rbx)
  movl $0, 0x10(%rbx)
  REPORT $1
  mov $0x4b, %edi
  mov P1, %rsi
  call await
  DONE $36

.balign 4096
payload_image_end:
.text
)asm");
// clang-format on
