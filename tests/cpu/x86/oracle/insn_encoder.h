// Random encodings of table rows, and random values, registers and memory that tend to corner
// cases: what the tests of single instructions and those of whole programs share.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <random>
#include <string_view>
#include <vector>

#include "cpu/x86/decode/insn.h"

namespace kvartz::cpu::x86::oracle {

// The row has one of these mnemonics.
bool Is(const Row& row, std::initializer_list<std::string_view> names);
bool HasOperand(const Row& row, OperandKind kind);

struct EncodedInsn {
  std::vector<uint8_t> code;
  bool undefined_encoding = false;  // no row matches: #UD is expected
  Insn insn;                        // unspecified if so
};

class InsnEncoder {
 public:
  explicit InsnEncoder(uint64_t seed) : random_(seed) {}

  uint64_t Random() { return random_(); }
  uint64_t Below(uint64_t limit) { return random_() % limit; }
  bool Chance(unsigned percent) { return Below(100) < percent; }
  // A value that tends to corner cases.
  uint64_t Value();
  void FillInteresting(uint8_t* bytes, unsigned size);
  void RandomFpu(XsaveArea* out);
  // Some encoding of the row, with random prefixes, registers, displacement and immediates. False
  // if this try came to nothing. The bytes may turn out to match another row: see out->insn.
  bool Encode(const Row& row, const DecodeContext& context, EncodedInsn* out);

 protected:
  // Of the latest encoding.
  size_t rex_at_ = 0, modrm_at_ = 0;  // rex_at_: only if the instruction has a REX prefix
  size_t displacement_at_ = 0;        // where in the code the displacement stands
  unsigned displacement_size_ = 0;
  size_t immediate_at_ = 0;

 private:
  void EncodePrefixes(const Row& row, CodeMode mode, EncodedInsn* out, unsigned* rex);
  void EncodeModrm(const Row& row, CodeMode mode, EncodedInsn* out);
  void EncodeImmediates(const Row& row, EncodedInsn* out);

  std::mt19937_64 random_;
};

}  // namespace kvartz::cpu::x86::oracle
