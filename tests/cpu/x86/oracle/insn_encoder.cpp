#include "cpu/x86/oracle/insn_encoder.h"

#include <algorithm>
#include <cstring>

namespace kvartz::cpu::x86::oracle {

bool Is(const Row& row, std::initializer_list<std::string_view> names) {
  return std::find(names.begin(), names.end(), row.mnemonic) != names.end();
}

bool HasOperand(const Row& row, OperandKind kind) {
  return std::any_of(row.operands, row.operands + row.operand_count,
                     [&](const Operand& o) { return o.kind == kind; });
}

uint64_t InsnEncoder::Value() {
  switch (Below(8)) {
    case 0:
      return Below(4);
    case 1:
      return ~Below(4);
    case 2:
      return uint64_t{1} << Below(64);
    case 3:
      return (uint64_t{1} << Below(64)) - 1;
    case 4:
      return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(Random())));
    case 5:
      return Random() & 0xffff;
    default:
      return Random();
  }
}

void InsnEncoder::FillInteresting(uint8_t* bytes, unsigned size) {
  static constexpr uint64_t kDoubles[] = {0,
                                          0x8000000000000000,
                                          0x3ff0000000000000,
                                          0x7ff0000000000000,
                                          0xfff0000000000000,
                                          0x7ff8000000000000,
                                          0x7ff0000000000001,
                                          1,
                                          0x000fffffffffffff,
                                          0x7fefffffffffffff,
                                          0x4330000000000000,
                                          0x41dfffffffc00000,
                                          0xc1e0000000000000,
                                          0x43e0000000000000};
  static constexpr uint32_t kFloats[] = {0,          0x80000000, 0x3f800000, 0x7f800000, 0xff800000,
                                         0x7fc00000, 0x7f800001, 1,          0x007fffff, 0x7f7fffff,
                                         0x4b000000, 0x4effffff, 0xcf000000, 0x5f000000};
  const unsigned kind = static_cast<unsigned>(Below(4));
  for (unsigned i = 0; i < size; i += 8) {
    uint64_t word = Random();
    if (kind == 0) word = Value();
    if (kind == 1) {
      word = kDoubles[Below(std::size(kDoubles))];
      if (Chance(30)) word = Below(2) << 63 | (1023 - 60 + Below(120)) << 52 | (Random() >> 12);
    }
    if (kind == 2) {
      const auto one = [&]() -> uint64_t {
        return Chance(70) ? kFloats[Below(std::size(kFloats))]
                          : static_cast<uint32_t>(Below(2) << 31 | (100 + Below(60)) << 23 |
                                                  Below(1 << 23));
      };
      word = one() | one() << 32;
    }
    std::memcpy(bytes + i, &word, std::min(8u, size - i));
  }
}

void InsnEncoder::RandomFpu(XsaveArea* out) {
  XsaveArea& fpu = *out;
  fpu = XsaveArea();
  for (unsigned i = 0; i < 16; ++i) {
    FillInteresting(fpu.xmm[i], 16);
    FillInteresting(fpu.ymm_high[i], 16);
  }
  fpu.mxcsr = 0x1f80;
  if (Chance(50))
    fpu.mxcsr = static_cast<uint32_t>((Random() & 0xffc0) | (Chance(70) ? 0x1f80 : 0));
  if (Chance(20)) fpu.mxcsr |= static_cast<uint32_t>(Random() & 0x3f);
  fpu.fcw = 0x37f;
  if (Chance(50))
    fpu.fcw = static_cast<uint16_t>((Random() & 0xf3f & (Chance(80) ? ~0 : 0xf00)) | 0x40 |
                                    (Chance(70) ? 0x3f : 0));
  fpu.fsw = static_cast<uint16_t>(Below(8) << 11 | (Chance(30) ? Random() & 0x4700 : 0));
  fpu.ftw = static_cast<uint8_t>(Chance(60) ? 0xff : Random());
  for (auto& st : fpu.st) {
    uint64_t mantissa = Random() | uint64_t{1} << 63;
    auto exponent = static_cast<uint16_t>(Below(2) << 15 | (16383 - 70 + Below(140)));
    if (Chance(30)) mantissa = Chance(50) ? uint64_t{1} << 63 : Chance(50) ? 0 : Random();
    if (Chance(20))
      exponent = static_cast<uint16_t>(Chance(50) ? 0x7fff : Chance(50) ? 0 : Random());
    if (mantissa == 0) exponent &= 0x8000;
    std::memcpy(st, &mantissa, 8);
    std::memcpy(st + 8, &exponent, 2);
  }
}

void InsnEncoder::EncodePrefixes(const Row& row, CodeMode mode, EncodedInsn* out, unsigned* rex) {
  auto& code = out->code;
  *rex = 0;
  if (Chance(5)) code.push_back(std::array<uint8_t, 4>{0x2e, 0x36, 0x3e, 0x26}[Below(4)]);
  if (mode == CodeMode::k64 && Chance(5)) code.push_back(0x65);
  if (Chance(5)) code.push_back(0x67);
  if (row.vex) return;
  // What 66 does to near branches and to MOVSXD in 64-bit mode differs between vendors.
  if (row.prefix == PrefixRule::kAny && !(row.attributes & kBranch) && !Is(row, {"MOVSXD"}) &&
      Chance(25))
    code.push_back(0x66);
  if (row.prefix == PrefixRule::k66) code.push_back(0x66);
  if (row.prefix == PrefixRule::kF3) code.push_back(0xf3);
  if (row.prefix == PrefixRule::kF2) code.push_back(0xf2);
  if ((row.attributes & kRep) && Chance(50)) code.push_back(Chance(50) ? 0xf2 : 0xf3);
  if ((row.attributes & kLock) && Chance(15)) code.push_back(0xf0);
  if (mode == CodeMode::k64 && (row.w == Tri::kYes || Chance(50))) {
    *rex = 0x40 | static_cast<unsigned>(Below(16));
    if (row.w == Tri::kYes) *rex |= 8;
    if (row.w == Tri::kNo) *rex &= ~8u;
    if (row.rex_b_clear) *rex &= ~1u;
    rex_at_ = code.size();
    code.push_back(static_cast<uint8_t>(*rex));
  }
}

void InsnEncoder::EncodeModrm(const Row& row, CodeMode mode, EncodedInsn* out) {
  auto& code = out->code;
  unsigned modrm = static_cast<unsigned>(Random() & 0xff & ~row.modrm_mask) | row.modrm_value;
  if ((row.modrm_mask & 0xc0) == 0) {
    if (row.memory == Tri::kNo) modrm |= 0xc0;
    if (row.memory == Tri::kYes && modrm >= 0xc0)
      modrm &= static_cast<unsigned>(Below(3) << 6 | 0x3f);
  }
  if (row.attributes & kVsib) modrm = (modrm & ~7u) | 4;
  modrm_at_ = code.size();
  code.push_back(static_cast<uint8_t>(modrm));
  displacement_size_ = 0;
  if (modrm >= 0xc0) return;
  const bool has67 = std::find(code.begin(), code.end() - 1, 0x67) != code.end() - 1;
  const bool address16 = mode == CodeMode::k16 ? !has67 : mode == CodeMode::k32 && has67;
  const unsigned mod = modrm >> 6, rm = modrm & 7;
  unsigned size = mod == 1 ? 1 : mod == 2 ? 4 : 0;
  if (address16) {
    size = mod == 1 ? 1 : (mod == 2 || (mod == 0 && rm == 6)) ? 2 : 0;
  } else if (rm == 4) {
    const auto sib = static_cast<uint8_t>(Random());
    code.push_back(sib);
    if (mod == 0 && (sib & 7) == 5) size = 4;
  } else if (mod == 0 && rm == 5) {
    size = 4;
  }
  displacement_at_ = code.size();
  displacement_size_ = size;
  const auto disp = static_cast<uint32_t>(static_cast<int32_t>(Random()) >> Below(32));
  for (unsigned i = 0; i < size; ++i) code.push_back(static_cast<uint8_t>(disp >> (8 * i)));
}

void InsnEncoder::EncodeImmediates(const Row& row, EncodedInsn* out) {
  immediate_at_ = out->code.size();
  for (ImmKind kind : row.imm) {
    unsigned size = 0;
    switch (kind) {
      case ImmKind::kNone:
        break;
      case ImmKind::kIb:
      case ImmKind::kCb:
      case ImmKind::kIs4:
        size = 1;
        break;
      case ImmKind::kIw:
        size = 2;
        break;
      default:
        size = 8;
        break;  // as many bytes as any of these may take; the decoder tells how many count
    }
    const uint64_t value = Value();
    for (unsigned i = 0; i < size; ++i) out->code.push_back(static_cast<uint8_t>(value >> (8 * i)));
  }
}

bool InsnEncoder::Encode(const Row& row, const DecodeContext& context, EncodedInsn* out) {
  const CodeMode mode = context.mode;
  out->code.clear();
  unsigned rex;
  EncodePrefixes(row, mode, out, &rex);
  auto& code = out->code;
  if (row.vex) {
    const unsigned map = row.map == OpcodeMap::k0f ? 1 : row.map == OpcodeMap::k0f38 ? 2 : 3;
    const unsigned pp = row.prefix == PrefixRule::k66   ? 1
                        : row.prefix == PrefixRule::kF3 ? 2
                        : row.prefix == PrefixRule::kF2 ? 3
                                                        : 0;
    const unsigned l =
        row.vex_l == Tri::kAny ? static_cast<unsigned>(Below(2)) : row.vex_l == Tri::kYes;
    const unsigned w = row.w == Tri::kAny ? static_cast<unsigned>(Below(2)) : row.w == Tri::kYes;
    const bool vvvv = HasOperand(row, OperandKind::kXmmVvvv) ||
                      HasOperand(row, OperandKind::kYmmVvvv) || HasOperand(row, OperandKind::kVvvv);
    const auto inverted = static_cast<unsigned>(vvvv ? Below(16) : 15);
    const unsigned tail = inverted << 3 | l << 2 | pp;
    const unsigned rxb = mode == CodeMode::k64 ? static_cast<unsigned>(Below(8)) : 7;
    if (map == 1 && w == 0 && Chance(30)) {
      code.push_back(0xc5);
      code.push_back(
          static_cast<uint8_t>((rxb & 4) << 5 | (mode != CodeMode::k64 ? tail | 0x40 : tail)));
    } else {
      code.push_back(0xc4);
      code.push_back(static_cast<uint8_t>(rxb << 5 | map));
      code.push_back(static_cast<uint8_t>(w << 7 | tail));
    }
  } else {
    if (row.map != OpcodeMap::kPrimary) code.push_back(0x0f);
    if (row.map == OpcodeMap::k0f38) code.push_back(0x38);
    if (row.map == OpcodeMap::k0f3a) code.push_back(0x3a);
  }
  code.push_back(static_cast<uint8_t>(row.opcode | (row.opcode_register ? Below(8) : 0)));
  displacement_size_ = 0;
  if (row.has_modrm) EncodeModrm(row, mode, out);
  EncodeImmediates(row, out);
  if (code.size() > 15) return false;

  std::memset(static_cast<void*>(&out->insn), 0, sizeof(Insn));
  const DecodeStatus status = Decode(context, code, &out->insn);
  out->undefined_encoding = status == DecodeStatus::kInvalid;
  if (status != DecodeStatus::kOk && status != DecodeStatus::kInvalid) return false;
  if (status == DecodeStatus::kOk) code.resize(out->insn.length);
  return true;
}

}  // namespace kvartz::cpu::x86::oracle
