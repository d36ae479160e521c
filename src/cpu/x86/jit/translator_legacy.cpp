// What is different about 16-bit and 32-bit code: addresses and targets wrap, segments have limits,
// registers and stack slots have 2 or 4 bytes. The upper halves of the host's registers are 0.
//
// Addresses of 32 bits in flat segments are computed by the host as 64-bit ones where that can't
// make a difference: a displacement of up to a page from a register. A wrap would have to come from
// or lead to the first page or the last of the 4 GiB, and accesses to these two are interpreted:
// slots of flat modes don't hold them. Everything else is computed in 32 bits.
#include "base/check.h"
#include "cpu/x86/jit/state_operands.h"
#include "cpu/x86/jit/translator.h"

namespace kvartz::cpu::x86::jit {
namespace {

constexpr int64_t kNear = 4096;  // bytes; see above

HostMem SegmentEnd(const AddressKey& key, bool write) {
  return Gs(offsetof(State, cpu) + offsetof(Cpu, segment_end) +
            ((key.address16 ? 2u : 0u) + (write ? 1u : 0u)) * sizeof(Cpu::segment_end[0][0]) +
            key.segment * sizeof(uint64_t));
}

// The effective address's parts; the sum is to be truncated.
HostMem Effective(const Insn& insn) {
  HostMem mem{.disp = static_cast<int32_t>(insn.disp)};
  if (insn.base != kNoRegister) mem.base = HostOf(insn.base);
  if (insn.index != kNoRegister) mem.index = HostOf(insn.index), mem.scale = insn.scale;
  return mem;
}

}  // namespace

// ---- operands of 2 and 4 bytes

void Translator::Lea32(HostReg to, const HostMem& mem) {
  if (mem.base == kNoReg && mem.index == kNoReg)
    return as_.MovImm32(to, static_cast<uint32_t>(mem.disp));
  as_.RegMem(Assembler::k32, 0x8d, to, mem);
}

void Translator::Load32(HostReg to, const HostMem& mem) {
  as_.RegMem(Assembler::k32, 0x8b, to, mem);
}

void Translator::Truncate16(HostReg reg) { as_.RegReg(Assembler::k32, 0xb70f, reg, reg); }

void Translator::LoadSized(HostReg to, const HostMem& mem, unsigned size) {
  size == 2 ? as_.RegMem(Assembler::k32, 0xb70f, to, mem) : Load32(to, mem);
}

void Translator::StoreSized(const HostMem& mem, HostReg from, unsigned size) {
  if (size == 2) as_.Byte(0x66);
  as_.RegMem(Assembler::k32, 0x89, from, mem);
}

void Translator::MovSized(HostReg to, HostReg from, unsigned size) {
  if (size == 2) as_.Byte(0x66);
  as_.RegReg(Assembler::k32, 0x89, from, to);
}

// An instruction's effective address.
void Translator::LegacyEffective(HostReg to, const Insn& insn) {
  Lea32(to, Effective(insn));
  if (insn.address_size == 2) Truncate16(to);
}

// ---- memory

// The lowest offset that the group accesses, in its segment, to S0.
void Translator::LegacyOffset(const AccessGroup& group, unsigned at) {
  const AddressKey& key = group.key;
  int64_t constant = group.low;
  HostMem mem;
  const auto& symbols = unit_.symbols(at);
  const auto find = [&](uint32_t id) {
    for (unsigned reg = 0; reg < 8; ++reg) {
      if (symbols[reg].id == id) return reg;
    }
    VERIFY(false);
    return 0u;
  };
  if (key.base != 0) {
    const unsigned reg = find(key.base);
    constant -= symbols[reg].offset;
    mem.base = HostOf(reg);
  }
  if (key.index != 0) {
    const unsigned reg = find(key.index);
    constant -= symbols[reg].offset << key.scale;
    mem.index = HostOf(reg);
    mem.scale = key.scale;
  }
  mem.disp = static_cast<int32_t>(static_cast<uint32_t>(constant));
  if (mem.base != kNoReg && mem.index == kNoReg && mem.disp == 0) {
    as_.RegReg(Assembler::k32, 0x8b, kS0, mem.base);
  } else {
    Lea32(kS0, mem);
  }
  if (key.address16) Truncate16(kS0);
}

void Translator::AddSegmentBase(const AddressKey& key) {
  if (key.checked) as_.RegMem(Assembler::k32, 0x03, kS0, SegmentBase(key.segment));
}

// In Check: the lowest linear address to S0, if the segment allows all that the group accesses.
void Translator::LegacyCheck(const AccessGroup& group, unsigned at, const Site& site) {
  LegacyOffset(group, at);
  if (!group.key.checked) return;
  as_.Lea(kS1, {.base = kS0, .disp = static_cast<int32_t>(site.span)});
  as_.Cmp(kS1, SegmentEnd(group.key, group.write));
  out_.cold.push_back({.kind = Cold::kInterpret, .from = as_.Jcc(kCcA, as_.run()), .site = site});
  AddSegmentBase(group.key);
}

// S0: the linear address that is about to be looked up for a slot.
void Translator::LegacyBeforeFill(const Site& site) {
  if (!unit_.mode().flat) return;
  Lea32(kS1, {.base = kS0, .disp = 4096});
  as_.RegReg(Assembler::k32, 0x81, 7, kS1);  // cmp
  as_.Dword(8192);
  uint8_t* other = as_.Jcc(kCcAe, as_.run());
  JumpToInterpret(site);
  as_.PatchHere(other);
}

bool Translator::Plain(const MemoryAccess& access) const {
  return !access.key.checked && !unit_.group(static_cast<unsigned>(access.group)).polymorphic;
}

// As Map, but both of S0 and S1 may be in the operand.
HostMem Translator::LegacyMap(const UnitInsn& u, const MemoryAccess& access) {
  const Insn& insn = u.insn;
  const HostMem addend = AddendOf(static_cast<unsigned>(access.group));
  HostMem mem = Effective(insn);
  held_ = {};
  if (Plain(access) && mem.base != kNoReg && mem.index == kNoReg && -kNear <= mem.disp &&
      mem.disp <= kNear) {
    as_.Load(kS0, addend);
    return {.base = kS0, .index = mem.base, .disp = mem.disp};
  }
  if (access.key.address16) {
    LegacyEffective(kS1, insn);
    Load32(kS0, SegmentBase(access.key.segment));
    Lea32(kS1, {.base = kS0, .index = kS1});
  } else if (!access.key.checked) {
    Lea32(kS1, mem);
  } else {
    Load32(kS1, SegmentBase(access.key.segment));
    if (mem.index != kNoReg) {
      Lea32(kS1, {.base = kS1, .index = mem.index, .scale = mem.scale, .disp = mem.disp});
      mem.index = kNoReg;
      mem.disp = 0;
    }
    if (mem.base != kNoReg || mem.disp != 0)
      Lea32(kS1, {.base = kS1, .index = mem.base, .disp = mem.disp});
  }
  as_.Load(kS0, addend);
  // A register that only S1 can stand in for.
  if (u.form->reg_is_gpr && insn.reg >= kHighByte) {
    as_.Lea(kS0, {.base = kS0, .index = kS1});
    return {.base = kS0};
  }
  return {.base = kS0, .index = kS1};
}

// Likewise of the stack. S1 is spoilt unless the access is plain.
HostMem Translator::LegacyStack(const MemoryAccess& access, HostReg base, int32_t disp) {
  const HostMem addend = AddendOf(static_cast<unsigned>(access.group));
  if (Plain(access)) {
    as_.Load(kS0, addend);
    return {.base = kS0, .index = base, .disp = disp};
  }
  Lea32(kS1, {.base = base, .disp = disp});
  if (access.key.address16) Truncate16(kS1);
  if (access.key.checked) {
    Load32(kS0, SegmentBase(kSs));
    Lea32(kS1, {.base = kS0, .index = kS1});
  }
  as_.Load(kS0, addend);
  as_.Lea(kS0, {.base = kS0, .index = kS1});
  return {.base = kS0};
}

// ---- the stack

// The stack pointer becomes `from` + by. S1 is spoilt.
void Translator::SetStackPointer(HostReg from, int32_t by) {
  if (unit_.mode().stack_size == 4) return Lea32(kGuestSp, {.base = from, .disp = by});
  Lea32(kS1, {.base = from, .disp = by});
  MovSized(kGuestSp, kS1, 2);
}

// Both of S0 and S1 are spoilt.
void Translator::PushRegister(const UnitInsn& u, HostReg from) {
  const auto size = static_cast<int32_t>(u.stack.size);
  const bool aside = from == kS1 && !Plain(u.stack);
  if (aside) as_.Store(Gs(offsetof(State, spare)), kS1);
  const HostMem mem = LegacyStack(u.stack, kGuestSp, -size);
  if (aside) as_.Load(kS1, Gs(offsetof(State, spare)));
  StoreSized(mem, from, u.stack.size);
  SetStackPointer(kGuestSp, -size);
}

void Translator::LegacyPush(const UnitInsn& u) {
  const Insn& insn = u.insn;
  Mark(u);
  HostReg from = kS1;
  if (u.operand.present) {
    const HostMem mem = LegacyMap(u, u.operand);
    LoadSized(kS1, mem, insn.operand_size);
  } else if (insn.row->imm[0] != ImmKind::kNone) {
    as_.MovImm32(kS1, static_cast<uint32_t>(insn.imm));
  } else {
    from = HostOf(u.form->memory_operand >= 0 ? insn.rm : insn.reg);
  }
  PushRegister(u, from);
}

void Translator::LegacyPop(const UnitInsn& u) {
  Mark(u);
  const HostReg to = HostOf(u.form->memory_operand >= 0 ? u.insn.rm : u.insn.reg);
  const HostMem mem = LegacyStack(u.stack, kGuestSp, 0);
  LoadSized(kS0, mem, u.stack.size);
  MovSized(to, kS0, u.stack.size);
  SetStackPointer(kGuestSp, u.stack.size);
}

void Translator::LegacyLeave(const UnitInsn& u) {
  Mark(u);
  const HostMem mem = LegacyStack(u.stack, kRegBp, 0);
  LoadSized(kS0, mem, u.stack.size);
  SetStackPointer(kRegBp, u.stack.size);
  MovSized(kRegBp, kS0, u.stack.size);
}

void Translator::LegacyLea(const UnitInsn& u) {
  const Insn& insn = u.insn;
  const HostReg to = HostOf(insn.reg);
  if (insn.operand_size == 4 && insn.address_size == 4) return Lea32(to, Effective(insn));
  LegacyEffective(kS1, insn);
  MovSized(to, kS1, insn.operand_size);
}

void Translator::LegacyMoveFromSegment(const UnitInsn& u) {
  LoadSized(kS1,
            Gs(offsetof(State, cpu) + offsetof(Cpu, seg) + u.insn.reg * sizeof(Segment) +
               offsetof(Segment, selector)),
            2);
  MovSized(HostOf(u.insn.rm), kS1, u.insn.operand_size);
}

// ---- branches

// A direct branch's target, from the page's start, to S0. The flags are put aside.
void Translator::LegacyTarget(const UnitInsn& u, int64_t page_offset) {
  as_.Load(kS0, PageBase());
  Lea32(kS0, {.base = kS0, .disp = static_cast<int32_t>(page_offset)});
  if (u.insn.operand_size == 2) Truncate16(kS0);
}

// The target in S0 lies within CS, or else the branch is interpreted. Flags are put aside.
void Translator::CheckCodeLimit(const UnitInsn& u) {
  if (unit_.mode().code_flat) return;
  as_.RegMem(Assembler::k32, 0x3b, kS0,  // cmp
             Gs(offsetof(State, cpu) + offsetof(Cpu, seg) + kCs * sizeof(Segment) +
                offsetof(Segment, limit)));
  host_flags_ = false;
  out_.cold.push_back({.kind = Cold::kInterpret,
                       .from = as_.Jcc(kCcA, as_.run()),
                       .site = {.count = 1, .offset = u.offset}});
}

void Translator::LegacyPushReturn(const UnitInsn& u) {
  const HostMem mem = LegacyStack(u.stack, kGuestSp, -static_cast<int32_t>(u.stack.size));
  PageAddress(kS1, u.offset + u.insn.length);
  StoreSized(mem, kS1, u.stack.size);
  SetStackPointer(kGuestSp, -static_cast<int32_t>(u.stack.size));
}

void Translator::LegacyLoadTarget(const UnitInsn& u) {
  if (u.operand.present) {
    const HostMem mem = LegacyMap(u, u.operand);
    return LoadSized(kS0, mem, u.insn.operand_size);
  }
  as_.RegReg(Assembler::k32, u.insn.operand_size == 2 ? 0xb70f : 0x8b, kS0, HostOf(u.insn.rm));
}

void Translator::LegacyCall(const UnitInsn& u) {
  Mark(u);
  if (u.form->memory_operand >= 0) {
    if (!saved_flags_) SaveFlags();
    LegacyLoadTarget(u);
    CheckCodeLimit(u);
    as_.Store(Gs(offsetof(State, spare)), kS0);
    LegacyPushReturn(u);
    as_.Load(kS0, Gs(offsetof(State, spare)));
    return Indirect(u, 0);
  }
  const int64_t target = int64_t{u.offset} + u.insn.length + u.insn.imm;
  if (unit_.NearTarget(u) < 0) {
    if (!saved_flags_) SaveFlags();
    if (!unit_.mode().code_flat) {
      LegacyTarget(u, target);
      CheckCodeLimit(u);
    }
    LegacyPushReturn(u);
    return LegacyCrossPage(u, target);
  }
  LegacyPushReturn(u);
  if (u.live_after != 0) NeedFlags();
  LeaveTo(as_.Jmp(as_.run()), target);
}

void Translator::LegacyReturn(const UnitInsn& u) {
  Mark(u);
  if (!saved_flags_) SaveFlags();
  const HostMem mem = LegacyStack(u.stack, kGuestSp, 0);
  LoadSized(kS0, mem, u.stack.size);
  CheckCodeLimit(u);
  const unsigned extra =
      u.insn.row->imm[0] == ImmKind::kNone ? 0 : static_cast<uint16_t>(u.insn.imm);
  SetStackPointer(kGuestSp, static_cast<int32_t>(u.stack.size + extra));
  Indirect(u, 0);
}

// CrossPage of a branch whose target CheckCodeLimit has seen.
void Translator::LegacyCrossPage(const UnitInsn& u, int64_t target) {
  if (!saved_flags_) SaveFlags();
  LegacyTarget(u, target);
  out_.exits.push_back(
      {.distance = as_.Jmp(as_.run()), .thunk = nullptr, .same_page = false, .offset = 0});
}

// JCXZ and LOOP, the address's size being that of the counter; the flags stay.
uint8_t* Translator::CounterBranch(const UnitInsn& u) {
  const bool loop = u.form->form == Form::kLoop;
  const unsigned size = u.insn.address_size;
  const auto skip = [&](unsigned opcode) {  // a short branch ahead
    as_.Byte(opcode), as_.Byte(0);
    return as_.here();
  };
  const auto here = [&](uint8_t* skipped) {
    skipped[-1] = static_cast<uint8_t>(as_.here() - skipped);
  };
  if (loop && size == 8) as_.Lea(kRegCx, {.base = kRegCx, .disp = -1});
  if (loop && size == 4) Lea32(kRegCx, {.base = kRegCx, .disp = -1});
  if (loop && size == 2) {
    Lea32(kS1, {.base = kRegCx, .disp = -1});
    MovSized(kRegCx, kS1, 2);
  }
  if (size == 2) {
    as_.Mov(kS1, kRegCx);
    Truncate16(kRegCx);
  }
  if (size == 4) as_.Byte(0x67);
  uint8_t* zero = skip(0xe3);
  if (size == 2) as_.Mov(kRegCx, kS1);
  uint8_t* branch = nullptr;
  if (loop) branch = as_.Jmp(as_.run());
  uint8_t* over = loop ? nullptr : skip(0xeb);
  here(zero);
  if (size == 2) as_.Mov(kRegCx, kS1);
  if (!loop) branch = as_.Jmp(as_.run());
  if (over != nullptr) here(over);
  return branch;
}

// ---- which of these

bool Translator::Legacy(const UnitInsn& u) {
  if (!unit_.mode().legacy()) return false;
  switch (u.form->form) {
    case Form::kLea:
      LegacyLea(u);
      return true;
    case Form::kMoveFromSegment:
      LegacyMoveFromSegment(u);
      return true;
    case Form::kPush:
      LegacyPush(u);
      return true;
    case Form::kPop:
      LegacyPop(u);
      return true;
    case Form::kLeave:
      LegacyLeave(u);
      return true;
    case Form::kCall:
      LegacyCall(u);
      return true;
    case Form::kReturn:
      LegacyReturn(u);
      return true;
    default:
      return false;
  }
}

}  // namespace kvartz::cpu::x86::jit
