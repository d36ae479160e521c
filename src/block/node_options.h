// Options that all nodes have.
#pragma once

#include <cstdint>
#include <string>

#include "base/result.h"

namespace kvartz::block {

// Writes of zeros become write-zeroes; kUnmap: which may give the space back.
enum class DetectZeroes : uint8_t { kOff, kOn, kUnmap };
Result<DetectZeroes> ParseDetectZeroes(const std::string& name);
const char* NameOf(DetectZeroes detect);
// aio= of files: threads, native or io_uring. However it is set, requests go the loop's way.
Result<> CheckAio(const std::string& name);

// Children inherit what is marked *.
struct NodeOptions {
  std::string node_name = {};
  bool read_only = false;       // * (backing nodes always are)
  bool auto_read_only = false;  // * read-only where writing isn't permitted
  bool cache_direct = false;    // *
  bool cache_no_flush = false;  // *
  bool writethrough = false;    // * each write is on stable storage when done
  bool discard_unmap = false;   // children: true unless they say otherwise
  bool force_share = false;     // *
  bool share_write = false;     // *
  bool locking = true;          // *
  DetectZeroes detect_zeroes = DetectZeroes::kOff;
  bool grows = false;   // below a format
  bool probed = false;  // the format was found out, not given
  // What is opened isn't used for I/O: no secret is needed, and no backing node is opened.
  bool no_io = false;
  bool no_backing = false;  // no backing node
  bool for_check = false;   // repairs nothing by itself, opens what is dirty or corrupt
};

}  // namespace kvartz::block
