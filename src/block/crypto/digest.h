// Hashes, keys from passphrases, and random bytes.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "base/result.h"
#include "block/crypto/secret_bytes.h"

namespace kvartz::block {

// One row a hash. Immutable.
struct HashAlg {
  std::string_view name;  // as cryptsetup and QEMU write it
  int id;                 // the library's
  size_t bytes;           // of a digest
};
constexpr size_t kMaxDigestBytes = 64;

// Null: not known.
const HashAlg* FindHash(std::string_view name);
// Errors: not known; names those that are.
Result<const HashAlg*> RequireHash(std::string_view name);

// `out`: hash.bytes long.
void HashBytes(const HashAlg& hash, std::span<const uint8_t> bytes, std::span<uint8_t> out);
// Of two parts, one after the other.
void HashBytes(const HashAlg& hash, std::span<const uint8_t> first, std::span<const uint8_t> second,
               std::span<uint8_t> out);

// Of the host's generator (getrandom).
void RandomBytes(std::span<uint8_t> out);

// PBKDF2 (RFC 8018) with HMAC of `hash`. Takes long: not on a loop's thread.
Result<> DerivePbkdf2(const HashAlg& hash, std::span<const uint8_t> passphrase,
                      std::span<const uint8_t> salt, uint64_t iterations, std::span<uint8_t> out);
// How many iterations for `bytes` of key this host makes in a second of one CPU's time.
Result<uint64_t> MeasurePbkdf2(const HashAlg& hash, size_t bytes);

// Argon2 (RFC 9106), version 1.3.
struct Argon2Cost {
  bool id = true;  // Argon2id, else Argon2i
  uint32_t passes = 0;
  uint32_t memory_kib = 0;
  uint32_t lanes = 0;
};
Result<> DeriveArgon2(const Argon2Cost& cost, std::span<const uint8_t> passphrase,
                      std::span<const uint8_t> salt, std::span<uint8_t> out);

// Not told from the time that it takes.
bool SameBytes(std::span<const uint8_t> a, std::span<const uint8_t> b);

// Called by all that uses the library; any thread.
void InitCrypto();

}  // namespace kvartz::block
