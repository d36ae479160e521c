// Several requests under way at once, waited for together.
#pragma once

#include <deque>
#include <functional>
#include <span>
#include <vector>

#include "base/fiber.h"
#include "block/node.h"

namespace kvartz::block {

// A place in an iovec list, from which ranges are taken in order.
class IovCursor {
 public:
  IovCursor() = default;
  IovCursor(const iovec* iov, unsigned count) : iov_(iov), count_(count) {}
  void Skip(uint64_t bytes);
  // Appends what the next `bytes` are held in, and passes them.
  void Take(uint64_t bytes, std::vector<iovec>& to);
  void Fill(uint64_t bytes, uint8_t value);  // memset, and passes them
  void CopyIn(std::span<const uint8_t> from);
  void CopyOut(std::span<uint8_t> to);

 private:
  template <typename Visit>
  void Advance(uint64_t bytes, Visit visit);
  const iovec* iov_ = nullptr;
  unsigned count_ = 0;
  uint64_t skip_ = 0;  // within iov_[0]
};

// Loop-owned. Either waited for in a fiber, or with `on_done`, which is called once after Close
// when all are done (not from within Close if any is under way; then the batch may be destroyed).
class IoBatch {
 public:
  IoBatch() = default;
  IoBatch(const IoBatch&) = delete;
  IoBatch& operator=(const IoBatch&) = delete;

  struct Item {
    Request request;
    std::vector<iovec> iov;
    IoBatch* batch = nullptr;
  };
  // Fill in kind, offset, length and iov, then Start it.
  Item& Add();
  void Start(Node& node, Item& item);
  void Read(Node& node, uint64_t offset, std::span<uint8_t> bytes);
  void Write(Node& node, uint64_t offset, std::span<const uint8_t> bytes);

  // Fiber: 0, or the first error.
  int Wait();
  // No fiber: when all are done, on_done(context, result).
  void Finish(void (*on_done)(void* context, int result), void* context);
  bool idle() const { return outstanding_ == 0; }
  int result() const { return result_; }
  void Reset();  // for another use, when idle

 private:
  static void Done(Request* request, int result);
  std::deque<Item> items_;
  size_t used_ = 0;
  unsigned outstanding_ = 0;
  int result_ = 0;
  Fiber* fiber_ = nullptr;
  void (*on_done_)(void* context, int result) = nullptr;
  void* context_ = nullptr;
};

}  // namespace kvartz::block
