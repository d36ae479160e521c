// ELF executables, read as hostile input. System V ABI, "Object files"; AMD64 supplement.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "machine/loader/boot_file.h"
#include "memory/address_space.h"

namespace kvartz::machine {

struct ElfImage {
  struct Segment {
    uint64_t file_offset = 0, file_size = 0;
    uint64_t physical = 0, virtual_address = 0, memory_size = 0;
  };
  bool is_64bit = false;
  uint64_t entry = 0;
  std::vector<Segment> segments;      // PT_LOAD, non-empty, within the file, without wrap-around
  std::optional<uint32_t> pvh_entry;  // of the Xen note PHYS32_ENTRY

  // Errors: damaged or truncated, not for x86.
  static Result<ElfImage> Parse(const BootFile& file);
  // The end of the highest segment.
  uint64_t end() const;
  // The physical address of `address`, that is within a segment by its virtual or physical address;
  // else `address` itself.
  uint64_t ToPhysical(uint64_t address) const;
  // Errors: too little memory, overlap with low memory.
  Result<> Load(const BootFile& file, AddressSpace& memory, uint64_t ram_end) const;
};

}  // namespace kvartz::machine
