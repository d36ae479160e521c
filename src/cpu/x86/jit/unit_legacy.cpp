// What is different about units of 16-bit and 32-bit code.
#include <algorithm>
#include <cstring>

#include "cpu/x86/jit/unit.h"

namespace kvartz::cpu::x86::jit {
namespace {

// The same instruction in an encoding that 64-bit mode has, too: INC and DEC with the register in
// the opcode, MOV between the accumulator and an absolute address. 0: there is none.
size_t Substitute(const Insn& insn, uint8_t* bytes) {
  const Row& row = *insn.row;
  if (row.map != OpcodeMap::kPrimary || row.vex) return 0;
  size_t size = 0;
  const auto put = [&](const uint8_t* from, size_t count) {
    std::memcpy(bytes + size, from, count);
    size += count;
  };
  if (insn.opcode >= 0x40 && insn.opcode <= 0x4f) {
    const uint8_t code[] = {
        0xff, static_cast<uint8_t>((insn.opcode < 0x48 ? 0xc0 : 0xc8) | (insn.opcode & 7))};
    put(insn.bytes, insn.length - 1u);
    put(code, 2);
  } else if (insn.opcode >= 0xa0 && insn.opcode <= 0xa3) {
    const uint8_t code[] = {
        static_cast<uint8_t>((insn.opcode & 2 ? 0x88 : 0x8a) | (insn.opcode & 1)),
        static_cast<uint8_t>(insn.address_size == 2 ? 6 : 5)};
    const size_t address = insn.address_size;
    put(insn.bytes, insn.length - 1 - address);
    put(code, 2);
    put(insn.bytes + insn.length - address, address);
  }
  return size;
}

}  // namespace

DecodeStatus DecodeForUnit(const DecodeContext& context, std::span<const uint8_t> bytes,
                           Insn* insn) {
  const DecodeStatus status = Decode(context, bytes, insn);
  if (status != DecodeStatus::kOk || context.mode == CodeMode::k64) return status;
  uint8_t other[sizeof(Insn::bytes) + 1];
  const size_t size = Substitute(*insn, other);
  Insn same;
  if (size == 0 || size > sizeof(Insn::bytes) ||
      Decode(context, {other, size}, &same) != DecodeStatus::kOk)
    return status;
  // Nothing of them is an immediate: the bytes may be the guest's.
  same.length = insn->length;
  std::memcpy(same.bytes, insn->bytes, sizeof(same.bytes));
  *insn = same;
  return status;
}

bool LegacyFits(const Insn& insn, const RowForm& form, UnitMode mode) {
  const bool memory = insn.has_memory();
  switch (form.form) {
    case Form::kPop:
      return !memory && (form.memory_operand >= 0 ? insn.rm : insn.reg) != kRsp;
    case Form::kMoveFromSegment:
      return !memory && insn.reg <= kGs;
    case Form::kClearInterrupts:
    case Form::kSetInterrupts:
      return mode.supervisor;
    case Form::kPushFlags:
      return !mode.real || mode.supervisor;
    case Form::kCall:
    case Form::kJump:
    case Form::kJcc:
    case Form::kJcxz:
    case Form::kLoop:
      // 32-bit code with targets of 16 bits.
      return form.memory_operand >= 0 || insn.operand_size >= mode.code_size;
    default:
      return true;
  }
}

void Unit::LegacyKey(AddressKey* key, unsigned segment, unsigned address_size) const {
  const bool flat = mode_.flat && address_size == 4 && segment < kFs && segment != kCs;
  key->checked = !flat;
  key->segment = flat ? 0 : static_cast<uint8_t>(segment);
  key->address16 = address_size == 2;
}

int64_t Unit::NearTarget(const UnitInsn& u) const {
  const int64_t target = TargetInPage(u);
  // In front of the unit may be the end of the segment, where the page begins before CS does.
  return mode_.code_aligned || target >= insns_[0].offset ? target : -1;
}

// PUSH and its like, symbolically. `size`: bytes.
void Unit::MoveStackPointer(int64_t by) {
  // A stack pointer of 16 bits wraps by itself.
  if (mode_.stack_size == 2) return Fresh(kRsp);
  now_[kRsp].offset += by;
}

}  // namespace kvartz::cpu::x86::jit
