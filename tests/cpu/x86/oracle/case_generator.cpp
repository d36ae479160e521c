#include "cpu/x86/oracle/case_generator.h"

#include <algorithm>
#include <cstring>
#include <string_view>

namespace kvartz::cpu::x86::oracle {
namespace {

bool Is(const Row& row, std::initializer_list<std::string_view> names) {
  return std::find(names.begin(), names.end(), row.mnemonic) != names.end();
}

bool HasOperand(const Row& row, OperandKind kind) {
  return std::any_of(row.operands, row.operands + row.operand_count,
                     [&](const Operand& o) { return o.kind == kind; });
}

}  // namespace

const char* WhyExcluded(const Row& row) {
  if (row.attributes & (kSystem | kPrivileged)) return "system instruction";
  if (Is(row, {"RDRAND", "RDSEED"})) return "result is random";
  if (Is(row, {"POPF", "POPFD", "POPFQ"})) return "changes TF, which ends the case";
  if (Is(row, {"XSAVE", "XSAVEOPT", "XSAVEC", "XRSTOR", "FXSAVE", "FXRSTOR"}))
    return "layout depends on the host's features";
  if (Is(row, {"FNSAVE", "FRSTOR", "FNSTENV", "FLDENV"}))
    return "stores instruction pointers that hosts treat differently";
  if (Is(row, {"LDMXCSR", "VLDMXCSR"}))
    return "which MXCSR bits are reserved differs between vendors";
  if (HasOperand(row, OperandKind::kSreg) || HasOperand(row, OperandKind::kFixedSreg))
    return "segment registers";
  if (HasOperand(row, OperandKind::kFar)) return "far transfer";
  if (Is(row, {"LDS", "LES", "LFS", "LGS", "LSS"})) return "segment registers";
  return nullptr;
}

uint64_t CaseGenerator::Value() {
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

void CaseGenerator::FillInteresting(uint8_t* bytes, unsigned size) {
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

void CaseGenerator::RandomRegisters(Case* out) {
  Registers& r = out->registers;
  for (auto& value : r.gpr) value = Value();
  r.gpr[kRsp] = kData + 0x800 + (Below(0x100) << (Chance(80) ? 3 : 0));
  r.rflags = 0x202 | (Random() & rflags::kStatus);
  if (Chance(20)) r.rflags |= rflags::kDf;
  XsaveArea& fpu = r.fpu;
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

void CaseGenerator::EncodePrefixes(const Row& row, Case* out, unsigned* rex) {
  auto& code = out->code;
  *rex = 0;
  if (Chance(5)) code.push_back(std::array<uint8_t, 4>{0x2e, 0x36, 0x3e, 0x26}[Below(4)]);
  if (out->mode == Mode::k64 && Chance(5)) code.push_back(0x65);
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
  if (out->mode == Mode::k64 && (row.w == Tri::kYes || Chance(50))) {
    *rex = 0x40 | static_cast<unsigned>(Below(16));
    if (row.w == Tri::kYes) *rex |= 8;
    if (row.w == Tri::kNo) *rex &= ~8u;
    if (row.rex_b_clear) *rex &= ~1u;
    code.push_back(static_cast<uint8_t>(*rex));
  }
}

void CaseGenerator::EncodeModrm(const Row& row, Case* out) {
  auto& code = out->code;
  unsigned modrm = static_cast<unsigned>(Random() & 0xff & ~row.modrm_mask) | row.modrm_value;
  if ((row.modrm_mask & 0xc0) == 0) {
    if (row.memory == Tri::kNo) modrm |= 0xc0;
    if (row.memory == Tri::kYes && modrm >= 0xc0)
      modrm &= static_cast<unsigned>(Below(3) << 6 | 0x3f);
  }
  if (row.attributes & kVsib) modrm = (modrm & ~7u) | 4;
  code.push_back(static_cast<uint8_t>(modrm));
  displacement_size_ = 0;
  if (modrm >= 0xc0) return;
  const bool address16 =
      out->mode == Mode::k32 && std::find(code.begin(), code.end() - 1, 0x67) != code.end() - 1;
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

void CaseGenerator::EncodeImmediates(const Row& row, Case* out) {
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

bool CaseGenerator::Encode(const Row& row, Case* out) {
  out->code.clear();
  unsigned rex;
  EncodePrefixes(row, out, &rex);
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
    const unsigned rxb = out->mode == Mode::k64 ? static_cast<unsigned>(Below(8)) : 7;
    if (map == 1 && w == 0 && Chance(30)) {
      code.push_back(0xc5);
      code.push_back(
          static_cast<uint8_t>((rxb & 4) << 5 | (out->mode == Mode::k32 ? tail | 0x40 : tail)));
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
  if (row.has_modrm) EncodeModrm(row, out);
  EncodeImmediates(row, out);
  if (code.size() > 15) return false;

  DecodeContext context;
  context.mode = out->mode == Mode::k64 ? CodeMode::k64 : CodeMode::k32;
  context.cpl = 3;
  context.features = features_;
  std::memset(static_cast<void*>(&out->insn), 0, sizeof(Insn));
  const DecodeStatus status = Decode(context, code, &out->insn);
  out->undefined_encoding = status == DecodeStatus::kInvalid;
  if (status != DecodeStatus::kOk && status != DecodeStatus::kInvalid) return false;
  if (status == DecodeStatus::kOk) {
    code.resize(out->insn.length);
    if (WhyExcluded(*out->insn.row)) return false;
  }
  return true;
}

uint64_t CaseGenerator::Target() {
  switch (Below(8)) {
    case 0:
      return kData + 0x1000 - Below(70);  // crosses two writable pages
    case 1:
      return kData + kDataWritable - Below(70);  // into the read-only page
    case 2:
      return kData + kDataSize - Below(70);  // into nothing
    case 3:
      return Chance(30) ? kData + kDataSize + Below(0x800)
                        : kData + kDataWritable + 0x40 + Below(0x800);
    case 4:
      return kData + 0x1000 + (Below(0x80) << 4);
    default:
      return kData + 0x1000 + (Below(0x1800) & ~uint64_t{63}) + (Chance(50) ? 0 : Below(64));
  }
}

bool CaseGenerator::AimMemory(Case* out) {
  Insn& insn = out->insn;
  Registers& r = out->registers;
  const Row& row = *insn.row;
  const uint64_t segment_base = insn.segment == kGs && out->mode == Mode::k64 ? kGsBase : 0;
  // Hosts differ on whether SHA's memory operand must be aligned.
  const bool aligned = std::string_view(row.mnemonic).starts_with("SHA1") ||
                       std::string_view(row.mnemonic).starts_with("SHA256");
  const uint64_t target = (Target() & (aligned ? ~uint64_t{15} : ~uint64_t{0})) - segment_base;
  if (row.attributes & kVsib) {
    if (insn.base == kNoRegister || insn.base == kBaseRip) return false;
    for (unsigned i = 0; i < 8; ++i) {
      int32_t index = static_cast<int32_t>(Below(65)) - 32;
      uint8_t* where =
          i < 4 ? r.fpu.xmm[insn.index] + i * 4 : r.fpu.ymm_high[insn.index] + (i - 4) * 4;
      // Also valid as 64-bit elements: odd ones carry the sign.
      if (row.operands[1].size == 8 && (i & 1)) std::memcpy(&index, where - 4, 4), index >>= 31;
      std::memcpy(where, &index, 4);
    }
    r.gpr[insn.base] = target - static_cast<uint64_t>(insn.disp);
    return true;
  }
  const uint64_t disp = static_cast<uint64_t>(insn.disp);
  const auto patch = [&](uint64_t value) {
    if (displacement_size_ != 4) return false;
    for (unsigned i = 0; i < 4; ++i)
      out->code[displacement_at_ + i] = static_cast<uint8_t>(value >> (8 * i));
    return true;
  };
  if (insn.address_size == 2) return !aligned;  // the first 64 KiB: nothing is mapped there
  if (insn.base == kBaseRip || (insn.base == kNoRegister && insn.index == kNoRegister)) {
    return patch(insn.base == kBaseRip ? target - (r.rip + out->code.size()) : target);
  }
  if (insn.base == kNoRegister) {
    r.gpr[insn.index] = (target - disp) >> insn.scale;
  } else if (insn.base == insn.index) {
    r.gpr[insn.base] = (target - disp) / ((uint64_t{1} << insn.scale) + 1);
  } else {
    if (insn.base == kRsp && insn.index != kNoRegister)
      return false;  // the stack must stay in the data pages
    const uint64_t index = insn.index == kNoRegister ? 0 : r.gpr[insn.index];
    r.gpr[insn.base] = target - disp - (index << insn.scale);
  }
  return true;
}

bool CaseGenerator::AimImplicit(const Row& row, Case* out) {
  Registers& r = out->registers;
  const auto is = [&](std::initializer_list<std::string_view> names) { return Is(row, names); };
  if (HasOperand(row, OperandKind::kStrSrc) || HasOperand(row, OperandKind::kStrDst)) {
    r.gpr[kRsi] = Target() - (out->insn.segment == kGs ? kGsBase : 0);
    r.gpr[kRdi] = Target();
    r.gpr[kRcx] = Below(20);
  }
  // Which byte's fault is reported is the implementation's choice: none here.
  if (is({"MASKMOVQ", "MASKMOVDQU", "VMASKMOVDQU"}))
    r.gpr[kRdi] = kData + 0x1000 + Below(0x1f00) - (out->insn.segment == kGs ? kGsBase : 0);
  if (is({"XLAT"}))
    r.gpr[kRbx] = Target() - (r.gpr[kRax] & 0xff) - (out->insn.segment == kGs ? kGsBase : 0);
  if (is({"ENTER", "LEAVE"})) r.gpr[kRbp] = kData + 0x1400 + Below(0x100) * 8;
  if (is({"LOOP", "LOOPE", "LOOPNE", "JRCXZ", "JCXZ"})) r.gpr[kRcx] = Below(3);
  if (is({"DIV", "IDIV"}) && Chance(70)) r.gpr[kRdx] = Chance(50) ? 0 : Below(100);
  return true;
}

uint64_t CaseGenerator::CodeTarget() { return kCode + 0x1200 + Below(0x400); }

bool CaseGenerator::AimBranch(Case* out) {
  const Insn& insn = out->insn;
  const Row& row = *insn.row;
  Registers& r = out->registers;
  const uint64_t next = r.rip + out->code.size();
  if (HasOperand(row, OperandKind::kRel)) {
    const size_t at = immediate_at_;
    const size_t size = out->code.size() - at;
    const uint64_t rel = size == 1 ? (Chance(50) ? Below(100) : ~uint64_t{0} - 16 - Below(100))
                                   : CodeTarget() - next;
    if (size == 2) return false;  // truncates RIP to 16 bits
    for (size_t i = 0; i < size; ++i) out->code[at + i] = static_cast<uint8_t>(rel >> (8 * i));
    return true;
  }
  const uint64_t target = Chance(90) || insn.has_memory() ? CodeTarget() : uint64_t{1} << 47;
  const auto poke = [&](uint64_t address) {
    if (address < kData || address > kData + kDataWritable - 8) return false;
    out->pokes.push_back({address, target});
    return true;
  };
  if (Is(row, {"RET"})) return poke(r.gpr[kRsp]);
  if (!insn.has_memory()) {
    r.gpr[insn.rm] = target;
    return insn.rm != kRsp;
  }
  // Through memory: aimed by AimMemory, so work out where.
  uint64_t base = insn.base < 16 ? r.gpr[insn.base] : insn.base == kBaseRip ? next : 0;
  uint64_t index = insn.index < 16 ? r.gpr[insn.index] : 0;
  int32_t disp = static_cast<int32_t>(insn.disp);
  if (displacement_size_ == 4) std::memcpy(&disp, out->code.data() + displacement_at_, 4);
  uint64_t address =
      base + (index << insn.scale) + static_cast<uint64_t>(static_cast<int64_t>(disp));
  if (insn.address_size == 4) address = static_cast<uint32_t>(address);
  if (insn.segment == kGs) address += kGsBase;
  if (!poke(address))
    return true;  // faults, or reads what is there: a wild jump traps before it fetches
  return true;
}

bool CaseGenerator::Generate(const Row& row, Mode mode, Case* out) {
  if (WhyExcluded(row)) return false;
  if (mode == Mode::k32 ? (row.attributes & kOnly64) != 0 : (row.attributes & kNo64) != 0)
    return false;
  if (!features_.Has(row.features[0]) || !features_.Has(row.features[1])) return false;
  out->mode = mode;
  out->pokes.clear();
  RandomRegisters(out);
  out->registers.rip = kCode + 0x400 + Below(16);
  if (!Encode(row, out)) return false;
  // TF ends the case after one instruction, or one iteration; without it the breakpoint behind the
  // instruction does.
  const bool branch = !out->undefined_encoding && out->insn.has(kBranch);
  const bool repeats = !out->undefined_encoding && out->insn.has(kRep);
  // (A gather may trap between two elements.)
  const bool gather = !out->undefined_encoding && out->insn.has(kVsib);
  if (branch || (!repeats && !gather && Chance(50))) out->registers.rflags |= rflags::kTf;
  if (out->undefined_encoding) return true;
  const Row& actual = *out->insn.row;
  if (mode == Mode::k32) {
    for (auto& value : out->registers.gpr) value = static_cast<uint32_t>(value);
  }
  if (!AimImplicit(actual, out)) return false;
  if (std::string_view(actual.mnemonic).find("MASKMOV") != std::string_view::npos &&
      (out->insn.address_size == 2 || out->insn.segment == kCs)) {
    return false;
  }
  if (out->insn.has_memory() && !AimMemory(out)) return false;
  if (HasOperand(actual, OperandKind::kMoffs)) {
    const uint64_t target = Target();
    for (unsigned i = 0; i < out->insn.address_size; ++i) {
      out->code[out->code.size() - out->insn.address_size + i] =
          static_cast<uint8_t>(target >> (8 * i));
    }
  }
  // Bit offsets in a register reach beyond the operand.
  if (Is(actual, {"BT", "BTS", "BTR", "BTC"}) && out->insn.has_memory() &&
      !HasOperand(actual, OperandKind::kImm)) {
    if (out->insn.reg == out->insn.base || out->insn.reg == out->insn.index) return false;
    out->registers.gpr[out->insn.reg & 15] = Below(2048) - 1024;
  }
  if (branch && !AimBranch(out)) return false;
  if (mode == Mode::k32) {
    for (auto& value : out->registers.gpr) value = static_cast<uint32_t>(value);
  }
  // The final say: decode what will run, and never let the host reach outside the case's pages.
  DecodeContext context;
  context.mode = mode == Mode::k64 ? CodeMode::k64 : CodeMode::k32;
  context.cpl = 3;
  context.features = features_;
  if (Decode(context, out->code, &out->insn) != DecodeStatus::kOk) return false;
  if (out->insn.has_memory() && !(actual.attributes & kVsib) && !Is(actual, {"LEA"}) &&
      out->insn.address_size != 2) {
    const Insn& insn = out->insn;
    uint64_t base = insn.base < 16          ? out->registers.gpr[insn.base]
                    : insn.base == kBaseRip ? out->registers.rip + insn.length
                                            : 0;
    uint64_t index = insn.index < 16 ? out->registers.gpr[insn.index] : 0;
    uint64_t address = base + (index << insn.scale) + static_cast<uint64_t>(insn.disp);
    if (insn.address_size == 4) address = static_cast<uint32_t>(address);
    if (insn.segment == kGs && mode == Mode::k64) address += kGsBase;
    if (address < kData - 0x1000 || address > kData + kDataSize + 0x1000) return false;
  }
  return true;
}

}  // namespace kvartz::cpu::x86::oracle
