// A unit becomes host code.
#pragma once

#include <bitset>
#include <cstdint>
#include <vector>

#include "cpu/x86/jit/assembler.h"
#include "cpu/x86/jit/state.h"
#include "cpu/x86/jit/stubs.h"
#include "cpu/x86/jit/unit.h"

namespace kvartz::cpu::x86::jit {

inline HostMem GprAt(unsigned guest) {
  return HostMem::Gs(offsetof(State, cpu) + offsetof(Cpu, gpr) + guest * 8);
}

// What a slow path is told of its site: lies behind the call, and the jump back, at any address.
struct [[gnu::packed]] Site {
  enum Flags : uint8_t {
    kVectors = 1,  // vector registers are in use
    kX87 = 2,      // x87 and MMX registers are
    kWrite = 4,
    kShared = 8,  // a check for more than one access, or made before its time
  };
  uint8_t flags = 0;
  uint8_t count = 0;    // instructions to interpret if the access can't be mapped
  uint8_t group = 0;    // its number in the unit
  uint16_t offset = 0;  // of the instruction to begin with, in its page
  uint16_t unit = 0;    // offset of the unit's first instruction
  uint16_t span = 0;
  uint16_t slot = 0;                   // index in State::slots, all classes
  static constexpr int kDistance = 5;  // from the call's return address

  bool write() const { return (flags & kWrite) != 0; }
  bool shared() const { return (flags & kShared) != 0; }
};
static_assert(kClassCount * kSlots <= UINT16_MAX);

// The same of an instruction that the interpreter carries out.
struct ExecuteSite {
  uint8_t flags = 0;  // Site's
  uint16_t offset = 0;
  const uint8_t* next = nullptr;  // where the host has the next instruction
  Insn insn;
};
static_assert(offsetof(Site, flags) == offsetof(ExecuteSite, flags));

// An indirect branch whose target turns out to be none: it is undone and interpreted.
struct Branch {
  uint16_t offset = 0;  // in its page
  uint32_t popped = 0;  // bytes
  uint64_t Pack() const { return offset | uint64_t{popped} << 12; }
  static Branch Unpack(uint64_t bits) {
    return {.offset = static_cast<uint16_t>(bits & 0xfff),
            .popped = static_cast<uint32_t>(bits >> 12)};
  }
};

// Where an instruction's code begins: for host exceptions, which are the guest's.
struct InsnMark {
  uint16_t begin;  // from the unit's first byte of code
  uint16_t offset : 12;
  uint16_t flags_in_host : 1;
};

// A direct branch out of a unit. Until it is linked it goes to its thunk.
struct ExitSite {
  uint8_t* distance;  // where the branch's distance is written
  uint8_t* thunk;     // as it runs
  bool same_page;     // goes to a body; else to a checked entry, with the target in S0
  uint16_t offset;    // same page: the target's
};

struct EntryPoints {
  uint8_t* checked = nullptr;  // S0: the target; compares it with the page that was entered last
  uint8_t* polled = nullptr;   // asks for requests; same page
  uint8_t* body = nullptr;     // same page, host flags valid if live
  uint8_t* body_write = nullptr;
};

struct TranslationContext {
  const Stubs* stubs = nullptr;
  unsigned data_class = 0;  // Tlb::Class
  // Where the class has slots for reads and for writes; both wrap.
  unsigned first_read_slot = 0, first_write_slot = 0;
  unsigned code_slot = 0;                  // of State::code_pages
  unsigned next_code_slot = 0;             // ... of the next page, if the unit crosses into it
  unsigned mode = 0;                       // the unit's; 0: its pages are entered by the dispatcher
  uint32_t first_exit = 0, exit_step = 1;  // numbers of the unit's exits
  bool counts_checks = false;              // State::checks
  // Groups whose page changes all the time; of these, the ones in the upper half of the address
  // space.
  struct Polymorphic {
    std::bitset<128> groups, upper;
  } polymorphic;
  Unit::Pages pages;
};

class Translator {
 public:
  // Used again from unit to unit.
  struct Buffers;

  Translator(Unit& unit, Assembler& assembler, const TranslationContext& context, Buffers& buffers);
  EntryPoints Run();

 private:
  struct Cold {
    enum Kind : uint8_t {
      kFill,
      kAsk,
      kVectors,
      kX87,
      kPollLoop,
      kExecute,
      kInterpret,
      kEnter
    } kind;
    uint8_t* from;            // distance to patch
    uint8_t* back = nullptr;  // as it runs
    Site site = {};
    uint16_t offset = 0;  // kPollLoop: leaves to it
    uint8_t* target = nullptr;
    const UnitInsn* insn = nullptr;  // kExecute
    uint8_t loaded = 0;
    uint8_t at = 0;              // kAsk
    uint8_t kept = kNoRegister;  // kFill: kept_[1]
  };
  struct Fixup {
    uint8_t* distance;
    unsigned insn;
  };

  struct FarExit {
    size_t exit;
    int64_t target;  // from the page's start
    bool saved;      // flags
    const UnitInsn* branch;
  };

  void Mark(const UnitInsn& u);
  void Entries();
  void CheckNextPage();
  void Label(unsigned i);
  void Checks(unsigned i);
  void Check(unsigned number, unsigned at);
  void GroupAddress(const AccessGroup& group, unsigned at);
  void AskTlb(unsigned number, unsigned span);
  HostMem AddendOf(unsigned group) const;
  void Instruction(unsigned i);
  void Interpret(const UnitInsn& u);
  void CallInterpreter(const UnitInsn& u, uint8_t loaded);
  void Copy(const UnitInsn& u);
  void CopyLoaded(const UnitInsn& u);
  void CopyOperands(const UnitInsn& u);
  void CopyEncoding(const UnitInsn& u, uint8_t opcode, const HostMem* mem, HostReg reg, HostReg rm,
                    HostReg vvvv);
  // An operand that is named in Cpu::gpr, where the guest's register lives.
  struct InPlace {
    unsigned guest = kNoRegister;  // none
    uint8_t opcode;                // of the instruction then
    bool swapped = false;          // it stands in ModRM's reg, and takes the place of rm
  };
  InPlace FindInPlace(const UnitInsn& u) const;
  void Lea(const UnitInsn& u);
  void MoveFromSegment(const UnitInsn& u);
  void ReadTsc(const UnitInsn& u);
  void ClearInterrupts(const UnitInsn& u);
  void SetInterrupts(unsigned i);
  void PushFlags(const UnitInsn& u);
  void Push(const UnitInsn& u);
  void Pop(const UnitInsn& u);
  void Leave(const UnitInsn& u);
  void Call(const UnitInsn& u);
  void Return(const UnitInsn& u);
  void Jump(const UnitInsn& u);
  void Conditional(const UnitInsn& u);
  void ColdPaths();
  void JumpToInterpret(const Site& site);
  void CallFill(const Cold& cold, const Stubs::Fill& fill);
  void Thunks();

  // Of 16-bit and 32-bit code (translator_legacy.cpp).
  bool Legacy(const UnitInsn& u);
  void Lea32(HostReg to, const HostMem& mem);
  void Load32(HostReg to, const HostMem& mem);
  void Truncate16(HostReg reg);
  void LoadSized(HostReg to, const HostMem& mem, unsigned size);
  void StoreSized(const HostMem& mem, HostReg from, unsigned size);
  void MovSized(HostReg to, HostReg from, unsigned size);
  void LegacyEffective(HostReg to, const Insn& insn);
  void LegacyOffset(const AccessGroup& group, unsigned at);
  void AddSegmentBase(const AddressKey& key);
  void LegacyCheck(const AccessGroup& group, unsigned at, const Site& site);
  void LegacyBeforeFill(const Site& site);
  bool Plain(const MemoryAccess& access) const;
  HostMem LegacyMap(const UnitInsn& u, const MemoryAccess& access);
  HostMem LegacyStack(const MemoryAccess& access, HostReg base, int32_t disp);
  void SetStackPointer(HostReg from, int32_t by);
  void PushRegister(const UnitInsn& u, HostReg from);
  void LegacyPush(const UnitInsn& u);
  void LegacyPop(const UnitInsn& u);
  void LegacyLeave(const UnitInsn& u);
  void LegacyLea(const UnitInsn& u);
  void LegacyMoveFromSegment(const UnitInsn& u);
  void LegacyTarget(const UnitInsn& u, int64_t page_offset);
  void CheckCodeLimit(const UnitInsn& u);
  void LegacyPushReturn(const UnitInsn& u);
  void LegacyLoadTarget(const UnitInsn& u);
  void LegacyCall(const UnitInsn& u);
  void LegacyReturn(const UnitInsn& u);
  void LegacyCrossPage(const UnitInsn& u, int64_t target);
  uint8_t* CounterBranch(const UnitInsn& u);

  // Flags.
  void SaveFlags();
  void RestoreFlags();
  void SpoilFlags(uint16_t live);
  void NeedFlags() {
    if (!host_flags_) RestoreFlags();
  }

  bool IsLastCheck(unsigned number, unsigned at) const;
  void AddTo(HostReg to, const HostMem& sum);
  bool KeepsScratch(const UnitInsn& u) const;
  HostReg KeptIn(unsigned guest) const;
  HostReg ToScratch(unsigned guest, HostReg taken, bool read);
  void Forget(unsigned guest);
  void Spoil(HostReg scratch);
  void SpoilScratch();
  HostMem Map(const UnitInsn& u, const MemoryAccess& access);
  HostMem StackAt(const MemoryAccess& access, HostReg base, int32_t disp);
  void LoadTarget(const UnitInsn& u);
  void NeedLoaded(const UnitInsn& u, size_t live, Cold::Kind load, bool* checked);
  void NeedVectors(const UnitInsn& u);
  void NeedX87(const UnitInsn& u);
  void KeepX87Pointers(const UnitInsn& u);
  // Site::Flags: what a helper's return has to load again.
  uint8_t Loaded() const {
    return static_cast<uint8_t>((vectors_checked_ ? Site::kVectors : 0) |
                                (x87_checked_ ? Site::kX87 : 0));
  }
  void LeaveTo(uint8_t* branch, int64_t page_offset);
  void CrossPage(int64_t page_offset);
  void Indirect(const UnitInsn& u, unsigned popped);
  void Internal(uint8_t* distance, unsigned insn);
  void PageAddress(HostReg to, int64_t page_offset);
  void PushReturn(const UnitInsn& u);

  Unit& unit_;
  Assembler& as_;
  const TranslationContext& context_;
  Buffers& out_;
  EntryPoints entries_;
  uint8_t* start_ = nullptr;
  uint8_t* labels_[kMaxUnitInsns] = {};
  bool host_flags_ = true, saved_flags_ = false;
  bool vectors_checked_ = false;
  bool x87_checked_ = false, x87_page_kept_ = false;  // State::x87_live, State::x87_page
  // The group whose addend a scratch register holds.
  struct Held {
    int group = -1;
    HostReg reg = kNoReg;
  } held_;
  // The guest's register that lives in memory and that S0, S1 hold as well.
  unsigned kept_[2] = {kNoRegister, kNoRegister};
};

struct Translator::Buffers {
  std::vector<ExitSite> exits;
  std::vector<InsnMark> marks;
  std::vector<Cold> cold;
  std::vector<Fixup> fixups;
  std::vector<FarExit> far;
  unsigned reads = 0, writes = 0;  // groups
};

}  // namespace kvartz::cpu::x86::jit
