#include "block/io_batch.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace kvartz::block {

template <typename Visit>
void IovCursor::Advance(uint64_t bytes, Visit visit) {
  while (bytes > 0) {
    VERIFY(count_ > 0);
    uint64_t length = std::min(bytes, iov_->iov_len - skip_);
    if (length > 0) visit(static_cast<uint8_t*>(iov_->iov_base) + skip_, length);
    bytes -= length;
    skip_ += length;
    if (skip_ == iov_->iov_len) {
      iov_++;
      count_--;
      skip_ = 0;
    }
  }
}

void IovCursor::Skip(uint64_t bytes) {
  Advance(bytes, [](uint8_t*, uint64_t) {});
}

void IovCursor::Take(uint64_t bytes, std::vector<iovec>& to) {
  Advance(bytes, [&](uint8_t* at, uint64_t length) { to.push_back({at, length}); });
}

void IovCursor::Fill(uint64_t bytes, uint8_t value) {
  Advance(bytes, [&](uint8_t* at, uint64_t length) { std::memset(at, value, length); });
}

void IovCursor::CopyIn(std::span<const uint8_t> from) {
  const uint8_t* source = from.data();
  Advance(from.size(), [&](uint8_t* at, uint64_t length) {
    std::memcpy(at, source, length);
    source += length;
  });
}

void IovCursor::CopyOut(std::span<uint8_t> to) {
  uint8_t* target = to.data();
  Advance(to.size(), [&](const uint8_t* at, uint64_t length) {
    std::memcpy(target, at, length);
    target += length;
  });
}

IoBatch::Item& IoBatch::Add() {
  if (used_ == items_.size()) items_.emplace_back();
  Item& item = items_[used_++];
  item.request = {};
  item.iov.clear();
  item.batch = this;
  return item;
}

void IoBatch::Start(Node& node, Item& item) {
  item.request.iov = item.iov.data();
  item.request.iov_count = static_cast<unsigned>(item.iov.size());
  item.request.done = Done;
  item.request.owner = &item;
  outstanding_++;
  node.Start(&item.request);
}

void IoBatch::Read(Node& node, uint64_t offset, std::span<uint8_t> bytes) {
  Item& item = Add();
  item.request.kind = Request::Kind::kRead;
  item.request.offset = offset;
  item.request.length = bytes.size();
  item.iov.push_back({bytes.data(), bytes.size()});
  Start(node, item);
}

void IoBatch::Write(Node& node, uint64_t offset, std::span<const uint8_t> bytes) {
  Item& item = Add();
  item.request.kind = Request::Kind::kWrite;
  item.request.offset = offset;
  item.request.length = bytes.size();
  item.iov.push_back({const_cast<uint8_t*>(bytes.data()), bytes.size()});
  Start(node, item);
}

void IoBatch::Done(Request* request, int result) {
  IoBatch& batch = *static_cast<Item*>(request->owner)->batch;
  if (batch.result_ == 0) batch.result_ = result;
  if (--batch.outstanding_ > 0) return;
  if (batch.fiber_) return batch.fiber_->Wake();
  if (batch.on_done_) batch.on_done_(batch.context_, batch.result_);
}

int IoBatch::Wait() {
  if (outstanding_ > 0) {
    fiber_ = Fiber::Current();
    Fiber::Suspend();
    fiber_ = nullptr;
  }
  VERIFY(outstanding_ == 0);
  return result_;
}

void IoBatch::Finish(void (*on_done)(void* context, int result), void* context) {
  VERIFY(outstanding_ > 0);
  on_done_ = on_done;
  context_ = context;
}

void IoBatch::Reset() {
  VERIFY(outstanding_ == 0);
  used_ = 0;
  result_ = 0;
  on_done_ = nullptr;
}

}  // namespace kvartz::block
