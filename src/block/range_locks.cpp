#include "block/range_locks.h"

namespace kvartz::block {

RangeLocks::Guard* RangeLocks::Find(uint64_t from, uint64_t end) const {
  for (Guard* guard : held_) {
    if (guard->from_ < end && from < guard->end_) return guard;
  }
  return nullptr;
}

RangeLocks::Guard::Guard(RangeLocks& locks, uint64_t offset, uint64_t length)
    : locks_(locks), from_(offset), end_(offset + length) {
  while (Guard* other = locks_.Find(from_, end_)) other->waiting_.Wait();
  place_ = locks_.held_.insert(locks_.held_.end(), this);
}

RangeLocks::Guard::~Guard() {
  locks_.held_.erase(place_);
  waiting_.WakeAll();
}

}  // namespace kvartz::block
