// A machine's state in a file: the contents of its RAM, then devices, engine and CPUs as VisitState
// declares them.
//
//   "KVZSTATE"  u32 version (1)  u32 number of RAM blocks
//   a block:    u16 length of the name, the name, u64 size in bytes,
//               pages: u64 offset and 4096 bytes each, ascending, pages of zeros left out; u64 ~0
//               ends them
//   u64 length, the state (base/state_visitor.h), u32 CRC-32C of all before. Integers are
//   little-endian.
#pragma once

#include <string>

#include "base/result.h"

namespace kvartz::machine {
class Board;
}

namespace kvartz::vmm {

// vCPUs parked, devices quiet. Replaces `path` when everything is written. Errors: the host's.
Result<> SaveMachine(machine::Board& board, const std::string& path);
// Into a board that was made of the same configuration and has not run. The file is checked as
// hostile input. Errors: absent, damaged, from another kind of machine; the board is of no use
// then.
Result<> LoadMachine(machine::Board& board, const std::string& path);

}  // namespace kvartz::vmm
