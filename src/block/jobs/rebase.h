// Jobs over chains of images: commit (an overlay's contents go down into a layer below it) and
// rebase (an overlay stands on another backing file, and reads as before).
#pragma once

#include "block/jobs/convert.h"
#include "block/node.h"

namespace kvartz::block {

// Copies what `top` and the layers between have into `base`, which is made writable meanwhile and
// larger if `top` is. Errors: base isn't below top; I/O.
class CommitJob final : public ConvertJob {
 public:
  enum class After : uint8_t { kKeepTop, kEmptyTop };
  CommitJob(std::string id, NodePtr top, Node* base, After after);
  const char* type() const override { return "commit"; }

 private:
  Result<> DoRun() override;
  Result<> CopyDown();
  const NodePtr top_;
  Node* const base_;
  const After after_;
};

// Writes into `overlay` what it shows now of its backing node and wouldn't show any more above
// `new_backing` (null: zeros). Recording the new name is the caller's.
class RebaseJob final : public Job {
 public:
  RebaseJob(std::string id, NodePtr overlay, NodePtr new_backing);
  const char* type() const override { return "rebase"; }

 private:
  Result<> DoRun() override;
  Result<uint64_t> Piece(uint64_t offset);
  Result<> ReadLayer(Node* node, uint64_t offset, std::span<uint8_t> bytes);
  const NodePtr overlay_, new_backing_;
  std::unique_ptr<uint8_t[]> old_bytes_, new_bytes_;
};

}  // namespace kvartz::block
