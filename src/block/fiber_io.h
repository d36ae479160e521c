// I/O in straight-line code: within a fiber, each call waits until its request is done.
#pragma once

#include <cstdint>
#include <span>

#include "block/node.h"

namespace kvartz::block {

// 0 or -errno. `request`: all but done and owner.
int Await(Node& node, Request& request);

int ReadAt(Node& node, uint64_t offset, std::span<uint8_t> bytes);
int WriteAt(Node& node, uint64_t offset, std::span<const uint8_t> bytes);
int FlushNode(Node& node);
int WriteZeroesAt(Node& node, uint64_t offset, uint64_t length, bool unmap = false,
                  bool no_fallback = false);
int DiscardAt(Node& node, uint64_t offset, uint64_t length);

// "cannot read 'a.img' at 0x10000: ..."
Error IoError(const Node& node, const char* verb, uint64_t offset, int result);
Result<> ReadExactly(Node& node, uint64_t offset, std::span<uint8_t> bytes);
Result<> WriteExactly(Node& node, uint64_t offset, std::span<const uint8_t> bytes);
Result<> Flush(Node& node);

}  // namespace kvartz::block
