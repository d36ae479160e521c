#include "cpu/x86/jit/insn_picker.h"

#include <algorithm>
#include <cstring>

namespace kvartz::cpu::x86::programs {
namespace {

using oracle::EncodedInsn;
using oracle::HasOperand;
using oracle::Is;

// These leave flags alone when their count is 0.
bool MayKeepFlags(const Insn& insn) {
  return Is(*insn.row, {"ROL", "ROR", "RCL", "RCR", "SHL", "SHR", "SAR", "SHLD", "SHRD"}) ||
         (insn.has(kRep) && (insn.flags & (kHasRep | kHasRepne)));
}

uint32_t Bit(unsigned reg) { return uint32_t{1} << (reg >= kHighByte ? reg - kHighByte : reg); }

uint32_t OperandRegister(const Insn& insn, const Operand& operand) {
  switch (operand.kind) {
    case OperandKind::kReg:
      return Bit(insn.reg);
    case OperandKind::kRm:
      return insn.has_memory() ? 0 : Bit(insn.rm);
    case OperandKind::kRmReg:
      return Bit(insn.rm);
    case OperandKind::kVvvv:
      return Bit(insn.vvvv);
    case OperandKind::kFixedReg:
      return Bit(operand.fixed);
    default:
      return 0;
  }
}

// General registers that it writes, as far as it matters: those that programs rely on.
uint32_t Written(const Insn& insn) {
  const Row& row = *insn.row;
  uint32_t mask = 0;
  if (!Is(row, {"CMP", "TEST", "BT", "PUSH", "NOP", "MUL", "DIV", "IDIV"}))
    mask |= OperandRegister(insn, row.operands[0]);
  if (Is(row, {"XCHG", "XADD", "MULX"})) mask |= OperandRegister(insn, row.operands[1]);
  if (Is(row, {"CPUID"})) mask |= 1 << kRbx;
  return mask;
}

unsigned Alignment(const Insn& insn) {
  if (insn.has(kAlign)) return 64;
  return Is(*insn.row, {"CMPXCHG16B", "XSAVE", "XSAVEOPT", "XSAVEC", "XRSTOR", "FXSAVE", "FXRSTOR"})
             ? 64
             : 1;
}

void Append32(std::vector<uint8_t>* code, uint64_t value, unsigned bytes = 4) {
  for (unsigned i = 0; i < bytes; ++i) code->push_back(static_cast<uint8_t>(value >> (8 * i)));
}

}  // namespace

bool AddFlags(Item* item, const Insn& insn) {
  const FlagEffects& flags = insn.row->flags;
  uint64_t tested = flags.tested & rflags::kStatus;
  if (Is(*insn.row, {"PUSHF"})) tested = rflags::kStatus;
  uint64_t defined =
      static_cast<uint64_t>(flags.modified | flags.cleared | flags.set) & rflags::kStatus;
  if (MayKeepFlags(insn)) defined = 0;
  if (tested & item->undefined) return false;
  item->tested |= tested & ~item->defined;
  item->defined = (item->defined | defined) & ~uint64_t{flags.undefined};
  item->undefined = (item->undefined & ~defined) | flags.undefined;
  return true;
}

const char* WhyLeftOut(const Row& row) {
  if (row.attributes & kBranch) return "made with a target of its own";
  if (row.attributes & kPrivileged) return "privileged";
  if (Is(row, {"RDRAND", "RDSEED", "RDTSC", "RDTSCP", "RDPMC"})) return "the result varies";
  if (Is(row, {"POPF", "POPA", "ENTER", "LEAVE"})) return "made in pairs";
  if (Is(row, {"LDS", "LES", "LFS", "LGS", "LSS", "POP"}) && (row.attributes & kSystem))
    return "segment registers";
  if (row.operand_count > 0 &&
      (row.operands[0].kind == OperandKind::kSreg || row.operands[0].kind == OperandKind::kFar))
    return "segment registers";
  if (Is(row, {"IN", "OUT", "INS", "OUTS"})) return "ports";
  if (Is(row, {"VMCALL", "WRFSBASE", "WRGSBASE", "MOVDIR64B"})) return "leads nowhere";
  return nullptr;
}

InsnPicker::InsnPicker(uint64_t seed, const FeatureSet& features)
    : InsnEncoder(seed), features_(features) {
  for (const Row& row : InsnRows()) {
    if (!features.Has(row.features[0]) || !features.Has(row.features[1])) continue;
    if ((row.attributes & kPrivileged) && !(row.attributes & kBranch)) privileged_.push_back(&row);
    if (WhyLeftOut(row)) continue;
    if (row.flags.tested & rflags::kStatus || Is(row, {"PUSHF"})) flag_readers_.push_back(&row);
    const bool x87 =
        !row.vex && row.map == OpcodeMap::kPrimary && row.opcode >= 0xd8 && row.opcode <= 0xdf;
    (x87 ? x87_ : row.attributes & kNative ? vector_ : integer_).push_back(&row);
  }
}

void InsnPicker::Begin(const Program& program) {
  layout_ = LayoutOf(program.shape);
  segment_shift_ = program.segment_shift;
  high_pointers_ = program.high_half || (layout_.is64() && Chance(30));
  context_.mode = layout_.code_mode;
  context_.protected_mode = !layout_.real_segments;
  context_.cpl = static_cast<uint8_t>(program.cpl);
  context_.features = features_;
  pointers_ = 1 << kRbx | 1 << kRbp | 1 << kRsi | 1 << kRdi;
  if (layout_.is64()) pointers_ |= 1 << kR12 | 1 << kR13 | 1 << kR14;
  TrustAll();
}

uint64_t InsnPicker::DataOffset(uint64_t at) const {
  return layout_.data_offset() + at + segment_shift_;
}

uint64_t InsnPicker::Target(unsigned grain) {
  uint64_t at;
  const uint64_t kind = Below(100);
  if (kind < 70) {
    at = (Below(3) * kPage + Below(kPage)) & ~uint64_t{63};
  } else if (kind < 85) {
    at = Below(3 * kPage);
  } else {
    static constexpr unsigned kPages[] = {0,
                                          0,
                                          0,
                                          1,
                                          1,
                                          1,
                                          2,
                                          2,
                                          kReadOnlyPage - 1,
                                          kReadOnlyPage,
                                          kSupervisorPage - 1,
                                          kAbsentPage - 1,
                                          kDemandPage - 1,
                                          kDemandPage,
                                          kNoMemoryPage - 1,
                                          kNoMemoryPage};
    at = (kPages[Below(std::size(kPages))] + 1) * kPage - Below(80);
  }
  return at & ~uint64_t{grain - 1};
}

void InsnPicker::MovImm(Item* item, unsigned reg, uint64_t value) {
  auto& code = item->code;
  const auto low = static_cast<uint8_t>(reg & 7), high = static_cast<uint8_t>(reg >> 3);
  if (layout_.width == 8 && value >> 31 != 0) {
    code.push_back(static_cast<uint8_t>(0x48 | high));
    code.push_back(static_cast<uint8_t>(0xb8 | low));
    return Append32(&code, value, 8);
  }
  if (layout_.width == 8 && Chance(40)) {
    code.push_back(static_cast<uint8_t>(0x48 | high));
    code.push_back(0xc7);
    code.push_back(static_cast<uint8_t>(0xc0 | low));
    return Append32(&code, value);
  }
  if (high) code.push_back(0x41);
  code.push_back(static_cast<uint8_t>(0xb8 | low));
  Append32(&code, value, layout_.is16() ? 2 : 4);
}

void InsnPicker::Aim(Item* item, unsigned reg, unsigned grain) {
  const uint64_t at = Target(grain);
  uint64_t value = DataOffset(at);
  if (high_pointers_ && Chance(30)) value |= kHighHalf;
  if (!layout_.is64()) value = static_cast<uint32_t>(value);
  MovImm(item, reg, value);
  const uint32_t bit = uint32_t{1} << reg;
  good_ |= bit & pointers_;
  aligned_ = at % 64 == 0 ? aligned_ | bit : aligned_ & ~bit;
}

unsigned InsnPicker::Pointer(Item* item, unsigned grain, bool high) {
  uint32_t choice = grain > 1 ? good_ & aligned_ : good_;
  if (!high) choice &= 0xff;
  if (choice == 0 || Chance(8)) {
    unsigned reg;
    do {
      reg = static_cast<unsigned>(Below(high ? 16 : 8));
    } while (!(pointers_ >> reg & 1));
    Aim(item, reg, grain);
    return reg;
  }
  for (;;) {
    const auto reg = static_cast<unsigned>(Below(16));
    if (choice >> reg & 1) return reg;
  }
}

bool InsnPicker::AcceptRegisters(const Insn& insn, bool stack) {
  const Row& row = *insn.row;
  uint32_t written = Written(insn);
  if (!stack && Is(row, {"PUSH", "POP", "PUSHA", "PUSHF"})) return false;
  if (written & 1 << kRsp && !Chance(1)) return false;
  if (written & pointers_ && !Chance(8)) return false;
  good_ &= ~written;
  aligned_ &= ~written;
  if (HasOperand(row, OperandKind::kStrSrc)) aligned_ &= ~(1u << kRsi);
  if (HasOperand(row, OperandKind::kStrDst)) aligned_ &= ~(1u << kRdi);
  return true;
}

// What an instruction takes from registers that it doesn't name.
void InsnPicker::AimImplicit(const Insn& insn, Item* item) {
  const Row& row = *insn.row;
  if (HasOperand(row, OperandKind::kStrSrc) && (Chance(60) || !(good_ & 1 << kRsi)))
    Aim(item, kRsi);
  if ((HasOperand(row, OperandKind::kStrDst) || insn.row->mnemonic == std::string("MASKMOVQ") ||
       std::string_view(row.mnemonic).ends_with("MASKMOVDQU")) &&
      (Chance(60) || !(good_ & 1 << kRdi)))
    Aim(item, kRdi);
  if (insn.has(kRep) && (insn.flags & (kHasRep | kHasRepne))) MovImm(item, kRcx, Below(24));
  if (Is(row, {"XLAT"}) && !(good_ & 1 << kRbx)) Aim(item, kRbx);
  if (Is(row, {"DIV", "IDIV"}) && Chance(70)) MovImm(item, kRdx, Chance(50) ? 0 : Below(100));
  if (Is(row, {"XGETBV"})) MovImm(item, kRcx, Below(3));
  if (Is(row, {"CPUID"})) MovImm(item, kRax, Chance(50) ? Below(20) : 0x80000000 + Below(9));
}

// Puts the high bits of an index and a base register into the REX or VEX prefix. False if it has
// none and they are needed.
bool InsnPicker::SetRexBits(std::vector<uint8_t>* head, const Insn& insn, unsigned index,
                            unsigned base) {
  if (!layout_.is64()) return index < 8 && base < 8;
  const unsigned bits = (index >> 3 & 1) << 1 | (base >> 3 & 1);
  if (insn.flags & kHasVex) {
    if ((*head)[modrm_at_ - 3] == 0xc5 && (*head)[modrm_at_ - 4] != 0xc4) return bits == 0;
    uint8_t& byte = (*head)[modrm_at_ - 3];
    byte = static_cast<uint8_t>((byte | 0x60) & ~(bits << 5));
    return true;
  }
  if (insn.rex == 0) return bits == 0;
  (*head)[rex_at_] = static_cast<uint8_t>(((*head)[rex_at_] & ~3u) | bits);
  return true;
}

bool InsnPicker::AddressVsib(EncodedInsn* e, Item* item) {
  const unsigned index = e->insn.index, base = Pointer(item, 1, true);
  std::vector<uint8_t> head(e->code.begin(), e->code.begin() + static_cast<long>(modrm_at_));
  const std::vector<uint8_t> tail(e->code.begin() + static_cast<long>(immediate_at_),
                                  e->code.end());
  if (layout_.is16() || !SetRexBits(&head, e->insn, index, base)) return false;
  // VPMOVZXBQ index, [rSP + small]: elements that stay small in either width.
  const uint8_t widen[] = {0xc4,
                           static_cast<uint8_t>(index < 8 ? 0xe2 : 0x62),
                           0x7d,
                           0x32,
                           static_cast<uint8_t>(0x44 | (index & 7) << 3),
                           0x24,
                           static_cast<uint8_t>(Below(64))};
  if (Chance(90)) item->code.insert(item->code.end(), std::begin(widen), std::end(widen));
  head.push_back(static_cast<uint8_t>(0x44 | (e->code[modrm_at_] & 0x38)));
  head.push_back(static_cast<uint8_t>(Below(4) << 6 | (index & 7) << 3 | (base & 7)));
  head.push_back(static_cast<uint8_t>(Below(128)));
  head.insert(head.end(), tail.begin(), tail.end());
  e->code = head;
  return true;
}

// With a displacement so large that the sum wraps.
bool InsnPicker::AddressFar(EncodedInsn* e, Item* item) {
  const unsigned reg = Scratch();
  const auto disp = static_cast<uint32_t>(Random());
  const auto value = static_cast<uint32_t>(DataOffset(Target(Alignment(e->insn)))) - disp;
  if (layout_.is16()) item->code.push_back(0x66);
  item->code.push_back(static_cast<uint8_t>(0xb8 | reg));
  Append32(&item->code, value);
  std::vector<uint8_t> head(e->code.begin(), e->code.begin() + static_cast<long>(modrm_at_));
  head.push_back(static_cast<uint8_t>(0x80 | (e->code[modrm_at_] & 0x38) | reg));
  Append32(&head, disp);
  head.insert(head.end(), e->code.begin() + static_cast<long>(immediate_at_), e->code.end());
  e->code = head;
  return true;
}

bool InsnPicker::Address16(EncodedInsn* e, Item* item) {
  const unsigned grain = Alignment(e->insn);
  std::vector<uint8_t> head(e->code.begin(), e->code.begin() + static_cast<long>(modrm_at_));
  const std::vector<uint8_t> tail(e->code.begin() + static_cast<long>(immediate_at_),
                                  e->code.end());
  const unsigned reg = e->code[modrm_at_] & 0x38u;
  if (Chance(25)) {
    head.push_back(static_cast<uint8_t>(6 | reg));
    Append32(&head, DataOffset(Target(grain)), 2);
  } else {
    const unsigned base = Pointer(item, grain, false);
    unsigned rm = base == kRsi ? 4 : base == kRdi ? 5 : base == kRbp ? 6 : 7;
    unsigned size = Chance(70) ? 1 : 2;
    uint64_t disp = (Chance(90) ? Below(128) : ~Below(128)) & ~uint64_t{grain - 1};
    if (grain == 1 && Chance(10)) {  // two registers, whose sum wraps, mostly
      const unsigned sum = static_cast<unsigned>(Below(4));
      const unsigned first = sum < 2 ? kRbx : kRbp, second = sum % 2 ? kRdi : kRsi;
      const uint64_t half = Random() & 0xffff;
      size = 2;
      disp = Random() & 0xffff;
      MovImm(item, first, half);
      MovImm(item, second, (DataOffset(Target(1)) - half - disp) & 0xffff);
      good_ &= ~(1u << first | 1u << second);
      rm = sum;
    }
    head.push_back(static_cast<uint8_t>(size << 6 | rm | reg));
    Append32(&head, disp, size);
  }
  head.insert(head.end(), tail.begin(), tail.end());
  e->code = head;
  return true;
}

// Gives the instruction another memory operand than the random one, mostly.
bool InsnPicker::Address(EncodedInsn* e, Item* item) {
  if (immediate_at_ > e->code.size()) return false;
  if (e->insn.has(kVsib)) return AddressVsib(e, item);
  // It would write code, which may read undefined flags then.
  if (layout_.real_segments && e->insn.seg() == kCs) return false;
  const unsigned width = e->insn.address_size;
  if (width == 2 && !layout_.near_data()) return false;
  if (Chance(1)) return true;
  if (width == 2) return Address16(e, item);
  if (width == 4 && !layout_.is64() && Chance(8)) return AddressFar(e, item);
  const unsigned grain = Chance(96) ? Alignment(e->insn) : 1;
  std::vector<uint8_t> head(e->code.begin(), e->code.begin() + static_cast<long>(modrm_at_));
  const std::vector<uint8_t> tail(e->code.begin() + static_cast<long>(immediate_at_),
                                  e->code.end());
  const unsigned reg = e->code[modrm_at_] & 0x38u;
  const auto put = [&](unsigned value) { head.push_back(static_cast<uint8_t>(value)); };
  const uint64_t form = Below(100);
  if (form < 8) {  // no registers
    if (!SetRexBits(&head, e->insn, 0, 0)) return false;
    if (layout_.is64()) put(4 | reg), put(0x25);
    if (!layout_.is64()) put(5 | reg);
    Append32(&head, DataOffset(Target(grain)));
  } else if (form < 20 && layout_.is64()) {
    if (!SetRexBits(&head, e->insn, 0, 0)) return false;
    put(5 | reg);
    rip_target_ = static_cast<int>(Target(grain));
    Append32(&head, 0);
  } else if (form < 28) {
    if (!SetRexBits(&head, e->insn, 0, 0)) return false;
    put(0x44 | reg), put(0x24);
    // In a function not at its return address.
    put(static_cast<unsigned>(stack_ && grain == 1 ? Below(128) : 64 + Below(48)) &
        ~((grain > 1 ? 32u : 1u) - 1));
  } else {
    const bool high = layout_.is64() &&
                      ((e->insn.flags & kHasVex) ? head[modrm_at_ - 3] != 0xc5 : e->insn.rex != 0);
    const unsigned base = Pointer(item, grain, high);
    unsigned index = 4;
    if (form < 45 && grain == 1) {
      index = high && Chance(50) ? static_cast<unsigned>(8 + Below(4)) : Scratch();
      if (index >= 8) item->code.push_back(0x45);  // MOVZX index, its low byte
      item->code.push_back(0x0f);
      item->code.push_back(0xb6);
      item->code.push_back(static_cast<uint8_t>(0xc0 | (index & 7) << 3 | (index & 7)));
    }
    if (!SetRexBits(&head, e->insn, index == 4 ? 0 : index, base)) return false;
    const unsigned size = Chance(20) && (base & 7) != 5 ? 0 : Chance(80) ? 1 : 4;
    const unsigned mod = size == 4 ? 2 : size;
    const bool sib = index != 4 || (base & 7) == 4;
    put(mod << 6 | reg | (sib ? 4 : base & 7));
    if (sib) put(static_cast<unsigned>(Below(4) << 6) | (index & 7) << 3 | (base & 7));
    const uint64_t disp = (Chance(70) ? Below(128) : ~Below(128)) & ~uint64_t{grain - 1};
    Append32(&head, disp, size);
  }
  head.insert(head.end(), tail.begin(), tail.end());
  e->code = head;
  return true;
}

bool InsnPicker::Append(const EncodedInsn& e, Item* item) {
  Item next = *item;
  std::vector<uint8_t> code = e.code;
  const bool fs_or_gs = e.insn.has_memory() && !(e.insn.flags & kHasSegment) && Chance(6);
  if (fs_or_gs) code.insert(code.begin(), Chance(50) ? 0x64 : 0x65);
  Insn insn;
  if (Decode(context_, code, &insn) != DecodeStatus::kOk || insn.length != code.size() ||
      insn.row != e.insn.row || !AddFlags(&next, insn))
    return false;
  const size_t at = next.code.size();
  next.code.insert(next.code.end(), code.begin(), code.end());
  if (rip_target_ >= 0) {
    Fixup fixup;
    fixup.end = static_cast<uint8_t>(next.code.size());
    fixup.at = static_cast<uint8_t>(at + (fs_or_gs ? 1 : 0) + modrm_at_ + 1);
    fixup.size = 4;
    fixup.addend =
        static_cast<int64_t>(layout_.data) + rip_target_ - static_cast<int64_t>(layout_.code);
    next.fixups.push_back(fixup);
  }
  *item = next;
  return true;
}

bool InsnPicker::TryRow(const Row& row, Item* item, bool stack) {
  if (layout_.is64() ? row.attributes & kNo64 : row.attributes & kOnly64) return false;
  EncodedInsn e;
  if (!Encode(row, context_, &e) || e.undefined_encoding) return false;
  if (e.insn.row != &row) return false;
  Item next = *item;
  const uint32_t good = good_, aligned = aligned_;
  rip_target_ = -1;
  AimImplicit(e.insn, &next);
  bool ok = true;
  if (HasOperand(*e.insn.row, OperandKind::kMoffs)) {
    const uint64_t target = DataOffset(Target(1));
    ok = e.insn.address_size != 2 || layout_.near_data();
    for (unsigned i = 0; ok && i < e.insn.address_size; ++i)
      e.code[e.code.size() - e.insn.address_size + i] = static_cast<uint8_t>(target >> (8 * i));
  }
  if (e.insn.has_memory() && !(row.modrm_mask & 0xc0)) ok = ok && Address(&e, &next);
  if (ok && e.insn.has_memory() && Is(row, {"BT", "BTS", "BTR", "BTC"}) &&
      !HasOperand(row, OperandKind::kImm) && !(pointers_ >> (e.insn.reg & 15) & 1) &&
      e.insn.reg != kRsp && !layout_.is16() && Chance(90)) {
    // A bit offset of a signed byte's size.
    const unsigned r = e.insn.reg & 15;
    if (layout_.is64()) next.code.push_back(static_cast<uint8_t>(r >= 8 ? 0x4d : 0x48));
    next.code.push_back(0x0f);
    next.code.push_back(0xbe);
    next.code.push_back(static_cast<uint8_t>(0xc0 | (r & 7) << 3 | (r & 3)));
  }
  if (ok && AcceptRegisters(e.insn, stack) && Append(e, &next)) {
    *item = next;
    return true;
  }
  good_ = good;
  aligned_ = aligned;
  return false;
}

void InsnPicker::Pick(Item* item, Kind kind, bool stack) {
  stack_ = stack;
  if (item->undefined != 0) kind = Kind::kAny;
  for (;;) {
    const uint64_t choice = Below(1000);
    const std::vector<const Row*>& rows = kind == Kind::kFlagReader         ? flag_readers_
                                          : choice < 2 && context_.cpl == 3 ? privileged_
                                          : choice < 650                    ? integer_
                                          : choice < 880                    ? vector_
                                                                            : x87_;
    if (TryRow(*rows[Below(rows.size())], item, stack)) return;
  }
}

}  // namespace kvartz::cpu::x86::programs
