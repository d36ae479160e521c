// How a random program is put together from items.
#include <algorithm>

#include "cpu/x86/jit/program_generator.h"

namespace kvartz::cpu::x86::programs {

void ProgramGenerator::Start(uint64_t seed, Shape shape, unsigned cpl) {
  picker_ = std::make_unique<InsnPicker>(seed * 0x9e3779b97f4a7c15 + 1, features_);
  program_ = Program{};
  program_.seed = seed;
  program_.shape = shape;
  program_.cpl = cpl;
  next_id_ = 0;
  function_ids_.clear();
  const Layout layout = LayoutOf(shape);
  program_.code_writable = Chance(30);
  program_.high_half = layout.is64() && Chance(15);
  program_.interrupted = Chance(10);
  if (!layout.is64() && layout.paged && Chance(25))
    program_.segment_shift = (layout.is16() ? 1 : 1 + Below(2)) * kPage;
  if (!layout.is64() && !layout.real_segments) {
    for (unsigned i : {kEs, kSs, kDs, kFs, kGs}) {
      // IRET loads SS from its descriptor.
      if (!Chance(i == kSs || i == kDs ? 6 : 20) || (i == kSs && program_.interrupted)) continue;
      program_.segments[i] = static_cast<Program::Segment>(
          i == kSs ? unsigned{2} : 1 + Below(i == kFs || i == kGs ? 4 : 3));
    }
    // Without paging it would let everything through.
    if (!layout.paged) std::fill_n(program_.segments, 6, Program::Segment::kUsual);
  }
  if (Chance(4)) program_.cr0_bits |= cr0::kTs;
  if (Chance(5)) program_.cr0_bits |= cr0::kAm;
  program_.data_seed = seed / 16;
  picker_->Begin(program_);
  picker_->RandomFpu(&program_.fpu);
  if (Chance(85)) program_.fpu.fcw |= 0x3f, program_.fpu.fsw &= 0x7f00;
  if (Chance(85)) program_.fpu.mxcsr |= 0x1f80;
  for (unsigned i = 0; i < 16; ++i) {
    program_.gpr[i] = picker_->Value();
    if (picker_->pointers() >> i & 1) {
      program_.gpr[i] = picker_->DataOffset((Below(3) * kPage + Below(kPage)) & ~uint64_t{63});
      if (program_.high_half && Chance(50)) program_.gpr[i] |= kHighHalf;
    }
    if (!layout.is64()) program_.gpr[i] = static_cast<uint32_t>(program_.gpr[i]);
  }
  program_.gpr[kRsp] = layout.stack_offset() + (layout.is16() ? 0xa00 : 0x1400) + Below(16) * 8;
  if (program_.high_half) program_.gpr[kRsp] |= kHighHalf;
  program_.rflags = 2 | (picker_->Random() & rflags::kStatus);
  if (Chance(20)) program_.rflags |= rflags::kDf;
  if (Chance(50)) program_.rflags |= rflags::kIf;
  if (Chance(4)) program_.rflags |= rflags::kAc;
  if (shape == Shape::kVm86)
    program_.rflags |= rflags::kVm | (Chance(80) ? rflags::kIopl : uint64_t{0});
}

void ProgramGenerator::AddItem(Section* section, bool function) {
  Item item;
  item.id = next_id_++;
  const bool edits = program_.cpl == 0 && layout().paged && !layout().is16();
  const uint64_t kind = Below(100);
  if (kind < 66) {
    Plain(&item, function);
  } else if (kind < 74) {
    Branch(&item);
  } else if (kind < 78 && !section->items.empty() && program_.counters.size() < 64) {
    BackEdge(&item, *section);
  } else if (kind < 80) {
    TightLoop(&item);
  } else if (kind < 82) {
    Indirect(&item);
  } else if (kind < 86 && !function) {
    Call(&item);
  } else if (kind < 89) {
    FlagsOnStack(&item);
  } else if (kind < 91) {
    Frame(&item);
  } else if (kind < 92 && !layout().is64()) {
    AllRegisters(&item);
  } else if (kind < 94 && !layout().is64()) {
    Chance(60) ? FarThereAndBack(&item) : Far(&item);
  } else if (kind < 95 && program_.code_writable && !layout().is16() && !program_.high_half) {
    Chance(40) ? Patchable(&item) : Patch(&item, *section);
  } else if (kind < 97 && edits) {
    EditMapping(&item);
  } else if (kind < 98 && layout().paged) {
    LoadSegment(&item);
  } else {
    Plain(&item, function);
  }
  section->items.push_back(item);
}

void ProgramGenerator::EndSection(Section* section, bool function) {
  Item item;
  item.id = next_id_++;
  item.must_stay = true;
  if (function) {
    item.flow = Item::Flow::kReturn;
    if (Chance(70)) Bytes(&item, {0xc3});
    if (item.code.empty())
      Bytes(&item, {0xc2, layout().width * static_cast<unsigned>(Below(3)), 0});
  } else {
    item.flow = Item::Flow::kEnd;
    if (program_.cpl == 0 && Chance(30)) {
      Bytes(&item, {0xe6, 0xf4, 0xeb, 0xfc});
    } else {
      Bytes(&item, {0xcd, kEndVector});
    }
  }
  section->items.push_back(item);
  // No target lies outside.
  const int first = section->items.front().id;
  const auto clamp = [&](int* target) {
    if (*target > kFunction) *target = std::clamp(*target, first, item.id);
  };
  for (Item& each : section->items) {
    for (int& target : each.targets) clamp(&target);
    for (Fixup& fixup : each.fixups)
      if (fixup.target >= 0 && each.needs < 0) clamp(&fixup.target);
  }
  for (int& target : program_.jump_table)
    if (target >= first) clamp(&target);
}

void ProgramGenerator::FillSection(Section* section, unsigned count, bool function) {
  picker_->TrustAll();
  for (unsigned i = 0; i < count; ++i) AddItem(section, function);
  EndSection(section, function);
}

void ProgramGenerator::ResolveTargets() {
  const auto resolve = [&](int* target) {
    if (*target <= kFunction) *target = function_ids_[static_cast<size_t>(kFunction - *target)];
  };
  for (Section& section : program_.sections) {
    for (Item& item : section.items) {
      for (int& target : item.targets) resolve(&target);
      for (Fixup& fixup : item.fixups) resolve(&fixup.target);
    }
  }
  for (int& target : program_.jump_table) resolve(&target);
}

Program ProgramGenerator::Generate(uint64_t seed, Shape shape, unsigned cpl) {
  Start(seed, shape, cpl);
  Section main;
  // Often so that it runs across the end of a page.
  main.offset = Chance(50) ? Below(kPage) : kPage - 1 - Below(600);
  FillSection(&main, 1 + static_cast<unsigned>(Chance(50) ? Below(60) : Below(20)), false);
  program_.sections.push_back(main);
  uint64_t at = 3 * kPage - 0x500;
  for (unsigned i = 0; i < kFunctions; ++i) {
    Section function;
    function.offset = at + Below(0x700);
    at += 0x1000;
    FillSection(&function, static_cast<unsigned>(Below(9)), true);
    function_ids_.push_back(function.items.front().id);
    program_.sections.push_back(function);
  }
  ResolveTargets();
  return program_;
}

}  // namespace kvartz::cpu::x86::programs
