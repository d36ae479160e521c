#include "cpu/x86/page_walk.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr uint64_t kP = 1, kRw = 2, kUs = 4, kA = 0x20, kD = 0x40, kPs = 0x80, kG = 0x100,
                   kNx = 1ull << 63;

// A paging-structure entry: where it is, and what was read. `host` null: not in RAM.
template <typename T>
struct Entry {
  uint64_t address = 0;
  T* host = nullptr;
  const FlatRange* range = nullptr;
  T value = 0;
};

template <typename T>
Entry<T> Load(Tlb& tlb, uint64_t address) {
  Entry<T> entry{.address = address};
  const FlatRange* range = tlb.Find(address);
  if (range && range->region->kind != RegionKind::kIo && address + sizeof(T) <= range->end()) {
    auto* host = reinterpret_cast<T*>(range->Host(address));
    entry.value = __atomic_load_n(host, __ATOMIC_RELAXED);
    if (range->region->kind == RegionKind::kRam) {
      entry.host = host;
      entry.range = range;
    }
  } else {
    entry.value = static_cast<T>(BusRead(tlb.view_cache(), address, sizeof(T)));
  }
  return entry;
}

// False: the entry changed meanwhile; walk again.
template <typename T>
bool SetBits(const Entry<T>& entry, uint64_t bits) {
  if ((entry.value & bits) == bits || !entry.host) return true;
  T expected = entry.value;
  if (!__atomic_compare_exchange_n(entry.host, &expected, static_cast<T>(entry.value | bits), false,
                                   __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    return false;
  }
  const FlatRange& range = *entry.range;
  range.region->ram->dirty().Mark(
      range.region->ram_offset + range.region_offset + (entry.address - range.base), sizeof(T));
  return true;
}

struct Rights {
  bool user = true, write = true, no_execute = false;
};

// The access rights of SDM vol. 3 4.6.
bool Permitted(const Cpu& cpu, Tlb::Class cls, Access access, const Rights& rights) {
  bool user_mode = cls == Tlb::kUser;
  if (user_mode && !rights.user) return false;
  if (access == Access::kExecute) {
    return !rights.no_execute && !(!user_mode && rights.user && (cpu.cr4 & cr4::kSmep));
  }
  if (cls == Tlb::kSupervisor && rights.user && (cpu.cr4 & cr4::kSmap)) return false;
  if (access == Access::kWrite && !rights.write) return !user_mode && !(cpu.cr0 & cr0::kWp);
  return true;
}

uint32_t ErrorCode(const Cpu& cpu, Tlb::Class cls, Access access) {
  uint32_t error = 0;
  if (cls == Tlb::kUser) error |= pf::kUser;
  if (access == Access::kWrite) error |= pf::kWrite;
  bool nx = (cpu.efer & efer::kNxe) && (cpu.cr4 & cr4::kPae);
  if (access == Access::kExecute && (nx || (cpu.cr4 & cr4::kSmep))) error |= pf::kFetch;
  return error;
}

enum class Outcome { kDone, kFault, kAgain };

Outcome Walk32(Cpu& cpu, Tlb::Class cls, uint64_t linear, Access access, WalkEffect effect,
               Mapping* mapping, uint32_t* error) {
  Tlb& tlb = *cpu.tlb;
  auto pde = Load<uint32_t>(tlb, (cpu.cr3 & 0xfffff000) | (linear >> 22 & 0x3ff) << 2);
  if (!(pde.value & kP)) return Outcome::kFault;
  Rights rights{.user = (pde.value & kUs) != 0, .write = (pde.value & kRw) != 0};
  Entry<uint32_t> pte;
  bool large = (pde.value & kPs) && (cpu.cr4 & cr4::kPse);
  if (large) {
    // PSE-36: bits 20:13 are physical 39:32, as far as the CPU has them; bit 21 is reserved.
    uint64_t high = pde.value >> 13 & 0xff;
    if ((pde.value >> 21 & 1) || (tlb.physical_bits < 40 && high >> (tlb.physical_bits - 32))) {
      *error |= pf::kPresent | pf::kReserved;
      return Outcome::kFault;
    }
    mapping->physical = high << 32 | (pde.value & 0xffc00000) | (linear & 0x3fffff);
    mapping->page_shift = 22;
  } else {
    pte = Load<uint32_t>(tlb, (pde.value & 0xfffff000) | (linear >> 12 & 0x3ff) << 2);
    if (!(pte.value & kP)) return Outcome::kFault;
    rights.user &= (pte.value & kUs) != 0;
    rights.write &= (pte.value & kRw) != 0;
    mapping->physical = (pte.value & 0xfffff000) | (linear & 0xfff);
    mapping->page_shift = 12;
  }
  if (!Permitted(cpu, cls, access, rights)) {
    *error |= pf::kPresent;
    return Outcome::kFault;
  }
  if (effect == kNoEffect) return Outcome::kDone;
  mapping->dirty = ((large ? pde.value : pte.value) & kD) != 0;
  uint64_t leaf = kA | (access == Access::kWrite && effect == kSetAccessed ? kD : 0);
  if (!SetBits(pde, large ? leaf : kA)) return Outcome::kAgain;
  if (!large && !SetBits(pte, leaf)) return Outcome::kAgain;
  return Outcome::kDone;
}

// Bits that must be 0 in an 8-byte entry at `level` (1: PTE ... 5: PML5E).
uint64_t ReservedBits(const Cpu& cpu, unsigned level, bool leaf) {
  const Tlb& tlb = *cpu.tlb;
  uint64_t reserved = 0x000fffffffffffffull & ~((1ull << tlb.physical_bits) - 1);
  bool pae = !cpu.long_mode();
  if (pae) reserved |= 0x7ff0000000000000ull;
  if (!(cpu.efer & efer::kNxe)) reserved |= kNx;
  if (pae && level == 3) return reserved | kNx | 0x1e6;
  if (level >= 4 || (level == 3 && !tlb.gigabyte_pages)) reserved |= kPs;
  if (leaf && level == 2) reserved |= 0x1fe000;
  if (leaf && level == 3) reserved |= 0x3fffe000;
  return reserved;
}

Outcome Walk64(Cpu& cpu, Tlb::Class cls, uint64_t linear, Access access, WalkEffect effect,
               Mapping* mapping, uint32_t* error) {
  Tlb& tlb = *cpu.tlb;
  const uint64_t address_mask = ((1ull << tlb.physical_bits) - 1) & ~0xfffull;
  bool pae = !cpu.long_mode();
  unsigned top = pae ? 3 : cpu.cr4 & cr4::kLa57 ? 5 : 4;
  Entry<uint64_t> entries[6];
  Rights rights, above;  // above: without the last level's
  uint64_t table = pae ? cpu.cr3 & 0xffffffe0 : cpu.cr3 & address_mask;
  unsigned first = top;
  Tlb::TableEntry& known = tlb.TableOf(linear);
  const uint64_t tag = tlb.TableTag(linear);
  if (known.tag == tag && !pae) {
    first = 1;
    table = known.table;
    rights = {.user = known.user, .write = known.write, .no_execute = known.no_execute};
  }
  unsigned level = first;
  for (;; level--) {
    unsigned shift = 12 + 9 * (level - 1);
    auto& entry = entries[level] =
        Load<uint64_t>(tlb, table | (linear >> shift & (pae && level == 3 ? 3 : 511)) << 3);
    if (!(entry.value & kP)) return Outcome::kFault;
    bool leaf = level == 1 || ((entry.value & kPs) && (level == 2 || (level == 3 && !pae)));
    if (entry.value & ReservedBits(cpu, level, leaf)) {
      *error |= pf::kPresent | pf::kReserved;
      return Outcome::kFault;
    }
    if (!(pae && level == 3)) {
      rights.user &= (entry.value & kUs) != 0;
      rights.write &= (entry.value & kRw) != 0;
      rights.no_execute |= (entry.value & kNx) != 0;
    }
    if (leaf) {
      uint64_t offset_mask = (1ull << shift) - 1;
      mapping->physical = (entry.value & address_mask & ~offset_mask) | (linear & offset_mask);
      mapping->page_shift = shift;
      mapping->global = (entry.value & kG) && (cpu.cr4 & cr4::kPge);
      break;
    }
    table = entry.value & address_mask;
    above = rights;
  }
  if (!Permitted(cpu, cls, access, rights)) {
    *error |= pf::kPresent;
    return Outcome::kFault;
  }
  if (effect == kNoEffect) return Outcome::kDone;
  mapping->dirty = (entries[level].value & kD) != 0;
  for (unsigned i = pae ? 2 : first; i >= level; i--) {
    const bool dirties = i == level && access == Access::kWrite && effect == kSetAccessed;
    uint64_t bits = kA | (dirties ? kD : 0);
    if (!SetBits(entries[i], bits)) return Outcome::kAgain;
  }
  if (level == 1 && first != 1 && !pae) {
    known = {.tag = tag,
             .table = table,
             .user = above.user,
             .write = above.write,
             .no_execute = above.no_execute};
  }
  return Outcome::kDone;
}

}  // namespace

bool Walk(Cpu& cpu, Tlb::Class cls, uint64_t linear, Access access, WalkEffect effect,
          Mapping* mapping, uint32_t* error) {
  if (!(cpu.cr0 & cr0::kPg)) {
    *mapping = {.physical = linear & 0xffffffff};
    return true;
  }
  for (;;) {
    *error = ErrorCode(cpu, cls, access);
    Outcome outcome = cpu.cr4 & cr4::kPae
                          ? Walk64(cpu, cls, linear, access, effect, mapping, error)
                          : Walk32(cpu, cls, linear, access, effect, mapping, error);
    if (outcome != Outcome::kAgain) return outcome == Outcome::kDone;
  }
}

namespace mmu {

void LoadCr3(Cpu& cpu, uint64_t value) {
  bool pcide = cpu.cr4 & cr4::kPcide;
  bool keep = pcide && value >> 63;
  cpu.cr3 = value & ~(1ull << 63);
  cpu.tlb->SwitchTo(pcide ? value & 0xfff : 0, keep);
}

bool PdptesValid(Cpu& cpu, uint64_t cr3) {
  for (unsigned i = 0; i < 4; i++) {
    uint64_t entry = Load<uint64_t>(*cpu.tlb, (cr3 & 0xffffffe0) | i << 3).value;
    if ((entry & kP) && (entry & (ReservedBits(cpu, 3, false) | kNx))) return false;
  }
  return true;
}

bool Probe(Cpu& cpu, uint64_t linear, uint64_t* physical) {
  Mapping mapping;
  uint32_t error = 0;
  if (!Walk(cpu, Tlb::kNoSmap, linear, Access::kRead, kNoEffect, &mapping, &error)) return false;
  *physical = mapping.physical;
  return true;
}

}  // namespace mmu
}  // namespace kvartz::cpu::x86
