// A unit of translation: instructions that follow each other within a page, with side exits and
// jumps among themselves, and what the translator must know of them: which flags are live, which
// memory accesses can share a check, and where it is best made. An instruction that ends in the
// next page is a unit of its own.
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <vector>

#include "cpu/x86/decode/insn.h"
#include "cpu/x86/jit/form.h"

namespace kvartz::cpu::x86::jit {

constexpr unsigned kMaxUnitInsns = 48;
constexpr unsigned kMaxGroupSpan = 512;

// The value of a register as far as it is known: that of symbol `id`, plus an offset.
struct Symbol {
  uint32_t id = 0;
  int64_t offset = 0;
};

// What an address is made of, apart from its constant part.
struct AddressKey {
  uint32_t base = 0, index = 0;  // symbols; 0: none
  uint8_t scale = 0;
  uint8_t segment = 0;  // kFs or kGs; else 0. With `checked`: any
  bool rip = false;
  // Outside of 64-bit mode: the segment's limit is to be checked and its base added; the address
  // has 16 bits.
  bool checked = false, address16 = false;
  bool operator==(const AddressKey&) const = default;
};

struct MemoryAccess {
  bool present = false, write = false;
  uint16_t size = 0;
  int64_t offset = 0;  // from the key's value
  AddressKey key;
  int8_t group = -1;
};

// Accesses of one key that one check covers: `[low, high)` from the key's value.
struct AccessGroup {
  AddressKey key;
  int64_t low = 0, high = 0;
  bool write = false;
  bool shared = false;       // by more than one
  bool alone = false;        // one access, checked where it is made
  bool polymorphic = false;  // the page changes all the time: the TLB is asked instead of the slot
  bool in_scratch = false;   // what it says isn't stored
  uint8_t first = 0, last = 0;  // instructions
  uint8_t check_at = 0;         // the check is made before this one
  uint16_t slot = 0;
};

struct UnitInsn {
  Insn insn;
  const RowForm* form = nullptr;
  uint16_t offset = 0;              // of its first byte within the page
  MemoryAccess operand;             // ModRM's
  MemoryAccess stack;               // of PUSH, POP, CALL, RET, LEAVE
  uint16_t tested = 0, killed = 0;  // status flags
  uint16_t live_before = 0;         // status flags that are read before they are written
  uint16_t live_after = 0;
  uint8_t loaded = 0;   // bytes of its immediate that are read from the guest's memory when it runs
  int8_t jump_to = -1;  // a branch to an instruction of the unit: which
  bool label = false;   // ... and the target of one
  bool loop = false;    // ... from further down
};

// As Decode. Encodings that 64-bit mode lacks are given as their equals that it has; but length and
// bytes are the guest's.
DecodeStatus DecodeForUnit(const DecodeContext& context, std::span<const uint8_t> bytes,
                           Insn* insn);

// Number of the register that is the first operand, for which a row with an immediate has a name.
unsigned TargetOf(const Insn& insn);

// Its count is or may be 0: then the flags stay.
bool KeepsFlags(const UnitInsn& insn);

// A step of a digest of bytes.
inline uint64_t Digested(uint64_t digest, uint64_t word) {
  digest = (digest ^ word) * 0x9e3779b97f4a7c15;
  return digest ^ digest >> 29;
}

// Bytes that the unit depends on: of its page, or from 4096 on of the one that follows.
struct CodeRange {
  uint16_t offset = 0, size = 0;
};

// What the mode allows; the rest is left to the interpreter, which raises what is due.
struct UnitMode {
  bool sse = true, avx = true, x87 = true;
  bool supervisor = false;  // CPL 0
  uint8_t code_size = 8;    // bytes of an operand or address: 8, 4, 2
  uint8_t stack_size = 8;   // of the stack pointer
  // Outside of 64-bit mode:
  bool real = false;         // real or virtual-8086 mode
  bool flat = true;          // DS, ES and SS: 4 GiB from 0
  bool code_flat = true;     // so is CS
  bool code_aligned = true;  // CS begins where a page does
  bool legacy() const { return code_size != 8; }
};

// Outside of 64-bit mode: the row's form covers the instruction.
bool LegacyFits(const Insn& insn, const RowForm& form, UnitMode mode);

// Accesses that share no check with others, by their instruction's number: twice that for ModRM's
// operand, one more for the stack.
using LoneAccesses = std::bitset<2 * kMaxUnitInsns>;

class Unit {
 public:
  // The host's addresses of the page that the unit begins in and of the one that follows; the
  // latter may be left out.
  struct Pages {
    const uint8_t* first = nullptr;
    const uint8_t* next = nullptr;
  };
  enum class Built : uint8_t {
    kOk,
    kNeedsNext,     // the first instruction ends in the next page, which wasn't given
    kUntranslated,  // ... is undefined
  };
  enum class Immediates : uint8_t {
    kFixed,
    kLoaded,  // where that can be: the unit doesn't depend on those bytes
  };
  // Decodes from `offset` of the first page.
  Built Build(const DecodeContext& context, UnitMode mode, Pages pages, unsigned offset,
              const LoneAccesses& lone, Immediates immediates = Immediates::kFixed);

  unsigned count() const { return count_; }
  UnitInsn& operator[](unsigned i) { return insns_[i]; }
  const UnitInsn& operator[](unsigned i) const { return insns_[i]; }
  unsigned end_offset() const { return end_; }  // behind the last instruction
  bool crosses() const { return end_ > 4096; }  // then it is one instruction
  unsigned group_count() const { return group_count_; }
  AccessGroup& group(unsigned i) { return groups_[i]; }
  LoneAccesses Members(unsigned group) const;
  const AccessGroup& group(unsigned i) const { return groups_[i]; }
  // Registers before instruction `i`.
  const std::array<Symbol, 16>& symbols(unsigned i) const { return symbols_[i]; }
  // Changes with the code, but not with the immediates that can be loaded.
  uint64_t Shape() const;
  // Its own bytes, and what was looked at behind its exits.
  const std::vector<CodeRange>& ranges() const { return ranges_; }
  // Same page: the target's offset; else -1.
  static int64_t TargetInPage(const UnitInsn& insn);
  // The same, but -1 also if it depends on where the page lies in CS.
  int64_t NearTarget(const UnitInsn& insn) const;
  const UnitMode& mode() const { return mode_; }

 private:
  DecodeStatus DecodeAt(unsigned offset, const uint8_t* next, Insn* insn) const;
  void Cover(unsigned offset, unsigned size);
  // Live flags at the target of a direct branch to `offset` of the same page.
  uint16_t LiveAt(unsigned offset);
  void FindLabels();
  void Liveness();
  void Accesses();
  void Address(UnitInsn& insn);
  void Stack(UnitInsn& insn);
  void LegacyKey(AddressKey* key, unsigned segment, unsigned address_size) const;
  void MoveStackPointer(int64_t by);
  void Update(const UnitInsn& insn);
  void Fresh(unsigned reg) { now_[reg & 15] = {next_symbol_++, 0}; }
  void FreshAll();
  void Group(MemoryAccess& access, unsigned at, bool alone);
  void PlaceChecks();
  bool TestsBase(const AccessGroup& group, unsigned branch) const;
  bool CanCheckAt(const AccessGroup& group, unsigned at) const;

  DecodeContext context_;
  UnitMode mode_;
  const uint8_t* page_ = nullptr;
  LoneAccesses lone_;
  Immediates immediates_ = Immediates::kFixed;
  unsigned count_ = 0, end_ = 0, group_count_ = 0, first_open_ = 0;
  std::vector<CodeRange> ranges_;
  uint32_t next_symbol_ = 1;
  std::array<Symbol, 16> now_;
  std::array<std::array<Symbol, 16>, kMaxUnitInsns> symbols_;
  std::array<UnitInsn, kMaxUnitInsns> insns_;
  std::array<AccessGroup, 2 * kMaxUnitInsns> groups_;
};

}  // namespace kvartz::cpu::x86::jit
