// The log of a VHDX: what its last writer had begun to change, to be done again.
// Spec: [MS-VHDX] 2.3 "Log".
#pragma once

#include "block/formats/vhdx.h"
#include "block/node.h"

namespace kvartz::block::vhdx {

// 2.3.1.1; entries begin at multiples of 4 KiB of the log, and go on at its beginning.
struct LogEntryHeader {
  std::array<char, 4> signature;  // "loge"
  Le32 checksum;                  // CRC-32C of the entry, with this field 0
  Le32 entry_length;              // multiple of 4 KiB
  Le32 tail;                      // where in the log the oldest entry is that counts
  Le64 sequence_number;
  Le32 descriptor_count;
  Le32 reserved;
  Guid log_guid;
  Le64 flushed_file_offset;  // the file was at least so large
  Le64 last_file_offset;
};
static_assert(sizeof(LogEntryHeader) == 64);

// 2.3.1.2 and 2.3.1.3. "zero": `length` zeros from file_offset on. "desc": 4 KiB, whose first 8
// bytes are `leading`, the last 4 `trailing`, and the others in a data sector.
struct LogDescriptor {
  std::array<char, 4> signature;
  Le32 trailing;
  Le64 leading_or_length;
  Le64 file_offset;
  Le64 sequence_number;
};
static_assert(sizeof(LogDescriptor) == 32);

// 2.3.1.4.
struct LogDataSector {
  std::array<char, 4> signature;  // "data"
  Le32 sequence_high;
  std::array<uint8_t, 4084> data;
  Le32 sequence_low;
};
static_assert(sizeof(LogDataSector) == 4096);

// Fiber: does what the log of `header` says, and flushes. The log itself stays as it is. Errors: no
// valid entries, places that make no sense, a file that is too short, I/O.
Result<> ReplayLog(Node& file, const Header& header);

}  // namespace kvartz::block::vhdx
