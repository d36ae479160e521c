// Filter copy-on-read: what is read from the layers below an image becomes its own.
#pragma once

#include "block/filters/filter_node.h"
#include "block/range_locks.h"

namespace kvartz::block {

// Loop-owned.
class CopyOnReadNode final : public FilterNode {
 public:
  // kNothing: Populate alone copies (block-stream).
  enum class Copies : uint8_t { kReads, kNothing };
  CopyOnReadNode(NodePtr file, Copies copies);
  // Layers from this one on down are left where they are; null: none. It is below file().
  void set_base(NodePtr base) { base_ = std::move(base); }

  // Fiber: what the layers above the base have of the range, and the image has not, is copied into
  // it. 0 or -errno; `reading`: what failed was a read.
  int Populate(uint64_t offset, uint64_t length, bool* reading);

 private:
  void Submit(Request* request) override;
  int Process(Request& request) override;
  int CopyPiece(uint64_t offset, uint64_t length, bool* reading);
  NodePtr base_;
  const Copies copies_;
  uint64_t unit_;  // clusters are copied whole
  RangeLocks locks_;
};

}  // namespace kvartz::block
