// A bare-metal guest that attacks the CPU engine on one or two processors: random instructions in
// rings 0 and 3, code that overwrites itself and the other processor's, page tables full of
// garbage. Each round starts with whatever state the one before left; an exception or the timer
// ends it, and what the guest itself needs is put back. A round that destroys that, too, hangs or
// triple-faults: the host resets the machine now and then. Prints '@' at the start, '.' each 256
// rounds. Entered through PVH: 32-bit, unpaged, interrupts off.
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

namespace {

constexpr u64 kPresent = 1, kWritable = 2, kUser = 4, kLarge = 0x80;
constexpr u64 kCr0 = 0x80010033,
              kCr4 = 0x50620;  // PG WP NE ET MP PE; OSXSAVE FSGSBASE OSXMMEXCPT OSFXSR PAE
constexpr u32 kEferMsr = 0xc0000080, kEfer = 0xd01;  // NXE LMA LME SCE
constexpr u64 kApic = 0xfee00000;
// Two linear windows onto the same 2 MiB of RAM, page by page; the second one in another order.
constexpr u64 kWindow = 0x40000000, kAlias = 0x50000000, kWindowPhysical = 16 << 20;
constexpr u64 kRamBytes = 64 << 20;
constexpr u32 kPages = 512;
constexpr u16 kCode64 = 0x08, kData = 0x10, kUserData = 0x1b, kUserCode = 0x23, kUserCode32 = 0x2b,
              kTssSelector = 0x38;
constexpr u8 kTimerVector = 0x40;

struct alignas(16) Pointer {
  u16 limit;
  u64 base;
} __attribute__((packed));

// In one block of 64 KiB, so that the stack pointer tells which.
struct alignas(65536) Cpu {
  u8 exception_stack[16384];
  u8 stack[16384];
  u64 gpr[16];
  u64 frame[5];  // for IRETQ
  u64 gdt[10];
  u32 tss[26];
  u64 random, rounds;
  bool pages_changed;
};

}  // namespace

extern "C" {
Cpu cpus[2];
extern u8 trampoline[], trampoline_end[];
void Recover();
[[noreturn]] void Enter(u64* gpr, u64* frame);
}

namespace {

alignas(4096) u64 root[512], low[512], high[4][512], window[512], alias[512], directory[512];
struct Gate {
  u64 low, high;
} gates[256];

u32 Random(Cpu& cpu) {  // xorshift64*
  cpu.random ^= cpu.random >> 12;
  cpu.random ^= cpu.random << 25;
  cpu.random ^= cpu.random >> 27;
  return static_cast<u32>((cpu.random * 0x2545f4914f6cdd1dull) >> 32);
}
u64 Random64(Cpu& cpu) { return u64{Random(cpu)} << 32 | Random(cpu); }
bool Chance(Cpu& cpu, u32 one_in) { return Random(cpu) % one_in == 0; }

void WriteMsr(u32 msr, u64 value) {
  asm volatile("wrmsr" ::"c"(msr), "a"(static_cast<u32>(value)),
               "d"(static_cast<u32>(value >> 32)));
}
volatile u32& Apic(u32 offset) { return *reinterpret_cast<volatile u32*>(kApic + offset); }

// Entries in use never change to something else on the way: this code runs through them.
void MakeTables() {
  for (u32 g = 0; g < 4; ++g) {
    for (u32 i = 0; i < 512 && g != 1; ++i)
      high[g][i] = (u64{g} << 30 | u64{i} << 21) | kPresent | kWritable | kLarge;
  }
  for (u32 i = 0; i < 512; ++i) {
    low[i] =
        i >= 4 ? 0
               : reinterpret_cast<u64>(i == 1 ? directory : high[i]) | kPresent | kWritable | kUser;
    root[i] = i != 0 ? 0 : reinterpret_cast<u64>(low) | kPresent | kWritable | kUser;
  }
}

void MapWindows() {
  for (u32 i = 0; i < 512; ++i) directory[i] = 0;
  directory[0] = reinterpret_cast<u64>(window) | kPresent | kWritable | kUser;
  directory[(kAlias - kWindow) >> 21] = reinterpret_cast<u64>(alias) | kPresent | kWritable | kUser;
  for (u32 i = 0; i < kPages; ++i) {
    window[i] = (kWindowPhysical + i * 4096) | kPresent | kWritable | kUser;
    alias[i] = (kWindowPhysical + (i ^ 1) * 4096) | kPresent | kWritable | kUser;
  }
}

void MakeGates() {
  const u64 handler = reinterpret_cast<u64>(Recover);
  for (Gate& gate : gates) {
    gate.low = (handler & 0xffff) | u64{kCode64} << 16 | u64{1} << 32 | u64{0x8e} << 40 |
               (handler >> 16 & 0xffff) << 48;
    gate.high = handler >> 32;
  }
}

// Everything that the guest needs on this processor.
void Restore(Cpu& cpu) {
  const u64 tss = reinterpret_cast<u64>(cpu.tss);
  const u64 stack = reinterpret_cast<u64>(cpu.exception_stack + sizeof(cpu.exception_stack));
  for (u32& word : cpu.tss) word = 0;
  cpu.tss[1] = cpu.tss[9] = static_cast<u32>(stack);  // RSP0, IST1; below 4 GiB
  const u64 gdt[10] = {0,
                       0x00af9b000000ffff,
                       0x00cf93000000ffff,
                       0x00cff3000000ffff,
                       0x00affb000000ffff,
                       0x00cffb000000ffff,
                       0,
                       (103 | (tss & 0xffffff) << 16 | u64{0x89} << 40 | (tss >> 24 & 0xff) << 56),
                       tss >> 32,
                       0};
  for (u32 i = 0; i < 10; ++i) cpu.gdt[i] = gdt[i];
  if (cpu.pages_changed) MakeTables(), MapWindows(), MakeGates();
  cpu.pages_changed = false;
  asm volatile("mov %0, %%cr4" ::"r"(kCr4));
  asm volatile("mov %0, %%cr3" ::"r"(root));
  asm volatile("mov %0, %%cr0" ::"r"(kCr0));
  WriteMsr(kEferMsr, kEfer);
  const Pointer gdtr{sizeof(cpu.gdt) - 1, reinterpret_cast<u64>(cpu.gdt)},
      idtr{sizeof(gates) - 1, reinterpret_cast<u64>(gates)};
  asm volatile("lgdt %0; lidt %1; ltr %w2" ::"m"(gdtr), "m"(idtr), "r"(kTssSelector));
  asm volatile("lldt %w0; mov %q0, %%dr7; mov %q0, %%cr8" ::"r"(u64{0}));
  Apic(0xf0) = 0x1ff;
  Apic(0x80) = 0;
  Apic(0x320) = kTimerVector;
  Apic(0x3e0) = 3;
  Apic(0x380) = 20000;  // ticks of 16 ns: 0.3 ms
  Apic(0xb0) = 0;
}

// An address that is worth a try.
u64 Address(Cpu& cpu) {
  const u64 near = Random(cpu) & (Chance(cpu, 4) ? 0x1fffff : 0x3fff);
  const u64 edge = (Random(cpu) & 31) - 16ull;
  switch (Random(cpu) % 16) {
    case 0:
      return kRamBytes + edge;
    case 1:
      return kWindow + kPages * 4096 + edge;
    case 2:
      return kWindow + (Random(cpu) % kPages) * 4096 + edge;
    case 3:
      return kApic + (Random(cpu) & 0xfff);
    case 4:
      return 0xfec00000 + (Random(cpu) & 0xff);
    case 5:
      return 0xa0000 + (Random(cpu) & 0x5ffff);
    case 6:
      return Random64(cpu);
    case 7:
      return (Random(cpu) & 1 ? 0x800000000000 : 0x100000000) + edge;
    case 8:
      return Random(cpu) & 63;
    case 9:
      return reinterpret_cast<u64>(window) + (Random(cpu) & 0xfff) * (Random(cpu) & 1);
    case 10:
    case 11:
      return kAlias + near;
    default:
      return kWindow + near;
  }
}

// Opcodes (and prefixes) that random bytes rarely make, behind their length.
constexpr const char* kOpcodes[] = {
    "\x01\x8b",
    "\x01\x89",
    "\x01\x01",
    "\x01\x87",
    "\x01\xff",
    "\x01\xf7",
    "\x01\xd9",
    "\x01\xdd",
    "\x01\xdf",
    "\x01\x8e",
    "\x01\xa4",
    "\x02\xf3\xa4",
    "\x02\xf3\xab",
    "\x03\xf3\x48\xa5",
    "\x02\xf2\xae",
    "\x02\xf3\xa6",
    "\x01\x6c",
    "\x02\xf3\x6f",
    "\x01\xec",
    "\x01\xef",
    "\x02\x0f\x01",
    "\x02\x0f\x00",
    "\x02\x0f\x20",
    "\x02\x0f\x22",
    "\x02\x0f\x21",
    "\x02\x0f\x23",
    "\x02\x0f\x30",
    "\x02\x0f\x32",
    "\x02\x0f\xae",
    "\x03\xf3\x0f\xae",
    "\x03\x48\x0f\xae",
    "\x02\x0f\xc7",
    "\x03\x48\x0f\xc7",
    "\x03\xf0\x0f\xc7",
    "\x02\x0f\x05",
    "\x02\x0f\x07",
    "\x02\x0f\x34",
    "\x02\x0f\x35",
    "\x02\x48\xcf",
    "\x01\xcf",
    "\x01\xcb",
    "\x02\x48\xcb",
    "\x01\xca",
    "\x01\xc8",
    "\x01\xcc",
    "\x02\xcd\x80",
    "\x01\xf4",
    "\x01\xfa",
    "\x01\xfb",
    "\x01\x9d",
    "\x01\x9c",
    "\x02\xff\x28",
    "\x02\xff\x18",
    "\x02\x0f\xb2",
    "\x02\x0f\xb4",
    "\x04\x66\x0f\x38\x80",
    "\x04\x66\x0f\x38\x82",
    "\x02\x0f\x09",
    "\x03\x0f\x01\xd0",
    "\x03\x0f\x01\xd1",
    "\x03\x0f\x01\xf9",
    "\x02\x0f\xa2",
    "\x02\x0f\x0b",
    "\x02\x0f\x06",
    "\x03\x0f\x01\xcb",
    "\x03\x0f\x01\xca",
    "\x03\xf3\x0f\x1e",
    "\x01\xe8",
    "\x01\xe9",
    "\x01\xc3",
    "\x01\xc2",
    "\x02\xff\x10",
    "\x02\xff\x20",
    "\x02\xc4\xe2",
    "\x02\xc4\xe1",
    "\x02\xc4\xe3",
    "\x01\xc5",
    "\x03\x66\x0f\x38",
    "\x03\x66\x0f\x3a",
    "\x03\x0f\x38\xf0",
    "\x02\x0f\xb1",
    "\x03\xf0\x0f\xb1",
    "\x02\xf0\x01",
    "\x02\xf0\x87",
    "\x02\x0f\x2b",
    "\x02\x0f\xe7",
    "\x03\x66\x0f\xf7",
    "\x02\x0f\x28",
    "\x03\x66\x0f\x6f",
    "\x03\xf3\x0f\x6f",
    "\x02\x0f\x10",
    "\x01\xd7",
    "\x01\xe2",
    "\x01\xe3",
    "\x02\x0f\x02",
    "\x02\x0f\x03",
};

// Up to `end`: instructions, most of them valid, most of their operands in memory.
void FillWithCode(Cpu& cpu, u8* at, u8* end) {
  while (at + 24 < end) {
    if (Chance(cpu, 4))
      *at++ = "\x66\xf2\xf3\x48\x65\x64\x67\xf0\x4d\x2e\x36\x40\x49\x4c\x44\x41"[Random(cpu) & 15];
    switch (Random(cpu) & 7) {
      case 0:
        *at++ = static_cast<u8>(0x70 | (Random(cpu) & 15));  // JCC to somewhere near
        *at++ = static_cast<u8>(Random(cpu));
        continue;
      case 1:
      case 2:
        *at++ = static_cast<u8>(Random(cpu));
        break;
      case 3:
        *at++ = 0x0f;
        *at++ = static_cast<u8>(Random(cpu));
        break;
      default: {
        const char* opcode = kOpcodes[Random(cpu) % (sizeof(kOpcodes) / sizeof(kOpcodes[0]))];
        for (int i = 0; i < opcode[0]; ++i) *at++ = static_cast<u8>(opcode[1 + i]);
      }
    }
    *at++ = static_cast<u8>(Chance(cpu, 3) ? Random(cpu) : Random(cpu) & 0x7f);  // ModRM
    for (u32 more = Random(cpu) % 6; more > 0; --more)
      *at++ = static_cast<u8>(Chance(cpu, 2) ? 0 : Random(cpu));
  }
}

u8* Emit(u8* at, u64 bytes, u32 count) {
  for (u32 i = 0; i < count; ++i, bytes >>= 8) *at++ = static_cast<u8>(bytes);
  return at;
}

// A loop of stores into itself, through both windows, and of harmless instructions.
void FillWithStorm(Cpu& cpu, u64 page) {
  u8* const start = reinterpret_cast<u8*>(page);
  u8* at = Emit(start, 0xb9 | u64{Random(cpu) & 0xfff} << 8, 5);  // MOV ECX, imm32
  const u8* loop = at;
  const u32 size = 64 + Random(cpu) % 3000;
  while (at < start + size) {
    const u64 target =
        ((Random(cpu) & 1 ? page : page ^ kWindow ^ kAlias ^ 0x1000) + Random(cpu) % (size + 32)) &
        0xffffffff;
    switch (Random(cpu) % 8) {
      case 0:
        at = Emit(Emit(at, 0x2504c6 | target << 24, 7), Random(cpu), 1);
        break;  // MOV byte [target], imm8
      case 1:
        at = Emit(Emit(at, 0x2504c7 | target << 24, 7), Random(cpu), 4);
        break;
      case 2:
        at = Emit(at, 0x2504fff0 | target << 32, 8);
        break;  // LOCK INC dword
      case 3:
        at = Emit(Emit(at, 0x250480 | target << 24, 7), Random(cpu) & 3, 1);
        break;  // ADD byte
      case 4:
        at = Emit(Emit(at, 0x2504110f, 4), target, 4);
        break;  // MOVUPS [target], XMM0
      default:
        at = Emit(at, 0x05 | u64{Random(cpu)} << 8, 5);  // ADD EAX, imm32
    }
  }
  at = Emit(at, 0xc9ff, 2);  // DEC ECX
  at = Emit(Emit(at, 0x850f, 2), static_cast<u64>(loop - (at + 6)), 4);
  Emit(at, 0x0b0f, 2);
}

u64 GarbageEntry(Cpu& cpu) {
  static const u64 kTargets[] = {kRamBytes - 4096, kRamBytes,  kApic,        0xfec00000,
                                 0xa0000,          0xfffff000, u64{1} << 39, 0};
  const u64 flags = (Random(cpu) & 0x1ff) | (Random(cpu) & 3 ? kPresent | kUser : 0);
  switch (Random(cpu) % 8) {
    case 0:
      return Random64(cpu);
    case 1:
      return kTargets[Random(cpu) & 7] | flags;
    case 2:
      return reinterpret_cast<u64>(Random(cpu) & 1 ? window : directory) | flags;
    case 3:
      return ((u64{Random(cpu)} << 12) & 0xffffffffff) | flags;
    case 4:
      return u64{Random(cpu)} << 48 | (kWindowPhysical + (Random(cpu) & 0x1ff000)) | flags;
    default:
      return (kWindowPhysical + (Random(cpu) & 0x1ff000)) | flags;
  }
}

void GarblePages(Cpu& cpu) {
  cpu.pages_changed = true;
  u64* const tables[] = {window,
                         alias,
                         directory,
                         window,
                         alias,
                         Chance(cpu, 64) ? low : directory,
                         Chance(cpu, 64) ? root : alias,
                         window};
  for (u32 i = Random(cpu) & 63; i > 0; --i) {
    u64* table = tables[Random(cpu) & 7];
    const u32 first = table == low || table == root ? 4 : 0;
    table[first + Random(cpu) % (Chance(cpu, 4) ? 508 - first : 12)] = GarbageEntry(cpu);
    if (Chance(cpu, 4)) asm volatile("invlpg (%0)" ::"r"(Address(cpu)) : "memory");
  }
  if (Chance(cpu, 2)) asm volatile("mov %0, %%cr3" ::"r"(root) : "memory");
}

// Never comes back: what it starts ends in Recover.
[[noreturn]] void Round(Cpu& cpu) {
  if ((++cpu.rounds & 0xff) == 0) asm volatile("outb %b0, %w1" ::"a"('.'), "d"(0x3f8));
  if (Chance(cpu, 64)) cpu.random ^= __builtin_ia32_rdtsc(), cpu.random |= 1;
  const u32 kind = Random(cpu) & 7;
  const bool user = (Random(cpu) & 3) != 0;
  const u64 page = kWindow + (Random(cpu) & 7) * 4096;
  u64 entry = page;
  if (kind < 5) {
    u8* const from = reinterpret_cast<u8*>(page + (Random(cpu) & 0xfff));
    FillWithCode(cpu, from, from + 64 + Random(cpu) % 512);
    entry = reinterpret_cast<u64>(from) ^ (Chance(cpu, 4) ? kWindow ^ kAlias ^ 0x1000 : 0);
  } else if (kind < 7) {
    FillWithStorm(cpu, page);
  }
  if (kind == 7 || Chance(cpu, 6)) GarblePages(cpu);
  for (u64& value : cpu.gpr) value = Address(cpu);
  const bool compat = user && Chance(cpu, 6);
  cpu.frame[0] = entry;
  cpu.frame[1] = user ? (compat ? kUserCode32 : kUserCode) : kCode64;
  cpu.frame[2] = (Random(cpu) & 0x40cd5) | 0x202 | (Chance(cpu, 32) ? 0x100 : 0);
  cpu.frame[3] = Chance(cpu, 4) ? Address(cpu) : kWindow + 0x20000 + (Random(cpu) & 0xfff8);
  cpu.frame[4] = user ? kUserData : kData;
  asm volatile(
      "mov %0, %%ds; mov %0, %%es; mov %0, %%fs; mov %0, %%gs" ::"r"(user ? kUserData : kData));
  Enter(cpu.gpr, cpu.frame);
}

}  // namespace

extern "C" [[noreturn]] void Again(Cpu* cpu) {
  Restore(*cpu);
  Round(*cpu);
}

extern "C" [[noreturn]] void Main(u32 index) {
  Cpu& cpu = cpus[index];
  cpu.random = __builtin_ia32_rdtsc() * 2 + index * 0x9e3779b97f4a7c15 + 1;
  if (index == 0) {
    asm volatile("outb %b0, %w1" ::"a"('@'), "d"(0x3f8));
    cpu.pages_changed = true;
    Restore(cpu);
    asm volatile("xsetbv" ::"c"(0), "a"(7), "d"(0));
    for (u32 i = 0; i < static_cast<u32>(trampoline_end - trampoline); ++i)
      reinterpret_cast<volatile u8*>(0x8000)[i] = trampoline[i];
    Apic(0x300) = 0xc4500;  // INIT, then SIPI to page 8, to all others (SDM vol. 3, 8.4.4)
    Apic(0x300) = 0xc4608;
  } else {
    Restore(cpu);
    asm volatile("xsetbv" ::"c"(0), "a"(7), "d"(0));
  }
  Round(cpu);
}

asm(R"(
    .section .note.PVH, "a", @note
    .balign 4
    .long 4, 4, 18                  # sizes of name and description; XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start
    .section .text.start, "ax"
    .globl start, Recover, Enter, trampoline, trampoline_end
    .code32
start:
    cli
    xorl %ebx, %ebx                 # which processor
    movl $first_tables, %eax
    movl $first_tables + 4096 + 7, (%eax)
    movl $0, %ecx
1:  movl %ecx, %edx                 # 4 GiB in a table of large pages each
    shll $30, %edx
    movl %ecx, %esi
    shll $12, %esi
    leal first_tables + 8192(%esi), %edi
    leal 7(%edi), %ebp
    movl %ebp, first_tables + 4096(, %ecx, 8)
    movl $512, %ebp
2:  leal 0x83(%edx), %esi
    movl %esi, (%edi)
    addl $0x200000, %edx
    addl $8, %edi
    decl %ebp
    jnz 2b
    incl %ecx
    cmpl $4, %ecx
    jne 1b
to_long:
    movl $0x50620, %eax
    movl %eax, %cr4
    movl $first_tables, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    movl $0xd01, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80010033, %eax
    movl %eax, %cr0
    lgdt first_gdtr
    ljmp $8, $in_long
    .code64
in_long:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %ebx, %edi
    shll $16, %ebx
    leaq cpus + 32768(%rbx), %rsp
    call Main

# Every vector: on this processor's exception stack.
Recover:
    cld
    movl $0x10, %eax
    movl %eax, %ss
    movl %eax, %ds
    movl %eax, %es
    movq %rsp, %rdi
    andq $-65536, %rdi
    leaq 32768(%rdi), %rsp
    xorl %ebp, %ebp
    call Again

Enter:                              # rdi: sixteen registers, of which RSP comes from the frame at rsi
    movq %rsi, %rsp
    movq 0(%rdi), %rax
    movq 8(%rdi), %rcx
    movq 16(%rdi), %rdx
    movq 24(%rdi), %rbx
    movq 40(%rdi), %rbp
    movq 48(%rdi), %rsi
    movq 64(%rdi), %r8
    movq 72(%rdi), %r9
    movq 80(%rdi), %r10
    movq 88(%rdi), %r11
    movq 96(%rdi), %r12
    movq 104(%rdi), %r13
    movq 112(%rdi), %r14
    movq 120(%rdi), %r15
    movq 56(%rdi), %rdi
    iretq

    .code16                         # copied to 0x8000
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl 0x8000 + trampoline_gdtr - trampoline
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x18, $second
    .balign 8
trampoline_gdtr:
    .word 31
    .long first_gdt
trampoline_end:
    .code32
second:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $1, %ebx
    jmp to_long
    .code64
    .balign 8
first_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
first_gdtr:
    .word 31
    .quad first_gdt
    .section .bss
    .balign 4096
first_tables:
    .skip 6 * 4096
    .text
)");
