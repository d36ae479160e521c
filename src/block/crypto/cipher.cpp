#include "block/crypto/cipher.h"

#include <fmt/format.h>
#include <gcrypt.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/sync.h"

namespace kvartz::block {
namespace {

constexpr uint32_t kSector = 512;
constexpr size_t kMaxBlock = 16;

// What the library calls a cipher with keys of so many bytes.
struct CipherRow {
  CipherFamily family;
  uint32_t key_bytes;
  int id;
};
constexpr CipherRow kCiphers[] = {
    {CipherFamily::kAes, 16, GCRY_CIPHER_AES128},
    {CipherFamily::kAes, 24, GCRY_CIPHER_AES192},
    {CipherFamily::kAes, 32, GCRY_CIPHER_AES256},
    {CipherFamily::kSerpent, 16, GCRY_CIPHER_SERPENT128},
    {CipherFamily::kSerpent, 24, GCRY_CIPHER_SERPENT192},
    {CipherFamily::kSerpent, 32, GCRY_CIPHER_SERPENT256},
    {CipherFamily::kTwofish, 16, GCRY_CIPHER_TWOFISH128},
    {CipherFamily::kTwofish, 32, GCRY_CIPHER_TWOFISH},
    {CipherFamily::kCast5, 16, GCRY_CIPHER_CAST5},
};

const CipherRow* FindRow(CipherFamily family, uint32_t key_bytes) {
  for (const CipherRow& row : kCiphers) {
    if (row.family == family && row.key_bytes == key_bytes) return &row;
  }
  return nullptr;
}

int LibraryMode(CipherMode mode) {
  switch (mode) {
    case CipherMode::kXts:
      return GCRY_CIPHER_MODE_XTS;
    case CipherMode::kCbc:
      return GCRY_CIPHER_MODE_CBC;
    case CipherMode::kCtr:
      return GCRY_CIPHER_MODE_CTR;
    case CipherMode::kEcb:
      break;
  }
  return GCRY_CIPHER_MODE_ECB;
}

template <typename Enum, size_t kCount>
bool FromName(std::string_view name, const std::array<Enum, kCount>& all, Enum& value) {
  auto found = std::find_if(all.begin(), all.end(), [&](Enum one) { return NameOf(one) == name; });
  if (found == all.end()) return false;
  value = *found;
  return true;
}

constexpr std::array kFamilies = {CipherFamily::kAes, CipherFamily::kSerpent,
                                  CipherFamily::kTwofish, CipherFamily::kCast5};
constexpr std::array kModes = {CipherMode::kXts, CipherMode::kCbc, CipherMode::kCtr,
                               CipherMode::kEcb};
constexpr std::array kGenerators = {IvGenerator::kNone, IvGenerator::kPlain, IvGenerator::kPlain64,
                                    IvGenerator::kPlain64Be, IvGenerator::kEssiv};

std::unexpected<Error> Unknown(const char* what, std::string_view name) {
  return Fail(ErrorCode::kUnsupported, fmt::format("{} '{}' is not known here", what, name));
}

// Of one of XTS's two.
uint32_t KeyBytes(const CipherSpec& spec) {
  return spec.mode == CipherMode::kXts ? spec.key_bytes / 2 : spec.key_bytes;
}

Result<CipherSpec> Checked(const CipherSpec& spec) {
  auto bad = [&](const char* what) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("cipher {}-{} with a key of {} bits: {}", spec.name(), spec.mode_name(),
                            spec.key_bytes * 8, what));
  };
  const CipherRow* row = FindRow(spec.family, KeyBytes(spec));
  if (!row || (spec.mode == CipherMode::kXts && spec.key_bytes % 2 != 0))
    return bad("the cipher takes no such key");
  InitCrypto();
  if (gcry_cipher_test_algo(row->id)) return bad("the library has no such cipher");
  if (spec.mode == CipherMode::kXts && gcry_cipher_get_algo_blklen(row->id) != kMaxBlock)
    return bad("XTS needs blocks of 128 bits");
  if (spec.mode == CipherMode::kXts && spec.key_bytes == 48)
    return bad("the library has no such cipher");
  if ((spec.mode == CipherMode::kEcb) != (spec.iv == IvGenerator::kNone))
    return bad("mode and initial vector don't go together");
  if (spec.iv == IvGenerator::kEssiv &&
      !FindRow(spec.family, static_cast<uint32_t>(spec.iv_hash->bytes)))
    return bad("the hash is no key for the cipher");
  return spec;
}

using Cipher = gcry_cipher_hd_t;

Result<Cipher> OpenCipher(int id, CipherMode mode, std::span<const uint8_t> key) {
  Cipher cipher = nullptr;
  gcry_error_t error = gcry_cipher_open(&cipher, id, LibraryMode(mode), 0);
  if (!error) {
    error = gcry_cipher_setkey(cipher, key.data(), key.size());
    // DES and such alone have weak keys; a mode that minds does so for FIPS.
    if (gcry_err_code(error) == GPG_ERR_WEAK_KEY) error = 0;
  }
  if (!error) return cipher;
  if (cipher) gcry_cipher_close(cipher);
  return Fail(ErrorCode::kUnsupported,
              fmt::format("cannot use the cipher: {}", gcry_strerror(error)));
}

}  // namespace

std::string_view NameOf(CipherFamily family) {
  switch (family) {
    case CipherFamily::kAes:
      return "aes";
    case CipherFamily::kSerpent:
      return "serpent";
    case CipherFamily::kTwofish:
      return "twofish";
    case CipherFamily::kCast5:
      break;
  }
  return "cast5";
}

std::string_view NameOf(CipherMode mode) {
  switch (mode) {
    case CipherMode::kXts:
      return "xts";
    case CipherMode::kCbc:
      return "cbc";
    case CipherMode::kCtr:
      return "ctr";
    case CipherMode::kEcb:
      break;
  }
  return "ecb";
}

std::string_view NameOf(IvGenerator generator) {
  switch (generator) {
    case IvGenerator::kNone:
      return "";
    case IvGenerator::kPlain:
      return "plain";
    case IvGenerator::kPlain64:
      return "plain64";
    case IvGenerator::kPlain64Be:
      return "plain64be";
    case IvGenerator::kEssiv:
      break;
  }
  return "essiv";
}

std::string CipherSpec::mode_name() const {
  std::string text(NameOf(mode));
  if (iv != IvGenerator::kNone) text += fmt::format("-{}", NameOf(iv));
  if (iv_hash) text += fmt::format(":{}", iv_hash->name);
  return text;
}

std::string CipherSpec::alg_name() const {
  return fmt::format("{}-{}", NameOf(family), KeyBytes(*this) * 8);
}

Result<CipherSpec> ParseCipher(std::string_view name, std::string_view mode, uint32_t key_bytes) {
  CipherSpec spec;
  spec.key_bytes = key_bytes;
  if (!FromName(name, kFamilies, spec.family)) return Unknown("cipher", name);
  size_t dash = mode.find('-');
  if (!FromName(mode.substr(0, dash), kModes, spec.mode)) return Unknown("cipher mode", mode);
  std::string_view iv = dash == std::string_view::npos ? "" : mode.substr(dash + 1);
  size_t colon = iv.find(':');
  if (!FromName(iv.substr(0, colon), kGenerators, spec.iv)) return Unknown("cipher mode", mode);
  if ((spec.iv == IvGenerator::kEssiv) != (colon != std::string_view::npos))
    return Unknown("cipher mode", mode);
  if (colon != std::string_view::npos) spec.iv_hash = TRY(RequireHash(iv.substr(colon + 1)));
  return Checked(spec);
}

Result<CipherSpec> CipherOfOptions(std::string_view alg, std::string_view mode,
                                   std::string_view ivgen, std::string_view ivgen_hash) {
  if (alg.empty()) alg = "aes-256";
  if (mode.empty()) mode = "xts";
  CipherSpec spec;
  size_t dash = alg.find('-');
  uint32_t bits = 0;
  for (uint32_t known : {128, 192, 256}) {
    if (dash != std::string_view::npos && alg.substr(dash + 1) == std::to_string(known))
      bits = known;
  }
  if (bits == 0 || !FromName(alg.substr(0, dash), kFamilies, spec.family))
    return Unknown("cipher-alg", alg);
  if (!FromName(mode, kModes, spec.mode)) return Unknown("cipher-mode", mode);
  spec.key_bytes = bits / 8 * (spec.mode == CipherMode::kXts ? 2 : 1);
  if (spec.mode == CipherMode::kEcb) spec.iv = IvGenerator::kNone;
  if (!ivgen.empty() && !FromName(ivgen, kGenerators, spec.iv)) return Unknown("ivgen-alg", ivgen);
  if (spec.iv == IvGenerator::kEssiv)
    spec.iv_hash = TRY(RequireHash(ivgen_hash.empty() ? "sha256" : ivgen_hash));
  return Checked(spec);
}

// Handles of the library keep a request's state, so each thread at work takes one of its own.
struct SectorCipher::State {
  CipherSpec spec;
  int id = 0;
  size_t block = kMaxBlock;
  SecretBytes key;
  int essiv_id = 0;
  SecretBytes essiv_key;
  struct Handles {
    Cipher data = nullptr;
    Cipher essiv = nullptr;
  };
  mutable Guarded<std::vector<Handles>> idle;

  Result<Handles> Open() const {
    Handles handles;
    handles.data = TRY(OpenCipher(id, spec.mode, key));
    if (spec.iv != IvGenerator::kEssiv) return handles;
    Result<Cipher> essiv = OpenCipher(essiv_id, CipherMode::kEcb, essiv_key);
    if (!essiv) {
      gcry_cipher_close(handles.data);
      return std::unexpected(essiv.error());
    }
    handles.essiv = *essiv;
    return handles;
  }
  Handles Take() const {
    {
      auto list = idle.Lock();
      if (!list->empty()) {
        Handles handles = list->back();
        list->pop_back();
        return handles;
      }
    }
    Result<Handles> handles = Open();
    VERIFY(handles);  // it worked when the cipher was made
    return *handles;
  }
  void GiveBack(Handles handles) const { idle.Lock()->push_back(handles); }
};

SectorCipher::SectorCipher(std::unique_ptr<State> state) : state_(std::move(state)) {}

SectorCipher::~SectorCipher() {
  for (const State::Handles& handles : *state_->idle.Lock()) {
    gcry_cipher_close(handles.data);
    if (handles.essiv) gcry_cipher_close(handles.essiv);
  }
}

Result<std::shared_ptr<const SectorCipher>> SectorCipher::Create(const CipherSpec& spec,
                                                                 std::span<const uint8_t> key) {
  VERIFY(key.size() == spec.key_bytes);
  auto state = std::make_unique<State>();
  state->spec = TRY(Checked(spec));
  state->id = FindRow(spec.family, KeyBytes(spec))->id;
  state->block = gcry_cipher_get_algo_blklen(state->id);
  state->key.assign(key.begin(), key.end());
  if (spec.iv == IvGenerator::kEssiv) {
    state->essiv_key.resize(spec.iv_hash->bytes);
    HashBytes(*spec.iv_hash, key, state->essiv_key);
    state->essiv_id = FindRow(spec.family, static_cast<uint32_t>(spec.iv_hash->bytes))->id;
  }
  State::Handles first = TRY(state->Open());
  state->GiveBack(first);
  return std::shared_ptr<const SectorCipher>(new SectorCipher(std::move(state)));
}

template <typename Step>
void SectorCipher::Each(uint64_t sector, uint32_t sector_bytes, std::span<uint8_t> data,
                        Step step) const {
  VERIFY(data.size() % sector_bytes == 0 && sector_bytes % kSector == 0);
  const State& state = *state_;
  State::Handles handles = state.Take();
  for (; !data.empty(); data = data.subspan(sector_bytes), sector += sector_bytes / kSector) {
    uint8_t iv[kMaxBlock] = {};
    uint64_t number = state.spec.iv == IvGenerator::kPlain ? sector & UINT32_MAX : sector;
    if (state.spec.iv == IvGenerator::kPlain64Be) {
      number = __builtin_bswap64(number);
      std::memcpy(iv + state.block - sizeof(number), &number, sizeof(number));
    } else {
      std::memcpy(iv, &number, sizeof(number));
    }
    if (handles.essiv) VERIFY(gcry_cipher_encrypt(handles.essiv, iv, state.block, nullptr, 0) == 0);
    if (state.spec.mode == CipherMode::kCtr) {
      VERIFY(gcry_cipher_setctr(handles.data, iv, state.block) == 0);
    } else if (state.spec.iv != IvGenerator::kNone) {
      VERIFY(gcry_cipher_setiv(handles.data, iv, state.block) == 0);
    }
    VERIFY(step(handles.data, data.data(), sector_bytes, nullptr, 0) == 0);
  }
  state.GiveBack(handles);
}

void SectorCipher::Encrypt(uint64_t sector, uint32_t sector_bytes, std::span<uint8_t> data) const {
  Each(sector, sector_bytes, data, gcry_cipher_encrypt);
}

void SectorCipher::Decrypt(uint64_t sector, uint32_t sector_bytes, std::span<uint8_t> data) const {
  Each(sector, sector_bytes, data, gcry_cipher_decrypt);
}

}  // namespace kvartz::block
