// Instructions that the host runs as the guest has them, but for registers and memory operands.
#include "base/check.h"
#include "cpu/x86/jit/state_operands.h"
#include "cpu/x86/jit/translator.h"

namespace kvartz::cpu::x86::jit {
namespace {

// Two registers of more than a byte, of an operation whose opcode for the other direction differs
// by 2 (but for TEST's, which has none and needs none).
bool IsPlainPair(const Insn& insn) {
  const unsigned opcode = insn.row->opcode, kind = opcode & 7;
  return insn.row->map == OpcodeMap::kPrimary && !insn.row->vex && insn.row->has_modrm &&
         !insn.has_memory() &&
         ((opcode < 0x40 && (kind == 1 || kind == 3)) || opcode == 0x85 || opcode == 0x89 ||
          opcode == 0x8b);
}

}  // namespace

void Translator::Copy(const UnitInsn& u) {
  const Insn& insn = u.insn;
  const RowForm& form = *u.form;
  if (form.vector) NeedVectors(u);
  if (form.x87) NeedX87(u);
  const FlagEffects& effects = insn.row->flags;
  const auto status = static_cast<uint16_t>(rflags::kStatus);
  const uint16_t written = effects.written() & status;
  const uint16_t kept = KeepsFlags(u) ? status : static_cast<uint16_t>(~written);
  if ((effects.tested & status) != 0 || (written != 0 && (u.live_after & kept) != 0)) NeedFlags();

  if (u.loaded != 0) {
    CopyLoaded(u);
  } else {
    CopyOperands(u);
  }
  if (written != 0) {
    host_flags_ = true;
    saved_flags_ = false;
  }
}

// With the immediate as it is in the guest's memory then.
void Translator::CopyLoaded(const UnitInsn& u) {
  const Insn& insn = u.insn;
  const HostReg to = HostOf(TargetOf(insn));
  const unsigned opcode = u.form->takes_source;
  const Assembler::Width width = insn.operand_size == 8 ? Assembler::k64 : Assembler::k32;
  const HostMem immediate{.base = kS0};
  Spoil(kS0);
  as_.MovImm64(
      kS0, reinterpret_cast<uint64_t>(context_.pages.first + u.offset + insn.length - u.loaded));
  if (u.loaded == insn.operand_size) return as_.RegMem(width, opcode, to, immediate);
  constexpr uint32_t kMovsx = 0xbe0f, kMovsxd = 0x63;
  as_.RegMem(Assembler::k64, u.loaded == 1 ? kMovsx : kMovsxd, kS0, immediate);
  as_.RegReg(width, opcode, to, kS0);
}

// One that is in a scratch register isn't named in memory: to read it there waits for its store.
// Nor is one that is written, unless as a whole: the rest has to be written, too.
Translator::InPlace Translator::FindInPlace(const UnitInsn& u) const {
  const Insn& insn = u.insn;
  const RowForm& form = *u.form;
  InPlace place = {.opcode = insn.row->opcode};
  if (insn.has_memory() || !form.rm_is_gpr || insn.rm >= kHighByte) return place;
  const bool pair = IsPlainPair(insn);
  const auto moves = [&](uint8_t opcode) {
    return pair && place.opcode == opcode && insn.operand_size == 8;
  };
  if (HostOf(insn.rm) == kNoReg) {
    const bool writes =
        (form.rm_operand == 0 && form.writes_first) || (form.rm_operand == 1 && form.writes_second);
    const bool reads = !writes && insn.row->operands[form.rm_operand].kind == OperandKind::kRm &&
                       !form.bit_of_string && KeptIn(insn.rm) == kNoReg;
    if (reads || (moves(0x89) && HostOf(insn.reg) != kNoReg)) place.guest = insn.rm;
  } else if (pair && HostOf(insn.reg) == kNoReg) {
    const bool writes = form.reg_operand == 0 && form.writes_first;
    if (writes ? moves(0x8b) : KeptIn(insn.reg) == kNoReg) {
      place.guest = insn.reg;
      place.swapped = true;
      if (place.opcode != 0x85) place.opcode ^= 2;  // the other direction's
    }
  }
  return place;
}

void Translator::CopyOperands(const UnitInsn& u) {
  const Insn& insn = u.insn;
  const RowForm& form = *u.form;
  const bool memory = insn.has_memory();
  if (memory || form.may_trap) Mark(u);
  HostMem mem;
  if (memory) mem = Map(u, u.operand);
  // AH..BH can't stand beside a memory operand here, since that takes a REX prefix: a scratch
  // register's low byte stands in. RORX leaves the flags.
  HostReg high = kNoReg;
  if (memory && form.reg_is_gpr && insn.reg >= kHighByte) {
    high = mem.base == kS0 ? kS1 : kS0;
    Spoil(high);
    as_.Byte(0xc4), as_.Byte(0x63), as_.Byte(0x7b), as_.Byte(0xf0);  // high 32 bits are dropped
    as_.Byte(0xc0 | (high & 7) << 3 | (insn.reg & 3));
    as_.Byte(8);
  }
  const InPlace place = FindInPlace(u);
  const bool in_place = place.guest != kNoRegister;
  if (in_place) {
    mem = GprAt(place.guest);
    if (place.opcode == 0x89) Forget(place.guest);
  }
  // Other registers that live in memory go through scratch ones.
  struct {
    unsigned guest;
    HostReg host;
    bool written;
  } temps[2];
  unsigned temp_count = 0;
  const bool narrow = insn.operand_size < 4;
  const auto host = [&](bool is_gpr, unsigned reg, int field_operand) {
    if (!is_gpr || reg >= kHighByte) return static_cast<HostReg>(reg);
    if (HostOf(reg) != kNoReg) return HostOf(reg);
    const bool first = field_operand == 0;
    const bool result = first ? form.writes_first : field_operand == 1 && form.writes_second;
    const bool read = !first || form.reads_first || narrow || !result;
    for (unsigned t = 0; t < temp_count; ++t) {
      if (temps[t].guest != reg) continue;
      temps[t].written |= result;
      if (!first || form.reads_first) as_.Load(temps[t].host, GprAt(reg));
      return temps[t].host;
    }
    VERIFY(temp_count < (memory ? 1u : 2u));
    const HostReg taken = memory ? mem.base : temp_count != 0 ? temps[0].host : kNoReg;
    const HostReg scratch = ToScratch(reg, taken, read);
    temps[temp_count++] = {reg, scratch, result};
    return scratch;
  };
  HostReg reg, rm = kNoReg;
  if (place.swapped) {
    reg = HostOf(insn.rm);
  } else {
    reg = high != kNoReg ? high : host(form.reg_is_gpr, insn.reg, form.reg_operand);
    if (!memory && !in_place) rm = host(form.rm_is_gpr, insn.rm, form.rm_operand);
  }
  const HostReg vvvv = host(form.vvvv_is_gpr, insn.vvvv, form.vvvv_operand);
  CopyEncoding(u, place.opcode, memory || in_place ? &mem : nullptr, reg, rm, vvvv);
  for (unsigned t = 0; t < temp_count; ++t) {
    if (temps[t].written) as_.Store(GprAt(temps[t].guest), temps[t].host);
  }
  if (form.x87_pointers) KeepX87Pointers(u);
}

void Translator::CopyEncoding(const UnitInsn& u, uint8_t opcode, const HostMem* mem, HostReg reg,
                              HostReg rm, HostReg vvvv) {
  const Insn& insn = u.insn;
  const Row& row = *insn.row;
  const RowForm& form = *u.form;
  const auto byte_register = [&](int operand, unsigned number) {
    return operand >= 0 && number >= 4 && number < kHighByte &&
           OperandSize(insn, row.operands[operand]) == 1;
  };
  // Fields as the host is to see them: 4-bit numbers.
  const unsigned reg_number =
      form.reg_is_gpr
          ? (insn.reg >= kHighByte && mem == nullptr ? 4u + (insn.reg & 3) : unsigned{reg})
          : insn.digit() | (insn.rex & 4u) << 1;
  const unsigned rm_number = mem != nullptr ? 0
                             : form.rm_is_gpr
                                 ? (insn.rm >= kHighByte ? 4u + (insn.rm & 3) : unsigned{rm})
                                 : (insn.modrm & 7u) | (insn.rex & 1u) << 3;
  const unsigned r = reg_number >> 3;
  const unsigned x = mem != nullptr && mem->index != kNoReg ? mem->index >> 3 : 0;
  const unsigned b = mem != nullptr ? (mem->base != kNoReg ? mem->base >> 3 : 0) : rm_number >> 3;
  if (mem != nullptr) as_.StatePrefix(*mem);
  if (row.vex) {
    const unsigned map = row.map == OpcodeMap::k0f ? 1 : row.map == OpcodeMap::k0f38 ? 2 : 3;
    const unsigned v = form.vvvv_is_gpr ? unsigned{vvvv} : unsigned{insn.vvvv};
    as_.Byte(0xc4);
    as_.Byte((r ? 0u : 0x80u) | (x ? 0u : 0x40u) | (b ? 0u : 0x20u) | map);
    as_.Byte((insn.w() ? 0x80u : 0u) | (~v & 15) << 3 | unsigned{insn.vex_l} << 2 | insn.vex_pp);
    as_.Byte(insn.opcode);
  } else {
    if (insn.locked()) as_.Byte(0xf0);
    // Where 16-bit operands are the default, they take a prefix here.
    const bool small = unit_.mode().legacy() && !insn.has(kNative)
                           ? insn.operand_size == 2 && row.prefix != PrefixRule::kNp
                           : (insn.flags & kHas66) != 0;
    if (small || row.prefix == PrefixRule::k66) as_.Byte(0x66);
    if (row.prefix == PrefixRule::kF2) as_.Byte(0xf2);
    if (row.prefix == PrefixRule::kF3) as_.Byte(0xf3);
    const bool forced = byte_register(form.reg_operand, insn.reg) ||
                        (mem == nullptr && byte_register(form.rm_operand, insn.rm));
    if (row.opcode_register) {
      const unsigned rex = 0x40 | (insn.w() ? 8u : 0u) | reg_number >> 3;
      if (rex != 0x40 || forced) as_.Byte(rex);
    } else {
      const unsigned rex = 0x40 | (insn.w() ? 8u : 0u) | r << 2 | x << 1 | b;
      if (rex != 0x40 || forced) as_.Byte(rex);
    }
    if (row.map != OpcodeMap::kPrimary) as_.Byte(0x0f);
    if (row.map == OpcodeMap::k0f38) as_.Byte(0x38);
    if (row.map == OpcodeMap::k0f3a) as_.Byte(0x3a);
    as_.Byte(row.opcode_register ? (opcode & ~7u) | (reg_number & 7) : opcode);
  }
  if (row.has_modrm) {
    if (mem != nullptr) {
      as_.ModRmMem(reg_number & 7, *mem);
    } else {
      as_.Byte(0xc0 | (reg_number & 7) << 3 | (rm_number & 7));
    }
  }
  size_t immediate = 0;
  for (const ImmKind kind : row.imm) {
    switch (kind) {
      case ImmKind::kIb:
      case ImmKind::kIs4:
        immediate += 1;
        break;
      case ImmKind::kIw:
        immediate += 2;
        break;
      case ImmKind::kId:
        immediate += 4;
        break;
      case ImmKind::kIz:
        immediate += insn.operand_size == 2 ? 2 : 4;
        break;
      case ImmKind::kIv:
        immediate += insn.operand_size;
        break;
      default:
        break;
    }
  }
  as_.Put(insn.bytes + insn.length - immediate, immediate);
  // Outside of 64-bit mode the register's highest bit is ignored.
  if (row.imm[0] == ImmKind::kIs4 && unit_.mode().legacy()) as_.here()[-1] &= 0x7f;
}

}  // namespace kvartz::cpu::x86::jit
