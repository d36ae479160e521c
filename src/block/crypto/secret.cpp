#include "block/crypto/secret.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gcrypt.h>
#include <string.h>
#include <unistd.h>

#include "base/base64.h"
#include "base/fd.h"
#include "base/file_error.h"
#include "block/crypto/digest.h"

namespace kvartz::block {
namespace {

constexpr size_t kLargestSecret = 1 << 20;
constexpr size_t kAesBlock = 16, kAesKey = 32;

Result<std::string> ReadFile(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return Fail(OpenFileError("secret", path, errno));
  std::string text(kLargestSecret + 1, '\0');
  size_t size = 0;
  while (size < text.size()) {
    ssize_t got = read(fd.get(), text.data() + size, text.size() - size);
    if (got < 0) return Fail(ErrnoError(errno, fmt::format("cannot read secret '{}'", path)));
    if (got == 0) break;
    size += static_cast<size_t>(got);
  }
  if (size > kLargestSecret)
    return Fail(ErrorCode::kInvalid, fmt::format("secret '{}' has more than 1 MiB", path));
  text.resize(size);
  return text;
}

Result<std::string> FromBase64(const std::string& text, const char* what) {
  std::optional<std::vector<uint8_t>> bytes = DecodeBase64(text);
  if (!bytes) return Fail(ErrorCode::kInvalid, fmt::format("{} isn't base64 text", what));
  return std::string(bytes->begin(), bytes->end());
}

// The padding says how long it is, in each of its bytes.
Result<> TakeOffPadding(std::string& text) {
  size_t padding = text.empty() ? 0 : static_cast<uint8_t>(text.back());
  if (padding == 0 || padding > kAesBlock || padding > text.size() ||
      text.find_first_not_of(text.back(), text.size() - padding) != std::string::npos) {
    return Fail(ErrorCode::kInvalid, "it can't be decrypted: the key or the iv is wrong");
  }
  text.resize(text.size() - padding);
  return {};
}

}  // namespace

SecretStore::~SecretStore() {
  for (auto& [id, secret] : secrets_) explicit_bzero(secret.data(), secret.size());
}

Result<std::string> SecretStore::Find(const std::string& id) const {
  auto it = secrets_.find(id);
  if (it != secrets_.end()) return it->second;
  return Fail(
      ErrorCode::kNotFound,
      fmt::format("there is no secret '{0}': give it with --object secret,id={0},file=...", id));
}

Result<> SecretStore::Remove(const std::string& id) {
  auto it = secrets_.find(id);
  if (it == secrets_.end())
    return Fail(ErrorCode::kNotFound, fmt::format("there is no secret '{}'", id));
  explicit_bzero(it->second.data(), it->second.size());
  secrets_.erase(it);
  return {};
}

Result<std::string> SecretStore::Decrypt(const std::string& key_id, const std::string& iv_text,
                                         const std::string& data) const {
  std::string key_text = TRY(Find(key_id));
  std::string key = TRY(FromBase64(key_text, "the key in it"));
  std::string iv = TRY(FromBase64(iv_text, "iv"));
  if (key.size() != kAesKey)
    return Fail(ErrorCode::kInvalid,
                fmt::format("keyid={}: the key has {} bytes, not {}", key_id, key.size(), kAesKey));
  if (iv.size() != kAesBlock)
    return Fail(ErrorCode::kInvalid, fmt::format("iv has {} bytes, not {}", iv.size(), kAesBlock));
  if (data.empty() || data.size() % kAesBlock != 0)
    return Fail(ErrorCode::kInvalid, "what is encrypted isn't whole blocks of 16 bytes");
  InitCrypto();
  gcry_cipher_hd_t cipher = nullptr;
  std::string text(data.size(), '\0');
  gcry_error_t error = gcry_cipher_open(&cipher, GCRY_CIPHER_AES256, GCRY_CIPHER_MODE_CBC, 0);
  if (!error) error = gcry_cipher_setkey(cipher, key.data(), key.size());
  if (!error) error = gcry_cipher_setiv(cipher, iv.data(), iv.size());
  if (!error)
    error = gcry_cipher_decrypt(cipher, text.data(), text.size(), data.data(), data.size());
  if (cipher) gcry_cipher_close(cipher);
  if (error) return Fail(ErrorCode::kUnsupported, gcry_strerror(error));
  TRY(TakeOffPadding(text));
  return text;
}

Result<std::string> SecretStore::Read(Options& options) const {
  std::optional<std::string> data = options.Take("data"), file = options.Take("file");
  std::optional<std::string> key_id = options.Take("keyid"), iv = options.Take("iv");
  std::string format = options.Take("format", "raw");
  TRY(options.RefuseRest("secret", {"id", "data", "file", "format", "keyid", "iv"}));
  if (data.has_value() == file.has_value())
    return Fail(ErrorCode::kInvalid, "either data= or file= must be given");
  if (key_id.has_value() != iv.has_value())
    return Fail(ErrorCode::kInvalid, "keyid= and iv= go together");
  if (format != "raw" && format != "base64")
    return Fail(ErrorCode::kInvalid, fmt::format("format={}: it is raw or base64", format));
  std::string text = data ? std::move(*data) : TRY(ReadFile(*file));
  if (format == "base64") text = TRY(FromBase64(text, "the secret"));
  return key_id ? Decrypt(*key_id, *iv, text) : text;
}

Result<> SecretStore::Add(Options options) {
  std::string id = options.Take("id", "");
  if (id.empty()) return Fail(ErrorCode::kInvalid, "secret: id= is missing");
  if (secrets_.contains(id))
    return Fail(ErrorCode::kExists, fmt::format("secret: there are two with id={}", id));
  Result<std::string> secret = Read(options);
  if (!secret) return Fail(std::move(secret).error().In("secret,id=" + id));
  secrets_[id] = std::move(*secret);
  return {};
}

}  // namespace kvartz::block
