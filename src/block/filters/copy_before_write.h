// Filter copy-before-write: above the source of a backup; what is about to be overwritten is copied
// first.
#pragma once

#include <functional>

#include "block/dirty_bitmap.h"
#include "block/filters/filter_node.h"

namespace kvartz::block {

// Loop-owned.
class CopyBeforeWriteNode final : public FilterNode {
 public:
  explicit CopyBeforeWriteNode(NodePtr file) : FilterNode(std::move(file), "copy-before-write") {}
  // From now on. `copy` (fiber) copies what is dirty of a range that will be written; `todo` and
  // `target` are there until Disarm.
  struct Arms {
    const DirtyBitmap* todo = nullptr;
    Node* target = nullptr;
    std::function<void(uint64_t offset, uint64_t length)> copy = {};
  };
  void Arm(Arms arms) { arms_ = std::move(arms); }
  void Disarm() { arms_ = {}; }
  void Drain() override;

 private:
  void Submit(Request* request) override;
  int Process(Request& request) override;
  void DrainMore() override {
    if (arms_.target) arms_.target->Drain();
  }
  Arms arms_;
  bool draining_ = false;
};

}  // namespace kvartz::block
