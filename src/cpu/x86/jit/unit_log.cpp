#include "cpu/x86/jit/unit_log.h"

#include <fmt/format.h>

#include <string>

#include "cpu/x86/code_log.h"
#include "cpu/x86/jit/mode.h"

namespace kvartz::cpu::x86::jit {
namespace {

constexpr const char* kRegisters[] = {"RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI",
                                      "R8",  "R9",  "R10", "R11", "R12", "R13", "R14", "R15"};

const char* NameOf(Form form) {
  switch (form) {
    case Form::kInterpret:
      return "calls the interpreter";
    case Form::kNothing:
      return "nothing";
    case Form::kCopy:
      return "copied";
    case Form::kLea:
      return "address";
    case Form::kMoveFromSegment:
      return "selector";
    case Form::kReadTsc:
      return "time stamp";
    case Form::kClearInterrupts:
    case Form::kSetInterrupts:
      return "interrupt flag";
    case Form::kPushFlags:
    case Form::kPush:
    case Form::kPop:
    case Form::kLeave:
      return "stack";
    case Form::kCall:
      return "call";
    case Form::kReturn:
      return "return";
    case Form::kJump:
      return "jump";
    case Form::kJcc:
    case Form::kJcxz:
    case Form::kLoop:
      return "branch";
  }
  return "";
}

std::string ModeText(uint16_t m) {
  std::string text = (m & mode::kCode16) != 0   ? "16-bit"
                     : (m & mode::kCode32) != 0 ? "32-bit"
                                                : "64-bit";
  text += (m & mode::kUser) != 0 ? " user" : " supervisor";
  const struct {
    uint16_t bit;
    const char* name;
  } names[] = {{mode::kSse, " sse"},
               {mode::kAvx, " avx"},
               {mode::kX87, " x87"},
               {mode::kReal, " real"},
               {mode::kFlat, " flat"},
               {mode::kCodeFlat, " flat-cs"},
               {mode::kSingle, " one check each"}};
  for (const auto& [bit, name] : names)
    if ((m & bit) != 0) text += name;
  return text;
}

std::string FlagsText(uint64_t flags) {
  const struct {
    uint64_t bit;
    char name;
  } names[] = {{rflags::kOf, 'O'}, {rflags::kSf, 'S'}, {rflags::kZf, 'Z'},
               {rflags::kAf, 'A'}, {rflags::kPf, 'P'}, {rflags::kCf, 'C'}};
  std::string text;
  for (const auto& [bit, name] : names)
    if ((flags & bit) != 0) text += name;
  return text;
}

// A symbol as one of the registers that hold it before `at`, and what to add to get the symbol.
std::string SymbolText(const Unit& unit, unsigned at, uint32_t symbol, int64_t* add) {
  for (unsigned reg = 0; reg < 16; ++reg) {
    const Symbol& value = unit.symbols(at)[reg];
    if (value.id != symbol) continue;
    *add -= value.offset;
    return kRegisters[reg];
  }
  return fmt::format("value {}", symbol);
}

std::string AddressText(const Unit& unit, const AccessGroup& group) {
  std::string text;
  if (group.key.segment == kFs || group.key.segment == kGs)
    text = group.key.segment == kFs ? "FS:" : "GS:";
  if (group.key.checked) text += "segment:";
  int64_t add = 0;
  std::string sum = group.key.rip ? "page" : "";
  if (group.key.base != 0) sum = SymbolText(unit, group.check_at, group.key.base, &add);
  if (group.key.index != 0) {
    int64_t index_add = 0;
    const std::string index = SymbolText(unit, group.check_at, group.key.index, &index_add);
    const int64_t scale = int64_t{1} << group.key.scale;
    add += index_add * scale;
    sum += fmt::format("{}{}*{}", sum.empty() ? "" : "+", index, scale);
  }
  return fmt::format("{}{}{}[{:+#x}, {:+#x})", text, sum, sum.empty() ? "" : "+", group.low + add,
                     group.high + add);
}

}  // namespace

void LogUnit(const Cpu& cpu, uint64_t page, const Unit& unit, uint16_t mode, unsigned exits) {
  LogOp(cpu, fmt::format("unit at {:#x}, {}: {} instructions, {} checks, {} exits",
                         page + unit[0].offset, ModeText(mode), unit.count(), unit.group_count(),
                         exits));
  for (unsigned i = 0; i < unit.count(); ++i) {
    for (unsigned g = 0; g < unit.group_count(); ++g) {
      const AccessGroup& group = unit.group(g);
      if (group.check_at != i) continue;
      LogOp(cpu, fmt::format("  check {}: {} {}, {} slot {}, for {:#x} to {:#x}", g,
                             group.write ? "writes" : "reads", AddressText(unit, group),
                             group.polymorphic ? "asks the TLB, not" : "asks", group.slot,
                             page + unit[group.first].offset, page + unit[group.last].offset));
    }
    const UnitInsn& insn = unit[i];
    std::string text = fmt::format("{:#x}: {} {}: {}", page + insn.offset, insn.insn.row->mnemonic,
                                   insn.insn.row->operand_text, NameOf(insn.form->form));
    if (insn.loaded != 0) text += ", immediate loaded";
    if (insn.jump_to >= 0)
      text += fmt::format(" to {:#x} of the unit",
                          page + unit[static_cast<unsigned>(insn.jump_to)].offset);
    if (insn.operand.present) text += fmt::format(", memory by check {}", insn.operand.group);
    if (insn.stack.present) text += fmt::format(", stack by check {}", insn.stack.group);
    if (insn.live_after != 0) text += ", flags read later: " + FlagsText(insn.live_after);
    LogOp(cpu, text);
  }
}

}  // namespace kvartz::cpu::x86::jit
