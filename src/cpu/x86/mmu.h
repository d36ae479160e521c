// Memory as the guest's instructions see it: the software TLB, with the hit paths inline.
#pragma once

#include <cstddef>
#include <iterator>
#include <memory>
#include <span>
#include <vector>

#include "cpu/x86/cpu.h"
#include "memory/address_space.h"

namespace kvartz::cpu::x86 {

// What the MMU asks of the engine when several CPUs run. Null in a Tlb: this CPU is alone.
class World {
 public:
  virtual ~World() = default;
  // Returns when every other CPU is between two instructions, and keeps them there until Resume.
  // Nests.
  virtual void Stop(Cpu& self) = 0;
  virtual void Resume(Cpu& self) = 0;
  // All CPUs' TLBs; only to be touched while the world is stopped.
  virtual const std::vector<class Tlb*>& tlbs() const = 0;
};

enum class Access : uint8_t { kRead, kWrite, kExecute };

// One translation. Tags are the linear page | address space id (1..4095); 0 never matches. A tag is
// only there if the access needs no further look: permitted, A (and for writes D) set, RAM, no
// watched code, no breakpoint, no dirty tracking.
struct TlbEntry {
  uint64_t read = 0, write = 0, execute = 0;
  uintptr_t addend = 0;  // host address - linear address
};

// One CPU's software TLB. Owned by its vCPU thread; others may touch it while the world is stopped.
//
// Three classes of mode have tables of their own, so that CPL and AC changes flush nothing. Address
// spaces (PCIDs) share the tables and are told apart by the id in the tags: a CR3 load is a new id,
// not a flush. The upper half of the address space has an id of its own, which a CR3 load leaves
// alone: most of what a kernel has there is global, and the few pages that aren't are dropped one
// by one. Large pages fill 4 KiB entries.
class Tlb {
  // The tables of the present mode, and the id in their tags. Comes first: translated code reads
  // it.
  struct Present {
    TlbEntry* data = nullptr;
    TlbEntry* code = nullptr;
    uint64_t asid[2] = {1, 1};  // of the lower and the upper half of the address space
  } now_;

 public:
  static constexpr int kDataOffset = offsetof(Present, data), kAsidOffset = offsetof(Present, asid);
  static constexpr unsigned kIndexBits = 13, kEntries = 1 << kIndexBits;
  // kNoSmap: supervisor with AC set. kNever stays empty: every access takes the slow path
  // (alignment checks).
  enum Class : uint8_t { kUser, kSupervisor, kNoSmap, kNever, kClassCount };

  // `tables`: kClassCount tables of kEntries, cleared, of who outlives this.
  Tlb(const AddressSpace& memory, TlbEntry* tables);

  TlbEntry& data(uint64_t linear) const { return now_.data[(linear >> 12) % kEntries]; }
  TlbEntry& code(uint64_t linear) const { return now_.code[(linear >> 12) % kEntries]; }
  TlbEntry& entry(Class cls, uint64_t linear) {
    return tables_[cls * kEntries + (linear >> 12) % kEntries];
  }
  uint64_t Tag(uint64_t linear) const { return (linear & ~0xfffull) | now_.asid[linear >> 63]; }

  // The classes of data accesses and of instruction fetches in the present mode.
  void SetClasses(Class data_class, Class code_class) {
    data_class_ = data_class;
    now_.data = &tables_[data_class * kEntries];
    now_.code = &tables_[code_class * kEntries];
  }
  Class data_class() const { return data_class_; }

  // Who keeps translations of his own, taken from here. Told when they may not be used any more, by
  // the CPU's thread or while the world is stopped.
  class Follower {
   public:
    virtual ~Follower() = default;
    virtual void DropAll() = 0;
    virtual void DropLowerHalf() = 0;
    virtual void DropPage(uint64_t linear) = 0;  // of 4 KiB
    // The lower half, and these pages of the upper one.
    virtual void DropLowerHalfAnd(std::span<const uint64_t> pages) = 0;
    virtual void DropWrites(const uint8_t* host_page) = 0;
    virtual void DropAllWrites() = 0;
  };
  Follower* follower = nullptr;
  // Of the lower and the upper half of the address space.
  uint64_t asid(unsigned half) const { return now_.asid[half]; }
  // Grows with each of these.
  uint64_t changes() const { return changes_; }

  // CR3 was loaded. `keep`: entries of that PCID stay (bit 63 of the source).
  void SwitchTo(unsigned pcid, bool keep);
  void FlushAll();
  void FlushPcid(unsigned pcid);
  void FlushPage(uint64_t linear);  // in every address space, large pages as a whole
  void DropWritable(const uint8_t* host_page);
  // There is an entry by which it may be written.
  void NoteWritable(const uint8_t* host_page, uint64_t linear) {
    WritableGroups(host_page) |= uint64_t{1} << (linear >> 12) % kEntries / kGroup;
  }
  void DropAllWritable();

  // The newest view. If it changed, everything is flushed.
  const FlatView& View();
  ViewCache& view_cache() { return view_; }
  // Lets go of views that decoded code may still refer to: the block cache is empty.
  void DropRetiredViews() { retired_.clear(); }
  const FlatRange* Find(uint64_t physical);
  void NoteLargePage(uint64_t linear, unsigned shift);
  // The last-level table of a 2 MiB region of long mode, found by a walk whose upper entries have A
  // set: a paging-structure cache (SDM vol. 3 4.10.3).
  struct TableEntry {
    uint64_t tag = 0;
    uint64_t table = 0;  // physical
    bool user = false, write = false, no_execute = false;
  };
  TableEntry& TableOf(uint64_t linear) { return walked_[(linear >> 21) % std::size(walked_)]; }
  uint64_t TableTag(uint64_t linear) const {
    return (linear & ~0x1fffffull) | uint64_t{walk_epoch_} << 12 | now_.asid[0];
  }
  // There is an entry of the upper half that isn't global.
  void NoteUpperLocal(uint64_t linear);

  // Set by the engine.
  World* world = nullptr;
  PageWatch::Listener* code_listener = nullptr;  // of the RAM whose code is watched
  IoHandler* local_apic = nullptr;
  uint64_t local_apic_page = ~0ull;  // physical; ~0: not memory-mapped now
  unsigned physical_bits = 40;
  bool gigabyte_pages = true;
  unsigned bus_locks = 0;  // depth of BusLock

 private:
  static constexpr unsigned kGroup = kEntries / 64;
  uint64_t& WritableGroups(const uint8_t* host_page) {
    return writable_[reinterpret_cast<uintptr_t>(host_page) / 4096 % std::size(writable_)];
  }
  uint16_t NewAsid();
  void ForgetTables();
  struct Pcid {
    uint32_t epoch = 0;
    uint16_t asid = 0;
  };
  void Tell(void (Follower::*what)()) {
    changes_++;
    if (follower) (follower->*what)();
  }

  uint64_t changes_ = 0;
  // Pages of the upper half that aren't global; more: it is dropped as a whole.
  uint64_t upper_local_[32];
  unsigned upper_local_count_ = 0;
  TableEntry walked_[128];
  unsigned walk_epoch_ = 1;  // 9 bits
  Class data_class_ = kSupervisor;
  TlbEntry* const tables_;
  ViewCache view_;
  std::shared_ptr<const FlatView>
      held_;  // keeps alive what the entries point to, until they are flushed
  std::vector<std::shared_ptr<const FlatView>> retired_;
  uint64_t generation_ = ~0ull;
  const FlatRange* last_range_ = nullptr;
  uint32_t epoch_ = 1;
  uint16_t next_asid_ = 1;
  unsigned pcid_ = 0;
  std::unique_ptr<Pcid[]> pcids_;
  // Which 2 MiB and 1 GiB regions may have entries that belong to a large page (hashed, may err on
  // the safe side).
  uint64_t large_2m_[64] = {}, large_1g_[16] = {};
  // By which of 64 groups of entries a page may be written (by its host address, hashed; may err on
  // the safe side).
  uint64_t writable_[4096] = {};
};

namespace mmu {
// Everything behind the inline paths. `seg` decides between #GP and #SS.
uint64_t CheckSegment(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size, Access access);
void ReadSlow(Cpu& cpu, SegReg seg, uint64_t linear, void* data, unsigned size);
void WriteSlow(Cpu& cpu, SegReg seg, uint64_t linear, const void* data, unsigned size);
void* MapSlow(Cpu& cpu, SegReg seg, uint64_t linear, unsigned size, Access access);
void ReadSystemBytes(Cpu& cpu, uint64_t linear, void* data, unsigned size);
void WriteSystemBytes(Cpu& cpu, uint64_t linear, const void* data, unsigned size);
// At the privilege of `cpl`, linear, for stacks of far transfers.
void ReadAs(Cpu& cpu, unsigned cpl, uint64_t linear, void* data, unsigned size);
void WriteAs(Cpu& cpu, unsigned cpl, uint64_t linear, const void* data, unsigned size);
void CheckSystemWrite(Cpu& cpu, uint64_t linear, unsigned size);
// Sets and clears what derives from CR0, CR3, CR4, EFER (SDM vol. 3 4.10.4: what these flush).
void LoadCr3(Cpu& cpu, uint64_t value);
// PAE: the four PDPTEs at `cr3` have no reserved bit set.
bool PdptesValid(Cpu& cpu, uint64_t cr3);
bool Canonical(const Cpu& cpu, uint64_t linear);
// Brings the translation of the byte at `linear` into the TLB, if an access of the present mode may
// go straight to memory there. Raises nothing; false: let the access itself show. Writes to watched
// code are left to the access, too.
bool TryMap(Cpu& cpu, uint64_t linear, Access access);
// The physical address behind `linear` for debuggers; no side effects. False if unmapped.
bool Probe(Cpu& cpu, uint64_t linear, uint64_t* physical);

// Segment checks; the linear address. Canonical checks are the slow path's: the TLB holds only
// canonical pages.
inline uint64_t Linear(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size, Access access) {
  if ((access == Access::kWrite ? cpu.flat_write : cpu.flat_read) >> seg & 1) [[likely]]
    return offset;
  if (cpu.code_mode == CodeMode::k64) return offset + cpu.seg[seg].base;
  return CheckSegment(cpu, seg, offset, size, access);
}
}  // namespace mmu

// The inline paths below need no stack frame: what may take longer is out of line, and starts over.
namespace mmu {
// False: the segment must be checked (CheckSegment).
inline bool FlatLinear(const Cpu& cpu, uint8_t flat, SegReg seg, uint64_t* linear) {
  if (flat >> seg & 1) [[likely]]
    return true;
  *linear += cpu.seg[seg].base;
  return cpu.code_mode == CodeMode::k64;
}

template <typename T>
[[gnu::noinline]] T ReadMemSlow(Cpu& cpu, SegReg seg, uint64_t offset) {
  uint64_t linear = Linear(cpu, seg, offset, sizeof(T), Access::kRead);
  const TlbEntry& entry = cpu.tlb->data(linear);
  T value;
  if (entry.read == cpu.tlb->Tag(linear + sizeof(T) - 1)) {
    std::memcpy(&value, reinterpret_cast<const void*>(linear + entry.addend), sizeof(T));
  } else {
    ReadSlow(cpu, seg, linear, &value, sizeof(T));
  }
  return value;
}
template <typename T>
[[gnu::noinline]] void WriteMemSlow(Cpu& cpu, SegReg seg, uint64_t offset, T value) {
  uint64_t linear = Linear(cpu, seg, offset, sizeof(T), Access::kWrite);
  const TlbEntry& entry = cpu.tlb->data(linear);
  if (entry.write == cpu.tlb->Tag(linear + sizeof(T) - 1)) {
    std::memcpy(reinterpret_cast<void*>(linear + entry.addend), &value, sizeof(T));
  } else {
    WriteSlow(cpu, seg, linear, &value, sizeof(T));
  }
}
void* MapMemSlow(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size, Access access);
}  // namespace mmu

template <typename T>
inline T ReadMem(Cpu& cpu, SegReg seg, uint64_t offset) {
  uint64_t linear = offset;
  if (mmu::FlatLinear(cpu, cpu.flat_read, seg, &linear)) [[likely]] {
    const TlbEntry& entry = cpu.tlb->data(linear);
    if (entry.read == cpu.tlb->Tag(linear + sizeof(T) - 1)) [[likely]] {
      T value;
      std::memcpy(&value, reinterpret_cast<const void*>(linear + entry.addend), sizeof(T));
      return value;
    }
  }
  return mmu::ReadMemSlow<T>(cpu, seg, offset);
}

template <typename T>
inline void WriteMem(Cpu& cpu, SegReg seg, uint64_t offset, T value) {
  uint64_t linear = offset;
  if (mmu::FlatLinear(cpu, cpu.flat_write, seg, &linear)) [[likely]] {
    const TlbEntry& entry = cpu.tlb->data(linear);
    if (entry.write == cpu.tlb->Tag(linear + sizeof(T) - 1)) [[likely]] {
      std::memcpy(reinterpret_cast<void*>(linear + entry.addend), &value, sizeof(T));
      return;
    }
  }
  mmu::WriteMemSlow<T>(cpu, seg, offset, value);
}

inline void ReadMemBytes(Cpu& cpu, SegReg seg, uint64_t offset, void* data, unsigned size) {
  uint64_t linear = mmu::Linear(cpu, seg, offset, size, Access::kRead);
  const TlbEntry& entry = cpu.tlb->data(linear);
  if (entry.read == cpu.tlb->Tag(linear + size - 1)) [[likely]] {
    std::memcpy(data, reinterpret_cast<const void*>(linear + entry.addend), size);
  } else {
    mmu::ReadSlow(cpu, seg, linear, data, size);
  }
}

inline void WriteMemBytes(Cpu& cpu, SegReg seg, uint64_t offset, const void* data, unsigned size) {
  uint64_t linear = mmu::Linear(cpu, seg, offset, size, Access::kWrite);
  const TlbEntry& entry = cpu.tlb->data(linear);
  if (entry.write == cpu.tlb->Tag(linear + size - 1)) [[likely]] {
    std::memcpy(reinterpret_cast<void*>(linear + entry.addend), data, size);
  } else {
    mmu::WriteSlow(cpu, seg, linear, data, size);
  }
}

inline void* MapForWrite(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size) {
  uint64_t linear = offset;
  if (mmu::FlatLinear(cpu, cpu.flat_write, seg, &linear)) [[likely]] {
    const TlbEntry& entry = cpu.tlb->data(linear);
    if (entry.write == cpu.tlb->Tag(linear + size - 1)) [[likely]]
      return reinterpret_cast<void*>(linear + entry.addend);
  }
  return mmu::MapMemSlow(cpu, seg, offset, size, Access::kWrite);
}

inline const void* MapForRead(Cpu& cpu, SegReg seg, uint64_t offset, unsigned size) {
  uint64_t linear = offset;
  if (mmu::FlatLinear(cpu, cpu.flat_read, seg, &linear)) [[likely]] {
    const TlbEntry& entry = cpu.tlb->data(linear);
    if (entry.read == cpu.tlb->Tag(linear + size - 1)) [[likely]]
      return reinterpret_cast<void*>(linear + entry.addend);
  }
  return mmu::MapMemSlow(cpu, seg, offset, size, Access::kRead);
}

template <typename T>
inline T ReadSystem(Cpu& cpu, uint64_t linear) {
  T value;
  mmu::ReadSystemBytes(cpu, linear, &value, sizeof(T));
  return value;
}

template <typename T>
inline void WriteSystem(Cpu& cpu, uint64_t linear, T value) {
  mmu::WriteSystemBytes(cpu, linear, &value, sizeof(T));
}

}  // namespace kvartz::cpu::x86
