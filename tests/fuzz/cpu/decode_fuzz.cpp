// The instruction decoder on arbitrary bytes: byte 0 chooses mode, privilege and how many bytes are
// there; the rest is code.
#include <cstdlib>

#include "base/check.h"
#include "cpu/x86/decode/insn.h"

using namespace kvartz::cpu::x86;  // NOLINT: a fuzz target is its own program

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) {
    return 0;
  }
  DecodeContext context;
  context.mode = static_cast<CodeMode>(data[0] % 3);
  context.protected_mode = (data[0] & 4) != 0 || context.mode == CodeMode::k64;
  context.cpl = (data[0] & 8) != 0 ? 3 : 0;
  for (std::span<const uint8_t> code(data + 1, size - 1); !code.empty();) {
    Insn insn;
    const DecodeStatus status = Decode(context, code, &insn);
    if (status == DecodeStatus::kTruncated) {
      VERIFY(code.size() < 15);
      break;
    }
    if (status != DecodeStatus::kOk) {
      code = code.subspan(1);
      continue;
    }
    VERIFY(insn.length >= 1 && insn.length <= 15 && insn.length <= code.size());
    VERIFY(insn.exec != nullptr && insn.row != nullptr);
    VERIFY(insn.base <= kNoRegister && insn.index <= kNoRegister &&
           insn.segment < kvartz::cpu::kSegCount);
    VERIFY(insn.reg < 20 && insn.rm < 20 && insn.vvvv < 16);
    // A prefix of the instruction is truncated, and the instruction alone decodes the same.
    Insn again;
    VERIFY(Decode(context, code.first(insn.length), &again) == DecodeStatus::kOk &&
           again.length == insn.length);
    VERIFY(Decode(context, code.first(insn.length - 1u), &again) == DecodeStatus::kTruncated);
    code = code.subspan(insn.length);
  }
  return 0;
}
