#include "cpu/x86/decode/table.h"

#include <algorithm>
#include <bit>
#include <string_view>

#include "base/check.h"

namespace kvartz::cpu::x86 {

#define INSN(mnemonic, encoding, operands, flags, ...) \
  void Exec_##mnemonic(Cpu& cpu, const Insn& insn);
#define PICK(mnemonic, encoding, operands, flags, ...) ExecFn Pick_##mnemonic(const Insn& insn);
#define NATIVE(mnemonic, encoding, operands, flags, ...)
#include "cpu/x86/decode/all.def"
#undef INSN
#undef PICK
#undef NATIVE

namespace {

using enum Feature;  // rows name features without qualification

// Attributes and features of a row, in any order.
class RowTraits {
 public:
  constexpr void Add(Attribute attribute) { attributes |= attribute; }
  constexpr void Add(Feature feature) {
    features[features[0] == Feature::kAlways ? 0 : 1] = feature;
  }

  uint32_t attributes = 0;
  Feature features[2] = {Feature::kAlways, Feature::kAlways};
};

template <typename... T>
constexpr RowTraits Traits(T... traits) {
  RowTraits all;
  (all.Add(traits), ...);
  return all;
}

struct RowText {
  const char* mnemonic;
  const char* encoding;
  const char* operands;
  const char* flags;
  RowTraits traits;
  ExecFn exec;
  PickFn pick;
};

#define INSN(mnemonic, encoding, operands, flags, ...) \
  {#mnemonic, encoding, operands, flags, Traits(__VA_ARGS__), Exec_##mnemonic, nullptr},
#define PICK(mnemonic, encoding, operands, flags, ...) \
  {#mnemonic, encoding, operands, flags, Traits(__VA_ARGS__), nullptr, Pick_##mnemonic},
#define NATIVE(mnemonic, encoding, operands, flags, ...)                              \
  {#mnemonic,  encoding, operands, flags, Traits(kNative __VA_OPT__(, ) __VA_ARGS__), \
   ExecNative, nullptr},
constexpr RowText kRows[] = {
#include "cpu/x86/decode/all.def"
    {nullptr, nullptr, nullptr, nullptr, {}, nullptr, nullptr},  // end; also keeps an empty table
                                                                 // legal
};
constexpr size_t kSystemBegin = [] {
  constexpr const char* kNames[] = {
#undef INSN
#undef PICK
#undef NATIVE
#define INSN(mnemonic, ...) #mnemonic,
#define PICK(mnemonic, ...) #mnemonic,
#define NATIVE(mnemonic, ...) #mnemonic,
#include "cpu/x86/decode/system.def"
      nullptr,
  };
  return std::size(kRows) - std::size(kNames);
}();

struct Token {
  std::string_view text;
  Operand operand;
};
constexpr Token kTokens[] = {
#define TOKEN(text, kind, size, fixed) {text, {OperandKind::kind, size, fixed}},
#include "cpu/x86/decode/operand_tokens.def"
#undef TOKEN
};

struct ImmToken {
  std::string_view text;
  ImmKind kind;
};
constexpr ImmToken kImmTokens[] = {
    {"ib", ImmKind::kIb},    {"iw", ImmKind::kIw},    {"id", ImmKind::kId}, {"iz", ImmKind::kIz},
    {"iv", ImmKind::kIv},    {"cb", ImmKind::kCb},    {"cz", ImmKind::kCz}, {"cp", ImmKind::kCp},
    {"mo", ImmKind::kMoffs}, {"/is4", ImmKind::kIs4},
};

// Cuts the text up to `separator` off the front.
std::string_view Cut(std::string_view* text, char separator) {
  const size_t end = std::min(text->find(separator), text->size());
  const std::string_view token = text->substr(0, end);
  text->remove_prefix(std::min(end + 1, text->size()));
  while (!text->empty() && text->front() == ' ') {
    text->remove_prefix(1);
  }
  return token;
}

int HexDigit(char c) {
  return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

// The two hexadecimal digits that `token` starts with, or -1.
int HexByte(std::string_view token) {
  if (token.size() < 2 || HexDigit(token[0]) < 0 || HexDigit(token[1]) < 0) {
    return -1;
  }
  return HexDigit(token[0]) * 16 + HexDigit(token[1]);
}

// Parses one row's encoding.
class EncodingParser {
 public:
  explicit EncodingParser(Row* row) : row_(row) {}

  void Parse() {
    std::string_view rest = row_->encoding;
    for (bool first = true; !rest.empty(); first = false) {
      const std::string_view token = Cut(&rest, ' ');
      VERIFY((first && Prefix(token)) || Rex(token) || Byte(token) || ModRm(token) ||
             Immediate(token));
    }
    VERIFY(have_opcode_);
  }

 private:
  static PrefixRule RuleOf(std::string_view token) {
    return token == "NP"   ? PrefixRule::kNp
           : token == "66" ? PrefixRule::k66
           : token == "F3" ? PrefixRule::kF3
           : token == "F2" ? PrefixRule::kF2
                           : PrefixRule::kAny;
  }

  bool Prefix(std::string_view token) {
    if (token.starts_with("VEX.")) {
      row_->vex = true;
      Cut(&token, '.');
      while (!token.empty()) {
        VERIFY(VexField(Cut(&token, '.')));
      }
      return true;
    }
    row_->prefix = RuleOf(token);
    return row_->prefix != PrefixRule::kAny;
  }

  bool VexField(std::string_view field) {
    if (field == "128" || field == "LZ" || field == "L0") {
      row_->vex_l = Tri::kNo;
    } else if (field == "256" || field == "L1") {
      row_->vex_l = Tri::kYes;
    } else if (field == "W0" || field == "W1") {
      row_->w = field == "W1" ? Tri::kYes : Tri::kNo;
    } else if (field == "0F" || field == "0F38" || field == "0F3A") {
      row_->map = field == "0F"     ? OpcodeMap::k0f
                  : field == "0F38" ? OpcodeMap::k0f38
                                    : OpcodeMap::k0f3a;
    } else if (RuleOf(field) != PrefixRule::kAny) {
      row_->prefix = RuleOf(field);
    } else {
      return field == "LIG" || field == "WIG";
    }
    return true;
  }

  bool Rex(std::string_view token) {
    if (token == "REX.W" || token == "!REX.W") {
      row_->w = token[0] == '!' ? Tri::kNo : Tri::kYes;
    } else if (token == "!REX.B") {
      row_->rex_b_clear = true;
    } else {
      return false;
    }
    return true;
  }

  // An opcode byte, or a fixed ModRM byte.
  bool Byte(std::string_view token) {
    const int value = HexByte(token);
    if (value < 0) {
      return false;
    }
    const std::string_view suffix = token.substr(2);
    if (have_opcode_) {
      row_->has_modrm = true;
      row_->sti = suffix == "+i";
      row_->modrm_mask = row_->sti ? 0xf8 : 0xff;
      row_->modrm_value = static_cast<uint8_t>(value);
      return suffix.empty() || row_->sti;
    }
    if (!row_->vex && row_->map == OpcodeMap::kPrimary && value == 0x0f) {
      row_->map = OpcodeMap::k0f;
    } else if (!row_->vex && row_->map == OpcodeMap::k0f && (value == 0x38 || value == 0x3a)) {
      row_->map = value == 0x38 ? OpcodeMap::k0f38 : OpcodeMap::k0f3a;
    } else {
      row_->opcode = static_cast<uint8_t>(value);
      row_->opcode_register = suffix == "+r";
      have_opcode_ = true;
      return suffix.empty() || row_->opcode_register;
    }
    return suffix.empty();
  }

  bool ModRm(std::string_view token) {
    if (token.size() != 2 || token[0] != '/' ||
        (token[1] != 'r' && (token[1] < '0' || token[1] > '7'))) {
      return false;
    }
    row_->has_modrm = true;
    if (token[1] != 'r') {
      row_->modrm_mask = 0x38;
      row_->modrm_value = static_cast<uint8_t>((token[1] - '0') << 3);
    }
    return true;
  }

  bool Immediate(std::string_view token) {
    const auto* found = std::find_if(std::begin(kImmTokens), std::end(kImmTokens),
                                     [&](const ImmToken& imm) { return imm.text == token; });
    if (found == std::end(kImmTokens) || imm_count_ == 2) {
      return false;
    }
    row_->imm[imm_count_++] = found->kind;
    return true;
  }

  Row* row_;
  bool have_opcode_ = false;
  unsigned imm_count_ = 0;
};

// What an operand says about ModRM.mod and VSIB.
void ApplyOperand(const Operand& operand, Row* row) {
  switch (operand.kind) {
    case OperandKind::kVsibMem:
      row->attributes |= kVsib;
      row->memory = Tri::kYes;
      break;
    case OperandKind::kMem:
      row->memory = Tri::kYes;
      break;
    case OperandKind::kRmReg:
    case OperandKind::kXmmRmReg:
    case OperandKind::kYmmRmReg:
    case OperandKind::kMmRmReg:
    case OperandKind::kSti:
      row->memory = row->has_modrm && row->memory != Tri::kYes ? Tri::kNo : row->memory;
      break;
    case OperandKind::kCr:
    case OperandKind::kDr:
      row->attributes |= kModIgnored;
      break;
    default:
      break;
  }
}

void ParseOperands(Row* row) {
  std::string_view rest = row->operand_text;
  while (!rest.empty()) {
    const std::string_view text = Cut(&rest, ',');
    const auto* found = std::find_if(std::begin(kTokens), std::end(kTokens),
                                     [&](const Token& token) { return token.text == text; });
    VERIFY(found != std::end(kTokens) && row->operand_count < std::size(row->operands));
    row->operands[row->operand_count++] = found->operand;
  }
  for (const Operand& operand : row->operands) {
    ApplyOperand(operand, row);
  }
  if ((row->attributes & kModIgnored) != 0) {
    row->memory = Tri::kAny;
  }
}

void ParseFlags(Row* row) {
  constexpr uint16_t kColumns[] = {rflags::kOf, rflags::kDf, rflags::kIf, rflags::kSf,
                                   rflags::kZf, rflags::kAf, rflags::kPf, rflags::kCf};
  const std::string_view text = row->flag_text;
  VERIFY(text.size() == std::size(kColumns));
  for (size_t i = 0; i < text.size(); ++i) {
    FlagEffects& flags = row->flags;
    switch (text[i]) {
      case '-':
        break;
      case 'm':
        flags.modified |= kColumns[i];
        break;
      case 't':
        flags.tested |= kColumns[i];
        break;
      case 'b':
        flags.tested |= kColumns[i], flags.modified |= kColumns[i];
        break;
      case '0':
        flags.cleared |= kColumns[i];
        break;
      case '1':
        flags.set |= kColumns[i];
        break;
      case 'u':
        flags.undefined |= kColumns[i];
        break;
      default:
        VERIFY(!"flag column");
    }
  }
}

Row ParseRow(const RowText& text, bool system) {
  Row row;
  row.mnemonic = text.mnemonic;
  row.encoding = text.encoding;
  row.operand_text = text.operands;
  row.flag_text = text.flags;
  row.attributes = text.traits.attributes | (system ? kSystem | kEndsBlock : 0);
  row.features[0] = text.traits.features[0];
  row.features[1] = text.traits.features[1];
  row.exec = text.exec;
  row.pick = text.pick;
  EncodingParser(&row).Parse();
  ParseOperands(&row);
  ParseFlags(&row);
  return row;
}

// Number of constraints that a row puts on the code.
int Specificity(const Row& row) {
  return 2 * std::popcount(row.modrm_mask) + (row.prefix != PrefixRule::kAny ? 4 : 0) +
         (row.w != Tri::kAny ? 1 : 0) + (row.vex_l != Tri::kAny ? 1 : 0) +
         (row.memory != Tri::kAny ? 1 : 0) + (row.rex_b_clear ? 1 : 0);
}

}  // namespace

InsnTable::InsnTable() {
  constexpr size_t kCount = std::size(kRows) - 1;
  rows_.reserve(kCount);
  for (size_t i = 0; i < kCount; ++i) {
    rows_.push_back(ParseRow(kRows[i], i >= kSystemBegin));
  }
  struct Entry {
    size_t slot;
    int specificity;
    const Row* row;
  };
  std::vector<Entry> entries;
  entries.reserve(kCount + 128);
  for (const Row& row : rows_) {
    for (unsigned i = 0; i < (row.opcode_register ? 8u : 1u); ++i) {
      entries.push_back(
          {Slot(row.vex, row.map, static_cast<uint8_t>(row.opcode + i)), Specificity(row), &row});
    }
  }
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.slot != b.slot ? a.slot < b.slot : a.specificity > b.specificity;
  });
  by_opcode_.reserve(entries.size());
  for (const Entry& entry : entries) {
    Range& range = index_[entry.slot];
    range.begin = range.count == 0 ? static_cast<uint16_t>(by_opcode_.size()) : range.begin;
    ++range.count;
    by_opcode_.push_back(entry.row);
    VERIFY(entry.row->has_modrm == by_opcode_[range.begin]->has_modrm);
  }
}

const InsnTable& InsnTable::Get() {
  static const InsnTable table;
  return table;
}

InsnTable::Bucket InsnTable::Find(bool vex, OpcodeMap map, uint8_t opcode) const {
  const Range range = index_[Slot(vex, map, opcode)];
  const std::span<const Row* const> rows(by_opcode_.data() + range.begin, range.count);
  return {rows, range.count != 0 && rows[0]->has_modrm};
}

std::span<const Row> InsnRows() { return InsnTable::Get().rows(); }

}  // namespace kvartz::cpu::x86
