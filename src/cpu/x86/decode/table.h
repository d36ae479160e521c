// The instruction tables, parsed and indexed by opcode. Immutable after construction.
#pragma once

#include <array>
#include <vector>

#include "cpu/x86/decode/insn.h"

namespace kvartz::cpu::x86 {

class InsnTable {
 public:
  // Rows that share an opcode, those with most constraints first.
  struct Bucket {
    std::span<const Row* const> rows;
    bool has_modrm = false;  // then all of them have
  };

  static const InsnTable& Get();

  Bucket Find(bool vex, OpcodeMap map, uint8_t opcode) const;
  std::span<const Row> rows() const { return rows_; }

 private:
  struct Range {
    uint16_t begin = 0, count = 0;
  };
  InsnTable();
  static size_t Slot(bool vex, OpcodeMap map, uint8_t opcode) {
    return (static_cast<size_t>(vex) * 4 + static_cast<size_t>(map)) * 256 + opcode;
  }

  std::vector<Row> rows_;
  std::vector<const Row*> by_opcode_;
  std::array<Range, 2 * 4 * 256> index_{};
};

}  // namespace kvartz::cpu::x86
