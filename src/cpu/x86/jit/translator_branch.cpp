// Branches, and what lies behind a unit's code: cold paths and thunks.
#include "base/check.h"
#include "cpu/x86/jit/state_operands.h"
#include "cpu/x86/jit/translator.h"

namespace kvartz::cpu::x86::jit {

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
    out_.fixups.push_back({distance, insn});
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
    SpoilScratch();
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
    const Site site = {.count = 1, .offset = u.offset};
    out_.cold.push_back(
        {.kind = Cold::kInterpret, .from = as_.Jcc(kCcNe, as_.run()), .site = site});
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
  const bool legacy = unit_.mode().legacy();
  if (u.form->memory_operand >= 0) {
    if (legacy) {
      if (!saved_flags_) SaveFlags();
      LegacyLoadTarget(u);
      CheckCodeLimit(u);
      return Indirect(u, 0);
    }
    LoadTarget(u);
    return Indirect(u, 0);
  }
  const int64_t target = int64_t{u.offset} + u.insn.length + u.insn.imm;
  if (unit_.NearTarget(u) < 0) {
    if (!legacy) return CrossPage(target);
    if (!saved_flags_) SaveFlags();
    LegacyTarget(u, target);
    CheckCodeLimit(u);
    return LegacyCrossPage(u, target);
  }
  if (u.live_after != 0) NeedFlags();
  uint8_t* branch = as_.Jmp(as_.run());
  if (u.jump_to < 0) return LeaveTo(branch, target);
  const auto to = static_cast<unsigned>(u.jump_to);
  if (labels_[to] != nullptr && unit_[to].live_before != 0) {
    out_.cold.push_back({.kind = Cold::kPollLoop,
                         .from = branch,
                         .offset = unit_[to].offset,
                         .target = labels_[to]});
    return;
  }
  Internal(branch, to);
}

void Translator::Conditional(const UnitInsn& u) {
  if (u.insn.row->flags.tested != 0 || u.live_after != 0) NeedFlags();
  uint8_t* branch;
  if (u.form->form != Form::kJcc) {
    branch = CounterBranch(u);
  } else {
    branch = as_.Jcc(u.insn.opcode & 15, as_.run());
  }
  const int64_t target = int64_t{u.offset} + u.insn.length + u.insn.imm;
  if (u.jump_to >= 0) {
    const auto to = static_cast<unsigned>(u.jump_to);
    if (labels_[to] != nullptr && unit_[to].live_before != 0) {
      out_.cold.push_back({.kind = Cold::kPollLoop,
                           .from = branch,
                           .offset = unit_[to].offset,
                           .target = labels_[to]});
      return;
    }
    return Internal(branch, to);
  }
  if (unit_.NearTarget(u) >= 0) return LeaveTo(branch, target);
  // Another page: through a cold jump with the target at hand.
  out_.exits.push_back({.distance = branch, .thunk = nullptr, .same_page = false, .offset = 1});
  out_.far.push_back({out_.exits.size() - 1, target, saved_flags_, &u});
}

// ---- behind the code

void Translator::ColdPaths() {
  SpoilScratch();
  for (const Fixup& fixup : out_.fixups) as_.Patch(fixup.distance, labels_[fixup.insn]);
  for (const FarExit& far : out_.far) {
    ExitSite& exit = out_.exits[far.exit];
    as_.PatchHere(exit.distance);
    if (!far.saved) SaveFlags();
    if (unit_.mode().legacy()) {
      LegacyTarget(*far.branch, far.target);
      CheckCodeLimit(*far.branch);
    } else {
      PageAddress(kS0, far.target);
    }
    exit.distance = as_.Jmp(as_.run());
    exit.offset = 0;
  }
  for (const Cold& cold : out_.cold) {
    as_.PatchHere(cold.from);
    switch (cold.kind) {
      case Cold::kFill:
        if (unit_.mode().legacy()) {
          as_.Add(kS0, SlotPage(cold.site.slot));
          LegacyBeforeFill(cold.site);
          CallFill(cold, context_.stubs->fill_at);
        } else {
          CallFill(cold, context_.stubs->fill);
        }
        break;
      case Cold::kAsk:
        GroupAddress(unit_.group(cold.site.group), cold.at);
        if (unit_.mode().legacy()) LegacyBeforeFill(cold.site);
        CallFill(cold, context_.stubs->fill_at);
        break;
      case Cold::kEnter:
        as_.MovImm32(kS1, context_.code_slot | context_.mode << 16);
        as_.Call(context_.stubs->enter_page[context_.data_class == Tlb::kUser]);
        as_.Jmp(entries_.checked);
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
        JumpToInterpret(cold.site);
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

void Translator::JumpToInterpret(const Site& site) {
  uint8_t* record = as_.LeaRip(kS1);
  as_.Jmp(context_.stubs->interpret);
  as_.PatchHere(record);
  as_.Put(&site, sizeof(site));
}

// S0: the address, or for `fill` what is left of it behind the slot's page.
void Translator::CallFill(const Cold& cold, const Stubs::Fill& fill) {
  as_.Call(fill[context_.data_class][cold.site.write()]);
  uint8_t* over = nullptr;
  const bool reloads = cold.kept != kNoRegister;
  if (cold.kind == Cold::kAsk || reloads) {
    over = as_.Jmp(as_.run());
  } else {
    as_.Jmp(cold.back);
  }
  static_assert(Site::kDistance == 5);
  as_.Put(&cold.site, sizeof(cold.site));
  if (over == nullptr) return;
  as_.PatchHere(over);
  if (reloads) {
    as_.Load(kS1, GprAt(cold.kept));
  } else {
    as_.Load(kS1,
             Gs(offsetof(State, slots) + cold.site.slot * sizeof(Slot) + offsetof(Slot, addend)));
    as_.Store(AddendOf(cold.site.group), kS1);
  }
  as_.Jmp(cold.back);
}

void Translator::Thunks() {
  uint32_t number = context_.first_exit;
  for (ExitSite& exit : out_.exits) {
    exit.thunk = as_.run();
    as_.MovImm32(kS1, number);
    as_.Jmp(exit.same_page ? context_.stubs->link_same : context_.stubs->link);
    as_.Patch(exit.distance, exit.thunk);
    number += context_.exit_step;
  }
}

}  // namespace kvartz::cpu::x86::jit
