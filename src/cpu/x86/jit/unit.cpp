#include "cpu/x86/jit/unit.h"

#include <algorithm>

#include "cpu/x86/interp/vector_plan.h"

namespace kvartz::cpu::x86::jit {
namespace {

constexpr auto kAllFlags = static_cast<uint16_t>(rflags::kStatus);
constexpr unsigned kPeekInsns = 6;

// Nothing runs on behind it.
bool Ends(const UnitInsn& u) {
  if (u.form->form == Form::kInterpret) return u.insn.has(kBranch);
  return u.form->form == Form::kCall || u.form->form == Form::kReturn ||
         u.form->form == Form::kJump;
}

uint16_t Tested(const UnitInsn& u) {
  // What the interpreter runs takes all flags with it, and may fault.
  if (u.form->form == Form::kInterpret || u.form->form == Form::kPushFlags) return kAllFlags;
  return u.insn.row->flags.tested & kAllFlags;
}
uint16_t Killed(const UnitInsn& u) {
  return KeepsFlags(u) ? 0 : u.insn.row->flags.written() & kAllFlags;
}

bool InMemory(unsigned reg) { return reg == kR10 || reg == kR11 || reg == kR15; }

// A byte register as AH..BH can't be named where a REX prefix is needed.
bool HighByteFits(const Insn& insn, const RowForm& form) {
  // Beside memory: as a source, through a scratch register.
  if (insn.has_memory()) {
    static const bool has_rorx = __builtin_cpu_supports("bmi2") != 0;
    return has_rorx && form.reg_is_gpr && form.memory_operand == 0 && !form.writes_second;
  }
  if (insn.w()) return false;
  const auto plain = [&](bool is_gpr, unsigned reg, unsigned operand) {
    if (!is_gpr || reg >= kHighByte) return true;
    return reg < 4 ||
           (reg < 8 && reg != kRsp && OperandSize(insn, insn.row->operands[operand]) > 1);
  };
  const bool rm_first = form.memory_operand == 0;
  return plain(form.reg_is_gpr, insn.reg, rm_first ? 1 : 0) &&
         plain(form.rm_is_gpr, insn.rm, rm_first ? 0 : 1) && !form.vvvv_is_gpr;
}

const RowForm& Interpreted() {
  static const RowForm form;
  return form;
}

// The row's form, or the interpreter's for the few shapes that it doesn't cover.
const RowForm* FormFor(const Insn& insn, UnitMode mode) {
  const RowForm& kInterpreted = Interpreted();
  const RowForm& form = RowForm::Of(*insn.row);
  if (form.form == Form::kInterpret || form.form == Form::kNothing) return &form;
  if ((insn.flags & kHas67) != 0 && !mode.legacy()) return &kInterpreted;
  if (form.vector && !(insn.row->vex ? mode.avx : mode.sse)) return &kInterpreted;
  const bool memory = insn.has_memory();
  if (form.x87 && !mode.x87) return &kInterpreted;
  // CVTPI2PS with a memory operand leaves the x87 unit alone, or some hosts don't.
  if (form.x87 && memory && VectorPlan::Of(*insn.row).mmx_in_rm) return &kInterpreted;
  if (mode.legacy() && form.form != Form::kCopy)
    return LegacyFits(insn, form, mode) ? &form : &kInterpreted;
  switch (form.form) {
    case Form::kPop:
      return memory || insn.operand_size != 8 ? &kInterpreted : &form;
    case Form::kMoveFromSegment:
      return memory || insn.operand_size < 4 || insn.reg > kGs ? &kInterpreted : &form;
    case Form::kClearInterrupts:
    case Form::kSetInterrupts:
      return mode.supervisor ? &form : &kInterpreted;
    case Form::kPush:
    case Form::kLeave:
    case Form::kPushFlags:
      return insn.operand_size == 8 ? &form : &kInterpreted;
    case Form::kLea:
      return insn.operand_size >= 4 ? &form : &kInterpreted;
    case Form::kCopy:
      break;
    default:
      return &form;
  }
  if (mode.legacy() && form.zeroes_vectors) return &kInterpreted;  // of the lower 8 registers
  if (memory && form.bit_of_string) return &kInterpreted;
  const bool high = (form.reg_is_gpr && insn.reg >= kHighByte) ||
                    (form.rm_is_gpr && !memory && insn.rm >= kHighByte);
  if (high) return HighByteFits(insn, form) ? &form : &kInterpreted;
  unsigned used = 0;
  if (form.reg_is_gpr && InMemory(insn.reg)) used |= 1u << insn.reg;
  if (form.rm_is_gpr && !memory && InMemory(insn.rm)) used |= 1u << insn.rm;
  if (form.vvvv_is_gpr && InMemory(insn.vvvv)) used |= 1u << insn.vvvv;
  return __builtin_popcount(used) <= (memory ? 1 : 2) ? &form : &kInterpreted;
}

// Bytes of its immediate, if that can be read when the instruction runs.
unsigned Loadable(const UnitInsn& u) {
  const Insn& insn = u.insn;
  if (u.form->form != Form::kCopy || u.form->takes_source == 0 || insn.has_memory() ||
      insn.operand_size < 4 || InMemory(TargetOf(insn)) || u.offset + insn.length > 4096)
    return 0;
  switch (insn.row->imm[0]) {
    case ImmKind::kIb:
      return 1;
    case ImmKind::kIz:
      return 4;
    case ImmKind::kIv:
      return insn.operand_size;
    default:
      return 0;
  }
}

}  // namespace

unsigned TargetOf(const Insn& insn) {
  const Operand& target = insn.row->operands[0];
  return target.kind == OperandKind::kReg        ? insn.reg
         : target.kind == OperandKind::kFixedReg ? target.fixed
                                                 : insn.rm;
}

bool KeepsFlags(const UnitInsn& u) {
  if (!u.form->keeps_flags_sometimes) return false;
  const Row& row = *u.insn.row;
  if (row.operands[row.operand_count - 1].kind == OperandKind::kOne) return false;
  return row.imm[0] == ImmKind::kNone ||
         (u.insn.imm & (u.insn.operand_size == 8 ? 0x3f : 0x1f)) == 0 || u.insn.operand_size < 4;
}

int64_t Unit::TargetInPage(const UnitInsn& u) {
  const int64_t target = int64_t{u.offset} + u.insn.length + u.insn.imm;
  return target >= 0 && target < 4096 ? target : -1;
}

DecodeStatus Unit::DecodeAt(unsigned offset, const uint8_t* next, Insn* insn) const {
  const size_t room = 4096 - offset;
  if (next == nullptr || room >= 15)
    return DecodeForUnit(context_, {page_ + offset, std::min<size_t>(room, 15)}, insn);
  uint8_t bytes[15];
  std::memcpy(bytes, page_ + offset, room);
  std::memcpy(bytes + room, next, sizeof(bytes) - room);
  return DecodeForUnit(context_, bytes, insn);
}

Unit::Built Unit::Build(const DecodeContext& context, UnitMode mode, Pages pages, unsigned offset,
                        const LoneAccesses& lone, Immediates immediates) {
  context_ = context;
  mode_ = mode;
  page_ = pages.first;
  lone_ = lone;
  immediates_ = immediates;
  count_ = 0;
  ranges_.clear();
  while (count_ < kMaxUnitInsns && offset < 4096) {
    UnitInsn& u = insns_[count_];
    u = UnitInsn{};
    const DecodeStatus status = DecodeAt(offset, count_ == 0 ? pages.next : nullptr, &u.insn);
    if (status == DecodeStatus::kTruncated && count_ == 0) return Built::kNeedsNext;
    if (status != DecodeStatus::kOk) break;
    u.form = FormFor(u.insn, mode_);
    u.offset = static_cast<uint16_t>(offset);
    // If its target may be out of CS, the count must not have changed yet.
    if (u.form->form == Form::kLoop && !mode_.code_flat && NearTarget(u) < 0)
      u.form = &Interpreted();
    u.tested = Tested(u);
    u.killed = Killed(u);
    if (immediates == Immediates::kLoaded) u.loaded = static_cast<uint8_t>(Loadable(u));
    Cover(offset, u.insn.length - u.loaded);
    offset += u.insn.length;
    ++count_;
    if (Ends(u)) break;
  }
  end_ = offset;
  if (count_ == 0) return Built::kUntranslated;
  if (crosses()) {
    ranges_[0].size = static_cast<uint16_t>(4096 - ranges_[0].offset);
    ranges_.push_back({.offset = 4096, .size = static_cast<uint16_t>(end_ - 4096)});
  }
  FindLabels();
  Liveness();
  Accesses();
  PlaceChecks();
  return Built::kOk;
}

void Unit::Cover(unsigned offset, unsigned size) {
  if (!ranges_.empty() && ranges_.back().offset + ranges_.back().size == offset) {
    ranges_.back().size = static_cast<uint16_t>(ranges_.back().size + size);
  } else {
    ranges_.push_back(
        {.offset = static_cast<uint16_t>(offset), .size = static_cast<uint16_t>(size)});
  }
}

uint64_t Unit::Shape() const {
  uint64_t shape = 1;
  for (unsigned i = 0; i < count_; ++i) {
    const UnitInsn& u = insns_[i];
    const unsigned loadable = Loadable(u);
    uint64_t words[2] = {};
    std::memcpy(words, u.insn.bytes, u.insn.length - loadable);
    shape = Digested(Digested(shape, words[0]), words[1] << 8 | loadable);
  }
  return shape;
}

void Unit::FindLabels() {
  for (unsigned i = 0; i < count_; ++i) {
    UnitInsn& u = insns_[i];
    const bool direct =
        IsConditional(u.form->form) || (u.form->form == Form::kJump && u.form->memory_operand < 0);
    if (!direct) continue;
    const int64_t target = NearTarget(u);
    for (unsigned j = 0; j < count_; ++j) {
      if (insns_[j].offset != target) continue;
      u.jump_to = static_cast<int8_t>(j);
      insns_[j].label = true;
      insns_[j].loop |= j <= i;
      break;
    }
  }
}

// Looks a few instructions ahead; what it can't see counts as live.
uint16_t Unit::LiveAt(unsigned offset) {
  uint16_t live = 0, open = kAllFlags;
  UnitInsn u;
  for (unsigned n = 0; n < kPeekInsns && offset < 4096; ++n) {
    if (DecodeAt(offset, nullptr, &u.insn) != DecodeStatus::kOk) break;
    u.form = FormFor(u.insn, mode_);
    u.offset = static_cast<uint16_t>(offset);
    Cover(offset, u.insn.length - (immediates_ == Immediates::kLoaded ? Loadable(u) : 0));
    live |= static_cast<uint16_t>(open & Tested(u));
    open &= static_cast<uint16_t>(~Killed(u));
    if (open == 0 || live == kAllFlags) return live;
    if (Ends(u) || IsConditional(u.form->form)) break;
    offset += u.insn.length;
  }
  return live | open;
}

void Unit::Liveness() {
  uint16_t exits[kMaxUnitInsns] = {};
  for (unsigned i = 0; i < count_; ++i) {
    const UnitInsn& u = insns_[i];
    const Form form = u.form->form;
    if (u.jump_to >= 0) continue;
    if (IsConditional(form) ||
        (form == Form::kJump && !u.insn.has_memory() && u.form->memory_operand < 0)) {
      const int64_t target = NearTarget(u);
      exits[i] = target < 0 ? kAllFlags : LiveAt(static_cast<unsigned>(target));
    } else if (Ends(u)) {
      exits[i] = kAllFlags;
    }
  }
  const UnitInsn& last = insns_[count_ - 1];
  const uint16_t behind = Ends(last) ? 0 : end_ < 4096 ? LiveAt(end_) : kAllFlags;
  for (bool again = true; again;) {
    again = false;
    uint16_t live = behind;
    for (unsigned i = count_; i-- > 0;) {
      UnitInsn& u = insns_[i];
      if (Ends(u)) live = 0;
      live |= u.jump_to >= 0 ? insns_[static_cast<unsigned>(u.jump_to)].live_before : exits[i];
      u.live_after = live;
      live = static_cast<uint16_t>((live & ~u.killed) | u.tested);
      again |= live != u.live_before;
      u.live_before = live;
    }
  }
}

void Unit::FreshAll() {
  for (unsigned reg = 0; reg < 16; ++reg) Fresh(reg);
}

// What the instruction leaves in the registers, symbolically.
void Unit::Update(const UnitInsn& u) {
  const Insn& insn = u.insn;
  const RowForm& form = *u.form;
  const unsigned full = mode_.legacy() ? 4 : 8;  // a whole register
  const int64_t slot = mode_.legacy() ? insn.operand_size : 8;
  switch (form.form) {
    case Form::kPush:
    case Form::kPushFlags:
      return MoveStackPointer(-slot);
    case Form::kLoop:
      return Fresh(kRcx);
    case Form::kMoveFromSegment:
      return Fresh(insn.rm);
    case Form::kReadTsc:
      Fresh(kRax);
      Fresh(kRcx);
      return Fresh(kRdx);
    case Form::kPop:
      MoveStackPointer(slot);
      if (!insn.has_memory()) Fresh(form.memory_operand >= 0 ? insn.rm : insn.reg);
      return;
    case Form::kLeave:
      now_[kRsp] = now_[kRbp];
      MoveStackPointer(slot);
      Fresh(kRbp);
      return;
    case Form::kLea:
      if (insn.operand_size == full && insn.address_size == full && insn.base < 16 &&
          insn.index == kNoRegister) {
        now_[insn.reg] = {now_[insn.base].id, now_[insn.base].offset + insn.disp};
      } else {
        Fresh(insn.reg);
      }
      return;
    case Form::kInterpret:
      FreshAll();
      return;
    case Form::kCopy:
      break;
    default:
      return;
  }
  const Row& row = *insn.row;
  if (u.loaded != 0) return Fresh(TargetOf(insn));
  const bool wide = insn.operand_size == full && !insn.has_memory();
  if (wide) {
    switch (form.arithmetic) {
      case Arithmetic::kAddImmediate:
        now_[insn.rm].offset += insn.imm;
        return;
      case Arithmetic::kSubImmediate:
        now_[insn.rm].offset -= insn.imm;
        return;
      case Arithmetic::kIncrement:
        ++now_[insn.rm].offset;
        return;
      case Arithmetic::kDecrement:
        --now_[insn.rm].offset;
        return;
      case Arithmetic::kMove: {
        if (!form.reg_is_gpr || !form.rm_is_gpr) break;
        const bool to_rm = row.operands[0].kind == OperandKind::kRm;
        now_[to_rm ? insn.rm : insn.reg] = now_[to_rm ? insn.reg : insn.rm];
        return;
      }
      case Arithmetic::kOther:
        break;
    }
  }
  for (unsigned i = 0; i < row.operand_count; ++i) {
    const bool written = (i == 0 && form.writes_first) || (i == 1 && form.writes_second);
    switch (row.operands[i].kind) {
      case OperandKind::kReg:
        if (written) Fresh(insn.reg >= kHighByte ? insn.reg & 3 : insn.reg);
        break;
      case OperandKind::kRm:
      case OperandKind::kRmReg:
        if (written && !insn.has_memory()) Fresh(insn.rm >= kHighByte ? insn.rm & 3 : insn.rm);
        break;
      case OperandKind::kVvvv:
        if (written) Fresh(insn.vvvv);
        break;
      case OperandKind::kFixedReg:
        Fresh(row.operands[i].fixed);
        break;
      default:
        break;
    }
  }
  if (form.results_in_ax_dx) {
    Fresh(kRax);
    Fresh(kRdx);
  }
  if ((row.attributes & kStrIndex) != 0) Fresh(kRcx);
}

}  // namespace kvartz::cpu::x86::jit
