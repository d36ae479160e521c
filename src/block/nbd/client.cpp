#include "block/nbd/client.h"

#include <algorithm>
#include <cerrno>
#include <deque>

#include "block/io_batch.h"

namespace kvartz::block::nbd {
namespace {
constexpr uint64_t kMostExtents = 1 << 16;
}

void Client::Start() {
  fibers_ = 2;
  auto gone = [self = shared_from_this()] {
    if (--self->fibers_ == 0 && self->ender_) self->ender_->Wake();
  };
  Fiber::Start([self = shared_from_this()] { self->ReadLoop(); }, gone);
  Fiber::Start([self = shared_from_this()] { self->WriteLoop(); }, gone);
}

void Client::End() {
  ending_ = true;
  if (!broken_) {
    RequestHeader header;
    header.magic = kRequestMagic;
    header.flags = 0;
    header.type = static_cast<uint16_t>(Command::kDisconnect);
    header.cookie = header.offset = 0;
    header.length = 0;
    stream_.Write({reinterpret_cast<const uint8_t*>(&header), sizeof header});
  }
  stream_.Shutdown();
  broken_ = true;
  if (writer_) writer_->Wake();
  AwaitFibers();
}

void Client::AwaitFibers() {
  ender_ = Fiber::Current();
  while (fibers_ > 0) Fiber::Suspend();
  ender_ = nullptr;
}

void Client::Pause() {
  pausing_ = true;
  stream_.Interrupt();
  if (writer_) writer_->Wake();
  AwaitFibers();
  stream_.Leave();
}

void Client::Resume(EventLoop& loop) {
  pausing_ = false;
  stream_.Join(loop);
  Start();
}

void Client::Send(Call* call) {
  call->received = 0;
  call->result = 0;
  queue_.push_back(call);
  if (writer_) writer_->Wake();
}

void Client::WriteLoop() {
  while (true) {
    if (queue_.empty()) {
      if (broken_ || pausing_) return;
      writer_ = Fiber::Current();
      Fiber::Suspend();
      writer_ = nullptr;
      continue;
    }
    if (broken_) {
      FailAll();
      continue;
    }
    std::vector<Call*> batch = std::move(queue_);
    queue_.clear();
    std::deque<RequestHeader> headers;
    std::vector<iovec> iov;
    for (Call* call : batch) {
      RequestHeader& header = headers.emplace_back();
      header.magic = kRequestMagic;
      header.flags = call->flags;
      header.type = static_cast<uint16_t>(call->command);
      header.cookie = next_cookie_;
      header.offset = call->offset;
      header.length = call->length;
      calls_[next_cookie_++] = call;
      iov.push_back({&header, sizeof header});
      if (call->command == Command::kWrite)
        iov.insert(iov.end(), call->iov, call->iov + call->iov_count);
    }
    if (stream_.Write(iov) != 0) {
      broken_ = true;
      stream_.Shutdown();  // who reads fails the calls
    }
  }
}

void Client::ReadLoop() {
  int rc = 0;
  while (rc == 0) rc = ReadReplies();
  if (rc == -ECANCELED && pausing_) return;
  broken_ = true;
  stream_.Shutdown();
  FailAll();
  if (writer_) writer_->Wake();
}

void Client::FailAll() {
  std::vector<Call*> failed = std::move(queue_);
  queue_.clear();
  for (const auto& [cookie, call] : calls_) failed.push_back(call);
  calls_.clear();
  for (Call* call : failed) call->done(call, kLost);
}

void Client::Conclude(uint64_t cookie, int result) {
  auto it = calls_.find(cookie);
  Call* call = it->second;
  calls_.erase(it);
  if (result == 0) result = call->result;
  // All of what was asked for must have come.
  if (result == 0 && call->command == Command::kRead && call->received != call->length)
    result = -EIO;
  call->done(call, result);
}

int Client::ReadReplies() {
  Be32 magic;
  if (int rc = stream_.ReadStruct(magic)) return rc;
  if (magic == kStructuredReplyMagic && info_.structured) return ReadChunk();
  if (magic != kSimpleReplyMagic) return -EPROTO;
  Be32 error;
  Be64 cookie;
  if (int rc = stream_.ReadStruct(error)) return rc;
  if (int rc = stream_.ReadStruct(cookie)) return rc;
  auto it = calls_.find(cookie);
  if (it == calls_.end()) return -EPROTO;
  Call& call = *it->second;
  if (error == 0 && call.command == Command::kRead) {
    if (info_.structured) return -EPROTO;
    if (int rc = ReadData(call, call.length)) return rc;
  }
  Conclude(cookie, FromWire(error));
  return 0;
}

// The next `length` bytes of a read, at call.received.
int Client::ReadData(Call& call, uint64_t length) {
  std::vector<iovec> iov;
  IovCursor cursor(call.iov, call.iov_count);
  cursor.Skip(call.received);
  cursor.Take(length, iov);
  for (const iovec& part : iov) {
    if (int rc = stream_.Read({static_cast<uint8_t*>(part.iov_base), part.iov_len})) return rc;
  }
  call.received += length;
  return 0;
}

int Client::ReadChunk() {
  struct {
    Be16 flags, type;
    Be64 cookie;
    Be32 length;
  } chunk;
  if (int rc = stream_.ReadStruct(chunk)) return rc;
  auto it = calls_.find(chunk.cookie);
  if (it == calls_.end() || chunk.length > kMostPayload + sizeof(Be64)) return -EPROTO;
  Call& call = *it->second;
  uint64_t length = chunk.length;
  int rc = 0;
  if (chunk.type == kChunkNone) {
    if (length != 0 || !(chunk.flags & kChunkDone)) return -EPROTO;
  } else if (chunk.type == kChunkData && call.command == Command::kRead) {
    Be64 offset;
    if (length <= sizeof offset) return -EPROTO;
    if ((rc = stream_.ReadStruct(offset))) return rc;
    length -= sizeof offset;
    // In order: servers may send chunks as they like, but none that we know does otherwise.
    if (offset != call.offset + call.received || length > call.length - call.received)
      return -EPROTO;
    rc = ReadData(call, length);
  } else if (chunk.type == kChunkHole && call.command == Command::kRead) {
    if (length != 12) return -EPROTO;
    rc = ReadHole(call);
  } else if (chunk.type == kChunkStatus && call.command == Command::kBlockStatus) {
    rc = ReadStatus(call, length);
  } else if (chunk.type & (1 << 15)) {
    rc = ReadError(call, length);
  } else {
    return -EPROTO;
  }
  if (rc) return rc;
  if (chunk.flags & kChunkDone) Conclude(chunk.cookie, 0);
  return 0;
}

int Client::ReadHole(Call& call) {
  struct {
    Be64 offset;
    Be32 length;
  } hole;
  if (int rc = stream_.ReadStruct(hole)) return rc;
  if (hole.offset != call.offset + call.received || hole.length > call.length - call.received)
    return -EPROTO;
  IovCursor cursor(call.iov, call.iov_count);
  cursor.Skip(call.received);
  cursor.Fill(hole.length, 0);
  call.received += hole.length;
  return 0;
}

int Client::ReadStatus(Call& call, uint64_t length) {
  Be32 id;
  if (length < sizeof id + sizeof(StatusExtent) || (length - sizeof id) % sizeof(StatusExtent) != 0)
    return -EPROTO;
  uint64_t count = (length - sizeof id) / sizeof(StatusExtent);
  if (count > kMostExtents) return -EPROTO;
  if (int rc = stream_.ReadStruct(id)) return rc;
  std::vector<StatusExtent> extents(count);
  if (int rc =
          stream_.Read({reinterpret_cast<uint8_t*>(extents.data()), count * sizeof(StatusExtent)}))
    return rc;
  if (id != info_.allocation_id) return -EPROTO;
  *call.extents = std::move(extents);
  return 0;
}

int Client::ReadError(Call& call, uint64_t length) {
  struct {
    Be32 error;
    Be16 length;
  } error;
  if (length < sizeof error) return -EPROTO;
  if (int rc = stream_.ReadStruct(error)) return rc;
  if (int rc = stream_.Skip(length - sizeof error)) return rc;
  if (error.error == 0) return -EPROTO;
  if (call.result == 0) call.result = FromWire(error.error);
  return 0;
}

}  // namespace kvartz::block::nbd
