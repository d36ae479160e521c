// Random instructions that fit into a program: memory operands that mostly hit the data pages, and
// registers that later instructions rely on left alone, mostly.
#pragma once

#include <string>
#include <vector>

#include "cpu/x86/jit/program.h"
#include "cpu/x86/oracle/insn_encoder.h"

namespace kvartz::cpu::x86::programs {

// Takes one more instruction's flags into account. False if it tests what the item left undefined.
bool AddFlags(Item* item, const Insn& insn);
// Why no random instruction is made from this row; null if it may be.
const char* WhyLeftOut(const Row& row);

class InsnPicker : public oracle::InsnEncoder {
 public:
  InsnPicker(uint64_t seed, const FeatureSet& features);

  // What follows is for this program.
  void Begin(const Program& program);
  enum class Kind { kAny, kFlagReader };
  // Appends a random instruction, after those that it needs before it. `stack`: it may move the
  // stack pointer.
  void Pick(Item* item, Kind kind, bool stack);
  // Appends REG := value, without touching flags.
  void MovImm(Item* item, unsigned reg, uint64_t value);
  // Appends a move that makes REG a pointer into the data pages. `grain`: its alignment, a power of
  // two.
  void Aim(Item* item, unsigned reg, unsigned grain = 1);
  // All pointers are good, as at the program's start.
  void TrustAll() { good_ = aligned_ = pointers_; }
  // The pointer in REG went elsewhere, by itself.
  void MovedPointer(unsigned reg) { aligned_ &= ~(uint32_t{1} << reg); }
  uint64_t Target(unsigned grain);
  // The offset of something in the data pages within DS.
  uint64_t DataOffset(uint64_t at) const;
  // A register that holds nothing of value: an old one (rAX, rCX, rDX).
  unsigned Scratch() { return static_cast<unsigned>(Below(3)); }
  uint32_t pointers() const { return pointers_; }
  const Layout& layout() const { return layout_; }

 private:
  bool TryRow(const Row& row, Item* item, bool stack);
  bool AcceptRegisters(const Insn& insn, bool stack);
  void AimImplicit(const Insn& insn, Item* item);
  bool Address(oracle::EncodedInsn* insn, Item* item);
  bool Address16(oracle::EncodedInsn* insn, Item* item);
  bool AddressFar(oracle::EncodedInsn* insn, Item* item);
  bool AddressVsib(oracle::EncodedInsn* insn, Item* item);
  bool SetRexBits(std::vector<uint8_t>* head, const Insn& insn, unsigned index, unsigned base);
  unsigned Pointer(Item* item, unsigned grain, bool high);
  bool Append(const oracle::EncodedInsn& insn, Item* item);

  const FeatureSet features_;
  DecodeContext context_;
  Layout layout_ = LayoutOf(Shape::k64);
  uint64_t segment_shift_ = 0;
  bool high_pointers_ = false;
  uint32_t pointers_ = 0;            // registers that are meant to hold pointers
  uint32_t good_ = 0, aligned_ = 0;  // those that do; to 64 bytes
  std::vector<const Row*> integer_, vector_, x87_, flag_readers_, privileged_;
  bool stack_ = false;   // the instruction under way may reach what lies on top of the stack
  int rip_target_ = -1;  // of the operand under way: in the data pages; -1: not RIP-relative
};

}  // namespace kvartz::cpu::x86::programs
