#include "block/crypto/digest.h"

#include <fmt/format.h>
#include <gcrypt.h>
#include <sys/random.h>
#include <time.h>

#include <algorithm>
#include <cerrno>

#include "base/check.h"

namespace kvartz::block {
namespace {

constexpr HashAlg kHashes[] = {
    {"md5", GCRY_MD_MD5, 16},
    {"sha1", GCRY_MD_SHA1, 20},
    {"sha224", GCRY_MD_SHA224, 28},
    {"sha256", GCRY_MD_SHA256, 32},
    {"sha384", GCRY_MD_SHA384, 48},
    {"sha512", GCRY_MD_SHA512, 64},
    {"ripemd160", GCRY_MD_RMD160, 20},
    {"whirlpool", GCRY_MD_WHIRLPOOL, 64},
    {"sha3-256", GCRY_MD_SHA3_256, 32},
    {"sha3-512", GCRY_MD_SHA3_512, 64},
    {"blake2b-512", GCRY_MD_BLAKE2B_512, 64},
    {"blake2s-256", GCRY_MD_BLAKE2S_256, 32},
};

Error LibraryError(const char* what, gcry_error_t error) {
  return {ErrorCode::kUnsupported, fmt::format("{}: {}", what, gcry_strerror(error))};
}

int64_t CpuTimeNs() {
  timespec now;
  VERIFY(clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) == 0);
  return now.tv_sec * int64_t{1'000'000'000} + now.tv_nsec;
}

}  // namespace

void InitCrypto() {
  static const bool done = [] {
    VERIFY(gcry_check_version(GCRYPT_VERSION) != nullptr);
    // Memory that can't be swapped is small and locked for all; ours is wiped instead.
    if (!gcry_control(GCRYCTL_INITIALIZATION_FINISHED_P)) {
      gcry_control(GCRYCTL_DISABLE_SECMEM, 0);
      gcry_control(GCRYCTL_INITIALIZATION_FINISHED, 0);
    }
    return true;
  }();
  (void)done;
}

const HashAlg* FindHash(std::string_view name) {
  for (const HashAlg& hash : kHashes) {
    if (hash.name == name) return &hash;
  }
  return nullptr;
}

Result<const HashAlg*> RequireHash(std::string_view name) {
  if (const HashAlg* hash = FindHash(name)) return hash;
  std::string known;
  for (const HashAlg& hash : kHashes)
    known += fmt::format("{}{}", known.empty() ? "" : ", ", hash.name);
  return Fail(ErrorCode::kUnsupported,
              fmt::format("hash '{}' is not known here ({})", name, known));
}

void HashBytes(const HashAlg& hash, std::span<const uint8_t> bytes, std::span<uint8_t> out) {
  HashBytes(hash, bytes, {}, out);
}

void HashBytes(const HashAlg& hash, std::span<const uint8_t> first, std::span<const uint8_t> second,
               std::span<uint8_t> out) {
  InitCrypto();
  VERIFY(out.size() == hash.bytes);
  gcry_buffer_t parts[2] = {};
  parts[0].data = const_cast<uint8_t*>(first.data());
  parts[0].len = first.size();
  parts[1].data = const_cast<uint8_t*>(second.data());
  parts[1].len = second.size();
  VERIFY(gcry_md_hash_buffers(hash.id, 0, out.data(), parts, second.empty() ? 1 : 2) == 0);
}

void RandomBytes(std::span<uint8_t> out) {
  while (!out.empty()) {
    ssize_t got = getrandom(out.data(), out.size(), 0);
    VERIFY(got > 0 || errno == EINTR);
    if (got > 0) out = out.subspan(static_cast<size_t>(got));
  }
}

Result<> DerivePbkdf2(const HashAlg& hash, std::span<const uint8_t> passphrase,
                      std::span<const uint8_t> salt, uint64_t iterations, std::span<uint8_t> out) {
  InitCrypto();
  gcry_error_t error =
      gcry_kdf_derive(passphrase.data(), passphrase.size(), GCRY_KDF_PBKDF2, hash.id, salt.data(),
                      salt.size(), iterations, out.size(), out.data());
  if (error) return Fail(LibraryError("cannot derive a key from the passphrase", error));
  return {};
}

Result<uint64_t> MeasurePbkdf2(const HashAlg& hash, size_t bytes) {
  constexpr int64_t kLongEnough = 100'000'000;  // ns
  const uint8_t passphrase[8] = {}, salt[32] = {};
  SecretBytes out(bytes);
  for (uint64_t iterations = 1 << 12;; iterations *= 2) {
    int64_t start = CpuTimeNs();
    TRY(DerivePbkdf2(hash, passphrase, salt, iterations, out));
    int64_t taken = CpuTimeNs() - start;
    if (taken < kLongEnough && iterations < (1u << 30)) continue;
    return static_cast<uint64_t>(static_cast<double>(iterations) * 1e9 /
                                 static_cast<double>(taken));
  }
}

Result<> DeriveArgon2(const Argon2Cost& cost, std::span<const uint8_t> passphrase,
                      std::span<const uint8_t> salt, std::span<uint8_t> out) {
  InitCrypto();
  const unsigned long parameters[4] = {out.size(), cost.passes, cost.memory_kib, cost.lanes};
  gcry_kdf_hd_t kdf = nullptr;
  gcry_error_t error = gcry_kdf_open(
      &kdf, GCRY_KDF_ARGON2, cost.id ? GCRY_KDF_ARGON2ID : GCRY_KDF_ARGON2I, parameters, 4,
      passphrase.data(), passphrase.size(), salt.data(), salt.size(), nullptr, 0, nullptr, 0);
  if (!error) error = gcry_kdf_compute(kdf, nullptr);
  if (!error) error = gcry_kdf_final(kdf, out.size(), out.data());
  if (kdf) gcry_kdf_close(kdf);
  if (error) return Fail(LibraryError("cannot derive a key from the passphrase", error));
  return {};
}

bool SameBytes(std::span<const uint8_t> a, std::span<const uint8_t> b) {
  if (a.size() != b.size()) return false;
  uint8_t difference = 0;
  for (size_t i = 0; i < a.size(); i++) difference |= a[i] ^ b[i];
  return difference == 0;
}

}  // namespace kvartz::block
