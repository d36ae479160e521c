// Ranges of a node that one fiber at a time works on.
#pragma once

#include <cstdint>
#include <list>

#include "base/fiber.h"

namespace kvartz::block {

// Loop-owned. A lock isn't held over anything that Drain can't end: I/O only.
class RangeLocks {
 public:
  // Fiber. Waits while another one has a part of [offset, offset + length).
  class Guard {
   public:
    Guard(RangeLocks& locks, uint64_t offset, uint64_t length);
    ~Guard();
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    friend class RangeLocks;
    RangeLocks& locks_;
    const uint64_t from_, end_;
    FiberQueue waiting_;
    std::list<Guard*>::iterator place_;
  };
  bool Busy(uint64_t offset, uint64_t length) const {
    return Find(offset, offset + length) != nullptr;
  }

 private:
  Guard* Find(uint64_t from, uint64_t end) const;
  std::list<Guard*> held_;
};

}  // namespace kvartz::block
