#include <gtest/gtest.h>

#include "cpu/x86/interp/native.h"

namespace kvartz::cpu::x86 {
namespace {

// A guest that runs every form of every NATIVE instruction gets a stub for each.
TEST(NativeStubs, EveryFormFitsIntoTheArena) {
  ASSERT_TRUE(PrepareStubs());
  size_t stubs = 0;
  for (const Row& row : InsnRows()) {
    if (!(row.attributes & kNative)) continue;
    const bool immediate = row.imm[0] == ImmKind::kIb;
    for (unsigned form = 0; form < 8; ++form) {
      Insn insn{};
      insn.row = &row;
      const bool memory = (form & 1) != 0;
      if (row.memory != Tri::kAny && (row.memory == Tri::kYes) != memory) continue;
      insn.flags = memory ? kHasMemory : 0;
      insn.modrm = static_cast<uint8_t>(row.modrm_value | (memory ? 0 : 0xc0));
      const bool w = (form & 2) != 0, l = (form & 4) != 0;
      if (row.w != Tri::kAny && (row.w == Tri::kYes) != w) continue;
      if (!row.vex ? l : row.vex_l != Tri::kAny && (row.vex_l == Tri::kYes) != l) continue;
      insn.rex = w ? 0x48 : 0;
      insn.vex_l = l;
      insn.vex_pp = row.prefix == PrefixRule::k66   ? 1
                    : row.prefix == PrefixRule::kF3 ? 2
                    : row.prefix == PrefixRule::kF2 ? 3
                                                    : 0;
      for (unsigned value = 0; value < (immediate ? 256u : 1u); ++value) {
        insn.imm = static_cast<int8_t>(value);
        ASSERT_NE(FindStub(insn), nullptr) << row.mnemonic << " after " << stubs << " stubs";
        ++stubs;
      }
    }
  }
  EXPECT_GT(stubs, InsnRows().size());
}

}  // namespace
}  // namespace kvartz::cpu::x86
