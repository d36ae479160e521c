// A LUKS header: how the volume is encrypted, and the key slots that give its key for a passphrase.
// Spec: LUKS1 On-Disk Format Specification 1.2.3; LUKS2 On-Disk Format Specification 1.1.1.
//
// What a header says is hostile: sizes, counts and costs are bounded where they are read.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "block/crypto/cipher.h"
#include "block/crypto/digest.h"
#include "block/image_info.h"
#include "block/node.h"

namespace kvartz::block::luks {

constexpr uint32_t kStripes = 4000;
constexpr uint32_t kMaxKeyBytes = 512;
constexpr uint64_t kMaxPassphrase = 8 << 20;
constexpr uint64_t kMinIterations = 1000;
// What a passphrase may cost here at most: about five minutes, and as much memory as cryptsetup
// asks for at most.
struct CostLimits {
  uint64_t iterations = 500'000'000;
  uint32_t memory_kib = 4 << 20;
  uint32_t passes = 10'000;
  uint32_t lanes = 64;
};

// Where the header is. Fiber: all; offsets are the header's own, of any alignment.
struct Area {
  Node* node = nullptr;
  uint64_t offset = 0;
  uint64_t length = UINT64_MAX;
  Result<> Read(uint64_t at, std::span<uint8_t> bytes) const;
  Result<> Write(uint64_t at, std::span<const uint8_t> bytes) const;
  Result<> Flush() const;
};

struct Kdf {
  enum class Kind : uint8_t { kPbkdf2, kArgon2i, kArgon2id };
  Kind kind = Kind::kPbkdf2;
  const HashAlg* hash = nullptr;  // kPbkdf2
  uint64_t iterations = 0;        // kArgon2*: passes
  uint32_t memory_kib = 0, lanes = 0;
  std::vector<uint8_t> salt = {};
};

struct Slot {
  uint32_t id = 0;
  bool active = false;
  Kdf kdf = {};
  const HashAlg* af_hash = nullptr;
  uint32_t stripes = kStripes;
  CipherSpec cipher = {};    // of the area
  uint64_t area_offset = 0;  // bytes, in the header's area
  uint64_t area_bytes = 0;
  uint32_t key_bytes = 0;
};

struct KeyDigest {
  const HashAlg* hash = nullptr;
  uint64_t iterations = 0;
  std::vector<uint8_t> salt, digest;
  std::vector<uint32_t> slots;  // LUKS2: whose keys it is of; LUKS1: all
};

struct Header {
  int version = 1;
  std::string uuid = {};
  std::string label = {};         // LUKS2
  CipherSpec cipher = {};         // of the payload
  const HashAlg* hash = nullptr;  // LUKS1
  uint32_t sector_bytes = 512;
  uint64_t payload_offset = 0;                 // bytes
  std::optional<uint64_t> payload_bytes = {};  // nothing: up to the end
  uint64_t iv_tweak = 0;                       // sectors of 512 bytes
  std::vector<Slot> slots = {};
  KeyDigest digest = {};
};

// Of `head`, the first bytes of a file; 0: no LUKS.
int VersionOf(std::span<const uint8_t> head);

// Fiber: reads and checks either version. Errors: no LUKS; broken; what isn't supported.
Result<Header> ReadHeader(const Area& area);
// Of the first bytes alone; luks1.cpp, luks2.cpp.
constexpr size_t kLuks1Bytes = 592;
Result<Header> ParseLuks1(std::span<const uint8_t> bytes);
constexpr size_t kLuks2BinaryBytes = 4096;
constexpr uint64_t kMaxLuks2Bytes = 4 << 20;  // of binary header and JSON area
// `at`: where in the file it was found, since it says so itself. `json`: what follows it.
// `sequence`: higher is newer.
Result<Header> ParseLuks2(std::span<const uint8_t> binary, std::span<const uint8_t> json,
                          uint64_t at, uint64_t* sequence);
// How long a header with its JSON area is, by its binary part; 0: it is none.
uint64_t Luks2HeaderBytes(std::span<const uint8_t> binary);
Result<Header> ReadLuks2(const Area& area);
// The JSON area alone.
Result<Header> ParseLuks2Json(std::span<const uint8_t> json);

struct Unlocked {
  SecretBytes key;
  uint32_t slot = 0;
};
// Fiber; computes on threads. Errors: kPermission if it opens no key slot ("wrong passphrase").
// `only`: that key slot alone.
Result<Unlocked> Unlock(const Area& area, const Header& header, std::string_view passphrase,
                        std::optional<uint32_t> only = {}, const CostLimits& limits = {});

// ---- LUKS1 only ----

struct CreateOptions {
  CipherSpec cipher = {};
  const HashAlg* hash = nullptr;
  uint64_t iter_time_ms = 2000;  // for a passphrase
};
// Bytes in front of the payload.
uint64_t HeaderBytes(const CipherSpec& cipher);
// Fiber: writes a header of HeaderBytes with `passphrase` in key slot 0; the rest of the slots'
// areas is left as it is. Answers the key.
Result<SecretBytes> Format(const Area& area, const CreateOptions& options,
                           std::string_view passphrase, Header& header);
// Fiber: the volume's key in an inactive slot.
Result<> AddKey(const Area& area, Header& header, uint32_t slot, std::span<const uint8_t> key,
                std::string_view passphrase, uint64_t iter_time_ms);
// Fiber: its passphrase opens the volume no more, and its area is overwritten.
Result<> EraseKey(const Area& area, Header& header, uint32_t slot);
Result<> WriteLuks1(const Area& area, const Header& header);

// "format-specific" as qemu-img tells it.
InfoValue::Object Describe(const Header& header, bool in_qcow2);

}  // namespace kvartz::block::luks
