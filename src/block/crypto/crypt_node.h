// Encryption between a node and what is below it.
#pragma once

#include <list>
#include <memory>

#include "base/fiber.h"
#include "base/workers.h"
#include "block/crypto/cipher.h"
#include "block/node.h"

namespace kvartz::block {

// Loop-owned. Its disk begins at `offset` of the node below; requests run in fibers, large ones
// compute on threads. Requests may begin and end anywhere: sectors that are written in part are
// read first.
class CryptNode : public Node {
 public:
  struct Layout {
    uint64_t offset = 0;          // in the node below, bytes
    uint64_t size = 0;            // bytes
    uint32_t sector_bytes = 512;  // that are encrypted as one
    uint64_t first_sector = 0;    // number of the first one, in units of 512 bytes
    bool grows = false;           // as the node below does
  };
  // Null `cipher`: the key isn't known; reads and writes end with -EACCES.
  CryptNode(NodePtr below, std::shared_ptr<const SectorCipher> cipher, const Layout& layout,
            bool read_only);

  const char* driver() const override { return "crypt"; }
  Node* file() const override { return below_.get(); }
  void Drain() override;
  // Of this node alone.
  Result<> SetReadOnly(bool read_only) override;

 protected:
  const NodePtr below_;
  Layout layout_;

 private:
  struct Writing {
    uint64_t from = 0, end = 0;  // whole units
    bool partly = false;         // what is around it in them is read first
    FiberQueue waiting;
  };
  class WritingGuard;

  void Submit(Request* request) override;
  int Handle(const Request& request);
  int ReadPieces(const Request& request);
  int ReadWhole(const Request& request);
  int WritePieces(const Request& request);
  int WriteUnits(uint64_t from, std::span<uint8_t> bytes);
  int ReadUnits(uint64_t from, std::span<uint8_t> bytes);
  void Transform(uint64_t from, std::span<uint8_t> bytes, bool encrypt);
  void Compute(uint64_t bytes, const std::function<void()>& job);
  uint64_t Below(uint64_t offset) const { return layout_.offset + offset; }

  const std::shared_ptr<const SectorCipher> cipher_;
  const uint64_t unit_;  // of requests to the node below: whole sectors of both
  std::list<Writing*> writing_;
  Workers workers_;
};

}  // namespace kvartz::block
