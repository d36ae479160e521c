// Encryption of disks sector by sector: ciphers, modes and how a sector's initial vector is made,
// as dm-crypt and QEMU name them ("aes-xts-plain64", "aes-cbc-essiv:sha256").
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/result.h"
#include "block/crypto/digest.h"

namespace kvartz::block {

enum class CipherFamily : uint8_t { kAes, kSerpent, kTwofish, kCast5 };
enum class CipherMode : uint8_t { kXts, kCbc, kCtr, kEcb };
enum class IvGenerator : uint8_t {
  kNone,       // ECB has no initial vector
  kPlain,      // the sector's number, 32 bits, little-endian
  kPlain64,    // 64 bits
  kPlain64Be,  // big-endian, at the end
  kEssiv,      // kPlain64 encrypted by the key's hash
};

std::string_view NameOf(CipherFamily family);    // "aes"
std::string_view NameOf(CipherMode mode);        // "xts"
std::string_view NameOf(IvGenerator generator);  // "plain64"

struct CipherSpec {
  CipherFamily family = CipherFamily::kAes;
  CipherMode mode = CipherMode::kXts;
  IvGenerator iv = IvGenerator::kPlain64;
  const HashAlg* iv_hash = nullptr;  // kEssiv
  uint32_t key_bytes = 64;           // of the whole key: XTS takes two

  std::string name() const { return std::string(NameOf(family)); }
  std::string mode_name() const;  // "xts-plain64", "cbc-essiv:sha256"
  std::string alg_name() const;   // "aes-256": by the bits of one key
};

// As LUKS stores it. Errors: not known here, or a key that the cipher doesn't take.
Result<CipherSpec> ParseCipher(std::string_view name, std::string_view mode, uint32_t key_bytes);
// QEMU's options: "aes-256", "xts", "plain64", "sha256". Empty: the default.
Result<CipherSpec> CipherOfOptions(std::string_view alg, std::string_view mode,
                                   std::string_view ivgen, std::string_view ivgen_hash);

// Immutable; any thread.
class SectorCipher {
 public:
  // `key`: spec.key_bytes long.
  static Result<std::shared_ptr<const SectorCipher>> Create(const CipherSpec& spec,
                                                            std::span<const uint8_t> key);
  ~SectorCipher();
  SectorCipher(const SectorCipher&) = delete;
  SectorCipher& operator=(const SectorCipher&) = delete;

  // In place: whole sectors of `sector_bytes`; `sector` is the first one's number in units of 512
  // bytes, whatever they have.
  void Encrypt(uint64_t sector, uint32_t sector_bytes, std::span<uint8_t> data) const;
  void Decrypt(uint64_t sector, uint32_t sector_bytes, std::span<uint8_t> data) const;

 private:
  struct State;
  explicit SectorCipher(std::unique_ptr<State> state);
  template <typename Step>
  void Each(uint64_t sector, uint32_t sector_bytes, std::span<uint8_t> data, Step step) const;
  const std::unique_ptr<State> state_;
};

}  // namespace kvartz::block
