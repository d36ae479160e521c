#include "cpu/x86/jit/form.h"

#include <algorithm>
#include <string_view>
#include <vector>

#include "cpu/x86/interp/vector_plan.h"

namespace kvartz::cpu::x86::jit {
namespace {

// General instructions that the host runs as they are. Condition codes (SETcc, CMOVcc) apart.
constexpr std::string_view kCopied[] = {
    "ADD",     "OR",     "ADC",    "SBB",   "AND",     "SUB",   "XOR",       "CMP",
    "TEST",    "INC",    "DEC",    "NOT",   "NEG",     "MUL",   "IMUL",      "DIV",
    "IDIV",    "ADCX",   "ADOX",   "ROL",   "ROR",     "RCL",   "RCR",       "SHL",
    "SHR",     "SAR",    "SHLD",   "SHRD",  "MOV",     "MOVZX", "MOVSX",     "MOVSXD",
    "MOVBE",   "MOVNTI", "XCHG",   "BSWAP", "CMPXCHG", "XADD",  "CMPXCHG8B", "CMPXCHG16B",
    "CBW",     "CWD",    "BT",     "BTS",   "BTR",     "BTC",   "BSF",       "BSR",
    "TZCNT",   "LZCNT",  "POPCNT", "CRC32", "ANDN",    "BLSR",  "BLSMSK",    "BLSI",
    "BEXTR",   "BZHI",   "MULX",   "PDEP",  "PEXT",    "RORX",  "SARX",      "SHLX",
    "SHRX",    "CLC",    "STC",    "CMC",   "LAHF",    "SAHF",  "FENCE",     "VZEROUPPER",
    "VZEROALL"};
// Rows of x87 control that the host runs as they are; those of the second list don't wait for
// pending exceptions.
constexpr std::string_view kX87Waiting[] = {"FLDCW", "FWAIT", "EMMS"};
constexpr std::string_view kX87Control[] = {"FNSTCW", "FNSTSW", "FNCLEX"};
constexpr std::string_view kPureWrites[] = {"MOV",  "MOVZX",  "MOVSX",  "MOVSXD", "MOVBE", "MOVNTI",
                                            "ANDN", "BLSR",   "BLSMSK", "BLSI",   "BEXTR", "BZHI",
                                            "MULX", "PDEP",   "PEXT",   "RORX",   "SARX",  "SHLX",
                                            "SHRX", "POPCNT", "TZCNT",  "LZCNT"};
constexpr std::string_view kReadOnly[] = {"CMP", "TEST", "BT", "MUL", "DIV", "IDIV", "FLDCW"};
// With an immediate; the opcode of each that takes r/m instead.
constexpr struct {
  std::string_view name;
  uint8_t opcode;
} kTakeSources[] = {{"ADD", 0x03}, {"OR", 0x0b},  {"ADC", 0x13}, {"SBB", 0x1b}, {"AND", 0x23},
                    {"SUB", 0x2b}, {"XOR", 0x33}, {"CMP", 0x3b}, {"MOV", 0x8b}};
// Beside operands, or instead of them.
constexpr std::string_view kAxDx[] = {"MUL", "IMUL",    "DIV",       "IDIV", "CBW",
                                      "CWD", "CMPXCHG", "CMPXCHG8B", "LAHF", "CMPXCHG16B"};
constexpr std::string_view kVariableCount[] = {"ROL", "ROR", "RCL",  "RCR", "SHL",
                                               "SHR", "SAR", "SHLD", "SHRD"};

template <size_t N>
bool In(const std::string_view (&list)[N], std::string_view name) {
  return std::find(std::begin(list), std::end(list), name) != std::end(list);
}

bool HasOperand(const Row& row, OperandKind kind) {
  return std::any_of(row.operands, row.operands + row.operand_count,
                     [kind](const Operand& operand) { return operand.kind == kind; });
}

Form FormOf(const Row& row) {
  const std::string_view name = row.mnemonic;
  if ((row.attributes & kNo64) != 0 && name != "LAHF" && name != "SAHF") return Form::kInterpret;
  if ((row.attributes & kNative) != 0) return Form::kCopy;
  if (In(kX87Waiting, name) || In(kX87Control, name)) return Form::kCopy;
  if (name == "RDTSC" || name == "RDTSCP") return Form::kReadTsc;
  if (name == "CLI") return Form::kClearInterrupts;
  if (name == "STI") return Form::kSetInterrupts;
  if (name == "PUSHF") return Form::kPushFlags;
  if (name == "MOV" && row.operands[1].kind == OperandKind::kSreg) return Form::kMoveFromSegment;
  if ((row.attributes & kSystem) != 0) return Form::kInterpret;
  if (HasOperand(row, OperandKind::kMoffs)) return Form::kInterpret;
  if (name == "NOP") return Form::kNothing;
  if (name == "LEA") return Form::kLea;
  if (name == "PUSH") return Form::kPush;
  if (name == "POP") return Form::kPop;
  if (name == "LEAVE") return Form::kLeave;
  if (name == "CALL") return Form::kCall;
  if (name == "RET") return Form::kReturn;
  if (name == "JMP") return Form::kJump;
  if (name == "JCXZ") return Form::kJcxz;
  if (name == "LOOP") return Form::kLoop;
  if (name.front() == 'J') return Form::kJcc;
  if (name.starts_with("SET") || name.starts_with("CMOV")) return Form::kCopy;
  return In(kCopied, name) ? Form::kCopy : Form::kInterpret;
}

uint8_t SourceOpcodeOf(const Row& row) {
  if (row.operand_count != 2 || row.operands[1].kind != OperandKind::kImm) return 0;
  for (const auto& [name, opcode] : kTakeSources) {
    if (row.mnemonic == name) return opcode;
  }
  return 0;
}

Arithmetic ArithmeticOf(const Row& row) {
  const std::string_view name = row.mnemonic;
  if (name == "INC") return Arithmetic::kIncrement;
  if (name == "DEC") return Arithmetic::kDecrement;
  if (row.operand_count != 2) return Arithmetic::kOther;
  if (name == "MOV") return Arithmetic::kMove;
  if (row.operands[0].kind != OperandKind::kRm || row.operands[1].kind != OperandKind::kImm)
    return Arithmetic::kOther;
  return name == "ADD"   ? Arithmetic::kAddImmediate
         : name == "SUB" ? Arithmetic::kSubImmediate
                         : Arithmetic::kOther;
}

}  // namespace

RowForm::RowForm(const Row& row) : form(FormOf(row)), arithmetic(ArithmeticOf(row)) {
  const std::string_view name = row.mnemonic;
  takes_source = SourceOpcodeOf(row);
  results_in_ax_dx = In(kAxDx, name);
  zeroes_vectors = name.starts_with("VZERO");
  bit_of_string =
      name.starts_with("BT") && row.operand_count == 2 && row.operands[1].kind == OperandKind::kReg;
  const bool native = (row.attributes & kNative) != 0;
  const VectorPlan& plan = VectorPlan::Of(row);
  const bool x87_waiting = (native && (plan.x87 || plan.mmx)) || In(kX87Waiting, name);
  x87 = x87_waiting || In(kX87Control, name);
  x87_pointers = native && plan.x87;
  vector = native ? !x87 || plan.vector_class == VectorClass::kSse
                  : name == "VZEROUPPER" || name == "VZEROALL";
  may_trap =
      name == "DIV" || name == "IDIV" || (row.attributes & (kAlign | kFp)) != 0 || x87_waiting;
  for (int8_t i = 0; i < row.operand_count; ++i) {
    switch (row.operands[i].kind) {
      case OperandKind::kRm:
      case OperandKind::kMem:
      case OperandKind::kXmmRm:
      case OperandKind::kYmmRm:
      case OperandKind::kMmRm:
        memory_operand = i;
        rm_is_gpr = row.operands[i].kind == OperandKind::kRm;
        if (rm_is_gpr) rm_operand = i;
        break;
      case OperandKind::kRmReg:
        rm_is_gpr = name != "FENCE";
        if (rm_is_gpr) rm_operand = i;
        break;
      case OperandKind::kReg:
        reg_is_gpr = true;
        reg_operand = i;
        break;
      case OperandKind::kVvvv:
        vvvv_is_gpr = true;
        vvvv_operand = i;
        break;
      default:
        break;
    }
  }
  if (native) {
    writes_first = (row.attributes & kNoWrite) == 0;
    reads_first = row.operands[0].kind != OperandKind::kReg &&
                  row.operands[0].kind != OperandKind::kRm &&
                  row.operands[0].kind != OperandKind::kRmReg;
    keeps_flags_sometimes = x87 && row.flags.written() != 0;  // FCOMI with an unmasked exception
  } else {
    const bool one_operand = row.operand_count == 1;
    writes_first = !In(kReadOnly, name) && !(name == "IMUL" && one_operand);
    reads_first = !In(kPureWrites, name) && !name.starts_with("SET");
    writes_second = name == "XCHG" || name == "XADD" || name == "MULX";
    keeps_flags_sometimes = In(kVariableCount, name);
  }
}

const RowForm& RowForm::Of(const Row& row) {
  static const std::vector<RowForm> forms(InsnRows().begin(), InsnRows().end());
  return forms[static_cast<size_t>(&row - InsnRows().data())];
}

}  // namespace kvartz::cpu::x86::jit
