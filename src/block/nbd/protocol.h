// The NBD protocol on the wire. Spec: "The NBD protocol" (doc/proto.md of the nbd project); all
// integers are big-endian.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/endian.h"

namespace kvartz::block::nbd {

constexpr uint64_t kMagic = 0x4e42444d41474943;        // "NBDMAGIC"
constexpr uint64_t kOptionMagic = 0x49484156454f5054;  // "IHAVEOPT"
constexpr uint64_t kOldStyleMagic = 0x00420281861253;
constexpr uint64_t kOptionReplyMagic = 0x0003e889045565a9;
constexpr uint32_t kRequestMagic = 0x25609513;
constexpr uint32_t kSimpleReplyMagic = 0x67446698;
constexpr uint32_t kStructuredReplyMagic = 0x668e33ef;

// "String": names have at most 4096 bytes.
constexpr uint32_t kMostName = 4096;
// "Oldstyle negotiation", NBD_OPT_EXPORT_NAME: zeros behind an export's size and flags.
constexpr size_t kReservedBytes = 124;
// Options: what is longer is refused before it is read.
constexpr uint32_t kMostOption = 64 << 10;
// "Block size constraints": of reads and writes.
constexpr uint32_t kMostPayload = 32 << 20;

// "Flag fields".
constexpr uint16_t kFixedNewstyle = 1, kNoZeroes = 2;
enum TransmissionFlag : uint16_t {
  kHasFlags = 1 << 0,
  kReadOnly = 1 << 1,
  kSendFlush = 1 << 2,
  kSendFua = 1 << 3,
  kSendTrim = 1 << 5,
  kSendWriteZeroes = 1 << 6,
  kSendDf = 1 << 7,
  kCanMultiConn = 1 << 8,
  kSendCache = 1 << 10,
  kSendFastZero = 1 << 11,
};

// "Option types".
enum class Option : uint32_t {
  kExportName = 1,
  kAbort = 2,
  kList = 3,
  kStartTls = 5,
  kInfo = 6,
  kGo = 7,
  kStructuredReply = 8,
  kListMetaContext = 9,
  kSetMetaContext = 10,
};
// "Option reply types".
constexpr uint32_t kRepAck = 1, kRepServer = 2, kRepInfo = 3, kRepMetaContext = 4;
constexpr uint32_t kRepError = 1u << 31;
constexpr uint32_t kErrUnsupported = kRepError | 1, kErrPolicy = kRepError | 2,
                   kErrInvalid = kRepError | 3, kErrTlsRequired = kRepError | 5,
                   kErrUnknown = kRepError | 6, kErrTooBig = kRepError | 9;
// NBD_INFO_*.
constexpr uint16_t kInfoExport = 0, kInfoName = 1, kInfoDescription = 2, kInfoBlockSize = 3;

// "Request types".
enum class Command : uint16_t {
  kRead = 0,
  kWrite = 1,
  kDisconnect = 2,
  kFlush = 3,
  kTrim = 4,
  kCache = 5,
  kWriteZeroes = 6,
  kBlockStatus = 7,
};
// "Command flags".
constexpr uint16_t kFua = 1, kNoHole = 2, kDf = 4, kReqOne = 8, kFastZero = 16;

// "Structured reply types".
constexpr uint16_t kChunkDone = 1;  // a flag
constexpr uint16_t kChunkNone = 0, kChunkData = 1, kChunkHole = 2, kChunkStatus = 5;
constexpr uint16_t kChunkError = (1 << 15) | 1, kChunkErrorOffset = (1 << 15) | 2;

// base:allocation.
constexpr uint32_t kStateHole = 1, kStateZero = 2;

struct OptionHeader {
  Be64 magic;
  Be32 option;
  Be32 length;
};
static_assert(sizeof(OptionHeader) == 16);

struct OptionReply {
  Be64 magic;
  Be32 option;
  Be32 type;
  Be32 length;
};
static_assert(sizeof(OptionReply) == 20);

struct RequestHeader {
  Be32 magic;
  Be16 flags;
  Be16 type;
  Be64 cookie;
  Be64 offset;
  Be32 length;
};
static_assert(sizeof(RequestHeader) == 28);

struct SimpleReply {
  Be32 magic;
  Be32 error;
  Be64 cookie;
};
static_assert(sizeof(SimpleReply) == 16);

struct ChunkHeader {
  Be32 magic;
  Be16 flags;
  Be16 type;
  Be64 cookie;
  Be32 length;
};
static_assert(sizeof(ChunkHeader) == 20);

struct StatusExtent {
  Be32 length;
  Be32 flags;
};
static_assert(sizeof(StatusExtent) == 8);

// "Error values": those of Linux, of which these may be sent; EIO for any other.
uint32_t ToWire(int error);
// -errno of what a peer sent.
int FromWire(uint32_t error);

}  // namespace kvartz::block::nbd
