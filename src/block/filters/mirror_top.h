// Filter mirror_top: above the source of a mirror; with write-blocking, writes reach the target
// before they are done.
#pragma once

#include <functional>
#include <utility>

#include "block/dirty_bitmap.h"
#include "block/filters/filter_node.h"
#include "block/range_locks.h"

namespace kvartz::block {

// Loop-owned.
class MirrorTopNode final : public FilterNode {
 public:
  explicit MirrorTopNode(NodePtr file, const char* driver) : FilterNode(std::move(file), driver) {}
  // From now on; `locks` and `todo` are the job's, and are there until Disarm.
  struct Blocking {
    Node* target = nullptr;
    RangeLocks* locks = nullptr;
    DirtyBitmap* todo = nullptr;
    // The target is written in such pieces; by `copy` (fiber; 0 or -errno) what a write covers only
    // a part of.
    uint64_t unit = 1;
    std::function<int(uint64_t offset, uint64_t length)> copy = {};
  };
  void Arm(Blocking blocking) { blocking_ = std::move(blocking); }
  void Disarm() { blocking_ = {}; }

 private:
  void Submit(Request* request) override;
  int Process(Request& request) override;
  void DrainMore() override {
    if (blocking_.target) blocking_.target->Drain();
  }
  Blocking blocking_;
};

}  // namespace kvartz::block
