#include "cpu/x86/jit/translator.h"

#include "base/check.h"
#include "cpu/x86/jit/state_operands.h"

namespace kvartz::cpu::x86::jit {

Translator::Translator(Unit& unit, Assembler& assembler, const TranslationContext& context,
                       Buffers& buffers)
    : unit_(unit), as_(assembler), context_(context), out_(buffers) {
  out_.exits.clear();
  out_.marks.clear();
  out_.cold.clear();
  out_.fixups.clear();
  out_.far.clear();
  out_.reads = out_.writes = 0;
  for (unsigned g = 0; g < unit_.group_count(); ++g) {
    AccessGroup& group = unit_.group(g);
    const unsigned slot = group.write ? kWriteSlots + (context_.first_write_slot + out_.writes++) %
                                                          (kSlots - kWriteSlots)
                                      : (context_.first_read_slot + out_.reads++) % kWriteSlots;
    group.slot = static_cast<uint16_t>(context_.data_class * kSlots + slot);
    group.polymorphic = context_.polymorphic.groups[g];
  }
}

EntryPoints Translator::Run() {
  Entries();
  for (unsigned i = 0; i < unit_.count(); ++i) {
    if (unit_[i].label) Label(i);
    Checks(i);
    if (!KeepsScratch(unit_[i])) SpoilScratch();
    Instruction(i);
    if (!KeepsScratch(unit_[i])) SpoilScratch();
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
      CrossPage(unit_.end_offset());
    }
  }
  // The body's first bytes may be replaced by a jump.
  while (as_.here() - entries_.body_write < 5) as_.Byte(0x90);
  ColdPaths();
  Thunks();
  return entries_;
}

// ---- ways in

void Translator::Entries() {
  const uint16_t offset = unit_[0].offset;
  const bool live = unit_[0].live_before != 0;
  start_ = as_.here();
  // Leaving with the unit's own address: flags are in saved_flags, or dead.
  entries_.checked = as_.run();
  as_.Lea(kS1, {.base = kS0, .disp = -int32_t{offset}});
  as_.Cmp(kS1, Gs(offsetof(State, code_pages) + context_.code_slot * 8));
  if (context_.mode != 0) {
    out_.cold.push_back({.kind = Cold::kEnter, .from = as_.Jcc(kCcNe, as_.run())});
  } else {
    as_.Jcc(kCcNe, context_.stubs->dispatch);
  }
  as_.Store(PageBase(), kS1);
  uint8_t* to_poll = nullptr;
  if (live) {
    as_.CmpDword(Requests(), 0);
    as_.Jcc(kCcNe, context_.stubs->dispatch);
    RestoreFlags();
    to_poll = as_.Jmp(as_.run());  // to the body
    entries_.polled = as_.run();
    SaveFlags();
  } else {
    entries_.polled = as_.run();
  }
  as_.CmpDword(Requests(), 0);
  uint8_t* requested = as_.Jcc(kCcNe, as_.run());
  if (live) {
    RestoreFlags();
    as_.PatchHere(to_poll);
  }
  host_flags_ = true;
  saved_flags_ = false;
  entries_.body = as_.run();
  entries_.body_write = as_.here();
  if (unit_.crosses()) CheckNextPage();
  out_.cold.push_back({.kind = Cold::kPollLoop, .from = requested, .offset = offset});
}

// The instruction's other part: the next page must be what it was.
void Translator::CheckNextPage() {
  const UnitInsn& u = unit_[0];
  SpoilFlags(u.live_before);
  PageAddress(kS0, u.offset);
  as_.Lea(kS1, {.base = kS0, .disp = 4096 - u.offset});
  as_.Cmp(kS1, Gs(offsetof(State, code_pages) + context_.next_code_slot * 8));
  as_.Jcc(kCcNe, context_.stubs->dispatch);
}

// ---- flags

void Translator::SaveFlags() {
  Spoil(kS1);
  as_.Mov(kS1, kRegAx);
  as_.FlagsToAx();
  as_.StoreAx(Gs(offsetof(State, saved_flags)));
  as_.Mov(kRegAx, kS1);
  saved_flags_ = true;
}

void Translator::RestoreFlags() {
  Spoil(kS1);
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

void Translator::Label(unsigned i) {
  const UnitInsn& u = unit_[i];
  if (u.live_before != 0) NeedFlags();
  SpoilScratch();
  host_flags_ = true;
  saved_flags_ = false;
  vectors_checked_ = x87_checked_ = x87_page_kept_ = false;
  labels_[i] = as_.run();
  if (u.loop && u.live_before == 0) {
    as_.CmpDword(Requests(), 0);
    out_.cold.push_back(
        {.kind = Cold::kPollLoop, .from = as_.Jcc(kCcNe, as_.run()), .offset = u.offset});
  }
}

// Registers of the guest's are to be in the host's before `u`; `live` says whether they are.
void Translator::NeedLoaded(const UnitInsn& u, size_t live, Cold::Kind load, bool* checked) {
  if (*checked) return;
  SpoilFlags(u.live_before);
  as_.CmpByte(Gs(live), 0);
  uint8_t* from = as_.Jcc(kCcE, as_.run());
  out_.cold.push_back({.kind = load, .from = from, .back = as_.run()});
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
  // A reload splits the pointer at a multiple of 4096, which is no page's start where CS isn't.
  if (!x87_page_kept_ || !unit_.mode().code_aligned) {
    as_.Load(kS1, PageBase());
    as_.Store(Gs(offsetof(State, x87_page)), kS1);
    x87_page_kept_ = true;
  }
  static_assert(offsetof(State, x87_opcode) == offsetof(State, x87_offset) + 2);
  const uint32_t opcode = (insn.opcode & 7u) << 8 | insn.modrm;
  as_.StoreDword(Gs(offsetof(State, x87_offset)), opcode << 16 | u.offset);
  if (!insn.has_memory()) return;
  const HostMem to = Gs(offsetof(State, x87_address));
  if (unit_.mode().legacy()) {
    LegacyEffective(kS1, insn);
    return as_.Store(to, kS1);
  }
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
  if (Legacy(u)) return;
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
    case Form::kReadTsc:
      return ReadTsc(u);
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
    case Form::kLoop:
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
void Translator::CallInterpreter(const UnitInsn& u, uint8_t loaded) {
  const bool ends = u.insn.has(kBranch);
  uint8_t* site = as_.LeaRip(kS1);
  if (ends) {
    as_.Jmp(context_.stubs->execute_end);
  } else {
    as_.Call(context_.stubs->execute);
  }
  uint8_t* over = ends ? nullptr : as_.Jmp(as_.run());
  while (reinterpret_cast<uintptr_t>(as_.here()) % alignof(ExecuteSite) != 0) as_.Byte(0xcc);
  as_.PatchHere(site);
  const unsigned next = u.offset + u.insn.length;
  const ExecuteSite record = {
      .flags = loaded,
      .offset = u.offset,
      .next = next < 4096 ? context_.pages.first + next : context_.pages.next + (next - 4096),
      .insn = u.insn};
  as_.Put(&record, sizeof(record));
  if (over != nullptr) as_.PatchHere(over);
}

void Translator::MoveFromSegment(const UnitInsn& u) {
  const HostReg to = HostOf(u.insn.rm) == kNoReg ? kS1 : HostOf(u.insn.rm);
  as_.RegMem(Assembler::k32, 0xb70f, to,  // movzx
             Gs(offsetof(State, cpu) + offsetof(Cpu, seg) + u.insn.reg * sizeof(Segment) +
                offsetof(Segment, selector)));
  if (to == kS1) as_.Store(GprAt(u.insn.rm), kS1);
}

void Translator::ReadTsc(const UnitInsn& u) {
  SpoilFlags(u.live_before);
  if (!unit_.mode().supervisor) {
    as_.RegMem(Assembler::k32, 0xf7, 0, Gs(offsetof(State, cpu) + offsetof(Cpu, cr4)));  // test
    as_.Dword(static_cast<uint32_t>(cr4::kTsd));
    out_.cold.push_back({.kind = Cold::kInterpret,
                         .from = as_.Jcc(kCcNe, as_.run()),
                         .site = {.count = 1, .offset = u.offset}});
  }
  const bool with_aux = u.insn.opcode != 0x31;  // RDTSCP
  as_.Call(with_aux ? context_.stubs->read_tscp : context_.stubs->read_tsc);
  if (with_aux) as_.Load(kRegCx, GprAt(kRcx));
  vectors_checked_ = x87_checked_ = false;
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
  out_.cold.push_back(
      {.kind = Cold::kExecute, .from = from, .back = as_.run(), .insn = &u, .loaded = Loaded()});
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
  if (unit_.mode().legacy()) return PushRegister(u, kS1);
  as_.Store(StackAt(u.stack, kGuestSp, -8), kS1);
  as_.Lea(kGuestSp, {.base = kGuestSp, .disp = -8});
}

void Translator::Lea(const UnitInsn& u) {
  const Insn& insn = u.insn;
  const Assembler::Width width = insn.operand_size == 8 ? Assembler::k64 : Assembler::k32;
  HostMem mem;
  int64_t disp = insn.disp;
  if (insn.base == kBaseRip) {
    Spoil(kS0);
    as_.Load(kS0, PageBase());
    mem.base = kS0;
    disp += u.offset + insn.length;
  } else if (insn.base != kNoRegister) {
    mem.base = HostOf(insn.base);
    if (mem.base == kNoReg) mem.base = ToScratch(insn.base, kNoReg, true);
  }
  if (insn.index != kNoRegister) {
    mem.index = HostOf(insn.index);
    mem.scale = insn.scale;
    if (mem.index == kNoReg) mem.index = ToScratch(insn.index, mem.base, true);
  }
  if (disp != static_cast<int32_t>(disp)) {
    Spoil(kS1);
    as_.MovImm64(kS1, static_cast<uint64_t>(disp));
    mem.index = kS1;
    disp = 0;
  }
  mem.disp = static_cast<int32_t>(disp);
  const bool stored = HostOf(insn.reg) == kNoReg;
  const HostReg to = stored ? ToScratch(insn.reg, kNoReg, false) : HostOf(insn.reg);
  as_.RegMem(width, 0x8d, to, mem);
  if (stored) as_.Store(GprAt(insn.reg), to);
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
    Spoil(kS1);
    as_.Load(kS1, mem);
  } else if (insn.row->imm[0] != ImmKind::kNone) {
    as_.StoreImm(StackAt(u.stack, kGuestSp, -8), static_cast<int32_t>(insn.imm));
    as_.Lea(kGuestSp, {.base = kGuestSp, .disp = -8});
    return;
  } else {
    const unsigned reg = u.form->memory_operand >= 0 ? insn.rm : insn.reg;
    from = HostOf(reg);
    if (from == kNoReg) from = ToScratch(reg, kS0, true);
  }
  as_.Store(StackAt(u.stack, kGuestSp, -8), from);
  as_.Lea(kGuestSp, {.base = kGuestSp, .disp = -8});
}

void Translator::Pop(const UnitInsn& u) {
  Mark(u);
  const unsigned reg = u.form->memory_operand >= 0 ? u.insn.rm : u.insn.reg;
  const HostMem mem = StackAt(u.stack, kGuestSp, 0);
  const bool stored = HostOf(reg) == kNoReg;
  const HostReg to = stored ? ToScratch(reg, mem.base, false) : HostOf(reg);
  as_.Load(to, mem);
  if (reg == kRsp) return;
  if (stored) as_.Store(GprAt(reg), to);
  as_.Lea(kGuestSp, {.base = kGuestSp, .disp = 8});
}

void Translator::Leave(const UnitInsn& u) {
  Mark(u);
  const HostMem mem = StackAt(u.stack, kRegBp, 0);
  as_.Lea(kGuestSp, {.base = kRegBp, .disp = 8});
  as_.Load(kRegBp, mem);
}

}  // namespace kvartz::cpu::x86::jit
