#include "cpu/x86/jit/program_generator.h"

#include <algorithm>

namespace kvartz::cpu::x86::programs {
namespace {

void Defines(Item* item) {
  item->defined = rflags::kStatus;
  item->undefined = 0;
}

}  // namespace

void ProgramGenerator::Bytes(Item* item, std::initializer_list<unsigned> bytes) {
  for (unsigned byte : bytes) item->code.push_back(static_cast<uint8_t>(byte));
}
void ProgramGenerator::Number(Item* item, uint64_t value, unsigned bytes) {
  for (unsigned i = 0; i < bytes; ++i) item->code.push_back(static_cast<uint8_t>(value >> (8 * i)));
}
void ProgramGenerator::Absolute(Item* item, unsigned reg, uint64_t at) {
  if (layout().is64()) Bytes(item, {4 | reg << 3, 0x25});
  if (!layout().is64()) Bytes(item, {(layout().is16() ? 6 : 5) | reg << 3});
  Number(item, at, near_size());
}
void ProgramGenerator::Relative(Item* item, unsigned size, int target) {
  Fixup fixup;
  fixup.at = static_cast<uint8_t>(item->code.size());
  fixup.size = static_cast<uint8_t>(size);
  fixup.end = static_cast<uint8_t>(fixup.at + size);
  fixup.target = target;
  item->fixups.push_back(fixup);
  item->targets.push_back(target);
  Number(item, 0, size);
}

void ProgramGenerator::Plain(Item* item, bool function) {
  const unsigned count = Chance(85) ? 1 : 2;
  for (unsigned i = 0; i < count; ++i)
    picker_->Pick(item, Chance(12) ? InsnPicker::Kind::kFlagReader : InsnPicker::Kind::kAny,
                  !function);
}

void ProgramGenerator::Branch(Item* item) {
  const int target = Ahead() + 1;
  item->flow = Item::Flow::kBranch;
  const uint64_t kind = Below(10);
  if (kind == 0) {
    item->flow = Item::Flow::kJump;
    const bool near = Chance(50);
    Bytes(item, {near ? 0xe9u : 0xebu});
    return Relative(item, near ? near_size() : 1, target);
  }
  if (kind == 1) {  // LOOPNE, LOOPE, LOOP, JCXZ
    const auto which = static_cast<unsigned>(Below(4));
    if (Chance(60)) picker_->MovImm(item, kRcx, Below(3));
    if (which < 2) item->tested = rflags::kZf;
    Bytes(item, {0xe0 + which});
    return Relative(item, 1, target);
  }
  const auto condition = static_cast<unsigned>(Below(16));
  static constexpr uint64_t kTested[] = {rflags::kOf,
                                         rflags::kCf,
                                         rflags::kZf,
                                         rflags::kZf | rflags::kCf,
                                         rflags::kSf,
                                         rflags::kPf,
                                         rflags::kSf | rflags::kOf,
                                         rflags::kZf | rflags::kSf | rflags::kOf};
  item->tested = kTested[condition / 2];
  if (Chance(60)) {
    Bytes(item, {0x70 | condition});
    return Relative(item, 1, target);
  }
  Bytes(item, {0x0f, 0x80 | condition});
  Relative(item, near_size(), target);
}

// Back to an earlier item, a bounded number of times.
void ProgramGenerator::BackEdge(Item* item, const Section& section) {
  const uint64_t back = std::min<uint64_t>(section.items.size(), 1 + Below(12));
  const int target = section.items[section.items.size() - back].id;
  const uint64_t counter = picker_->DataOffset(kCountersAt + program_.counters.size() * 4);
  program_.counters.push_back(
      static_cast<uint32_t>(Chance(92) ? Below(6) : Below(Chance(80) ? 60 : 600)));
  item->flow = Item::Flow::kBranch;
  if (Chance(25)) return QuietBackEdge(item, target, counter);
  if (Chance(10)) Bytes(item, {0xf0});
  Bytes(item, {0x83});
  Absolute(item, 5, counter);
  Bytes(item, {1});
  Defines(item);
  Bytes(item, {0x0f, 0x89});
  Relative(item, near_size(), target);
}

// The same without touching flags.
void ProgramGenerator::QuietBackEdge(Item* item, int target, uint64_t counter) {
  const uint64_t save = picker_->DataOffset(kSaveAt);
  const auto move = [&](unsigned opcode, uint64_t at) {
    Bytes(item, {opcode});
    Absolute(item, kRcx, at);
  };
  move(0x89, save);
  move(0x8b, counter);
  Bytes(item, {0xe3, 0});
  const size_t skip = item->code.size();
  if (layout().is16()) Bytes(item, {0x67});
  Bytes(item, {0x8d, 0x49, 0xff});
  move(0x89, counter);
  move(0x8b, save);
  Bytes(item, {0xe9});
  Relative(item, near_size(), target);
  item->code[skip - 1] = static_cast<uint8_t>(item->code.size() - skip);
  move(0x8b, save);
}

// A chain of carries: ADC or SBB, steps that leave CF alone, DEC, JNZ.
void ProgramGenerator::TightLoop(Item* item) {
  picker_->MovImm(item, kRcx, 1 + Below(Chance(90) ? 8 : 100));
  Bytes(item, {Chance(50) ? 0xf8u : 0xf9u});
  const size_t start = item->code.size();
  Bytes(item, {Chance(50) ? 0x13u : 0x1bu});
  Absolute(item, Chance(50) ? kRax : kRdx, picker_->DataOffset(Below(0x400) * 8));
  if (Chance(50))
    Bytes(item, {0x8d, layout().is16() ? 0x44u : 0x40u, static_cast<unsigned>(Below(64))});
  if (Chance(50)) {
    Bytes(item, {0x11});
    Absolute(item, kRdx, picker_->DataOffset(Below(0x400) * 8));
  }
  if (Chance(30)) {
    Bytes(item, {0xe2});  // LOOP
  } else {
    if (layout().is64()) Bytes(item, {0xff, 0xc9, 0x75});
    if (!layout().is64()) Bytes(item, {0x49, 0x75});
  }
  Number(item, start - item->code.size() - 1, 1);
  Defines(item);
}

void ProgramGenerator::Indirect(Item* item) {
  const int target = Ahead() + 1;
  item->flow = Item::Flow::kJump;
  if (Chance(40)) {
    const uint64_t slot = kJumpTableAt + 8 * program_.jump_table.size();
    program_.jump_table.push_back(target);
    item->targets.push_back(target);
    Bytes(item, {0xff});
    return Absolute(item, 4, picker_->DataOffset(slot));
  }
  const unsigned reg = picker_->Scratch();
  Fixup fixup;
  fixup.target = target;
  // Sometimes into the other mapping of the code.
  const bool alias = layout().paged && !layout().is16() && Chance(25);
  if (alias) fixup.addend = kAlias;
  const bool wide = layout().is64() && (program_.high_half || Chance(20));
  if (wide) Bytes(item, {0x48});
  Bytes(item, {0xb8 | reg});
  fixup.at = static_cast<uint8_t>(item->code.size());
  fixup.size = static_cast<uint8_t>(wide ? 8 : near_size());
  item->fixups.push_back(fixup);
  item->targets.push_back(target);
  Number(item, 0, fixup.size);
  Bytes(item, {0xff, 0xe0 | reg});
}

void ProgramGenerator::Call(Item* item) {
  const int target = kFunction - static_cast<int>(Below(kFunctions));
  item->flow = Item::Flow::kCall;
  const uint64_t kind = Below(3);
  if (kind == 0) {
    Bytes(item, {0xe8});
    return Relative(item, near_size(), target);
  }
  item->targets.push_back(target);
  if (kind == 1) {
    const uint64_t slot = kJumpTableAt + 8 * program_.jump_table.size();
    program_.jump_table.push_back(target);
    Bytes(item, {0xff});
    return Absolute(item, 2, picker_->DataOffset(slot));
  }
  const unsigned reg = picker_->Scratch();
  const bool wide = layout().is64() && program_.high_half;
  if (wide) Bytes(item, {0x48});
  Bytes(item, {0xb8 | reg});
  Fixup fixup;
  fixup.at = static_cast<uint8_t>(item->code.size());
  fixup.size = static_cast<uint8_t>(wide ? 8 : near_size());
  fixup.target = target;
  item->fixups.push_back(fixup);
  Number(item, 0, fixup.size);
  Bytes(item, {0xff, 0xd0 | reg});
}

void ProgramGenerator::FlagsOnStack(Item* item) {
  item->tested = rflags::kStatus;
  Bytes(item, {0x9c});
  if (Chance(40)) return Bytes(item, {0x58 | picker_->Scratch()});
  uint64_t mask = picker_->Random() & rflags::kStatus;
  if (Chance(20)) mask |= rflags::kDf;
  if (Chance(3)) mask |= rflags::kTf;
  if (Chance(5)) mask |= rflags::kAc;
  if (Chance(5)) mask |= rflags::kId | rflags::kNt;
  if (!layout().is16()) {
    Bytes(item, {0x81, 0x34, 0x24});
    Number(item, mask, 4);
  }
  Bytes(item, {0x9d});
  Defines(item);
}

void ProgramGenerator::Frame(Item* item) {
  if (layout().is64()) Bytes(item, {0x48});
  Bytes(item, {0x89, 0xe5});  // MOV rBP, rSP
  const auto level = static_cast<unsigned>(Chance(60) ? 0 : Below(4));
  Bytes(item, {0xc8, static_cast<unsigned>(Below(8)) * 8, 0, level});
  picker_->Pick(item, InsnPicker::Kind::kAny, false);
  Bytes(item, {0xc9});
  picker_->MovedPointer(kRbp);
}

void ProgramGenerator::AllRegisters(Item* item) {
  Bytes(item, {0x60});
  picker_->Pick(item, InsnPicker::Kind::kAny, false);
  Bytes(item, {0x61});
}

// An instruction with a byte that others may change.
void ProgramGenerator::Patchable(Item* item) {
  const unsigned reg = picker_->Scratch();
  const uint64_t kind = Below(3);
  if (kind == 0) {
    Bytes(item, {0xb8 | reg});
    item->patch_at = static_cast<int>(item->code.size() + Below(near_size()));
    return Number(item, picker_->Random(), near_size());
  }
  // ADD reg, imm8
  Bytes(item, {0x83, 0xc0 | reg, static_cast<unsigned>(Below(128))});
  item->patch_at = 2;
  Defines(item);
}

// A store into an instruction of the program, near or far, ahead or behind.
void ProgramGenerator::Patch(Item* item, const Section& section) {
  std::vector<const Item*> choice;
  for (const Section& other : program_.sections)
    for (const Item& candidate : other.items)
      if (candidate.patch_at >= 0) choice.push_back(&candidate);
  for (const Item& candidate : section.items)
    if (candidate.patch_at >= 0) choice.push_back(&candidate);
  if (choice.empty()) return Patchable(item);
  const Item& victim = *choice[Below(choice.size())];
  item->needs = victim.id;
  Fixup fixup;
  fixup.target = victim.id;
  // The assembler may put two bytes in front of the victim's code: found by the item's end then.
  fixup.addend =
      static_cast<int64_t>(victim.patch_at) + static_cast<int64_t>(program_.segment_shift);
  if (layout().paged && Chance(30)) fixup.addend += kAlias;
  const uint64_t kind = Below(3);
  if (kind == 0) Bytes(item, {0xc6});        // MOV byte
  if (kind == 1) Bytes(item, {0x80});        // ADD byte
  if (kind == 2) Bytes(item, {0xf0, 0xfe});  // LOCK INC byte
  Absolute(item, 0, 0);
  fixup.at = static_cast<uint8_t>(item->code.size() - 4);
  fixup.size = 4;
  item->fixups.push_back(fixup);
  if (kind < 2) Bytes(item, {static_cast<unsigned>(picker_->Random() & 0xff)});
  if (kind == 1) Defines(item);
  if (kind == 2) item->defined = rflags::kStatus & ~rflags::kCf;
}

// Data pages get another page behind them, or another right, and the TLB is told.
void ProgramGenerator::EditMapping(Item* item) {
  const uint64_t page = Below(4), other = Chance(70) ? page : Below(4);
  const uint64_t linear = layout().data + page * kPage;
  const uint64_t right = Chance(85) ? 7 : 5;
  const uint64_t entry = (layout().data + layout().physical_offset + other * kPage) | right;
  const uint64_t at = kPageTableLinear +
                      (linear >> 12) * (layout().mode == Mode::kPaged32 ? 4 : 8) +
                      program_.segment_shift;
  if (layout().is64()) Bytes(item, {0x48});
  Bytes(item, {0xc7});
  Absolute(item, 0, at);
  Number(item, entry, 4);
  if (Chance(50)) {
    Bytes(item, {0x0f, 0x01});
    return Absolute(item, 7, linear + program_.segment_shift);
  }
  Bytes(item, {0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8});  // MOV eAX, CR3; MOV CR3, eAX
  item->undefined = rflags::kStatus;
}

// Data segments of all kinds; the flat ones that programs rely on only where theirs are.
void ProgramGenerator::LoadSegment(Item* item) {
  const unsigned user = program_.cpl == 3 ? 8 | 3 : 0;
  if (layout().is64() || (layout().data_base == 0 && program_.segment_shift == 0 && Chance(50))) {
    picker_->MovImm(item, kRax, program_.cpl == 3 ? kUserData : kData32);
    const unsigned flat = Chance(50) ? kDs : kEs;
    return Bytes(item, {0x8e, 0xc0 | flat << 3});
  }
  const unsigned segment = Chance(30) ? kEs : Chance(50) ? kFs : kGs;
  if (layout().real_segments) {
    picker_->MovImm(item, kRax, (layout().data_base >> 4) + Below(0x300));
  } else {
    static constexpr uint16_t kKinds[] = {kTightData, kDownData, kOwnData};
    picker_->MovImm(item, kRax, Chance(10) ? 0 : kKinds[Below(3)] | user);
  }
  Bytes(item, {0x8e, 0xc0 | segment << 3});
}

unsigned ProgramGenerator::CodeSelector(unsigned selector) const {
  const uint64_t shift = selector == kAliasCode ? kAliasShift : 0;
  if (layout().real_segments) return static_cast<unsigned>((layout().code_base - shift) >> 4);
  return selector | (program_.cpl == 3 ? 8 | 3 : 0);
}

// The place where the item's code ends by now, and behind these bytes, as an offset of `size` bytes
// and a selector.
void ProgramGenerator::FarTarget(Item* item, unsigned size, int64_t shift, unsigned selector) {
  Fixup fixup;
  fixup.at = static_cast<uint8_t>(item->code.size());
  fixup.size = static_cast<uint8_t>(size);
  fixup.target = item->id;
  fixup.addend = static_cast<int64_t>(item->code.size() + size + 2) + shift;
  item->fixups.push_back(fixup);
  Number(item, 0, size);
  Number(item, CodeSelector(selector), 2);
}

// Far branches to the next instruction.
void ProgramGenerator::Far(Item* item) {
  const uint64_t kind = Below(3);
  if (kind == 0) {
    Bytes(item, {0xea});
    return FarTarget(item, near_size(), 0, kOwnCode);
  }
  if (kind == 1) {  // a call, whose return address is dropped
    Bytes(item, {0x9a});
    FarTarget(item, near_size(), 0, kOwnCode);
    if (layout().is16()) Bytes(item, {0x67});
    return Bytes(item, {0x8d, 0x64, 0x24, 2 * near_size()});  // LEA eSP, [ESP + ...]
  }
  Bytes(item, {0x0e, 0x68});  // PUSH CS, the target; RETF
  Fixup fixup;
  fixup.at = 2;
  fixup.size = static_cast<uint8_t>(near_size());
  fixup.target = item->id;
  fixup.addend = 3 + near_size();
  item->fixups.push_back(fixup);
  Number(item, 0, near_size());
  Bytes(item, {0xcb});
}

// A few instructions of the same code in another segment, or of code of the other size.
void ProgramGenerator::FarThereAndBack(Item* item) {
  const bool other = !layout().real_segments && Chance(50);
  const unsigned size = near_size();
  Bytes(item, {0xea});
  if (!other) {
    FarTarget(item, size, kAliasShift, kAliasCode);
    Item inner;
    picker_->Pick(&inner, InsnPicker::Kind::kAny, false);
    if (inner.tested == 0 && inner.undefined == 0 && inner.fixups.empty()) {
      item->code.insert(item->code.end(), inner.code.begin(), inner.code.end());
      item->defined = inner.defined;
    } else {
      picker_->TrustAll();
    }
    Bytes(item, {0xea});
    return FarTarget(item, size, 0, kOwnCode);
  }
  const auto shift = static_cast<int64_t>(layout().code - layout().code_base);
  FarTarget(item, size, -shift, kOtherCode);
  const unsigned other_size = 6 - size, reg = picker_->Scratch();
  for (uint64_t n = Below(4); n > 0; --n) {
    switch (Below(5)) {
      case 0:
        Bytes(item, {0xb8 | reg});
        Number(item, picker_->Random(), other_size);
        break;
      case 1:
        Bytes(item, {0x50 | reg, 0x58 | picker_->Scratch()});
        break;
      case 2:  // LEA, with addresses of either size
        if (Chance(50)) Bytes(item, {0x67});
        Bytes(item, {0x8d, 0x40 | reg << 3 | 3, static_cast<unsigned>(Below(256))});
        break;
      case 3:  // MOV reg, [...], by addresses as the program's
        Bytes(item, {0x67, 0x8b, 0x40 | reg << 3 | 7, static_cast<unsigned>(Below(64))});
        break;
      default:
        Bytes(item, {0x89, 0xc0 | reg << 3 | picker_->Scratch()});
    }
  }
  Bytes(item, {0x66, 0xea});
  FarTarget(item, size, 0, kOwnCode);
}

}  // namespace kvartz::cpu::x86::programs
