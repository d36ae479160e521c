#include "cpu/x86/jit/translator.h"

#include "base/check.h"

namespace kvartz::cpu::x86::jit {
namespace {

HostMem Gs(size_t offset) { return HostMem::Gs(offset); }
HostMem SlotPage(unsigned slot) {
  return Gs(offsetof(State, slots) + slot * sizeof(Slot) + offsetof(Slot, page));
}
HostMem SegmentBase(unsigned segment) {
  return Gs(offsetof(State, cpu) + offsetof(Cpu, seg) + segment * sizeof(Segment) +
            offsetof(Segment, base));
}
HostMem Requests() { return Gs(offsetof(State, cpu) + offsetof(Cpu, requests)); }
HostMem Rflags() { return Gs(offsetof(State, cpu) + offsetof(Cpu, rflags)); }
HostMem PageBase() { return Gs(offsetof(State, page)); }

}  // namespace

Translator::Translator(Unit& unit, Assembler& assembler, const TranslationContext& context)
    : unit_(unit), as_(assembler), context_(context) {
  cold_.reserve(unit_.count());
  out_.marks.reserve(unit_.count());
  for (unsigned g = 0; g < unit_.group_count(); ++g) {
    AccessGroup& group = unit_.group(g);
    group.slot =
        static_cast<uint16_t>(context_.data_class * kSlots + (group.write ? kWriteSlots : 0) +
                              (context_.first_slot + g) % kWriteSlots);
    group.polymorphic = context_.polymorphic[g];
  }
}

Translation Translator::Run() {
  Entries();
  for (unsigned i = 0; i < unit_.count(); ++i) {
    if (unit_[i].label) Label(i);
    Checks(i);
    Instruction(i);
    held_ = -1;
  }
  const UnitInsn& last = unit_[unit_.count() - 1];
  const bool branched = last.form->form == Form::kCall || last.form->form == Form::kReturn ||
                        last.form->form == Form::kJump ||
                        (last.form->form == Form::kInterpret && last.insn.has(kBranch));
  if (!branched) {
    if (last.live_after != 0) NeedFlags();
    if (unit_.end_offset() < 4096) {
      LeaveTo(as_.Jmp(as_.run()), unit_.end_offset());
    } else {
      CrossPage(4096);
    }
  }
  // The body's first bytes may be replaced by a jump.
  while (as_.here() - out_.body_write < 5) as_.Byte(0x90);
  ColdPaths();
  Thunks();
  return std::move(out_);
}

// ---- ways in

void Translator::Entries() {
  const uint16_t offset = unit_[0].offset;
  const bool live = unit_[0].live_before != 0;
  start_ = as_.here();
  // Leaving with the unit's own address: flags are in saved_flags, or dead.
  out_.checked = as_.run();
  as_.Lea(kS1, {.base = kS0, .disp = -int32_t{offset}});
  as_.Cmp(kS1, Gs(offsetof(State, code_pages) + context_.code_slot * 8));
  as_.Jcc(kCcNe, context_.stubs->dispatch);
  as_.Store(PageBase(), kS1);
  uint8_t* to_poll = nullptr;
  if (live) {
    as_.CmpDword(Requests(), 0);
    as_.Jcc(kCcNe, context_.stubs->dispatch);
    RestoreFlags();
    to_poll = as_.Jmp(as_.run());  // to the body
    out_.polled = as_.run();
    SaveFlags();
  } else {
    out_.polled = as_.run();
  }
  as_.CmpDword(Requests(), 0);
  uint8_t* requested = as_.Jcc(kCcNe, as_.run());
  if (live) {
    RestoreFlags();
    as_.PatchHere(to_poll);
  }
  host_flags_ = true;
  saved_flags_ = false;
  out_.body = as_.run();
  out_.body_write = as_.here();
  cold_.push_back({.kind = Cold::kPollLoop,
                   .from = requested,
                   .back = nullptr,
                   .site = 0,
                   .offset = offset,
                   .target = nullptr});
}

// ---- flags

void Translator::SaveFlags() {
  held_ = -1;
  as_.Mov(kS1, kRegAx);
  as_.FlagsToAx();
  as_.StoreAx(Gs(offsetof(State, saved_flags)));
  as_.Mov(kRegAx, kS1);
  saved_flags_ = true;
}

void Translator::RestoreFlags() {
  held_ = -1;
  as_.Mov(kS1, kRegAx);
  as_.LoadAx(Gs(offsetof(State, saved_flags)));
  as_.AxToFlags();
  as_.Mov(kRegAx, kS1);
  host_flags_ = true;
}

// The host's flags are about to be overwritten by something that isn't the guest's.
void Translator::SpoilFlags(uint16_t live) {
  if (live != 0 && !saved_flags_) SaveFlags();
  host_flags_ = false;
}

// ---- memory

// Where a group's check left host address - linear address.
HostMem Translator::AddendOf(unsigned group) const {
  const AccessGroup& g = unit_.group(group);
  return g.polymorphic
             ? Gs(offsetof(State, addends) + group * 8)
             : Gs(offsetof(State, slots) + g.slot * sizeof(Slot) + offsetof(Slot, addend));
}

void Translator::Label(unsigned i) {
  const UnitInsn& u = unit_[i];
  if (u.live_before != 0) NeedFlags();
  host_flags_ = true;
  saved_flags_ = false;
  vectors_checked_ = x87_checked_ = x87_page_kept_ = false;
  labels_[i] = as_.run();
  if (u.loop && u.live_before == 0) {
    as_.CmpDword(Requests(), 0);
    cold_.push_back({.kind = Cold::kPollLoop,
                     .from = as_.Jcc(kCcNe, as_.run()),
                     .back = nullptr,
                     .site = 0,
                     .offset = u.offset,
                     .target = nullptr});
  }
}

void Translator::Checks(unsigned i) {
  for (unsigned g = 0; g < unit_.group_count(); ++g) {
    if (unit_.group(g).check_at == i) Check(g, i);
  }
}

// The group's lowest address to S0; S1 is spoilt.
void Translator::GroupAddress(const AccessGroup& group, unsigned at) {
  const AddressKey& key = group.key;
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
    address.base = HostOf(reg);
    if (address.base == kNoReg) {
      as_.Load(kS0, GprAt(reg));
      address.base = kS0;
    }
  }
  if (key.index != 0) {
    const unsigned reg = find(key.index);
    constant -= unit_.symbols(at)[reg].offset << key.scale;
    address.index = HostOf(reg);
    address.scale = key.scale;
    if (address.index == kNoReg) {
      as_.Load(kS1, GprAt(reg));
      address.index = kS1;
    }
  }
  if (constant != static_cast<int32_t>(constant)) {
    // Rare: a constant of more than 32 bits.
    if (address.base != kNoReg || address.index != kNoReg) as_.Lea(kS0, address);
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

void Translator::Check(unsigned number, unsigned at) {
  const AccessGroup& group = unit_.group(number);
  SpoilFlags(unit_[at].live_before);
  held_ = -1;
  GroupAddress(group, at);
  const auto span = static_cast<unsigned>(group.high - group.low);
  const Site site = {.offset = unit_[at].offset,
                     .count = static_cast<uint8_t>(group.last - at + 1),
                     .vectors = vectors_checked_,
                     .x87 = x87_checked_,
                     .write = group.write,
                     .span = static_cast<uint16_t>(span),
                     .slot = group.slot,
                     .unit = unit_[0].offset,
                     .shared = group.shared,
                     .group = static_cast<uint8_t>(number)};
  if (group.polymorphic) {
    AskTlb(number, span);
    cold_.back().site = site.Pack();
    cold_.back().group = number;
    cold_.back().at = at;
    if (group.first == at) held_ = static_cast<int>(number);
    return;
  }
  as_.Sub(kS0, SlotPage(group.slot));
  as_.CmpImm(kS0, static_cast<int32_t>(4096 - span));
  uint8_t* from = as_.Jcc(kCcA, as_.run());
  cold_.push_back({.kind = Cold::kFill,
                   .from = from,
                   .back = as_.run(),
                   .site = site.Pack(),
                   .offset = 0,
                   .target = nullptr});
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
  const bool upper = context_.data_class == Tlb::kSupervisor;
  as_.RegMem(Assembler::k64, 0x0b, kS0, Gs(offsetof(State, asid) + (upper ? 8 : 0)));  // or
  as_.Cmp(kS0, field(group.write ? offsetof(TlbEntry, write) : offsetof(TlbEntry, read)));
  uint8_t* from = as_.Jcc(kCcNe, as_.run());
  as_.Load(kS1, field(offsetof(TlbEntry, addend)));
  as_.Store(AddendOf(number), kS1);
  cold_.push_back({.kind = Cold::kAsk,
                   .from = from,
                   .back = as_.run(),
                   .site = 0,
                   .offset = 0,
                   .target = nullptr});
}

// The host's address of a checked access, in one of S0 and S1; the other is spoilt. The flags stay.
HostMem Translator::Map(const UnitInsn& u, const MemoryAccess& access) {
  const Insn& insn = u.insn;
  const bool held = held_ == access.group;
  const HostReg to = held ? kS1 : kS0, spare = held ? kS0 : kS1;
  held_ = -1;
  if (!held) as_.Load(to, AddendOf(static_cast<unsigned>(access.group)));
  if (access.key.segment != 0) {
    as_.Load(spare, SegmentBase(access.key.segment));
    as_.Lea(to, {.base = to, .index = spare});
  }
  int64_t disp = insn.disp;
  HostReg base = kNoReg;
  if (insn.base == kBaseRip) {
    as_.Load(spare, PageBase());
    base = spare;
    disp += u.offset + insn.length;
  } else if (insn.base != kNoRegister) {
    base = HostOf(insn.base);
    if (base == kNoReg) {
      as_.Load(spare, GprAt(insn.base));
      base = spare;
    }
  }
  if (insn.index == kNoRegister) {
    if (base == spare) {
      as_.Lea(to, {.base = to, .index = spare});
      base = kNoReg;
    }
  } else {
    if (base != kNoReg) as_.Lea(to, {.base = to, .index = base});
    base = HostOf(insn.index);
    if (base == kNoReg) {
      as_.Load(spare, GprAt(insn.index));
      as_.Lea(to, {.base = to, .index = spare, .scale = insn.scale});
    }
  }
  if (disp != static_cast<int32_t>(disp)) {  // RIP-relative at the very edge
    as_.MovImm64(spare, static_cast<uint64_t>(disp));
    as_.Lea(to, {.base = to, .index = spare});
    disp = 0;
  }
  return {.base = to,
          .index = base,
          .scale = insn.index == kNoRegister ? uint8_t{0} : insn.scale,
          .disp = static_cast<int32_t>(disp)};
}

HostMem Translator::StackAt(const MemoryAccess& access, HostReg base, int32_t disp) {
  as_.Load(kS0, AddendOf(static_cast<unsigned>(access.group)));
  return {.base = kS0, .index = base, .disp = disp};
}

// Registers of the guest's are to be in the host's before `u`; `live` says whether they are.
void Translator::NeedLoaded(const UnitInsn& u, size_t live, Cold::Kind load, bool* checked) {
  if (*checked) return;
  SpoilFlags(u.live_before);
  as_.CmpByte(Gs(live), 0);
  uint8_t* from = as_.Jcc(kCcE, as_.run());
  cold_.push_back(
      {.kind = load, .from = from, .back = as_.run(), .site = 0, .offset = 0, .target = nullptr});
  *checked = true;
}

void Translator::NeedVectors(const UnitInsn& u) {
  NeedLoaded(u, offsetof(State, vector_live), Cold::kVectors, &vectors_checked_);
}

void Translator::NeedX87(const UnitInsn& u) {
  NeedLoaded(u, offsetof(State, x87_live), Cold::kX87, &x87_checked_);
}

// After an x87 instruction: what FIP, FOP and FDP hold from now on. S0 and S1 are spoilt.
void Translator::KeepX87Pointers(const UnitInsn& u) {
  const Insn& insn = u.insn;
  if (!x87_page_kept_) {
    as_.Load(kS1, PageBase());
    as_.Store(Gs(offsetof(State, x87_page)), kS1);
    x87_page_kept_ = true;
  }
  static_assert(offsetof(State, x87_opcode) == offsetof(State, x87_offset) + 2);
  const uint32_t opcode = (insn.opcode & 7u) << 8 | insn.modrm;
  as_.StoreDword(Gs(offsetof(State, x87_offset)), opcode << 16 | u.offset);
  if (!insn.has_memory()) return;
  const HostMem to = Gs(offsetof(State, x87_address));
  HostMem address{.disp = static_cast<int32_t>(insn.disp)};
  if (insn.base == kBaseRip) {
    as_.Load(kS1, PageBase());
    as_.Lea(kS1, {.base = kS1, .disp = u.offset + insn.length});
    address.base = kS1;
  } else if (insn.base != kNoRegister) {
    address.base = HostOf(insn.base);
    if (address.base == kNoReg) as_.Load(address.base = kS1, GprAt(insn.base));
  }
  if (insn.index != kNoRegister) {
    address.index = HostOf(insn.index);
    address.scale = insn.scale;
    if (address.index == kNoReg) as_.Load(address.index = kS0, GprAt(insn.index));
  }
  if (address.index == kNoReg && address.base == kNoReg) return as_.StoreImm(to, address.disp);
  if (address.index == kNoReg && address.disp == 0) return as_.Store(to, address.base);
  as_.Lea(kS1, address);
  as_.Store(to, kS1);
}

// ---- instructions

void Translator::Instruction(unsigned i) {
  const UnitInsn& u = unit_[i];
  switch (u.form->form) {
    case Form::kInterpret:
      return Interpret(u);
    case Form::kNothing:
      return;
    case Form::kCopy:
      return Copy(u);
    case Form::kLea:
      return Lea(u);
    case Form::kMoveFromSegment:
      return MoveFromSegment(u);
    case Form::kClearInterrupts:
      return ClearInterrupts(u);
    case Form::kSetInterrupts:
      return SetInterrupts(i);
    case Form::kPushFlags:
      return PushFlags(u);
    case Form::kPush:
      return Push(u);
    case Form::kPop:
      return Pop(u);
    case Form::kLeave:
      return Leave(u);
    case Form::kCall:
      return Call(u);
    case Form::kReturn:
      return Return(u);
    case Form::kJump:
      return Jump(u);
    case Form::kJcc:
    case Form::kJcxz:
      return Conditional(u);
  }
}

void Translator::Interpret(const UnitInsn& u) {
  if (!saved_flags_) SaveFlags();
  CallInterpreter(u, Loaded());
  x87_page_kept_ = false;
  host_flags_ = false;
  saved_flags_ = true;
}

// Flags are in saved_flags, before and after.
void Translator::CallInterpreter(const UnitInsn& u, uint32_t loaded) {
  const bool ends = u.insn.has(kBranch);
  // The instruction itself lies in the code, jumped over.
  as_.MovImm32(kS0, u.offset | (ends ? 0 : loaded));
  uint8_t* load = as_.here();
  as_.MovImm64(kS1, 0);
  if (ends) {
    as_.Jmp(context_.stubs->execute_end);
  } else {
    as_.Call(context_.stubs->execute);
  }
  uint8_t* over = ends ? nullptr : as_.Jmp(as_.run());
  while (reinterpret_cast<uintptr_t>(as_.here()) % alignof(Insn) != 0) as_.Byte(0xcc);
  const auto where = reinterpret_cast<uint64_t>(as_.here());
  as_.Put(&u.insn, sizeof(u.insn));
  as_.Qword(reinterpret_cast<uint64_t>(context_.page + u.offset + u.insn.length));
  std::memcpy(load + 2, &where, 8);
  if (over != nullptr) as_.PatchHere(over);
}

void Translator::MoveFromSegment(const UnitInsn& u) {
  const HostReg to = HostOf(u.insn.rm) == kNoReg ? kS1 : HostOf(u.insn.rm);
  as_.RegMem(Assembler::k32, 0xb70f, to,  // movzx
             Gs(offsetof(State, cpu) + offsetof(Cpu, seg) + u.insn.reg * sizeof(Segment) +
                offsetof(Segment, selector)));
  if (to == kS1) as_.Store(GprAt(u.insn.rm), kS1);
}

void Translator::ClearInterrupts(const UnitInsn& u) {
  SpoilFlags(u.live_before);
  as_.RegMem(Assembler::k64, 0x81, 4, Rflags());  // and
  as_.Dword(~static_cast<uint32_t>(rflags::kIf));
}

// The next instruction follows without a look at requests: that is the interrupt shadow, as far as
// nothing waits.
void Translator::SetInterrupts(unsigned i) {
  const UnitInsn& u = unit_[i];
  if (i + 1 == unit_.count() || unit_[i + 1].label) return Interpret(u);
  if (!saved_flags_) SaveFlags();
  host_flags_ = false;
  as_.CmpByte(Gs(offsetof(State, cpu) + offsetof(Cpu, interrupt_waiting)), 0);
  uint8_t* from = as_.Jcc(kCcNe, as_.run());
  as_.RegMem(Assembler::k64, 0x81, 1, Rflags());  // or
  as_.Dword(static_cast<uint32_t>(rflags::kIf));
  cold_.push_back({.kind = Cold::kExecute,
                   .from = from,
                   .back = as_.run(),
                   .site = 0,
                   .offset = 0,
                   .target = nullptr,
                   .insn = &u,
                   .loaded = Loaded()});
}

void Translator::PushFlags(const UnitInsn& u) {
  NeedFlags();
  if (u.live_after != 0 && !saved_flags_) SaveFlags();
  as_.Byte(0x9c);  // pushfq
  as_.Byte(0x41), as_.Byte(0x58 | (kS1 & 7));
  host_flags_ = false;
  const auto status = static_cast<uint32_t>(rflags::kStatus);
  as_.RegReg(Assembler::k32, 0x81, 4, kS1);  // and
  as_.Dword(status);
  as_.Load(kS0, Rflags());
  as_.RegReg(Assembler::k64, 0x81, 4, kS0);
  as_.Dword(~(status | static_cast<uint32_t>(rflags::kVm | rflags::kRf)));
  as_.RegReg(Assembler::k64, 0x0b, kS1, kS0);  // or
  Mark(u);
  as_.Store(StackAt(u.stack, kGuestSp, -8), kS1);
  as_.Lea(kGuestSp, {.base = kGuestSp, .disp = -8});
}

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

  const bool memory = insn.has_memory();
  if (memory || form.may_trap) Mark(u);
  HostMem mem;
  if (memory) mem = Map(u, u.operand);
  // AH..BH can't stand beside a memory operand here, since that takes a REX prefix: a scratch
  // register's low byte stands in. RORX leaves the flags.
  HostReg high = kNoReg;
  if (memory && form.reg_is_gpr && insn.reg >= kHighByte) {
    high = mem.base == kS0 ? kS1 : kS0;
    as_.Byte(0xc4), as_.Byte(0x63), as_.Byte(0x7b), as_.Byte(0xf0);  // high 32 bits are dropped
    as_.Byte(0xc0 | (high & 7) << 3 | (insn.reg & 3));
    as_.Byte(8);
  }
  // Registers that live in memory go through scratch ones.
  struct {
    unsigned guest;
    HostReg host;
    bool written;
  } temps[2];
  unsigned temp_count = 0;
  const bool narrow = insn.operand_size < 4;
  const auto host = [&](bool is_gpr, unsigned reg, unsigned field_operand) {
    if (!is_gpr || reg >= kHighByte) return static_cast<HostReg>(reg);
    if (HostOf(reg) != kNoReg) return HostOf(reg);
    const bool first = field_operand == 0;
    const bool result = first ? form.writes_first : field_operand == 1 && form.writes_second;
    for (unsigned t = 0; t < temp_count; ++t) {
      if (temps[t].guest != reg) continue;
      temps[t].written |= result;
      if (!first || form.reads_first) as_.Load(temps[t].host, GprAt(reg));
      return temps[t].host;
    }
    const HostReg scratch = memory ? (mem.base == kS0 ? kS1 : kS0) : temp_count == 1 ? kS1 : kS0;
    VERIFY(temp_count < (memory ? 1u : 2u));
    temps[temp_count++] = {reg, scratch, result};
    if (!first || form.reads_first || narrow || !result) as_.Load(scratch, GprAt(reg));
    return scratch;
  };
  unsigned reg_operand = 9, rm_operand = 9, vvvv_operand = 9;
  for (unsigned n = 0; n < insn.row->operand_count; ++n) {
    switch (insn.row->operands[n].kind) {
      case OperandKind::kReg:
        reg_operand = n;
        break;
      case OperandKind::kRm:
      case OperandKind::kRmReg:
        rm_operand = n;
        break;
      case OperandKind::kVvvv:
        vvvv_operand = n;
        break;
      default:
        break;
    }
  }
  const HostReg reg = high != kNoReg ? high : host(form.reg_is_gpr, insn.reg, reg_operand);
  const HostReg rm = memory ? kNoReg : host(form.rm_is_gpr, insn.rm, rm_operand);
  const HostReg vvvv = host(form.vvvv_is_gpr, insn.vvvv, vvvv_operand);
  CopyEncoding(u, memory ? &mem : nullptr, reg, rm, vvvv);
  for (unsigned t = 0; t < temp_count; ++t) {
    if (temps[t].written) as_.Store(GprAt(temps[t].guest), temps[t].host);
  }
  if (form.x87_pointers) KeepX87Pointers(u);
  if (written != 0) {
    host_flags_ = true;
    saved_flags_ = false;
  }
}

void Translator::CopyEncoding(const UnitInsn& u, const HostMem* mem, HostReg reg, HostReg rm,
                              HostReg vvvv) {
  const Insn& insn = u.insn;
  const Row& row = *insn.row;
  const RowForm& form = *u.form;
  const auto byte_register = [&](unsigned operand_kind_first, bool is_gpr, unsigned number) {
    if (!is_gpr || number >= kHighByte) return false;
    for (unsigned n = 0; n < row.operand_count; ++n) {
      const OperandKind kind = row.operands[n].kind;
      const bool match = operand_kind_first == 0
                             ? kind == OperandKind::kReg
                             : kind == OperandKind::kRm || kind == OperandKind::kRmReg;
      if (match) return OperandSize(insn, row.operands[n]) == 1 && number >= 4;
    }
    return false;
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
  if (row.vex) {
    const unsigned map = row.map == OpcodeMap::k0f ? 1 : row.map == OpcodeMap::k0f38 ? 2 : 3;
    const unsigned v = form.vvvv_is_gpr ? unsigned{vvvv} : unsigned{insn.vvvv};
    as_.Byte(0xc4);
    as_.Byte((r ? 0u : 0x80u) | (x ? 0u : 0x40u) | (b ? 0u : 0x20u) | map);
    as_.Byte((insn.w() ? 0x80u : 0u) | (~v & 15) << 3 | unsigned{insn.vex_l} << 2 | insn.vex_pp);
    as_.Byte(insn.opcode);
  } else {
    if (insn.locked()) as_.Byte(0xf0);
    if ((insn.flags & kHas66) != 0 || row.prefix == PrefixRule::k66) as_.Byte(0x66);
    if (row.prefix == PrefixRule::kF2) as_.Byte(0xf2);
    if (row.prefix == PrefixRule::kF3) as_.Byte(0xf3);
    const bool forced = byte_register(0, form.reg_is_gpr, insn.reg) ||
                        (mem == nullptr && byte_register(1, form.rm_is_gpr, insn.rm));
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
    as_.Byte(row.opcode_register ? (row.opcode & ~7u) | (reg_number & 7) : row.opcode);
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
}

void Translator::Lea(const UnitInsn& u) {
  const Insn& insn = u.insn;
  const Assembler::Width width = insn.operand_size == 8 ? Assembler::k64 : Assembler::k32;
  const HostReg to = HostOf(insn.reg) == kNoReg ? kS1 : HostOf(insn.reg);
  HostMem mem;
  int64_t disp = insn.disp;
  if (insn.base == kBaseRip) {
    as_.Load(kS0, PageBase());
    mem.base = kS0;
    disp += u.offset + insn.length;
  } else if (insn.base != kNoRegister) {
    mem.base = HostOf(insn.base);
    if (mem.base == kNoReg) {
      as_.Load(kS0, GprAt(insn.base));
      mem.base = kS0;
    }
  }
  if (insn.index != kNoRegister) {
    mem.index = HostOf(insn.index);
    mem.scale = insn.scale;
    if (mem.index == kNoReg) {
      as_.Load(kS1, GprAt(insn.index));
      mem.index = kS1;
    }
  }
  if (disp != static_cast<int32_t>(disp)) {
    as_.MovImm64(kS1, static_cast<uint64_t>(disp));
    mem.index = kS1;
    disp = 0;
  }
  mem.disp = static_cast<int32_t>(disp);
  as_.RegMem(width, 0x8d, to, mem);
  if (to == kS1) as_.Store(GprAt(insn.reg), kS1);
}

void Translator::Mark(const UnitInsn& u) {
  out_.marks.push_back({.begin = static_cast<uint16_t>(as_.here() - start_),
                        .offset = u.offset,
                        .flags_in_host = host_flags_ ? uint16_t{1} : uint16_t{0}});
}

void Translator::Push(const UnitInsn& u) {
  Mark(u);
  const Insn& insn = u.insn;
  HostReg from = kS1;
  if (u.operand.present) {
    const HostMem mem = Map(u, u.operand);
    as_.Load(kS1, mem);
  } else if (insn.row->imm[0] != ImmKind::kNone) {
    as_.StoreImm(StackAt(u.stack, kGuestSp, -8), static_cast<int32_t>(insn.imm));
    as_.Lea(kGuestSp, {.base = kGuestSp, .disp = -8});
    return;
  } else {
    const unsigned reg = u.form->memory_operand >= 0 ? insn.rm : insn.reg;
    from = HostOf(reg);
    if (from == kNoReg) {
      as_.Load(kS1, GprAt(reg));
      from = kS1;
    }
  }
  as_.Store(StackAt(u.stack, kGuestSp, -8), from);
  as_.Lea(kGuestSp, {.base = kGuestSp, .disp = -8});
}

void Translator::Pop(const UnitInsn& u) {
  Mark(u);
  const unsigned reg = u.form->memory_operand >= 0 ? u.insn.rm : u.insn.reg;
  const HostReg to = HostOf(reg) == kNoReg ? kS1 : HostOf(reg);
  as_.Load(to, StackAt(u.stack, kGuestSp, 0));
  if (reg == kRsp) return;
  if (to == kS1) as_.Store(GprAt(reg), kS1);
  as_.Lea(kGuestSp, {.base = kGuestSp, .disp = 8});
}

void Translator::Leave(const UnitInsn& u) {
  Mark(u);
  const HostMem mem = StackAt(u.stack, kRegBp, 0);
  as_.Lea(kGuestSp, {.base = kRegBp, .disp = 8});
  as_.Load(kRegBp, mem);
}

// ---- branches

void Translator::PageAddress(HostReg to, int64_t page_offset) {
  as_.Load(to, PageBase());
  if (page_offset != 0) as_.Lea(to, {.base = to, .disp = static_cast<int32_t>(page_offset)});
}

// A branch within the page, linked or not: host flags are valid where they are live.
void Translator::LeaveTo(uint8_t* branch, int64_t page_offset) {
  out_.exits.push_back({.distance = branch,
                        .thunk = nullptr,
                        .same_page = true,
                        .offset = static_cast<uint16_t>(page_offset)});
}

// Jumps to another page.
void Translator::CrossPage(int64_t page_offset) {
  if (!saved_flags_) SaveFlags();
  PageAddress(kS0, page_offset);
  out_.exits.push_back(
      {.distance = as_.Jmp(as_.run()), .thunk = nullptr, .same_page = false, .offset = 0});
}

// To the address in S0.
void Translator::Indirect(const UnitInsn& u, unsigned popped) {
  if (!saved_flags_) SaveFlags();
  as_.StoreImm(Gs(offsetof(State, branch)),
               static_cast<int32_t>(Branch{.offset = u.offset, .popped = popped}.Pack()));
  as_.Mov(kS1, kS0);
  as_.RegReg(Assembler::k64, 0xc1, 5, kS1);  // shr
  as_.Byte(12);
  as_.RegReg(Assembler::k32, 0x33, kS1, kS0);  // xor
  as_.RegReg(Assembler::k32, 0x81, 4, kS1);    // and
  as_.Dword(kJumpEntries - 1);
  as_.JmpMem({.index = kS1,
              .scale = 3,
              .disp = static_cast<int32_t>(offsetof(State, jumps) +
                                           context_.data_class * kJumpEntries * 8),
              .gs = true});
}

void Translator::Internal(uint8_t* distance, unsigned insn) {
  if (labels_[insn] != nullptr) {
    as_.Patch(distance, labels_[insn]);
  } else {
    fixups_.push_back({distance, insn});
  }
}

void Translator::PushReturn(const UnitInsn& u) {
  const HostMem mem = StackAt(u.stack, kGuestSp, -8);
  PageAddress(kS1, u.offset + u.insn.length);
  as_.Store(mem, kS1);
  as_.Lea(kGuestSp, {.base = kGuestSp, .disp = -8});
}

// An indirect branch's target to S0.
void Translator::LoadTarget(const UnitInsn& u) {
  if (u.operand.present) {
    const HostMem mem = Map(u, u.operand);
    as_.Load(kS0, mem);
  } else if (HostOf(u.insn.rm) != kNoReg) {
    as_.Mov(kS0, HostOf(u.insn.rm));
  } else {
    as_.Load(kS0, GprAt(u.insn.rm));
  }
}

void Translator::Call(const UnitInsn& u) {
  Mark(u);
  if (u.form->memory_operand >= 0) {
    // A target that can't be one is found before anything is pushed.
    if (!saved_flags_) SaveFlags();
    host_flags_ = false;
    LoadTarget(u);
    as_.Store(Gs(offsetof(State, spare)), kS0);
    as_.Mov(kS1, kS0);
    as_.RegReg(Assembler::k64, 0xc1, 4, kS1);  // shl
    as_.Byte(16);
    as_.RegReg(Assembler::k64, 0xc1, 7, kS1);  // sar
    as_.Byte(16);
    as_.RegReg(Assembler::k64, 0x3b, kS1, kS0);  // cmp
    const Site site = {.offset = u.offset, .count = 1};
    cold_.push_back({.kind = Cold::kInterpret,
                     .from = as_.Jcc(kCcNe, as_.run()),
                     .back = nullptr,
                     .site = site.Pack(),
                     .offset = 0,
                     .target = nullptr});
    PushReturn(u);
    as_.Load(kS0, Gs(offsetof(State, spare)));
    return Indirect(u, 0);
  }
  PushReturn(u);
  const int64_t target = int64_t{u.offset} + u.insn.length + u.insn.imm;
  if (target < 0 || target >= 4096) return CrossPage(target);
  if (u.live_after != 0) NeedFlags();
  LeaveTo(as_.Jmp(as_.run()), target);
}

void Translator::Return(const UnitInsn& u) {
  Mark(u);
  as_.Load(kS0, StackAt(u.stack, kGuestSp, 0));
  const auto extra = u.insn.row->imm[0] == ImmKind::kNone ? 0 : static_cast<uint16_t>(u.insn.imm);
  as_.Lea(kGuestSp, {.base = kGuestSp, .disp = 8 + extra});
  Indirect(u, 8u + extra);
}

void Translator::Jump(const UnitInsn& u) {
  Mark(u);
  if (u.form->memory_operand >= 0) {
    LoadTarget(u);
    return Indirect(u, 0);
  }
  const int64_t target = int64_t{u.offset} + u.insn.length + u.insn.imm;
  if (target < 0 || target >= 4096) return CrossPage(target);
  if (u.live_after != 0) NeedFlags();
  uint8_t* branch = as_.Jmp(as_.run());
  if (u.jump_to < 0) return LeaveTo(branch, target);
  const auto to = static_cast<unsigned>(u.jump_to);
  if (labels_[to] != nullptr && unit_[to].live_before != 0) {
    cold_.push_back({.kind = Cold::kPollLoop,
                     .from = branch,
                     .back = nullptr,
                     .site = 0,
                     .offset = unit_[to].offset,
                     .target = labels_[to]});
    return;
  }
  Internal(branch, to);
}

void Translator::Conditional(const UnitInsn& u) {
  if (u.insn.row->flags.tested != 0 || u.live_after != 0) NeedFlags();
  uint8_t* branch;
  if (u.form->form == Form::kJcxz) {
    as_.Byte(0xe3), as_.Byte(2);  // over the next jump
    as_.Byte(0xeb), as_.Byte(5);  // over the one after
    branch = as_.Jmp(as_.run());
  } else {
    branch = as_.Jcc(u.insn.opcode & 15, as_.run());
  }
  const int64_t target = int64_t{u.offset} + u.insn.length + u.insn.imm;
  if (u.jump_to >= 0) {
    const auto to = static_cast<unsigned>(u.jump_to);
    if (labels_[to] != nullptr && unit_[to].live_before != 0) {
      cold_.push_back({.kind = Cold::kPollLoop,
                       .from = branch,
                       .back = nullptr,
                       .site = 0,
                       .offset = unit_[to].offset,
                       .target = labels_[to]});
      return;
    }
    return Internal(branch, to);
  }
  if (target >= 0 && target < 4096) return LeaveTo(branch, target);
  // Another page: through a cold jump with the target at hand.
  out_.exits.push_back({.distance = branch, .thunk = nullptr, .same_page = false, .offset = 1});
  far_.push_back({out_.exits.size() - 1, target, saved_flags_});
}

// ---- behind the code

void Translator::ColdPaths() {
  for (const Fixup& fixup : fixups_) as_.Patch(fixup.distance, labels_[fixup.insn]);
  for (const FarExit& far : far_) {
    ExitSite& exit = out_.exits[far.exit];
    as_.PatchHere(exit.distance);
    if (!far.saved) SaveFlags();
    PageAddress(kS0, far.target);
    exit.distance = as_.Jmp(as_.run());
    exit.offset = 0;
  }
  for (const Cold& cold : cold_) {
    as_.PatchHere(cold.from);
    switch (cold.kind) {
      case Cold::kFill:
        as_.Add(kS0, SlotPage(Site::Unpack(cold.site).slot));
        as_.MovImm64(kS1, cold.site);
        as_.Call(context_.stubs->fill);
        as_.Jmp(cold.back);
        break;
      case Cold::kAsk:
        GroupAddress(unit_.group(cold.group), cold.at);
        as_.MovImm64(kS1, cold.site);
        as_.Call(context_.stubs->fill);
        as_.Load(kS1, Gs(offsetof(State, slots) + unit_.group(cold.group).slot * sizeof(Slot) +
                         offsetof(Slot, addend)));
        as_.Store(AddendOf(cold.group), kS1);
        as_.Jmp(cold.back);
        break;
      case Cold::kVectors:
        as_.Call(context_.stubs->load_vectors);
        as_.Jmp(cold.back);
        break;
      case Cold::kX87:
        as_.Call(context_.stubs->load_x87);
        as_.Jmp(cold.back);
        break;
      case Cold::kInterpret:
        as_.MovImm64(kS1, cold.site);
        as_.Jmp(context_.stubs->interpret);
        break;
      case Cold::kExecute:
        CallInterpreter(*cold.insn, cold.loaded);
        as_.Jmp(cold.back);
        break;
      case Cold::kPollLoop:
        if (cold.target != nullptr) {  // a loop whose flags are live
          SaveFlags();
          as_.CmpDword(Requests(), 0);
          uint8_t* leave = as_.Jcc(kCcNe, as_.run());
          RestoreFlags();
          as_.Jmp(cold.target);
          as_.PatchHere(leave);
        }
        PageAddress(kS0, cold.offset);
        as_.Jmp(context_.stubs->dispatch);
        break;
    }
  }
}

void Translator::Thunks() {
  // Where a killed unit's body goes.
  out_.leave = as_.run();
  SaveFlags();
  PageAddress(kS0, unit_[0].offset);
  as_.Jmp(context_.stubs->dispatch);
  uint32_t number = context_.first_exit;
  for (ExitSite& exit : out_.exits) {
    exit.thunk = as_.run();
    if (exit.same_page) {
      SaveFlags();
      PageAddress(kS0, exit.offset);
    }
    as_.MovImm32(kS1, number++);
    as_.Jmp(context_.stubs->link);
    as_.Patch(exit.distance, exit.thunk);
  }
}

}  // namespace kvartz::cpu::x86::jit
