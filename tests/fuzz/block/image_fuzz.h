// An image of any bytes: it is opened, told of, read, written, checked and closed, or refused.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/fd.h"
#include "block/fiber_io.h"
#include "block/graph.h"
#include "block/sync_io.h"

namespace kvartz::block {

inline void UseImage(Node& node) {
  std::vector<uint8_t> buffer(4096, 0x5a);
  uint64_t size = node.size_bytes();
  (void)node.Info();
  if (node.editor()) (void)node.editor()->Check(Repair::kNone, [](const std::string&) {});
  for (uint64_t at : {uint64_t{0}, size / 2, size - std::min<uint64_t>(size, 512)}) {
    uint64_t length = std::min<uint64_t>(buffer.size(), size - at);
    if (length == 0) continue;
    (void)StatusOf(node, at, size - at);
    (void)ReadAt(node, at, {buffer.data(), length});
    // The host's disk is not for the asking.
    if (size <= (64 << 20)) (void)WriteAt(node, at, {buffer.data(), length});
    (void)ReadAt(node, at, {buffer.data(), length});
  }
}

inline void FuzzFile(const char* format, const UniqueFd& file, const NodeOptions& options) {
  static std::unique_ptr<EventLoop> loop = *EventLoop::Create();
  std::string path = "/proc/self/fd/" + std::to_string(file.get());
  // The host's other files are not for the asking.
  OpenEnv env = {.loop = *loop, .follow_backing = false};
  RunInFiber(*loop, [&] {
    Result<NodePtr> node = OpenFilename(env, path, format, options);
    if (!node) {
      if (node.error().what.empty()) std::abort();
      return;
    }
    UseImage(**node);
    (void)(*node)->Close();
  });
}

inline int FuzzImage(const char* format, const uint8_t* data, size_t size) {
  UniqueFd file(memfd_create("image", MFD_CLOEXEC));
  if (write(file.get(), data, size) != static_cast<ssize_t>(size)) std::abort();
  FuzzFile(format, file, {.locking = false});
  return 0;
}

}  // namespace kvartz::block
