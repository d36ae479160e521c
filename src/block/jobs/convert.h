// Job: copies the contents of one or more nodes, one after the other, into another node.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "block/dirty_bitmap.h"
#include "block/fiber_io.h"
#include "block/io_batch.h"
#include "block/jobs/host_copy.h"
#include "block/jobs/job.h"
#include "block/node.h"

namespace kvartz::block {

struct ConvertOptions {
  std::vector<NodePtr> sources = {};
  NodePtr target = nullptr;
  uint64_t source_offset = 0;    // of the first source
  uint64_t target_offset = 0;    // where the copy begins
  uint64_t length = UINT64_MAX;  // at most so many bytes
  bool target_is_zero = false;   // reads as zeros already: zeros needn't be written
  bool only_allocated = false;   // copies what the layers above `base` have, and leaves the rest
  Node* base = nullptr;          // null: the layer below the source
  uint64_t sparse_bytes = 4096;  // zeros of this length are left out of data; 0: copied
  bool compressed = false;       // whole clusters are written compressed
  bool host_copy = false;        // data are copied by the host where it can
  bool salvage = false;          // what can't be read becomes zeros
  bool out_of_order = false;     // writes needn't begin in order
  unsigned workers = 8;          // pieces under way at once
  DirtyBitmap* only_dirty = nullptr;  // copies what is dirty alone (one source)
  std::function<void(const std::string& message)> on_unreadable = {};  // with salvage
};

class ConvertJob : public Job {
 public:
  ConvertJob(EventLoop& loop, std::string id, ConvertOptions options);
  const char* type() const override { return "convert"; }

 protected:
  Result<> DoRun() override;

 private:
  struct Piece {
    enum class Kind : uint8_t { kData, kZero, kSkip };
    Kind kind = Kind::kSkip;
    Node* source = nullptr;
    uint64_t from = 0, to = 0, length = 0;
    uint64_t sequence = 0;
  };
  // A range of the target that is like, within one source.
  struct Stretch {
    Piece::Kind kind = Piece::Kind::kSkip;
    uint64_t end = 0;
  };

  Result<> Work();
  Result<Piece> NextPiece();
  Result<Stretch> Examine(Node& source, uint64_t offset, uint64_t end);
  Result<> Copy(const Piece& piece, std::span<uint8_t> buffer);
  bool CopyByHost(const Piece& piece);
  Result<> ReadPiece(const Piece& piece, std::span<uint8_t> bytes);
  void StartWrites(IoBatch& batch, const Piece& piece, std::span<const uint8_t> bytes);
  void StartCompressed(IoBatch& batch, const Piece& piece, std::span<const uint8_t> bytes);
  void StartZeroes(IoBatch& batch, uint64_t offset, uint64_t length);
  void StartWrite(IoBatch& batch, uint64_t offset, std::span<const uint8_t> bytes, bool compressed);
  bool IsWhole(uint64_t offset, uint64_t length) const;
  void AwaitTurn(const Piece& piece);
  void EndTurn(const Piece& piece);

  const ConvertOptions options_;
  uint64_t piece_bytes_ = 0;
  uint64_t unit_ = 0;  // of compressed writes
  FiberMutex next_;
  size_t source_ = 0;  // the piece to come: of this source,
  uint64_t from_ = 0;  // from here in it,
  uint64_t to_ = 0;    // to here
  uint64_t left_ = 0;  // bytes
  Stretch run_ = {};   // what was found out about the source from from_ on
  uint64_t sequence_ = 0;
  uint64_t turn_ = 0;  // the piece that may begin to write
  FiberQueue turns_;
  Result<> failed_;
  std::unique_ptr<HostCopier> host_copier_;
  bool host_copy_failed_ = false;  // once is enough
};

}  // namespace kvartz::block
