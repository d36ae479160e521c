#include "machine/loader/elf.h"

#include <elf.h>

#include <algorithm>
#include <cstring>

#include "machine/loader/kernel.h"

namespace kvartz::machine {

namespace {
constexpr uint64_t kMaxHeaders = 256, kMaxNotes = 1 << 20;
constexpr uint32_t kXenPhys32Entry = 18;  // XEN_ELFNOTE_PHYS32_ENTRY

// Program headers of both classes in one shape.
struct Header {
  uint32_t type;
  uint64_t offset, vaddr, paddr, filesz, memsz, align;
};
template <typename Phdr>
Header Widen(const Phdr& p) {
  return {p.p_type, p.p_offset, p.p_vaddr, p.p_paddr, p.p_filesz, p.p_memsz, p.p_align};
}

// The notes of one segment.
void FindPvhNote(const std::vector<uint8_t>& notes, uint64_t align,
                 std::optional<uint32_t>* entry) {
  if (align != 8) align = 4;
  uint64_t at = 0;
  while (at + 12 <= notes.size()) {
    uint32_t words[3];  // name size, descriptor size, type
    std::memcpy(words, &notes[at], 12);
    uint64_t name = at + 12;
    uint64_t descriptor = (name + words[0] + align - 1) / align * align;
    uint64_t next = (descriptor + words[1] + align - 1) / align * align;
    if (descriptor + words[1] > notes.size()) return;
    bool xen = words[0] == 4 && std::memcmp(&notes[name], "Xen", 4) == 0;
    if (xen && words[2] == kXenPhys32Entry && words[1] >= 4) {
      uint32_t value;
      std::memcpy(&value, &notes[descriptor], 4);
      *entry = value;
      return;
    }
    at = next;
  }
}

template <typename Ehdr, typename Phdr>
Result<ElfImage> ParseClass(const BootFile& file) {
  Ehdr header;
  TRY(file.Read(0, &header, sizeof header));
  if (header.e_phentsize != sizeof(Phdr) || header.e_phnum == 0 || header.e_phnum > kMaxHeaders) {
    return file.Bad("has no usable program headers; give a linked executable");
  }
  ElfImage image;
  image.is_64bit = sizeof(Ehdr) == sizeof(Elf64_Ehdr);
  image.entry = header.e_entry;
  std::vector<Phdr> table(header.e_phnum);
  if (header.e_phoff > file.size())
    return file.Bad("is truncated before its program headers; copy or download it again");
  TRY(file.Read(header.e_phoff, table.data(), table.size() * sizeof(Phdr)));
  for (const Phdr& entry : table) {
    Header p = Widen(entry);
    if (p.type != PT_LOAD && p.type != PT_NOTE) continue;
    if (p.filesz > file.size() || p.offset > file.size() - p.filesz) {
      return file.Bad("is truncated: a segment ends beyond the " + std::to_string(file.size()) +
                      " bytes of the file; copy or download it again");
    }
    if (p.type == PT_NOTE) {
      if (!image.pvh_entry)
        FindPvhNote(TRY(file.ReadSome(p.offset, std::min(p.filesz, kMaxNotes))), p.align,
                    &image.pvh_entry);
      continue;
    }
    if (p.memsz == 0) continue;
    if (p.memsz < p.filesz || p.paddr + p.memsz < p.paddr)
      return file.Bad("has a damaged program header; copy or download it again");
    image.segments.push_back({p.offset, p.filesz, p.paddr, p.vaddr, p.memsz});
  }
  if (image.segments.empty()) return file.Bad("has nothing to load; give a linked executable");
  return image;
}
}  // namespace

Result<ElfImage> ElfImage::Parse(const BootFile& file) {
  uint8_t ident[20];
  TRY(file.Read(0, ident, sizeof ident));
  uint16_t machine = ident[18] | ident[19] << 8;
  if (ident[EI_DATA] != ELFDATA2LSB || (machine != EM_386 && machine != EM_X86_64)) {
    return file.Bad("is an ELF file for another processor; give a kernel for x86");
  }
  if (ident[EI_CLASS] == ELFCLASS64) return ParseClass<Elf64_Ehdr, Elf64_Phdr>(file);
  if (ident[EI_CLASS] == ELFCLASS32) return ParseClass<Elf32_Ehdr, Elf32_Phdr>(file);
  return file.Bad("has a damaged ELF header; copy or download it again");
}

uint64_t ElfImage::end() const {
  uint64_t end = 0;
  for (const Segment& segment : segments)
    end = std::max(end, segment.physical + segment.memory_size);
  return end;
}

uint64_t ElfImage::ToPhysical(uint64_t address) const {
  for (const Segment& s : segments) {
    if (address - s.physical < s.memory_size) return address;
  }
  for (const Segment& s : segments) {
    if (address - s.virtual_address < s.memory_size)
      return address - s.virtual_address + s.physical;
  }
  return address;
}

Result<> ElfImage::Load(const BootFile& file, AddressSpace& memory, uint64_t ram_end) const {
  for (const Segment& s : segments) {
    if (s.physical < BootSpace::kHigh) {
      return file.Bad("has a segment below 1 MiB, where tables for the kernel are; link it higher");
    }
    if (s.physical + s.memory_size > ram_end) {
      return file.Bad(NeedsMemory(end(), ram_end), ErrorCode::kNoSpace);
    }
  }
  for (const Segment& s : segments) {
    TRY(LoadRange(memory, s.physical, file, s.file_offset, s.file_size));
    TRY(ZeroRange(memory, s.physical + s.file_size, s.memory_size - s.file_size));
  }
  return {};
}

}  // namespace kvartz::machine
