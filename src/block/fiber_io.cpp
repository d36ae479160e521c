#include "block/fiber_io.h"

#include <fmt/format.h>

#include "base/fiber.h"

namespace kvartz::block {

int Await(Node& node, Request& request) {
  struct Wait {
    Fiber* fiber;
    int result;
  } wait = {Fiber::Current(), 0};
  request.owner = &wait;
  request.done = [](Request* done, int result) {
    auto* waiting = static_cast<Wait*>(done->owner);
    waiting->result = result;
    waiting->fiber->Wake();
  };
  node.Start(&request);
  Fiber::Suspend();
  return wait.result;
}

int ReadAt(Node& node, uint64_t offset, std::span<uint8_t> bytes) {
  iovec iov = {bytes.data(), bytes.size()};
  Request request = {.kind = Request::Kind::kRead, .offset = offset, .length = bytes.size()};
  request.iov = &iov;
  request.iov_count = 1;
  return Await(node, request);
}

int WriteAt(Node& node, uint64_t offset, std::span<const uint8_t> bytes) {
  iovec iov = {const_cast<uint8_t*>(bytes.data()), bytes.size()};
  Request request = {.kind = Request::Kind::kWrite, .offset = offset, .length = bytes.size()};
  request.iov = &iov;
  request.iov_count = 1;
  return Await(node, request);
}

int FlushNode(Node& node) {
  Request request = {.kind = Request::Kind::kFlush};
  return Await(node, request);
}

int WriteZeroesAt(Node& node, uint64_t offset, uint64_t length, bool unmap, bool no_fallback) {
  Request request = {.kind = Request::Kind::kWriteZeroes,
                     .unmap = unmap,
                     .no_fallback = no_fallback,
                     .offset = offset,
                     .length = length};
  return Await(node, request);
}

int DiscardAt(Node& node, uint64_t offset, uint64_t length) {
  Request request = {.kind = Request::Kind::kDiscard, .offset = offset, .length = length};
  return Await(node, request);
}

Error IoError(const Node& node, const char* verb, uint64_t offset, int result) {
  return ErrnoError(-result, fmt::format("cannot {} '{}' at {:#x}", verb, node.name(), offset));
}

Result<> ReadExactly(Node& node, uint64_t offset, std::span<uint8_t> bytes) {
  if (int rc = ReadAt(node, offset, bytes)) return Fail(IoError(node, "read", offset, rc));
  return {};
}

Result<> WriteExactly(Node& node, uint64_t offset, std::span<const uint8_t> bytes) {
  if (int rc = WriteAt(node, offset, bytes)) return Fail(IoError(node, "write", offset, rc));
  return {};
}

Result<> Flush(Node& node) {
  if (int rc = FlushNode(node))
    return Fail(ErrnoError(-rc, fmt::format("cannot flush '{}'", node.name())));
  return {};
}

}  // namespace kvartz::block
