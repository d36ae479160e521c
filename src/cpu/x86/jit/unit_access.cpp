// Memory accesses of a unit: what their addresses are made of, which share a check, and where it is
// made.
#include <algorithm>

#include "cpu/x86/jit/unit.h"

namespace kvartz::cpu::x86::jit {

void Unit::Accesses() {
  next_symbol_ = 1;
  group_count_ = first_open_ = 0;
  FreshAll();
  for (unsigned i = 0; i < count_; ++i) {
    UnitInsn& u = insns_[i];
    if (u.label || (i > 0 && insns_[i - 1].form->form == Form::kInterpret)) {
      FreshAll();
      first_open_ = group_count_;
    }
    symbols_[i] = now_;
    if (u.form->form != Form::kInterpret && u.form->form != Form::kNothing) {
      if (u.form->form != Form::kLea && u.insn.has_memory()) Address(u);
      Stack(u);
      if (u.operand.present) Group(u.operand, i, lone_[2 * i]);
      if (u.stack.present) Group(u.stack, i, lone_[2 * i + 1]);
    }
    Update(u);
    // A write behind a side exit must not be asked for before it: perhaps it never comes.
    if (IsConditional(u.form->form)) {
      for (unsigned g = first_open_; g < group_count_; ++g) {
        if (!groups_[g].write) groups_[g].last |= 0x80;  // closed for writes
      }
    }
  }
  for (unsigned g = 0; g < group_count_; ++g) groups_[g].last &= 0x7f;
}

void Unit::Address(UnitInsn& u) {
  const Insn& insn = u.insn;
  MemoryAccess& access = u.operand;
  access.present = true;
  const int operand = u.form->memory_operand;
  access.size =
      static_cast<uint16_t>(operand < 0 ? 0 : OperandSize(insn, insn.row->operands[operand]));
  const bool first = operand == 0;
  access.write = first && u.form->writes_first && u.form->form == Form::kCopy;
  if (u.form->form == Form::kPop) access.write = true;
  access.offset = insn.disp;
  if (insn.segment >= kFs) access.key.segment = insn.segment;
  if (mode_.legacy()) LegacyKey(&access.key, insn.segment, insn.address_size);
  if (insn.base == kBaseRip) {
    access.key.rip = true;
    access.offset += u.offset + insn.length;
  } else if (insn.base != kNoRegister) {
    access.key.base = now_[insn.base].id;
    access.offset += now_[insn.base].offset;
  }
  if (insn.index != kNoRegister) {
    access.key.index = now_[insn.index].id;
    access.key.scale = insn.scale;
    access.offset += now_[insn.index].offset << insn.scale;
  }
}

void Unit::Stack(UnitInsn& u) {
  const uint16_t size = mode_.legacy() ? u.insn.operand_size : 8;
  const auto at = [&](unsigned reg, int64_t offset, bool write) {
    u.stack = {.present = true,
               .write = write,
               .size = size,
               .offset = now_[reg].offset + offset,
               .key = {.base = now_[reg].id}};
    if (mode_.legacy()) LegacyKey(&u.stack.key, kSs, mode_.stack_size);
  };
  switch (u.form->form) {
    case Form::kPush:
    case Form::kPushFlags:
    case Form::kCall:
      at(kRsp, -int64_t{size}, true);
      break;
    case Form::kPop:
    case Form::kReturn:
      at(kRsp, 0, false);
      break;
    case Form::kLeave:
      at(kRbp, 0, false);
      break;
    default:
      break;
  }
}

LoneAccesses Unit::Members(unsigned group) const {
  LoneAccesses members;
  for (unsigned i = 0; i < count_; ++i) {
    members[2 * i] = insns_[i].operand.group == static_cast<int>(group);
    members[2 * i + 1] = insns_[i].stack.group == static_cast<int>(group);
  }
  return members;
}

void Unit::Group(MemoryAccess& access, unsigned at, bool alone) {
  if (access.size == 0) access.size = 1;
  const int64_t low = access.offset, high = low + access.size;
  if (!alone) {
    for (unsigned g = first_open_; g < group_count_; ++g) {
      AccessGroup& group = groups_[g];
      if (group.alone || !(group.key == access.key)) continue;
      // The segment may begin between them.
      const bool absolute = access.key.base == 0 && access.key.index == 0;
      if (access.key.checked && absolute && (low < 0) != (group.low < 0)) continue;
      if (access.write && !group.write && (group.last & 0x80) != 0) continue;
      const int64_t from = std::min(group.low, low), to = std::max(group.high, high);
      if (to - from > kMaxGroupSpan) continue;
      group.low = from;
      group.high = to;
      group.write |= access.write;
      group.shared = true;
      group.last = static_cast<uint8_t>((group.last & 0x80) | at);
      access.group = static_cast<int8_t>(g);
      return;
    }
  }
  access.group = static_cast<int8_t>(group_count_);
  groups_[group_count_++] = {.key = access.key,
                             .low = low,
                             .high = high,
                             .write = access.write,
                             .alone = alone,
                             .first = static_cast<uint8_t>(at),
                             .last = static_cast<uint8_t>(at),
                             .check_at = static_cast<uint8_t>(at)};
}

bool Unit::CanCheckAt(const AccessGroup& group, unsigned at) const {
  const auto has = [&](uint32_t id) {
    return id == 0 || std::any_of(symbols_[at].begin(), symbols_[at].end(),
                                  [id](const Symbol& s) { return s.id == id; });
  };
  return has(group.key.base) && has(group.key.index);
}

// The branch depends on whether the group's base is 0: the accesses mustn't be asked for before.
bool Unit::TestsBase(const AccessGroup& group, unsigned branch) const {
  if (branch == 0) return false;
  const Insn& test = insns_[branch - 1].insn;
  return test.opcode == 0x85 && test.row->map == OpcodeMap::kPrimary && !test.has_memory() &&
         test.reg == test.rm && symbols_[branch - 1][test.rm & 15].id == group.key.base;
}

// A check spoils the flags: it is made where they are dead if such a place is near.
void Unit::PlaceChecks() {
  for (unsigned g = 0; g < group_count_; ++g) {
    AccessGroup& group = groups_[g];
    for (unsigned at = group.first;; --at) {
      if (!CanCheckAt(group, at)) break;
      if (insns_[at].live_before == 0) {
        group.check_at = static_cast<uint8_t>(at);
        break;
      }
      if (at == 0 || insns_[at].label || insns_[at - 1].form->form == Form::kInterpret ||
          group.first - at > 12)
        break;
      const Form before = insns_[at - 1].form->form;
      if (IsConditional(before) && (group.write || group.alone || TestsBase(group, at - 1))) break;
    }
  }
}

}  // namespace kvartz::cpu::x86::jit
