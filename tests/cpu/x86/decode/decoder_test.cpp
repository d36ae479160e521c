// The decoder against Zydis (an independent decoder) on real code and random bytes, and against the
// manual on the rules that decoders disagree about.
#include <Zydis/Zydis.h>
#include <gtest/gtest.h>
#include <link.h>

#include <chrono>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <string_view>

#include "cpu/x86/decode/insn.h"
#include "cpu/x86/engine.h"

namespace kvartz::cpu::x86 {
namespace {

std::string Hex(std::span<const uint8_t> bytes) {
  std::string text;
  for (const uint8_t byte : bytes) {
    char buffer[4];
    std::snprintf(buffer, sizeof buffer, "%02x ", byte);
    text += buffer;
  }
  return text;
}

DecodeStatus DecodeHex(std::initializer_list<uint8_t> bytes, Insn* insn,
                       CodeMode mode = CodeMode::k64) {
  DecodeContext context;
  context.mode = mode;
  return Decode(context, std::span(bytes.begin(), bytes.size()), insn);
}

// What Zydis knows and this table leaves to #UD on purpose, by ISA set or mnemonic.
bool LeftOut(const ZydisDecodedInstruction& theirs) {
  if (theirs.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX ||
      theirs.encoding == ZYDIS_INSTRUCTION_ENCODING_MVEX ||
      theirs.encoding == ZYDIS_INSTRUCTION_ENCODING_XOP ||
      theirs.encoding == ZYDIS_INSTRUCTION_ENCODING_3DNOW) {
    return true;
  }
  switch (theirs.meta.isa_ext) {
    case ZYDIS_ISA_EXT_AMD3DNOW:
    case ZYDIS_ISA_EXT_AMX_BF16:
    case ZYDIS_ISA_EXT_AMX_INT8:
    case ZYDIS_ISA_EXT_AMX_TILE:
    case ZYDIS_ISA_EXT_CET:
    case ZYDIS_ISA_EXT_CLDEMOTE:
    case ZYDIS_ISA_EXT_ENQCMD:
    case ZYDIS_ISA_EXT_HRESET:
    case ZYDIS_ISA_EXT_KEYLOCKER:
    case ZYDIS_ISA_EXT_KEYLOCKER_WIDE:
    case ZYDIS_ISA_EXT_KNC:
    case ZYDIS_ISA_EXT_KNCE:
    case ZYDIS_ISA_EXT_KNCV:
    case ZYDIS_ISA_EXT_MCOMMIT:
    case ZYDIS_ISA_EXT_MOVDIR:
    case ZYDIS_ISA_EXT_MPX:
    case ZYDIS_ISA_EXT_PADLOCK:
    case ZYDIS_ISA_EXT_PCONFIG:
    case ZYDIS_ISA_EXT_PT:
    case ZYDIS_ISA_EXT_RDPRU:
    case ZYDIS_ISA_EXT_RTM:
    case ZYDIS_ISA_EXT_SERIALIZE:
    case ZYDIS_ISA_EXT_SGX:
    case ZYDIS_ISA_EXT_SMX:
    case ZYDIS_ISA_EXT_SNP:
    case ZYDIS_ISA_EXT_SVM:
    case ZYDIS_ISA_EXT_TBM:
    case ZYDIS_ISA_EXT_TDX:
    case ZYDIS_ISA_EXT_TSX_LDTRK:
    case ZYDIS_ISA_EXT_UINTR:
    case ZYDIS_ISA_EXT_VTX:
    case ZYDIS_ISA_EXT_WAITPKG:
    case ZYDIS_ISA_EXT_AVX512EVEX:
    case ZYDIS_ISA_EXT_AVX512VEX:
      return true;
    case ZYDIS_ISA_EXT_FMA4:
    case ZYDIS_ISA_EXT_SSE4A:
    case ZYDIS_ISA_EXT_PKU:
    case ZYDIS_ISA_EXT_CLZERO:
    case ZYDIS_ISA_EXT_MONITORX:
    case ZYDIS_ISA_EXT_XSAVES:
      return true;
    default:
      break;
  }
  switch (theirs.mnemonic) {
    case ZYDIS_MNEMONIC_UD0:
    case ZYDIS_MNEMONIC_UD1:
    case ZYDIS_MNEMONIC_UD2:
    case ZYDIS_MNEMONIC_RSM:
    case ZYDIS_MNEMONIC_ENCLV:
    case ZYDIS_MNEMONIC_VMFUNC:
    case ZYDIS_MNEMONIC_INVLPGB:
    case ZYDIS_MNEMONIC_TLBSYNC:
      return true;
    case ZYDIS_MNEMONIC_NOP:
      return theirs.opcode == 0x0d;  // PREFETCHW of a register is #UD on AMD
    default:
      return false;
  }
}

// What this decoder takes and Zydis doesn't: register numbers that the instruction itself refuses,
// MPX as the NOPs that it is without the feature, 66 before instructions that ignore it.
bool OursIsWider(const Insn& ours) {
  const std::string_view name = ours.row->mnemonic;
  if (name == "MOV") {
    const OperandKind first = ours.row->operands[0].kind, second = ours.row->operands[1].kind;
    for (const OperandKind kind : {first, second}) {
      if (kind == OperandKind::kCr || kind == OperandKind::kDr || kind == OperandKind::kSreg) {
        return true;
      }
    }
  }
  return (name == "NOP" && (ours.opcode == 0x1a || ours.opcode == 0x1b)) || name == "MONITOR" ||
         name == "MWAIT";
}

// Register number of a general register as Insn counts them.
int GeneralNumber(ZydisRegister reg) {
  if (reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH) {
    return kHighByte + (reg - ZYDIS_REGISTER_AH);
  }
  if (reg >= ZYDIS_REGISTER_SPL && reg <= ZYDIS_REGISTER_DIL) {
    return kRsp + (reg - ZYDIS_REGISTER_SPL);
  }
  if (reg >= ZYDIS_REGISTER_R8B && reg <= ZYDIS_REGISTER_R15B) {
    return kR8 + (reg - ZYDIS_REGISTER_R8B);
  }
  if (reg == ZYDIS_REGISTER_RIP || reg == ZYDIS_REGISTER_EIP || reg == ZYDIS_REGISTER_IP) {
    return kBaseRip;
  }
  return reg == ZYDIS_REGISTER_NONE ? kNoRegister : ZydisRegisterGetId(reg);
}

bool IsGeneral(ZydisRegister reg) {
  const ZydisRegisterClass kind = ZydisRegisterGetClass(reg);
  return kind == ZYDIS_REGCLASS_GPR8 || kind == ZYDIS_REGCLASS_GPR16 ||
         kind == ZYDIS_REGCLASS_GPR32 || kind == ZYDIS_REGCLASS_GPR64;
}

// The first difference between the decodings, or nothing.
std::string Compare(const ZydisDecodedInstruction& theirs, const ZydisDecodedOperand* operands,
                    const Insn& ours) {
  if (theirs.length != ours.length) {
    return "length";
  }
  if (theirs.address_width != ours.address_size * 8 && theirs.mnemonic != ZYDIS_MNEMONIC_NOP) {
    return "address size";
  }
  unsigned imms = 0;
  for (unsigned i = 0; i < theirs.operand_count_visible; ++i) {
    const ZydisDecodedOperand& operand = operands[i];
    if (operand.type == ZYDIS_OPERAND_TYPE_MEMORY &&
        operand.encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM) {
      if (!ours.has_memory()) {
        return "no memory operand";
      }
      const bool vsib = operand.mem.type == ZYDIS_MEMOP_TYPE_VSIB;
      if (GeneralNumber(operand.mem.base) != ours.base) {
        return "base";
      }
      if ((vsib ? ZydisRegisterGetId(operand.mem.index) : GeneralNumber(operand.mem.index)) !=
          ours.index) {
        return "index";
      }
      if (operand.mem.index != ZYDIS_REGISTER_NONE && operand.mem.scale != 1u << ours.scale) {
        return "scale";
      }
      if ((operand.mem.disp.has_displacement ? operand.mem.disp.value : 0) != ours.disp &&
          static_cast<uint16_t>(operand.mem.disp.value) != static_cast<uint64_t>(ours.disp)) {
        return "displacement";
      }
      const bool computes_only =
          operand.mem.type == ZYDIS_MEMOP_TYPE_AGEN || operand.mem.type == ZYDIS_MEMOP_TYPE_MIB;
      if (!computes_only && operand.mem.segment != ZYDIS_REGISTER_ES + ours.segment) {
        return "segment";
      }
    } else if (operand.type == ZYDIS_OPERAND_TYPE_REGISTER && IsGeneral(operand.reg.value)) {
      const int number = GeneralNumber(operand.reg.value);
      if (operand.encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG && number != ours.reg) {
        return "reg";
      }
      if (operand.encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM && number != ours.rm) {
        return "rm";
      }
      if (operand.encoding == ZYDIS_OPERAND_ENCODING_OPCODE && number != ours.reg) {
        return "opcode register";
      }
      if (operand.encoding == ZYDIS_OPERAND_ENCODING_NDSNDD && number != ours.vvvv) {
        return "vvvv";
      }
      // The size of the first register, where the row gives it one.
      if (i == 0 && ours.row->operands[0].kind == OperandKind::kReg &&
          theirs.mnemonic != ZYDIS_MNEMONIC_INVPCID &&
          operand.size != OperandSize(ours, ours.row->operands[0]) * 8) {
        return "operand size";
      }
    } else if (operand.type == ZYDIS_OPERAND_TYPE_IMMEDIATE &&
               operand.encoding != ZYDIS_OPERAND_ENCODING_NONE) {
      const unsigned width = theirs.raw.imm[imms].size;
      const uint64_t mask = width >= 64 ? ~0ull : (1ull << width) - 1;
      const uint64_t value = imms == 0 ? static_cast<uint64_t>(ours.imm) : ours.imm2;
      if ((operand.imm.value.u & mask) != (value & mask)) {
        return "immediate";
      }
      ++imms;
    }
  }
  return "";
}

// Compares both decoders on code; collects differences by kind.
class Comparer {
 public:
  explicit Comparer(CodeMode mode) {
    const ZydisMachineMode theirs = mode == CodeMode::k64   ? ZYDIS_MACHINE_MODE_LONG_64
                                    : mode == CodeMode::k32 ? ZYDIS_MACHINE_MODE_LEGACY_32
                                                            : ZYDIS_MACHINE_MODE_LEGACY_16;
    const ZydisStackWidth width = mode == CodeMode::k64   ? ZYDIS_STACK_WIDTH_64
                                  : mode == CodeMode::k32 ? ZYDIS_STACK_WIDTH_32
                                                          : ZYDIS_STACK_WIDTH_16;
    ZydisDecoderInit(&decoder_, theirs, width);
    context_.mode = mode;
  }

  // Returns the length to go on with.
  unsigned Run(std::span<const uint8_t> code) {
    ZydisDecodedInstruction theirs;
    ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];
    const bool they = ZYAN_SUCCESS(
        ZydisDecoderDecodeFull(&decoder_, code.data(), code.size(), &theirs, operands));
    Insn ours;
    const DecodeStatus status = Decode(context_, code, &ours);
    ++compared_;
    if (they && LeftOut(theirs)) {
      return theirs.length;
    }
    if (!they && status == DecodeStatus::kOk && OursIsWider(ours)) {
      return 1;
    }
    if (they != (status == DecodeStatus::kOk)) {
      Note(they ? std::string("only Zydis: ") + ZydisMnemonicGetString(theirs.mnemonic)
                : std::string("only ours: ") + ours.row->mnemonic + " " + ours.row->encoding,
           code);
    } else if (they) {
      const std::string difference = Compare(theirs, operands, ours);
      if (!difference.empty()) {
        Note(difference + ": " + ZydisMnemonicGetString(theirs.mnemonic) + " / " +
                 ours.row->mnemonic + " " + ours.row->encoding,
             code);
      }
    }
    return they ? theirs.length : 1;
  }

  void Report(unsigned most = 0) {
    std::string text;
    for (const auto& [what, first] : differences_) {
      text += std::to_string(first.second) + "x " + what + "   " + first.first + "\n";
    }
    EXPECT_LE(differences_.size(), most) << text << compared_ << " compared";
  }
  uint64_t compared() const { return compared_; }

 private:
  void Note(const std::string& what, std::span<const uint8_t> code) {
    auto& entry = differences_[what];
    if (entry.second++ == 0) {
      entry.first = Hex(code.first(std::min<size_t>(code.size(), 15)));
    }
  }

  ZydisDecoder decoder_;
  DecodeContext context_;
  uint64_t compared_ = 0;
  std::map<std::string, std::pair<std::string, uint64_t>> differences_;
};

TEST(Decoder, AgreesWithZydisOnLibraries) {
  Comparer comparer(CodeMode::k64);
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_LOAD || (header.p_flags & PF_X) == 0) {
            continue;
          }
          const auto* code = reinterpret_cast<const uint8_t*>(info->dlpi_addr + header.p_vaddr);
          const size_t size = std::min<size_t>(header.p_filesz, 2 << 20);
          for (size_t at = 0; at + 16 < size;) {
            at += static_cast<Comparer*>(data)->Run({code + at, 15});
          }
        }
        return 0;
      },
      &comparer);
  EXPECT_GT(comparer.compared(), 100000u);
  comparer.Report();
}

class RandomBytes : public testing::TestWithParam<CodeMode> {};

TEST_P(RandomBytes, AgreeWithZydis) {
  Comparer comparer(GetParam());
  std::mt19937_64 random(1);
  const char* count = std::getenv("KVARTZ_DECODER_ROUNDS");
  const uint64_t rounds = count != nullptr ? std::strtoull(count, nullptr, 0) : 300000;
  for (uint64_t i = 0; i < rounds; ++i) {
    uint8_t code[16];
    const uint64_t words[] = {random(), random()};
    std::memcpy(code, words, sizeof code);
    switch (i % 4) {  // dwell on the larger maps
      case 1:
        code[0] = 0x0f;
        break;
      case 2:
        code[0] = 0x66;
        code[1] = 0x0f;
        break;
      case 3:
        code[0] = (i & 4) != 0 ? 0xc5 : 0x0f;
        code[1] = (i & 8) != 0 ? 0x38 : code[1];
        break;
      default:
        break;
    }
    comparer.Run({code, 15});
  }
  comparer.Report();
}
INSTANTIATE_TEST_SUITE_P(Modes, RandomBytes,
                         testing::Values(CodeMode::k16, CodeMode::k32, CodeMode::k64));

TEST(Decoder, FindsTheEndOfTheCode) {
  Insn insn;
  EXPECT_EQ(DecodeHex({}, &insn), DecodeStatus::kTruncated);
  EXPECT_EQ(DecodeHex({0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7}, &insn), DecodeStatus::kTruncated);
  EXPECT_EQ(DecodeHex({0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8}, &insn), DecodeStatus::kOk);
  EXPECT_EQ(insn.imm, 0x0807060504030201);
  // 14 prefixes and an opcode are 15 bytes; one more prefix is #GP.
  const uint8_t longest[] = {0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66,
                             0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90, 0x90};
  EXPECT_EQ(Decode({}, std::span(longest), &insn), DecodeStatus::kOk);
  EXPECT_EQ(insn.length, 15);
  uint8_t too_long[16];
  std::fill(std::begin(too_long), std::end(too_long), 0x66);
  EXPECT_EQ(Decode({}, std::span(too_long), &insn), DecodeStatus::kTooLong);
}

TEST(Decoder, PrefixRules) {
  Insn insn;
  // REX counts only directly before the opcode.
  ASSERT_EQ(DecodeHex({0x48, 0x66, 0x01, 0xc0}, &insn), DecodeStatus::kOk);
  EXPECT_EQ(insn.operand_size, 2);
  ASSERT_EQ(DecodeHex({0x66, 0x48, 0x01, 0xc0}, &insn), DecodeStatus::kOk);
  EXPECT_EQ(insn.operand_size, 8);
  // LOCK needs a lockable instruction with a memory destination.
  EXPECT_EQ(DecodeHex({0xf0, 0x01, 0x00}, &insn), DecodeStatus::kOk);
  EXPECT_EQ(DecodeHex({0xf0, 0x01, 0xc0}, &insn), DecodeStatus::kInvalid);
  EXPECT_EQ(DecodeHex({0xf0, 0x03, 0x00}, &insn), DecodeStatus::kInvalid);
  EXPECT_EQ(DecodeHex({0xf0, 0x39, 0x00}, &insn), DecodeStatus::kInvalid);
  // NOP, PAUSE and XCHG R8, RAX.
  ASSERT_EQ(DecodeHex({0x90}, &insn), DecodeStatus::kOk);
  EXPECT_STREQ(insn.row->mnemonic, "NOP");
  ASSERT_EQ(DecodeHex({0xf3, 0x90}, &insn), DecodeStatus::kOk);
  EXPECT_STREQ(insn.row->mnemonic, "PAUSE");
  ASSERT_EQ(DecodeHex({0x41, 0x90}, &insn), DecodeStatus::kOk);
  EXPECT_STREQ(insn.row->mnemonic, "XCHG");
  EXPECT_EQ(insn.reg, 8);
}

TEST(Decoder, FeaturesGateRows) {
  DecodeContext context;
  context.features.Set(Feature::kBmi1, false);
  context.features.Set(Feature::kPopcnt, false);
  Insn insn;
  const uint8_t tzcnt[] = {0xf3, 0x0f, 0xbc, 0xc1};
  ASSERT_EQ(Decode(context, tzcnt, &insn), DecodeStatus::kOk);
  EXPECT_STREQ(insn.row->mnemonic, "BSF");
  const uint8_t popcnt[] = {0xf3, 0x0f, 0xb8, 0xc1};
  EXPECT_EQ(Decode(context, popcnt, &insn), DecodeStatus::kInvalid);
  const uint8_t andn[] = {0xc4, 0xe2, 0x70, 0xf2, 0xc2};
  EXPECT_EQ(Decode(context, andn, &insn), DecodeStatus::kInvalid);
  EXPECT_EQ(Decode({}, andn, &insn), DecodeStatus::kOk);
}

TEST(Decoder, VexNeedsProtectedMode) {
  DecodeContext context;
  context.mode = CodeMode::k16;
  const uint8_t vaddps[] = {0xc5, 0xf0, 0x58, 0xc2};
  Insn insn;
  EXPECT_EQ(Decode(context, vaddps, &insn), DecodeStatus::kOk);
  context.protected_mode = false;
  EXPECT_EQ(Decode(context, vaddps, &insn), DecodeStatus::kInvalid);
}

// CPUID promises nothing that the tables lack.
TEST(Decoder, EveryFeatureOfferedHasRows) {
  FeatureSet gates;
  for (const Row& row : InsnRows()) {
    gates.Set(row.features[0]);
    gates.Set(row.features[1]);
  }
  const FeatureSet offered = FeatureSet::FromCpuid(SoftCpuid({}));
  for (unsigned i = 0; i < static_cast<unsigned>(Feature::kCount); ++i) {
    const auto feature = static_cast<Feature>(i);
    const bool gates_no_row = feature == Feature::kPrefetchw;  // a NOP with or without it
    EXPECT_TRUE(!offered.Has(feature) || gates.Has(feature) || gates_no_row) << "feature " << i;
  }
}

TEST(Decoder, TableBuildsFast) {
  const auto begin = std::chrono::steady_clock::now();
  const size_t rows = InsnRows().size();
  const auto taken = std::chrono::steady_clock::now() - begin;
  EXPECT_GT(rows, 400u);
  EXPECT_LT(taken, std::chrono::milliseconds(50));  // generous: sanitizers, loaded machines
}

}  // namespace
}  // namespace kvartz::cpu::x86
