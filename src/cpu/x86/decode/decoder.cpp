#include <algorithm>

#include "cpu/x86/decode/table.h"

namespace kvartz::cpu::x86 {
namespace {

// Walks the code bytes; the first failure sticks in `status_`.
class Decoder {
 public:
  Decoder(const DecodeContext& context, std::span<const uint8_t> bytes, Insn* insn)
      : context_(context),
        bytes_(bytes.first(std::min<size_t>(bytes.size(), sizeof insn->bytes))),
        insn_(*insn) {}

  DecodeStatus Run() {
    insn_ = Insn{};
    insn_.base = insn_.index = kNoRegister;
    insn_.segment = kDs;
    if (!Prefixes() || !Opcode() || !Match()) {
      return status_;
    }
    Sizes();
    if (!Memory() || !Immediates() || !Check()) {
      return status_;
    }
    ByteRegisters();
    Finish();
    return DecodeStatus::kOk;
  }

 private:
  bool is64() const { return context_.mode == CodeMode::k64; }
  bool Fail(DecodeStatus status) {
    status_ = status;
    return false;
  }
  bool Invalid() { return Fail(DecodeStatus::kInvalid); }

  bool Peek(uint8_t* byte) {
    if (position_ >= bytes_.size()) {
      return Fail(bytes_.size() == sizeof insn_.bytes ? DecodeStatus::kTooLong
                                                      : DecodeStatus::kTruncated);
    }
    *byte = bytes_[position_];
    return true;
  }
  bool Next(uint8_t* byte) {
    if (!Peek(byte)) {
      return false;
    }
    ++position_;
    return true;
  }
  // A little-endian number of `size` bytes, sign-extended.
  bool Number(unsigned size, int64_t* value) {
    uint64_t bits = 0;
    for (unsigned i = 0; i < size; ++i) {
      uint8_t byte;
      if (!Next(&byte)) {
        return false;
      }
      bits |= uint64_t{byte} << (8 * i);
    }
    const unsigned shift = 64 - 8 * size;
    *value = static_cast<int64_t>(bits << shift) >> shift;
    return true;
  }

  void Segment(SegReg segment) {
    if (is64() && segment < kFs) {
      return;  // no effect there, not even on an earlier FS or GS override
    }
    override_ = segment;
    insn_.flags |= kHasSegment;
  }

  bool Prefixes() {
    uint8_t byte;
    while (Next(&byte)) {
      uint8_t rex = 0;
      switch (byte) {
        case 0x26:
          Segment(kEs);
          break;
        case 0x2e:
          Segment(kCs);
          break;
        case 0x36:
          Segment(kSs);
          break;
        case 0x3e:
          Segment(kDs);
          break;
        case 0x64:
          Segment(kFs);
          break;
        case 0x65:
          Segment(kGs);
          break;
        case 0x66:
          insn_.flags |= kHas66;
          break;
        case 0x67:
          insn_.flags |= kHas67;
          break;
        case 0xf0:
          insn_.flags |= kHasLock;
          break;
        case 0xf2:
          insn_.flags = (insn_.flags & ~kHasRep) | kHasRepne;
          break;
        case 0xf3:
          insn_.flags = (insn_.flags & ~kHasRepne) | kHasRep;
          break;
        default:
          if (!is64() || (byte & 0xf0) != 0x40) {
            --position_;
            return true;
          }
          rex = byte;
      }
      insn_.rex = rex;  // counts only directly before the opcode
    }
    return false;
  }

  bool Opcode() {
    uint8_t byte;
    if (!Next(&byte)) {
      return false;
    }
    if (byte == 0xc4 || byte == 0xc5) {
      uint8_t next;
      if (!Peek(&next)) {
        return false;
      }
      if (is64() || (next >= 0xc0 && context_.protected_mode)) {
        return Vex(byte);
      }
    }
    map_ = OpcodeMap::kPrimary;
    if (byte == 0x0f) {
      map_ = OpcodeMap::k0f;
      if (!Next(&byte)) {
        return false;
      }
      if (byte == 0x38 || byte == 0x3a) {
        map_ = byte == 0x38 ? OpcodeMap::k0f38 : OpcodeMap::k0f3a;
        if (!Next(&byte)) {
          return false;
        }
      }
    }
    insn_.opcode = byte;
    w_ = (insn_.rex & 8) != 0;
    prefix_ = (insn_.flags & kHasRep) != 0     ? PrefixRule::kF3
              : (insn_.flags & kHasRepne) != 0 ? PrefixRule::kF2
              : (insn_.flags & kHas66) != 0    ? PrefixRule::k66
                                               : PrefixRule::kNp;
    return true;
  }

  // SDM vol. 2 section 2.3.5: the fields are stored inverted.
  bool Vex(uint8_t escape) {
    if (insn_.rex != 0 || (insn_.flags & (kHas66 | kHasRep | kHasRepne | kHasLock)) != 0) {
      return Invalid();
    }
    uint8_t first, last;
    if (!Next(&first)) {
      return false;
    }
    uint8_t rex = 0x40 | (~first >> 5 & 4);  // R
    unsigned map = 1;
    last = first;
    if (escape == 0xc4) {
      if (!Next(&last)) {
        return false;
      }
      rex |= (~first >> 5 & 3) | (last >> 4 & 8);  // X, B, W
      map = first & 0x1f;
    }
    if (map < 1 || map > 3) {
      return Invalid();
    }
    if (!is64()) {
      rex &= 0x48;
    }
    insn_.flags |= kHasVex;
    insn_.rex = rex;
    insn_.vvvv = (~last >> 3) & (is64() ? 15 : 7);
    vvvv_used_ = (~last >> 3 & 15) != 0;
    insn_.vex_l = last >> 2 & 1;
    insn_.vex_pp = last & 3;
    map_ = static_cast<OpcodeMap>(map);
    w_ = (rex & 8) != 0;
    constexpr PrefixRule kRules[] = {PrefixRule::kNp, PrefixRule::k66, PrefixRule::kF3,
                                     PrefixRule::kF2};
    prefix_ = kRules[last & 3];
    return Next(&insn_.opcode);
  }

  bool Match() {
    const InsnTable::Bucket bucket =
        InsnTable::Get().Find((insn_.flags & kHasVex) != 0, map_, insn_.opcode);
    if (bucket.rows.empty()) {
      return Invalid();
    }
    if (bucket.has_modrm && !Next(&insn_.modrm)) {
      return false;
    }
    for (const Row* row : bucket.rows) {
      if (Matches(*row)) {
        insn_.row = row;
        return true;
      }
    }
    return Invalid();
  }

  bool Matches(const Row& row) const {
    if (row.prefix != PrefixRule::kAny && row.prefix != prefix_) {
      return false;
    }
    if ((insn_.modrm & row.modrm_mask) != row.modrm_value) {
      return false;
    }
    if (row.memory != Tri::kAny && (row.memory == Tri::kYes) == (insn_.modrm >= 0xc0)) {
      return false;
    }
    if (row.w != Tri::kAny && (row.w == Tri::kYes) != w_) {
      return false;
    }
    if (row.vex_l != Tri::kAny && (row.vex_l == Tri::kYes) != (insn_.vex_l != 0)) {
      return false;
    }
    if (row.rex_b_clear && (insn_.rex & 1) != 0) {
      return false;
    }
    if ((row.attributes & (is64() ? kNo64 : kOnly64)) != 0) {
      return false;
    }
    return context_.features.Has(row.features[0]) && context_.features.Has(row.features[1]);
  }

  // Address and operand size.
  void Sizes() {
    const Row& row = *insn_.row;
    const bool swap_address = (insn_.flags & kHas67) != 0;
    const bool swap_operand = (insn_.flags & kHas66) != 0 && row.prefix != PrefixRule::k66;
    const bool w64 = w_ && is64();
    if (!is64() && row.w == Tri::kAny) {
      insn_.rex &= static_cast<uint8_t>(
          ~8);  // VEX.W that chooses a register size counts in 64-bit mode only
    }
    switch (context_.mode) {
      case CodeMode::k16:
        insn_.address_size = swap_address ? 4 : 2;
        insn_.operand_size = swap_operand ? 4 : 2;
        break;
      case CodeMode::k32:
        insn_.address_size = swap_address ? 2 : 4;
        insn_.operand_size = swap_operand ? 2 : 4;
        break;
      case CodeMode::k64:
        insn_.address_size = swap_address ? 4 : 8;
        insn_.operand_size = w64                                  ? 8
                             : swap_operand                       ? 2
                             : (row.attributes & kDefault64) != 0 ? 8
                                                                  : 4;
        if ((row.attributes & kForce64) != 0) {
          insn_.operand_size = 8;
        }
        break;
    }
    full_size_ = insn_.operand_size;
    for (unsigned i = 0; i < row.operand_count; ++i) {
      const Operand& operand = row.operands[i];
      const bool general =
          operand.kind == OperandKind::kReg || operand.kind == OperandKind::kRm ||
          operand.kind == OperandKind::kRmReg || operand.kind == OperandKind::kVvvv ||
          operand.kind == OperandKind::kMoffs || operand.kind == OperandKind::kStrSrc ||
          operand.kind == OperandKind::kStrDst ||
          (operand.kind == OperandKind::kFixedReg && operand.size == 1);
      if (general) {
        insn_.operand_size = operand.size >= kSizeRegOrByte ? insn_.operand_size : operand.size;
      }
      if (general ||
          (operand.kind != OperandKind::kImm && operand.kind != OperandKind::kFixedReg)) {
        break;  // the first operand that is neither an immediate nor DX decides
      }
    }
  }

  bool Memory() {
    const Row& row = *insn_.row;
    const unsigned extend = is64() ? insn_.rex : 0;
    insn_.reg =
        static_cast<uint8_t>(row.opcode_register ? (insn_.opcode & 7) | (extend & 1) << 3
                                                 : (insn_.modrm >> 3 & 7) | (extend & 4) << 1);
    if (override_ != kSegCount) {
      insn_.segment = override_;
    }
    if (!row.has_modrm) {
      return true;
    }
    const unsigned mod = (row.attributes & kModIgnored) != 0 ? 3 : insn_.mod();
    const unsigned rm = insn_.modrm & 7;
    insn_.rm = static_cast<uint8_t>(rm | (extend & 1) << 3);
    if (mod == 3) {
      return true;
    }
    insn_.flags |= kHasMemory;
    if (insn_.address_size == 2) {
      return Memory16(mod, rm);
    }
    insn_.base = insn_.rm;
    if (rm == 4) {
      if (!Sib(mod, extend)) {
        return false;
      }
    } else if ((row.attributes & kVsib) != 0) {
      return Invalid();
    }
    unsigned displacement = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    if (mod == 0 && (insn_.base & 7) == 5 &&
        insn_.base != kNoRegister) {  // RBP and R13 as a base need a displacement
      insn_.base = rm == 5 && is64() ? kBaseRip : kNoRegister;
      displacement = 4;
    }
    if (override_ == kSegCount && (insn_.base == kRsp || insn_.base == kRbp)) {
      insn_.segment = kSs;
    }
    return Displacement(displacement);
  }

  bool Sib(unsigned mod, unsigned extend) {
    uint8_t sib;
    if (!Next(&sib)) {
      return false;
    }
    insn_.scale = sib >> 6;
    const unsigned index = (sib >> 3 & 7) | (extend & 2) << 2;
    insn_.index = index == 4 && (insn_.row->attributes & kVsib) == 0 ? kNoRegister
                                                                     : static_cast<uint8_t>(index);
    insn_.base = static_cast<uint8_t>((sib & 7) | (extend & 1) << 3);
    return true;
  }

  bool Memory16(unsigned mod, unsigned rm) {
    constexpr uint8_t kBase[] = {kRbx, kRbx, kRbp, kRbp, kRsi, kRdi, kRbp, kRbx};
    constexpr uint8_t kIndex[] = {kRsi,        kRdi,        kRsi,        kRdi,
                                  kNoRegister, kNoRegister, kNoRegister, kNoRegister};
    if ((insn_.row->attributes & kVsib) != 0) {
      return Invalid();
    }
    const bool absolute = mod == 0 && rm == 6;
    insn_.base = absolute ? kNoRegister : kBase[rm];
    insn_.index = kIndex[rm];
    if (override_ == kSegCount && insn_.base == kRbp) {
      insn_.segment = kSs;
    }
    return Displacement(mod == 1 ? 1 : mod == 2 || absolute ? 2 : 0);
  }

  // A displacement of 0..4 bytes.
  bool Displacement(unsigned size) { return size == 0 || Number(size, &insn_.disp); }

  bool Immediates() {
    const Row& row = *insn_.row;
    int64_t second = 0;
    if (row.imm[0] != ImmKind::kNone && !Immediate(row.imm[0], &insn_.imm)) {
      return false;
    }
    if (row.imm[1] != ImmKind::kNone && !Immediate(row.imm[1], &second)) {
      return false;
    }
    if (row.imm[0] != ImmKind::kCp) {
      insn_.imm2 = static_cast<uint16_t>(second);
    }
    if (row.imm[1] == ImmKind::kIb) {
      insn_.imm2 &= 0xff;
    }
    return true;
  }

  bool Immediate(ImmKind kind, int64_t* value) {
    const unsigned z = full_size_ == 2 ? 2 : 4;
    switch (kind) {
      case ImmKind::kNone:
        return true;
      case ImmKind::kIb:
      case ImmKind::kCb:
        return Number(1, value);
      case ImmKind::kIs4:
        if (!Number(1, value)) {
          return false;
        }
        *value &= is64() ? 0xff : 0x7f;  // eight registers outside 64-bit mode
        return true;
      case ImmKind::kIw:
        return Number(2, value);
      case ImmKind::kId:
        return Number(4, value);
      case ImmKind::kIz:
      case ImmKind::kCz:
        return Number(z, value);
      case ImmKind::kIv:
        return Number(full_size_, value);
      case ImmKind::kMoffs:
        if (!Number(insn_.address_size, &insn_.disp)) {
          return false;
        }
        if (insn_.address_size == 4) {
          insn_.disp = static_cast<uint32_t>(insn_.disp);
        } else if (insn_.address_size == 2) {
          insn_.disp = static_cast<uint16_t>(insn_.disp);
        }
        return true;
      case ImmKind::kCp: {
        int64_t selector;
        if (!Number(z, value) || !Number(2, &selector)) {
          return false;
        }
        *value = z == 2 ? static_cast<uint16_t>(*value) : static_cast<uint32_t>(*value);
        insn_.imm2 = static_cast<uint16_t>(selector);
        return true;
      }
    }
    return Invalid();
  }

  bool Check() {
    const Row& row = *insn_.row;
    if ((insn_.flags & kHasLock) != 0 && ((row.attributes & kLock) == 0 || !insn_.has_memory())) {
      return Invalid();
    }
    if (!context_.protected_mode && (row.vex || (row.attributes & kProtected) != 0)) {
      return Invalid();
    }
    if (row.vex && vvvv_used_ && !UsesVvvv(row)) {
      return Invalid();
    }
    return true;
  }

  static bool UsesVvvv(const Row& row) {
    for (const Operand& operand : row.operands) {
      if (operand.kind == OperandKind::kVvvv || operand.kind == OperandKind::kXmmVvvv ||
          operand.kind == OperandKind::kYmmVvvv) {
        return true;
      }
    }
    return false;
  }

  void ByteRegisters() {
    if (insn_.rex != 0) {
      return;
    }
    for (const Operand& operand : insn_.row->operands) {
      if (operand.size != 1) {
        continue;
      }
      if (operand.kind == OperandKind::kReg && insn_.reg >= 4) {
        insn_.reg = kHighByte + insn_.reg - 4;
      } else if (operand.kind == OperandKind::kRm && !insn_.has_memory() && insn_.rm >= 4) {
        insn_.rm = kHighByte + insn_.rm - 4;
      }
    }
  }

  static void ExecPrivilegeViolation(Cpu& cpu, const Insn&) { Raise(cpu, kGP, 0); }

  void Finish() {
    const Row& row = *insn_.row;
    insn_.length = static_cast<uint8_t>(position_);
    std::memcpy(insn_.bytes, bytes_.data(), position_);
    if ((row.attributes & kPrivileged) != 0 && context_.cpl != 0) {
      insn_.exec = ExecPrivilegeViolation;
    } else {
      insn_.exec = row.pick != nullptr ? row.pick(insn_) : row.exec;
    }
  }

  const DecodeContext& context_;
  std::span<const uint8_t> bytes_;
  Insn& insn_;
  size_t position_ = 0;
  DecodeStatus status_ = DecodeStatus::kOk;
  OpcodeMap map_ = OpcodeMap::kPrimary;
  PrefixRule prefix_ = PrefixRule::kNp;
  SegReg override_ = kSegCount;
  bool w_ = false;
  bool vvvv_used_ = false;
  uint8_t full_size_ = 0;  // operand size before a byte operand made it 1
};

}  // namespace

DecodeStatus Decode(const DecodeContext& context, std::span<const uint8_t> bytes, Insn* insn) {
  return Decoder(context, bytes, insn).Run();
}

unsigned OperandSize(const Insn& insn, const Operand& operand) {
  switch (operand.size) {
    case kSizeOperand:
      return insn.operand_size;
    case kSizeW:
      return insn.operand_size == 8 ? 8 : 4;
    case kSizeRegOrWord:
      return insn.has_memory() ? 2 : insn.operand_size;
    case kSizeRegOrByte:
      return insn.has_memory() ? 1 : insn.operand_size == 8 ? 8 : 4;
    default:
      return operand.size;
  }
}

}  // namespace kvartz::cpu::x86
