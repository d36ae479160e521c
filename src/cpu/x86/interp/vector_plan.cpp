#include "cpu/x86/interp/vector_plan.h"

#include <vector>

namespace kvartz::cpu::x86 {

VectorPlan::VectorPlan(const Row& row) {
  using enum OperandKind;
  vex = row.vex;
  fp = (row.attributes & kFp) != 0;
  align = (row.attributes & kAlign) != 0;
  flags_written = row.flags.written() != 0;
  string_lengths = (row.attributes & kStrLen) != 0;
  string_index = (row.attributes & kStrIndex) != 0;
  string_mask = (row.attributes & kStrMask) != 0;
  x87 = !row.vex && row.map == OpcodeMap::kPrimary && row.opcode >= 0xd8 && row.opcode <= 0xdf;
  bool vector = false;
  const auto add = [this](File file, Field field, uint8_t slot, bool is_rm) {
    inputs[input_count++] = {file, field, slot, is_rm};
  };
  for (unsigned i = 0; i < row.operand_count; ++i) {
    const Operand& operand = row.operands[i];
    const unsigned before = input_count;
    switch (operand.kind) {
      case kXmm:
      case kYmm:
        add(File::kVector, Field::kReg, 1, false);
        break;
      case kXmmRm:
      case kYmmRm:
        add(File::kVector, Field::kRm, 2, true);
        break;
      case kXmmRmReg:
      case kYmmRmReg:
        add(File::kVector, Field::kRm, 2, false);
        break;
      case kXmmVvvv:
      case kYmmVvvv:
        add(File::kVector, Field::kVvvv, 3, false);
        break;
      case kXmmIs4:
      case kYmmIs4:
        add(File::kVector, Field::kIs4, 4, false);
        break;
      case kFixedXmm:
        add(File::kVector, Field::kXmm0, 0, false);
        break;
      case kMm:
        add(File::kMmx, Field::kReg, 1, false);
        break;
      case kMmRm:
        add(File::kMmx, Field::kRm, 2, true);
        break;
      case kMmRmReg:
        add(File::kMmx, Field::kRm, 2, false);
        break;
      case kReg:
        add(File::kGpr, Field::kReg, 0, false);
        break;
      case kRm:
        add(File::kGpr, Field::kRm, 0, true);
        break;
      case kRmReg:
        add(File::kGpr, Field::kRm, 0, false);
        break;
      default:
        break;
    }
    const bool is_memory = operand.kind == kMem || (input_count > before && inputs[before].is_rm);
    if (is_memory) {
      memory_size = operand.size;
      memory_written = i == 0 && (row.attributes & kNoWrite) == 0;
    }
    if (input_count > before) {
      vector |= inputs[before].file == File::kVector;
      mmx |= inputs[before].file == File::kMmx;
      mmx_in_rm |= operand.kind == kMmRm && vector;
      writes_register |= i == 0 && (row.attributes & kNoWrite) == 0;
    }
  }
  vector_class = x87      ? VectorClass::kX87
                 : vex    ? VectorClass::kAvx
                 : vector ? VectorClass::kSse
                          : VectorClass::kMmx;
}

const VectorPlan& VectorPlan::Of(const Row& row) {
  static const std::vector<VectorPlan> plans(InsnRows().begin(), InsnRows().end());
  return plans[static_cast<size_t>(&row - InsnRows().data())];
}

}  // namespace kvartz::cpu::x86
