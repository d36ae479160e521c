// A bare-metal guest without manners: it gives every PCI function addresses, then reads and writes
// random values at random ports, device registers and configuration registers for ever. The VMM
// must survive all of it; what the guest does to its own machine (resets, power-off, DMA over
// itself) is its right. Entered through PVH: 32-bit, unpaged, interrupts off.
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

namespace {

// PCI Local Bus 3.0, 3.2.2.3.2 and 6.1.
constexpr u16 kConfigAddress = 0xcf8, kConfigData = 0xcfc;
constexpr u32 kConfigEnable = 0x80000000;
constexpr u32 kCommand = 0x04, kBar0 = 0x10;
constexpr u32 kBars = 6, kDevices = 32;
constexpr u32 kVirtioMmio = 0xfeb00000;  // where microvm has its transports, 0x200 bytes each
constexpr u32 kWindow = 0xc0000000, kWindowStride = 0x01000000;

u64 state;
u32 bars[kDevices * kBars];  // addresses, bit 0 set for ports
u32 bar_count;

void Out(u16 port, u32 value, u32 size) {
  if (size == 1) asm volatile("outb %b0, %1" ::"a"(value), "d"(port));
  if (size == 2) asm volatile("outw %w0, %1" ::"a"(value), "d"(port));
  if (size == 4) asm volatile("outl %0, %1" ::"a"(value), "d"(port));
}

u32 In(u16 port, u32 size) {
  u32 value = 0;
  if (size == 1) asm volatile("inb %1, %b0" : "+a"(value) : "d"(port));
  if (size == 2) asm volatile("inw %1, %w0" : "+a"(value) : "d"(port));
  if (size == 4) asm volatile("inl %1, %0" : "+a"(value) : "d"(port));
  return value;
}

template <typename T>
void Touch(u32 address, u32 value, bool write) {
  volatile T* at = reinterpret_cast<volatile T*>(address);
  if (write) {
    *at = static_cast<T>(value);
  } else {
    (void)*at;
  }
}

void TouchMemory(u32 address, u32 value, u32 size, bool write) {
  if (size == 1) Touch<u8>(address, value, write);
  if (size == 2) Touch<u16>(address, value, write);
  if (size == 4) Touch<u32>(address, value, write);
}

u32 Random() {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return static_cast<u32>((state * 0x2545f4914f6cdd1dull) >> 32);
}

u32 ReadConfig(u32 device, u32 offset) {
  Out(kConfigAddress, kConfigEnable | device << 11 | offset, 4);
  return In(kConfigData, 4);
}

void WriteConfig(u32 device, u32 offset, u32 value) {
  Out(kConfigAddress, kConfigEnable | device << 11 | offset, 4);
  Out(kConfigData, value, 4);
}

void AssignAddresses() {
  u32 memory = kWindow, port = 0x1000;
  for (u32 device = 0; device < kDevices; ++device) {
    if ((ReadConfig(device, 0) & 0xffff) == 0xffff) continue;
    for (u32 bar = 0; bar < kBars; ++bar) {
      WriteConfig(device, kBar0 + bar * 4, 0xffffffff);
      const u32 answer = ReadConfig(device, kBar0 + bar * 4);
      if (answer == 0) continue;
      const bool is_port = (answer & 1) != 0;
      WriteConfig(device, kBar0 + bar * 4, is_port ? port : memory);
      bars[bar_count++] = is_port ? port | 1 : memory;
      if (is_port) {
        port += 0x400;
      } else {
        memory += kWindowStride;
      }
      if (!is_port && (answer & 6) == 4) WriteConfig(device, kBar0 + ++bar * 4, 0);  // 64 bits wide
    }
    WriteConfig(device, kCommand, 7);
  }
}

// Small values and offsets reach more registers and states than evenly spread ones.
u32 RandomBits() { return Random() >> (Random() & 31); }

void Step() {
  const u32 choice = Random() & 15, size = 1u << (Random() % 3);
  const bool write = (Random() & 3) != 0;
  if (choice < 4) {
    const u16 port = static_cast<u16>(choice < 2 ? RandomBits() : Random());
    write ? Out(port, RandomBits(), size) : static_cast<void>(In(port, size));
  } else if (choice < 11 && bar_count != 0) {
    const u32 bar = bars[Random() % bar_count];
    if (bar & 1) {
      const u16 port = static_cast<u16>((bar & ~3u) + RandomBits() % 0x100);
      write ? Out(port, RandomBits(), size) : static_cast<void>(In(port, size));
    } else {
      TouchMemory(bar + RandomBits() % 0x8000, RandomBits(), size, write);
    }
  } else if (choice < 13) {
    TouchMemory(kVirtioMmio + (RandomBits() & 0x2fff), RandomBits(), size, write);
  } else if (choice == 13) {  // IOAPIC, HPET, local APIC, flash and what lies between
    TouchMemory(0xfec00000 + (Random() & 0x013fffff), RandomBits(), size, write);
  } else if (choice == 14) {
    TouchMemory(kWindow + (Random() & 0x3fffffff), RandomBits(), size, write);
  } else {
    const u32 device = Random() % kDevices, offset = Random() & 0xfc;
    write ? WriteConfig(device, offset, RandomBits())
          : static_cast<void>(ReadConfig(device, offset));
  }
}

}  // namespace

extern "C" [[noreturn]] void Main() {
  asm volatile("rdtsc" : "=A"(state));
  state |= 1;
  Out(0x3f8, '@', 1);
  AssignAddresses();
  for (;;) {
    for (u32 i = 0; i < 1000; ++i) Step();
    // Random writes may have taken the devices off the bus.
    for (u32 device = 0; device < kDevices; ++device) WriteConfig(device, kCommand, 7);
  }
}

asm(R"(
    .section .note.PVH, "a", @note
    .balign 4
    .long 4, 4, 18                  # sizes of name and description; XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start
    .section .text.start, "ax"
    .globl start
start:
    cli
    movl $0x200000, %esp
    call Main
)");
