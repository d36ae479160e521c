// Slow paths of memory accesses: segment checks, filling the TLB, devices, data breakpoints.
#include "cpu/x86/mmu.h"

#include <bit>

#include "cpu/x86/page_walk.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr uint64_t kPageMask = ~0xfffull;

[[noreturn]] void RaiseSegment(Cpu& cpu, SegReg seg) { Raise(cpu, seg == kSs ? kSS : kGP, 0); }

// One page's part of an access.
struct Piece {
  uint8_t* host = nullptr;  // null: goes to the bus
  uint64_t physical = 0;
  unsigned size = 0;
};

bool IsLocalApic(const Tlb& tlb, uint64_t physical) {
  return (physical & kPageMask) == tlb.local_apic_page;
}

bool HasDataBreakpoint(const Cpu& cpu, uint64_t page) {
  for (unsigned i = 0; i < 4; i++) {
    if (!(cpu.dr[7] >> (2 * i) & 3) || !(cpu.dr[7] >> (16 + 4 * i) & 1)) continue;
    if (((cpu.dr[i] & ~7ull) ^ page) >> 12 == 0) return true;
  }
  return false;
}

// Data breakpoints (SDM vol. 3 17.2.5) within [linear, linear + size): noted, the trap follows the
// instruction.
void CheckDataBreakpoints(Cpu& cpu, uint64_t linear, unsigned size, Access access) {
  static constexpr unsigned kLength[4] = {1, 2, 8, 4};
  for (unsigned i = 0; i < 4; i++) {
    unsigned type = cpu.dr[7] >> (16 + 4 * i) & 3;
    if (!(cpu.dr[7] >> (2 * i) & 3) || !(type & 1)) continue;
    if (type == 1 && access != Access::kWrite) continue;
    unsigned length = kLength[cpu.dr[7] >> (18 + 4 * i) & 3];
    uint64_t start = cpu.dr[i] & ~uint64_t{length - 1};
    if (linear < start + length && start < linear + size) {
      cpu.pending_dr6 |= static_cast<uint8_t>(1 << i);
      SetRequest(cpu, request::kDebugTrap);
    }
  }
}

uint64_t RamOffset(const FlatRange& range, uint64_t physical) {
  return range.region->ram_offset + range.region_offset + ((physical & kPageMask) - range.base);
}

bool IsWatched(const FlatRange& range, uint64_t physical) {
  const uint32_t* word = range.region->ram->dirty().Watch().word(RamOffset(range, physical));
  return (__atomic_load_n(word, __ATOMIC_SEQ_CST) & PageWatch::kWatched) != 0;
}

// Tells code watchers and dirty tracking of a write that is about to happen; true if further writes
// to the page need not come here (the TLB may hold them).
bool PrepareWrite(Cpu& cpu, const FlatRange& range, uint64_t physical) {
  DirtyBitmap& dirty = range.region->ram->dirty();
  uint64_t offset = RamOffset(range, physical);
  range.region->ram->ExpectWrites(offset);
  uint32_t* word = dirty.Watch().word(offset);
  uint32_t before = __atomic_load_n(word, __ATOMIC_SEQ_CST);
  bool keep = true;
  while (!(before & PageWatch::kWritable)) {
    keep = !(before & PageWatch::kTellMask);
    const uint32_t after = keep ? before | PageWatch::kWritable : before - PageWatch::kTell;
    if (__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_SEQ_CST,
                                    __ATOMIC_SEQ_CST))
      break;
  }
  if (before & PageWatch::kWatched) {
    dirty.Watch().Bump(word);
    SetRequest(cpu, request::kCodeWritten);
  }
  if (!dirty.enabled()) return keep;
  dirty.Mark(offset, kPageSize);
  return false;
}

bool WholePage(const FlatRange& range, uint64_t physical) {
  uint64_t page = physical & kPageMask;
  return range.base <= page && page + kPageSize <= range.end();
}

void Fill(Cpu& cpu, Tlb::Class cls, uint64_t linear, const Mapping& mapping, const FlatRange& range,
          Access access, bool write_ok) {
  Tlb& tlb = *cpu.tlb;
  uint64_t page = linear & kPageMask;
  TlbEntry& entry = tlb.entry(cls, linear);
  uintptr_t addend = reinterpret_cast<uintptr_t>(range.Host(mapping.physical & kPageMask)) - page;
  uint64_t tag = tlb.Tag(linear);
  uint64_t old = entry.read | entry.write | entry.execute;
  if (old != tag || entry.addend != addend) entry = {};
  entry.addend = addend;
  bool breakpoint = (cpu.dr[7] & 0xff) && HasDataBreakpoint(cpu, page);
  if (access == Access::kExecute) entry.execute = tag;
  if (access == Access::kRead && !breakpoint) entry.read = tag;
  if (access == Access::kWrite && write_ok && !breakpoint) {
    entry.read = entry.write = tag;
    tlb.NoteWritable(reinterpret_cast<const uint8_t*>(page + addend), linear);
  }
  if (linear >> 63 && !mapping.global) tlb.NoteUpperLocal(page);
  tlb.NoteLargePage(linear, mapping.page_shift);
}

// Translates the part of an access that lies in one page. Raises the page fault.
Piece Translate(Cpu& cpu, Tlb::Class cls, uint64_t linear, unsigned size, Access access) {
  Tlb& tlb = *cpu.tlb;
  tlb.View();  // a changed memory map empties the TLB before it is asked
  Piece piece{.size = size};
  if (cls != Tlb::kNever) {
    const TlbEntry& entry = tlb.entry(cls, linear);
    uint64_t tag = access == Access::kWrite  ? entry.write
                   : access == Access::kRead ? entry.read
                                             : entry.execute;
    if (tag == tlb.Tag(linear)) {
      piece.host = reinterpret_cast<uint8_t*>(linear + entry.addend);
      return piece;
    }
  }
  Mapping mapping;
  uint32_t error = 0;
  if (!Walk(cpu, cls == Tlb::kNever ? Tlb::kUser : cls, linear, access, kSetAccessed, &mapping,
            &error)) {
    RaisePageFault(cpu, linear, error);
  }
  piece.physical = mapping.physical;
  if (IsLocalApic(tlb, mapping.physical)) return piece;
  const FlatRange* range = tlb.Find(mapping.physical);
  if (!range || range->region->kind == RegionKind::kIo) return piece;
  if (access == Access::kWrite && range->region->kind != RegionKind::kRam) return piece;
  if (!WholePage(*range, mapping.physical)) return piece;
  bool write_ok = access == Access::kWrite && PrepareWrite(cpu, *range, mapping.physical);
  piece.host = range->Host(mapping.physical);
  if (cls != Tlb::kNever) Fill(cpu, cls, linear, mapping, *range, access, write_ok);
  return piece;
}

// Devices take 1, 2, 4 or 8 bytes.
template <typename Fn>
void InBusSizes(uint64_t physical, unsigned size, Fn fn) {
  for (unsigned done = 0; done < size;) {
    unsigned length = std::bit_floor(std::min(size - done, 8u));
    fn(physical + done, done, length);
    done += length;
  }
}

void ReadPiece(Cpu& cpu, const Piece& piece, void* data) {
  if (piece.host) {
    std::memcpy(data, piece.host, piece.size);
    return;
  }
  Tlb& tlb = *cpu.tlb;
  InBusSizes(piece.physical, piece.size, [&](uint64_t at, unsigned done, unsigned length) {
    uint64_t value = IsLocalApic(tlb, at) ? tlb.local_apic->IoRead(at & 0xfff, length)
                                          : BusRead(tlb.view_cache(), at, length);
    std::memcpy(static_cast<uint8_t*>(data) + done, &value, length);
  });
}

void WritePiece(Cpu& cpu, const Piece& piece, const void* data) {
  if (piece.host) {
    std::memcpy(piece.host, data, piece.size);
    return;
  }
  Tlb& tlb = *cpu.tlb;
  InBusSizes(piece.physical, piece.size, [&](uint64_t at, unsigned done, unsigned length) {
    uint64_t value = 0;
    std::memcpy(&value, static_cast<const uint8_t*>(data) + done, length);
    if (IsLocalApic(tlb, at)) {
      tlb.local_apic->IoWrite(at & 0xfff, length, value);
    } else {
      BusWrite(tlb.view_cache(), at, length, value);
    }
  });
}

struct Pieces {
  Piece piece[2];
  unsigned count = 0;
};

uint64_t Wrap(const Cpu& cpu, uint64_t linear) {
  return cpu.long_mode() ? linear : linear & 0xffffffff;
}

Pieces TranslateAll(Cpu& cpu, Tlb::Class cls, uint64_t linear, unsigned size, Access access) {
  Pieces pieces;
  linear = Wrap(cpu, linear);
  unsigned first = std::min<unsigned>(size, 4096 - (linear & 0xfff));
  pieces.piece[pieces.count++] = Translate(cpu, cls, linear, first, access);
  if (first < size) {
    pieces.piece[pieces.count++] =
        Translate(cpu, cls, Wrap(cpu, linear + first), size - first, access);
    // The second fill may have changed the memory map's or the first page's entry, never the first
    // piece's address.
  }
  return pieces;
}

// Canonical, alignment and translation, for an access by an instruction.
Pieces Prepare(Cpu& cpu, SegReg seg, uint64_t linear, unsigned size, Access access) {
  if (!mmu::Canonical(cpu, linear) || !mmu::Canonical(cpu, linear + size - 1))
    RaiseSegment(cpu, seg);
  Tlb::Class cls = cpu.tlb->data_class();
  // Wider than 8 bytes: SSE and AVX operands, whose own rules apply (#GP) or that are exempt.
  if (cls == Tlb::kNever && size <= 8 && std::has_single_bit(size) && (linear & (size - 1)))
    Raise(cpu, kAC, 0);
  return TranslateAll(cpu, cls, linear, size, access);
}

}  // namespace

namespace mmu {

bool TryMap(Cpu& cpu, uint64_t linear, Access access) {
  Tlb& tlb = *cpu.tlb;
  tlb.View();
  const Tlb::Class cls = tlb.data_class();
  if (cls == Tlb::kNever || !Canonical(cpu, linear)) return false;
  Mapping mapping;
  uint32_t error = 0;
  // The D bit is set by a write that happens, not by one that is looked ahead to.
  if (!Walk(cpu, cls, linear, access, kSetAccessedOnly, &mapping, &error)) return false;
  if (access == Access::kWrite && !mapping.dirty) return false;
  if (IsLocalApic(tlb, mapping.physical)) return false;
  const FlatRange* range = tlb.Find(mapping.physical);
  if (!range || range->region->kind == RegionKind::kIo) return false;
  bool write_ok = false;
  if (access == Access::kWrite) {
    if (range->region->kind != RegionKind::kRam || IsWatched(*range, mapping.physical))
      return false;
    write_ok = PrepareWrite(cpu, *range, mapping.physical);
  }
  if (!WholePage(*range, mapping.physical)) return false;
  Fill(cpu, cls, linear, mapping, *range, access, write_ok);
  return true;
}

bool Canonical(const Cpu& cpu, uint64_t linear) {
  if (!cpu.long_mode()) return true;
  unsigned unused = cpu.cr4 & cr4::kLa57 ? 7 : 16;
  return static_cast<uint64_t>(static_cast<int64_t>(linear << unused) >> unused) == linear;
}

uint64_t CheckSegment(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size, Access access) {
  const Segment& s = cpu.seg[seg];
  if (cpu.protected_mode() && !cpu.virtual_8086()) {
    if (s.attributes & Segment::kUnusable) RaiseSegment(cpu, seg);
    bool code = s.type() & 8;
    bool writable = !code && (s.type() & 2);
    bool readable = !code || (s.type() & 2);
    if (access == Access::kWrite ? !writable : !readable) RaiseSegment(cpu, seg);
  }
  uint64_t last = offset + size - 1;
  bool expand_down = (s.type() & 0xc) == 4;
  if (expand_down && (s.attributes & Segment::kS)) {
    uint64_t top = s.attributes & Segment::kDb ? 0xffffffff : 0xffff;
    if (offset <= s.limit || last > top) RaiseSegment(cpu, seg);
  } else if (last > s.limit) {
    RaiseSegment(cpu, seg);
  }
  return (s.base + offset) & 0xffffffff;
}

void ReadSlow(Cpu& cpu, SegReg seg, uint64_t linear, void* data, unsigned size) {
  Pieces pieces = Prepare(cpu, seg, linear, size, Access::kRead);
  if (cpu.dr[7] & 0xff) CheckDataBreakpoints(cpu, linear, size, Access::kRead);
  ReadPiece(cpu, pieces.piece[0], data);
  if (pieces.count == 2)
    ReadPiece(cpu, pieces.piece[1], static_cast<uint8_t*>(data) + pieces.piece[0].size);
}

void WriteSlow(Cpu& cpu, SegReg seg, uint64_t linear, const void* data, unsigned size) {
  Pieces pieces = Prepare(cpu, seg, linear, size, Access::kWrite);
  if (cpu.dr[7] & 0xff) CheckDataBreakpoints(cpu, linear, size, Access::kWrite);
  WritePiece(cpu, pieces.piece[0], data);
  if (pieces.count == 2)
    WritePiece(cpu, pieces.piece[1], static_cast<const uint8_t*>(data) + pieces.piece[0].size);
}

void* MapSlow(Cpu& cpu, SegReg seg, uint64_t linear, unsigned size, Access access) {
  Pieces pieces = Prepare(cpu, seg, linear, size, access);
  if (pieces.count == 2 || !pieces.piece[0].host) return nullptr;
  if (cpu.dr[7] & 0xff) CheckDataBreakpoints(cpu, linear, size, access);
  return pieces.piece[0].host;
}

void* MapMemSlow(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size, Access access) {
  const uint64_t linear = Linear(cpu, seg, offset, size, access);
  const TlbEntry& entry = cpu.tlb->data(linear);
  if ((access == Access::kWrite ? entry.write : entry.read) == cpu.tlb->Tag(linear + size - 1)) {
    return reinterpret_cast<void*>(linear + entry.addend);
  }
  return MapSlow(cpu, seg, linear, size, access);
}

namespace {

Tlb::Class ClassOf(const Cpu& cpu, unsigned cpl) {
  if (cpl == 3) return Tlb::kUser;
  return cpu.tlb->data_class() == Tlb::kNoSmap ? Tlb::kNoSmap : Tlb::kSupervisor;
}

void ReadClass(Cpu& cpu, Tlb::Class cls, uint64_t linear, void* data, unsigned size) {
  Pieces pieces = TranslateAll(cpu, cls, linear, size, Access::kRead);
  ReadPiece(cpu, pieces.piece[0], data);
  if (pieces.count == 2)
    ReadPiece(cpu, pieces.piece[1], static_cast<uint8_t*>(data) + pieces.piece[0].size);
}

void WriteClass(Cpu& cpu, Tlb::Class cls, uint64_t linear, const void* data, unsigned size) {
  Pieces pieces = TranslateAll(cpu, cls, linear, size, Access::kWrite);
  WritePiece(cpu, pieces.piece[0], data);
  if (pieces.count == 2)
    WritePiece(cpu, pieces.piece[1], static_cast<const uint8_t*>(data) + pieces.piece[0].size);
}

}  // namespace

void ReadAs(Cpu& cpu, unsigned cpl, uint64_t linear, void* data, unsigned size) {
  ReadClass(cpu, ClassOf(cpu, cpl), linear, data, size);
}

void WriteAs(Cpu& cpu, unsigned cpl, uint64_t linear, const void* data, unsigned size) {
  WriteClass(cpu, ClassOf(cpu, cpl), linear, data, size);
}

void ReadSystemBytes(Cpu& cpu, uint64_t linear, void* data, unsigned size) {
  if (!Canonical(cpu, linear)) Raise(cpu, kGP, 0);
  ReadClass(cpu, Tlb::kSupervisor, linear, data, size);
}

void WriteSystemBytes(Cpu& cpu, uint64_t linear, const void* data, unsigned size) {
  if (!Canonical(cpu, linear)) Raise(cpu, kGP, 0);
  WriteClass(cpu, Tlb::kSupervisor, linear, data, size);
}

void CheckSystemWrite(Cpu& cpu, uint64_t linear, unsigned size) {
  if (!Canonical(cpu, linear)) Raise(cpu, kGP, 0);
  TranslateAll(cpu, Tlb::kSupervisor, linear, size, Access::kWrite);
}

}  // namespace mmu

void CheckWrite(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size) {
  uint64_t linear = mmu::Linear(cpu, seg, offset, size, Access::kWrite);
  if (cpu.tlb->data(linear).write == cpu.tlb->Tag(linear + size - 1)) return;
  Prepare(cpu, seg, linear, size, Access::kWrite);
}

const uint8_t* FetchCode(Cpu& cpu, uint64_t linear) {
  const TlbEntry& entry = cpu.tlb->code(linear);
  if (entry.execute == cpu.tlb->Tag(linear)) [[likely]] {
    return reinterpret_cast<const uint8_t*>(linear + entry.addend);
  }
  if (!mmu::Canonical(cpu, linear)) Raise(cpu, kGP, 0);
  Tlb::Class cls = cpu.cpl == 3 ? Tlb::kUser : Tlb::kSupervisor;
  return Translate(cpu, cls, Wrap(cpu, linear), 1, Access::kExecute).host;
}

void FetchBytes(Cpu& cpu, uint64_t linear, uint8_t* data, unsigned size) {
  if (!mmu::Canonical(cpu, linear)) Raise(cpu, kGP, 0);
  Tlb::Class cls = cpu.cpl == 3 ? Tlb::kUser : Tlb::kSupervisor;
  Pieces pieces = TranslateAll(cpu, cls, linear, size, Access::kExecute);
  ReadPiece(cpu, pieces.piece[0], data);
  if (pieces.count == 2) ReadPiece(cpu, pieces.piece[1], data + pieces.piece[0].size);
}

CodeWatch WatchCode(Cpu& cpu, const uint8_t* host) {
  Tlb& tlb = *cpu.tlb;
  const auto* page =
      reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(host) & kPageMask);
  uint32_t* word = nullptr;
  for (const FlatRange& range : tlb.View().ranges()) {
    if (range.region->kind == RegionKind::kIo) continue;
    RamBlock& ram = *range.region->ram;
    if (page < ram.host() || page >= ram.host() + ram.size()) continue;
    ram.dirty().Watch().SetListener(tlb.code_listener);
    word = ram.dirty().Watch().word(static_cast<uint64_t>(page - ram.host()));
    break;
  }
  static const uint32_t kGone = 1;  // the map changed since FetchCode: never valid
  if (!word) return {&kGone, 0};
  for (;;) {
    constexpr uint32_t kBits = PageWatch::kWatched | PageWatch::kTellMask;
    uint32_t value = __atomic_fetch_or(word, kBits, __ATOMIC_SEQ_CST) | kBits;
    if (!(value & PageWatch::kWritable)) return {word, value};
    if (tlb.world) {
      tlb.world->Stop(cpu);
      for (Tlb* other : tlb.world->tlbs()) other->DropWritable(page);
      __atomic_fetch_and(word, ~PageWatch::kWritable, __ATOMIC_SEQ_CST);
      tlb.world->Resume(cpu);
    } else {
      tlb.DropWritable(page);
      __atomic_fetch_and(word, ~PageWatch::kWritable, __ATOMIC_SEQ_CST);
    }
  }
}

void BusLock(Cpu& cpu) {
  if (cpu.tlb->bus_locks++ == 0 && cpu.tlb->world) cpu.tlb->world->Stop(cpu);
}

void BusUnlock(Cpu& cpu) {
  if (--cpu.tlb->bus_locks == 0 && cpu.tlb->world) cpu.tlb->world->Resume(cpu);
}

}  // namespace kvartz::cpu::x86
