// Checks of memory accesses, and the operands that they allow.
#include "base/check.h"
#include "cpu/x86/jit/state_operands.h"
#include "cpu/x86/jit/translator.h"

namespace kvartz::cpu::x86::jit {

// Where a group's check left host address - linear address.
HostMem Translator::AddendOf(unsigned group) const {
  const AccessGroup& g = unit_.group(group);
  return g.polymorphic
             ? Gs(offsetof(State, addends) + group * 8)
             : Gs(offsetof(State, slots) + g.slot * sizeof(Slot) + offsetof(Slot, addend));
}

void Translator::Checks(unsigned i) {
  for (unsigned g = 0; g < unit_.group_count(); ++g) {
    if (unit_.group(g).check_at == i) Check(g, i);
  }
}

// The group's lowest address to S0; S1 may be spoilt.
void Translator::GroupAddress(const AccessGroup& group, unsigned at) {
  const AddressKey& key = group.key;
  if (unit_.mode().legacy()) {
    LegacyOffset(group, at);
    return AddSegmentBase(key);
  }
  int64_t constant = group.low;
  HostMem address;
  const auto find = [&](uint32_t id) {
    const auto& symbols = unit_.symbols(at);
    for (unsigned reg = 0; reg < 16; ++reg) {
      if (symbols[reg].id == id && HostOf(reg) != kNoReg) return reg;
    }
    for (unsigned reg = 0; reg < 16; ++reg) {
      if (symbols[reg].id == id) return reg;
    }
    VERIFY(false);
    return 0u;
  };
  if (key.rip) {
    as_.Load(kS0, PageBase());
    address.base = kS0;
  } else if (key.base != 0) {
    const unsigned reg = find(key.base);
    constant -= unit_.symbols(at)[reg].offset;
    address.base = HostOf(reg) != kNoReg ? HostOf(reg) : KeptIn(reg);
    if (address.base == kNoReg) {
      as_.Load(kS0, GprAt(reg));
      address.base = kS0;
      Spoil(kS0);
    }
  }
  if (key.index != 0) {
    const unsigned reg = find(key.index);
    constant -= unit_.symbols(at)[reg].offset << key.scale;
    address.index = HostOf(reg) != kNoReg ? HostOf(reg) : KeptIn(reg);
    address.scale = key.scale;
    if (address.index == kNoReg) {
      address.index = address.base == kS1 ? kS0 : kS1;
      Spoil(address.index);
      as_.Load(address.index, GprAt(reg));
    }
  }
  if (constant != static_cast<int32_t>(constant)) {
    // Rare: a constant of more than 32 bits.
    if (address.base != kNoReg || address.index != kNoReg) as_.Lea(kS0, address);
    Spoil(kS1);
    as_.MovImm64(kS1, static_cast<uint64_t>(constant));
    address.base == kNoReg&& address.index == kNoReg ? as_.Mov(kS0, kS1)
                                                     : as_.Lea(kS0, {.base = kS0, .index = kS1});
  } else {
    address.disp = static_cast<int32_t>(constant);
    if (address.base == kNoReg && address.index == kNoReg) {
      as_.RegReg(Assembler::k64, 0xc7, 0, kS0);  // sign-extended
      as_.Dword(static_cast<uint32_t>(constant));
    } else if (address.index == kNoReg && address.disp == 0) {
      if (address.base != kS0) as_.Mov(kS0, address.base);
    } else {
      as_.Lea(kS0, address);
    }
  }
  if (key.segment != 0) as_.Add(kS0, SegmentBase(key.segment));
}

bool Translator::IsLastCheck(unsigned number, unsigned at) const {
  for (unsigned g = number + 1; g < unit_.group_count(); ++g) {
    if (unit_.group(g).check_at == at) return false;
  }
  return true;
}

void Translator::Check(unsigned number, unsigned at) {
  AccessGroup& group = unit_.group(number);
  SpoilFlags(unit_[at].live_before);
  const auto span = static_cast<unsigned>(group.high - group.low);
  const bool early = group.shared || at != group.first;
  const Site site = {.flags = static_cast<uint8_t>(Loaded() | (group.write ? Site::kWrite : 0) |
                                                   (!group.alone && early ? Site::kShared : 0)),
                     .count = static_cast<uint8_t>(group.last - at + 1),
                     .group = static_cast<uint8_t>(number),
                     .offset = unit_[at].offset,
                     .unit = unit_[0].offset,
                     .span = static_cast<uint16_t>(span),
                     .slot = group.slot};
  if (unit_.mode().legacy()) {
    LegacyCheck(group, at, site);
  } else {
    GroupAddress(group, at);
  }
  Spoil(kS0);
  if (held_.reg == kS1) Spoil(kS1);
  if (group.polymorphic || unit_.mode().legacy()) SpoilScratch();
  if (group.polymorphic) {
    // One access follows at once, and nothing of it needs a scratch register before.
    const UnitInsn& u = unit_[at];
    group.in_scratch = !group.shared && group.first == at && u.form->form == Form::kCopy &&
                       u.live_before == 0 && KeepsScratch(u) && IsLastCheck(number, at);
    AskTlb(number, span);
    out_.cold.back().site = site;
    out_.cold.back().at = static_cast<uint8_t>(at);
    if (group.first == at) held_ = {static_cast<int>(number), kS1};
    return;
  }
  if (context_.counts_checks)
    as_.IncDword(Gs(offsetof(State, checks) + group.slot * sizeof(State::checks[0])));
  as_.Sub(kS0, SlotPage(group.slot));
  as_.CmpImm(kS0, static_cast<int32_t>(4096 - span));
  uint8_t* from = as_.Jcc(kCcA, as_.run());
  out_.cold.push_back({.kind = Cold::kFill,
                       .from = from,
                       .back = as_.run(),
                       .site = site,
                       .kept = static_cast<uint8_t>(kept_[1])});
}

// The TLB's answer to S1, and to memory for the group's other accesses.
void Translator::AskTlb(unsigned number, unsigned span) {
  const AccessGroup& group = unit_.group(number);
  const size_t table = offsetof(State, tlb) + context_.data_class * sizeof(State::tlb[0]);
  const auto field = [&](size_t offset) {
    return HostMem{.base = kS1, .disp = static_cast<int32_t>(table + offset), .gs = true};
  };
  static_assert(sizeof(TlbEntry) == 32);
  as_.Mov(kS1, kS0);
  as_.RegReg(Assembler::k64, 0xc1, 5, kS1);  // shr
  as_.Byte(7);
  as_.RegReg(Assembler::k32, 0x81, 4, kS1);  // and
  as_.Dword((Tlb::kEntries - 1) * sizeof(TlbEntry));
  as_.Lea(kS0, {.base = kS0, .disp = static_cast<int32_t>(span - 1)});
  as_.RegReg(Assembler::k64, 0x81, 4, kS0);
  as_.Dword(0xfffff000);
  const bool upper = context_.polymorphic.upper[number];
  as_.RegMem(Assembler::k64, 0x0b, kS0, Gs(offsetof(State, asid) + (upper ? 8 : 0)));  // or
  as_.Cmp(kS0, field(group.write ? offsetof(TlbEntry, write) : offsetof(TlbEntry, read)));
  uint8_t* from = as_.Jcc(kCcNe, as_.run());
  as_.Load(kS1, field(offsetof(TlbEntry, addend)));
  if (!group.in_scratch) as_.Store(AddendOf(number), kS1);
  out_.cold.push_back({.kind = Cold::kAsk, .from = from, .back = as_.run()});
}

void Translator::AddTo(HostReg to, const HostMem& sum) {
  as_.Lea(to, sum);
  Spoil(to);
}

void Translator::Spoil(HostReg scratch) {
  kept_[scratch == kS1] = kNoRegister;
  if (held_.reg == scratch) held_ = {};
}

void Translator::SpoilScratch() {
  Spoil(kS0);
  Spoil(kS1);
}

HostReg Translator::KeptIn(unsigned guest) const {
  return kept_[0] == guest ? kS0 : kept_[1] == guest ? kS1 : kNoReg;
}

// It is about to be written in memory alone.
void Translator::Forget(unsigned guest) {
  for (unsigned& kept : kept_) {
    if (kept == guest) kept = kNoRegister;
  }
}

// A scratch register for a guest's register that lives in memory, other than `taken`. The caller
// stores what it writes there. The flags stay.
HostReg Translator::ToScratch(unsigned guest, HostReg taken, bool read) {
  const HostReg kept = KeptIn(guest);
  if (kept != kNoReg && kept != taken) return kept;
  const auto loss = [&](HostReg reg) {
    return reg == taken ? 3 : reg == held_.reg ? 2 : kept_[reg == kS1] != kNoRegister ? 1 : 0;
  };
  const HostReg scratch = loss(kS1) < loss(kS0) ? kS1 : kS0;
  Spoil(scratch);
  Forget(guest);
  kept_[scratch == kS1] = guest;
  if (read) as_.Load(scratch, GprAt(guest));
  return scratch;
}

// Scratch registers are known behind the instruction: what it calls spoils the ones that it uses.
bool Translator::KeepsScratch(const UnitInsn& u) const {
  if (unit_.mode().legacy()) return false;
  switch (u.form->form) {
    case Form::kPush:
    case Form::kPop:
    case Form::kNothing:
    case Form::kJcc:
    case Form::kLea:
      return true;
    case Form::kCopy:
      return !u.form->x87;
    default:
      return false;
  }
}

// The host's address of a checked access, in one of S0 and S1; the other may be spoilt. The flags
// stay.
HostMem Translator::Map(const UnitInsn& u, const MemoryAccess& access) {
  const Insn& insn = u.insn;
  if (unit_.mode().legacy()) return LegacyMap(u, access);
  const bool held = held_.group == access.group;
  const bool in_s0 = kept_[0] != kNoRegister && (insn.base == kept_[0] || insn.index == kept_[0]);
  const HostReg to = held ? held_.reg : in_s0 ? kS1 : kS0, spare = to == kS0 ? kS1 : kS0;
  if (!held) Spoil(to);
  const auto to_spare = [&](unsigned guest) {
    if (KeptIn(guest) == spare) return;
    Spoil(spare);
    as_.Load(spare, GprAt(guest));
    kept_[spare == kS1] = guest;
  };
  held_ = {access.group, to};
  VERIFY(held || !unit_.group(static_cast<unsigned>(access.group)).in_scratch);
  if (!held) as_.Load(to, AddendOf(static_cast<unsigned>(access.group)));
  if (access.key.segment != 0) {
    Spoil(spare);
    as_.Load(spare, SegmentBase(access.key.segment));
    AddTo(to, {.base = to, .index = spare});
  }
  int64_t disp = insn.disp;
  HostReg base = kNoReg;
  if (insn.base == kBaseRip) {
    Spoil(spare);
    as_.Load(spare, PageBase());
    base = spare;
    disp += u.offset + insn.length;
  } else if (insn.base != kNoRegister) {
    base = HostOf(insn.base);
    if (base == kNoReg) {
      to_spare(insn.base);
      base = spare;
    }
  }
  if (insn.index == kNoRegister) {
    if (base == spare) {
      AddTo(to, {.base = to, .index = spare});
      base = kNoReg;
    }
  } else {
    if (base != kNoReg) AddTo(to, {.base = to, .index = base});
    base = HostOf(insn.index);
    if (base == kNoReg) {
      to_spare(insn.index);
      AddTo(to, {.base = to, .index = spare, .scale = insn.scale});
    }
  }
  if (disp != static_cast<int32_t>(disp)) {  // RIP-relative at the very edge
    Spoil(spare);
    as_.MovImm64(spare, static_cast<uint64_t>(disp));
    AddTo(to, {.base = to, .index = spare});
    disp = 0;
  }
  return {.base = to,
          .index = base,
          .scale = insn.index == kNoRegister ? uint8_t{0} : insn.scale,
          .disp = static_cast<int32_t>(disp)};
}

// Spoils S0 alone.
HostMem Translator::StackAt(const MemoryAccess& access, HostReg base, int32_t disp) {
  if (held_.group == access.group && held_.reg == kS0)
    return {.base = kS0, .index = base, .disp = disp};
  Spoil(kS0);
  as_.Load(kS0, AddendOf(static_cast<unsigned>(access.group)));
  held_ = {access.group, kS0};
  return {.base = kS0, .index = base, .disp = disp};
}

}  // namespace kvartz::cpu::x86::jit
