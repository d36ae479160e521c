#include "cpu/x86/oracle/case_generator.h"

#include <algorithm>
#include <cstring>
#include <string_view>

namespace kvartz::cpu::x86::oracle {
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

void CaseGenerator::RandomRegisters(Case* out) {
  Registers& r = out->registers;
  for (auto& value : r.gpr) value = Value();
  r.gpr[kRsp] = kData + 0x800 + (Below(0x100) << (Chance(80) ? 3 : 0));
  r.rflags = 0x202 | (Random() & rflags::kStatus);
  if (Chance(20)) r.rflags |= rflags::kDf;
  RandomFpu(&r.fpu);
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
  DecodeContext context;
  context.mode = mode == Mode::k64 ? CodeMode::k64 : CodeMode::k32;
  context.cpl = 3;
  context.features = features_;
  if (!Encode(row, context, out)) return false;
  if (!out->undefined_encoding && WhyExcluded(*out->insn.row)) return false;
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
