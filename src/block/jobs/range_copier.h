// Copying ranges of one node to another, with zeros as zeros.
#pragma once

#include "block/node.h"

namespace kvartz::block {

struct RangeCopier {
  Node* source = nullptr;
  Node* base = nullptr;  // what only this one and what is below have is left out; null: nothing
  Node* target = nullptr;
  bool unmap = true;  // zeros may be holes
  // What isn't copied comes from what the target stands on, or will when that is put below it.
  bool partial = false;
  uint64_t compressed_unit = 0;  // whole clusters of so many bytes are written compressed; 0: not

  // Fiber: 0 or -errno; `reading`: of the source.
  int Copy(uint64_t offset, uint64_t length, bool* reading) const;

 private:
  int CopyLike(uint64_t offset, uint64_t length, bool zero, bool* reading) const;
  int CopyData(uint64_t offset, uint64_t length, bool* reading) const;
  int CopyZeros(uint64_t offset, uint64_t length) const;
};

}  // namespace kvartz::block
