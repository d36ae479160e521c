// What the older formats have in common: the disk is in blocks of one size, and tables say where in
// the file each block is, or that it is nowhere yet and reads as what is below, or zeros. New
// blocks go to the end of the file: first their data, then the table that leads to them, so that
// whatever ends us leaves at most an unused block behind.
#pragma once

#include "base/fiber.h"
#include "block/driver.h"
#include "block/io_batch.h"
#include "block/node.h"

namespace kvartz::block {

// Loop-owned. Requests run in fibers.
class MappedNode : public Node {
 public:
  // Takes and opens the child "file"; other options are refused, or the caller's. Errors: direct
  // I/O that needs more than sectors.
  enum class Others : uint8_t { kRefuse, kLeave };
  static Result<NodePtr> OpenFile(const OpenEnv& env, const NodeOptions& node, Options& options,
                                  const char* format, Others others = Others::kRefuse);

  Node* file() const override { return file_.get(); }
  Node* backing() const override { return backing_.get(); }
  Result<> SetBacking(NodePtr backing) override;
  void Drain() override;
  Result<Extent> Status(uint64_t offset, uint64_t length) override;
  Result<> Close() override;
  Result<> SetReadOnly(bool read_only) override;
  Result<ImageInfo> Info() override;

 protected:
  // Where a byte of the disk is.
  struct Place {
    enum class Kind : uint8_t { kNowhere, kZero, kStored, kCompressed };
    Kind kind = Kind::kNowhere;
    uint64_t offset = 0;  // in the file; kCompressed: of the block's record
  };

  MappedNode(NodePtr file, bool read_only, uint64_t size_bytes, uint64_t block_bytes);

  // Fiber, all of the following; answers are 0 or -errno.
  // Of the block that `offset` (of the disk) is in, moved to that byte.
  virtual int Find(uint64_t offset, Place& place) = 0;
  // Holding the allocation's lock: where block `index` is to be; the file is made as long as that
  // needs and reads as zeros there.
  virtual int NewPlace(uint64_t index, uint64_t& offset) = 0;
  // Holding it, too: the block's data are written, and the tables now lead to it.
  virtual int Publish(uint64_t index, uint64_t offset) = 0;
  // All of block `index` reads as zeros from now on, by a mark in the tables. Holding the lock.
  // -ENOTSUP: there is no such mark.
  virtual int MarkZero(uint64_t index);
  // Of kCompressed blocks: all of one.
  virtual int ReadCompressed(const Place& place, uint64_t index, std::span<uint8_t> block);
  // A whole block (or the last, cut short), to be stored compressed. Holding the lock.
  virtual int WriteCompressed(uint64_t index, std::span<const uint8_t> block);
  // Images of the format may stand on others, so that what is nowhere isn't this image's.
  virtual bool HasParents() const { return false; }
  // Before the first write since it was opened; on Close of a writable node.
  virtual int BeginWriting() { return 0; }
  virtual Result<> EndWriting() { return {}; }

  uint64_t block_bytes() const { return block_bytes_; }
  bool wrote() const { return wrote_; }
  NodePtr file_;
  NodePtr backing_;

 private:
  void Submit(Request* request) override;
  int Handle(Request& request);
  int HandlePiece(Request& request, uint64_t offset, uint64_t length, IovCursor& cursor);
  // A block that is nowhere isn't zeros here.
  bool ShowsBacking(const Place& place, uint64_t offset) const {
    return place.kind == Place::Kind::kNowhere && backing_ && offset < backing_->size_bytes();
  }
  int ReadBacking(uint64_t offset, uint64_t length, IovCursor& cursor);
  int WriteNewBlock(uint64_t offset, uint64_t length, IovCursor& cursor, const Place& place);
  int ReadPiece(const Place& place, uint64_t offset, uint64_t length, IovCursor& cursor);
  int WritePiece(Place place, uint64_t offset, uint64_t length, IovCursor& cursor);
  int ZeroPiece(const Request& request, Place place, uint64_t offset, uint64_t length);
  int CompressPiece(uint64_t offset, uint64_t length, IovCursor& cursor);
  int FileIo(Request::Kind kind, uint64_t offset, uint64_t length, IovCursor& cursor);

  const uint64_t block_bytes_;
  FiberMutex allocation_;
  bool wrote_ = false;
};

}  // namespace kvartz::block
