// Kernels that are started without firmware, and what they are told.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu/x86_state.h"
#include "machine/loader/boot_file.h"
#include "memory/guest_memory.h"

namespace kvartz::machine {

// A range of guest-physical addresses, as of the BIOS call E820. ACPI 6.4, 15.2.
struct E820Entry {
  enum Type : uint32_t { kRam = 1, kReserved = 2, kAcpi = 3, kNvs = 4 };
  uint64_t base = 0;
  uint64_t size = 0;
  Type type = kRam;
};

// Where a kernel goes and what it is told. Low memory from kLowBegin to kLowEnd is the loader's
// own.
struct BootSpace {
  static constexpr uint64_t kLowBegin = 0x1000, kLowEnd = 0x9fc00, kHigh = 0x100000;

  AddressSpace& memory;
  uint64_t ram_end = 0;  // RAM is contiguous in [kHigh, ram_end)
  std::vector<E820Entry> e820;
  uint64_t rsdp = 0;  // address of the ACPI RSDP; 0: there is none
  std::string cmdline;
};

// How the bootstrap processor begins.
struct CpuEntry {
  enum class Mode { kProtected32, kLong64 };
  Mode mode = Mode::kProtected32;
  uint64_t rip = 0;
  uint64_t rax = 0, rbx = 0, rsi = 0;
  uint64_t gdt = 0, page_tables = 0;  // addresses that PrepareEntry chose
};

// Hands out low memory for tables, and writes there. One load; one thread.
class LowArea {
 public:
  explicit LowArea(BootSpace& space) : memory_(space.memory) {}
  // Errors: it is full (the command line or the list of modules is too long).
  Result<uint64_t> Put(const void* data, uint64_t size, uint64_t align = 16);
  Result<uint64_t> PutString(const std::string& text) { return Put(text.c_str(), text.size() + 1); }

 private:
  GuestMemory memory_;
  uint64_t next_ = BootSpace::kLowBegin;
};

// Immutable once opened; Load may be called again after a reset.
class Kernel {
 public:
  virtual ~Kernel() = default;
  // Finds out the kind: Linux bzImage, ELF (PVH, or Linux's vmlinux), multiboot 1. Checks what can
  // be checked without the machine. Errors: missing, not a kernel, truncated, a kind that is not
  // supported.
  static Result<std::unique_ptr<Kernel>> Open(BootFile file);
  static Result<std::unique_ptr<Kernel>> OpenPath(const std::string& path) {
    return Open(TRY(BootFile::Open("kernel", path)));
  }

  virtual const char* kind() const = 0;
  // Opens the initrd or modules. Errors as of files; a kind that takes none. Once, before Load.
  virtual Result<> OpenInitrd(const std::string& initrd) = 0;
  // Places everything. Errors: too little memory (says how much is needed), the command line is too
  // long.
  virtual Result<CpuEntry> Load(BootSpace& space) = 0;
};

// Puts GDT (and page tables for long mode) into low memory.
Result<> PrepareEntry(LowArea& low, CpuEntry* entry);
// Registers of the bootstrap processor at its entry point.
void ApplyEntry(const CpuEntry& entry, cpu::X86State* state);

// [base, base + size) of guest RAM from a file, or zeroes. Errors: the range isn't RAM.
Result<> LoadRange(AddressSpace& memory, uint64_t base, const BootFile& file, uint64_t offset,
                   uint64_t size);
Result<> ZeroRange(AddressSpace& memory, uint64_t base, uint64_t size);
// "needs at least N MiB of memory, the machine has M MiB below 4 GiB; give it more with -m".
std::string NeedsMemory(uint64_t needed_end, uint64_t ram_end);

// Chooses the highest page-aligned place for `size` bytes in [lowest, limit). 0: it doesn't fit.
uint64_t PlaceHigh(uint64_t lowest, uint64_t limit, uint64_t size);

// By Kernel::Open, each for its kind.
Result<std::unique_ptr<Kernel>> OpenBzImage(BootFile file);
Result<std::unique_ptr<Kernel>> OpenElfKernel(BootFile file);
Result<std::unique_ptr<Kernel>> OpenMultiboot(BootFile file, uint32_t header_offset);

// Linux's boot parameters ("zero page"), shared by bzImage and vmlinux.
// Documentation/arch/x86/boot.rst, zero-page.rst.
struct LinuxParams {
  std::vector<uint8_t> setup_header;  // from offset 0x1f1; empty: a minimal one is made
  uint64_t initrd_base = 0, initrd_size = 0;
};
Result<uint64_t> PutLinuxParams(LowArea& low, const BootSpace& space, const LinuxParams& params);

}  // namespace kvartz::machine
