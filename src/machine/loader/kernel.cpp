#include "machine/loader/kernel.h"

#include <algorithm>
#include <cstring>

#include "base/endian.h"

namespace kvartz::machine {

namespace {
// Selectors of Linux's boot protocol (__BOOT_CS, __BOOT_DS), used for all protocols.
constexpr uint16_t kCode = 0x10, kData = 0x18, kTask = 0x20;
constexpr uint64_t kGdt32[] = {0, 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00008b0000000067};
constexpr uint64_t kGdt64[] = {0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00008b0000000067};
constexpr uint64_t kPage = 0x1000;

constexpr uint32_t kMultibootMagic = 0x1badb002;
constexpr uint64_t kMultibootSearch = 8192;

// Offset of a multiboot 1 header (multiboot 0.6.96, 3.1), or -1.
int64_t FindMultiboot(const std::vector<uint8_t>& head) {
  for (size_t i = 0; i + 12 <= head.size(); i += 4) {
    Le32 words[3];
    std::memcpy(words, &head[i], 12);
    if (words[0] == kMultibootMagic &&
        uint32_t(words[0]) + uint32_t(words[1]) + uint32_t(words[2]) == 0)
      return i;
  }
  return -1;
}
}  // namespace

Result<uint64_t> LowArea::Put(const void* data, uint64_t size, uint64_t align) {
  uint64_t base = (next_ + align - 1) & ~(align - 1);
  if (size > BootSpace::kLowEnd || base + size > BootSpace::kLowEnd ||
      !memory_.Write(Gpa(base), data, size)) {
    return Fail(
        ErrorCode::kNoSpace,
        "the command line and the tables of the kernel don't fit into low memory; shorten -append");
  }
  next_ = base + size;
  return base;
}

Result<std::unique_ptr<Kernel>> Kernel::Open(BootFile file) {
  std::vector<uint8_t> head = TRY(file.ReadSome(0, kMultibootSearch));
  auto at = [&](size_t offset, std::string_view text) {
    return head.size() >= offset + text.size() &&
           std::memcmp(&head[offset], text.data(), text.size()) == 0;
  };
  if (at(0x202, "HdrS")) return OpenBzImage(std::move(file));
  if (int64_t offset = FindMultiboot(head); offset >= 0)
    return OpenMultiboot(std::move(file), offset);
  if (at(0,
         "\x7f"
         "ELF"))
    return OpenElfKernel(std::move(file));
  if (at(0, "\x1f\x8b")) return file.Bad("is compressed with gzip; unpack it first");
  return file.Bad("is not a kernel (no bzImage, ELF or multiboot header)" +
                  std::string(file.size() < 0x210
                                  ? ", or truncated; copy or download it again"
                                  : "; give the kernel itself, not a disk or an archive"));
}

Result<> PrepareEntry(LowArea& low, CpuEntry* entry) {
  if (entry->mode == CpuEntry::Mode::kProtected32) {
    entry->gdt = TRY(low.Put(kGdt32, sizeof kGdt32));
    return {};
  }
  entry->gdt = TRY(low.Put(kGdt64, sizeof kGdt64));
  // The first 4 GiB, mapped one to one in pages of 2 MiB.
  std::vector<uint64_t> tables(512 * 4, 0);
  uint64_t directories[4];
  for (uint64_t gib = 0; gib < 4; gib++) {
    std::vector<uint64_t> directory(512);
    for (uint64_t i = 0; i < 512; i++) directory[i] = gib << 30 | i << 21 | 0x83;
    directories[gib] = TRY(low.Put(directory.data(), kPage, kPage));
  }
  std::vector<uint64_t> pointers(512), top(512);
  for (uint64_t gib = 0; gib < 4; gib++) pointers[gib] = directories[gib] | 3;
  top[0] = TRY(low.Put(pointers.data(), kPage, kPage)) | 3;
  entry->page_tables = TRY(low.Put(top.data(), kPage, kPage));
  return {};
}

void ApplyEntry(const CpuEntry& entry, cpu::X86State* state) {
  using cpu::Segment;
  bool long_mode = entry.mode == CpuEntry::Mode::kLong64;
  state->gpr = {};
  state->gpr[cpu::kRax] = entry.rax;
  state->gpr[cpu::kRbx] = entry.rbx;
  state->gpr[cpu::kRsi] = entry.rsi;
  state->rip = entry.rip;
  state->rflags = 2;
  Segment data;
  data.limit = 0xffffffff;
  data.selector = kData;
  data.attributes = 3 | Segment::kS | Segment::kP | Segment::kDb | Segment::kG;
  for (Segment& segment : state->seg) segment = data;
  Segment& code = state->seg[cpu::kCs];
  code.selector = kCode;
  code.attributes =
      0xb | Segment::kS | Segment::kP | Segment::kG | (long_mode ? Segment::kL : Segment::kDb);
  state->tr = {};
  state->tr.selector = kTask;
  state->tr.limit = 0x67;
  state->tr.attributes = 0xb | Segment::kP;
  state->ldtr = {};
  state->ldtr.attributes = 2 | Segment::kP | Segment::kUnusable;
  state->gdtr = {entry.gdt, sizeof kGdt64 - 1};
  state->idtr = {0, 0};
  state->cr0 = 0x11;  // PE, ET
  state->cr3 = state->cr4 = state->efer = 0;
  if (long_mode) {
    state->cr0 |= 1u << 31;
    state->cr3 = entry.page_tables;
    state->cr4 = 1 << 5;  // PAE
    state->efer = 0x500;  // LME, LMA
  }
}

Result<> LoadRange(AddressSpace& memory, uint64_t base, const BootFile& file, uint64_t offset,
                   uint64_t size) {
  if (size == 0) return {};
  GuestMemory guest(memory);
  uint8_t* host = guest.MapContiguous(Gpa(base), size, GuestMemory::Access::kWrite);
  if (!host)
    return file.Bad("wants to be loaded at an address where there is no RAM", ErrorCode::kNoSpace);
  TRY(file.Read(offset, host, size));
  guest.MarkDirty(Gpa(base), size);
  return {};
}

Result<> ZeroRange(AddressSpace& memory, uint64_t base, uint64_t size) {
  if (size == 0) return {};
  GuestMemory guest(memory);
  uint8_t* host = guest.MapContiguous(Gpa(base), size, GuestMemory::Access::kWrite);
  if (!host)
    return Fail(ErrorCode::kNoSpace, "kernel wants zeroes at an address where there is no RAM");
  std::memset(host, 0, size);
  guest.MarkDirty(Gpa(base), size);
  return {};
}

std::string NeedsMemory(uint64_t needed_end, uint64_t ram_end) {
  auto mib = [](uint64_t bytes) { return std::to_string((bytes + 0xfffff) >> 20) + " MiB"; };
  return "needs at least " + mib(needed_end) + " of memory, the machine has " + mib(ram_end) +
         (needed_end < 0xc0000000 ? "; give it more with -m" : " in one piece below 4 GiB");
}

uint64_t PlaceHigh(uint64_t lowest, uint64_t limit, uint64_t size) {
  if (size > limit) return 0;
  uint64_t base = (limit - size) & ~(kPage - 1);
  return base >= lowest ? base : 0;
}

}  // namespace kvartz::machine
