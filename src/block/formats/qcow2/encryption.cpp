#include "block/formats/qcow2/encryption.h"

#include <fmt/format.h>
#include <string.h>

#include <algorithm>

#include "block/fiber_io.h"
#include "block/formats/luks/luks_node.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace kvartz::block::qcow2 {
namespace {

constexpr uint32_t kSector = 512;
constexpr size_t kOldKeyBytes = 16;

// AES-128 in CBC mode; the passphrase, cut or filled up with zeros, is the key.
Result<std::shared_ptr<const SectorCipher>> OldCipher(const std::string& passphrase) {
  CipherSpec spec = {.mode = CipherMode::kCbc, .key_bytes = kOldKeyBytes};
  SecretBytes key(kOldKeyBytes);
  std::copy_n(passphrase.begin(), std::min(passphrase.size(), key.size()), key.begin());
  return SectorCipher::Create(spec, key);
}

Result<> Unlock(Encryption& encryption, const std::string& passphrase, Node& file) {
  if (encryption.method == Crypt::kAes) {
    encryption.cipher = TRY(OldCipher(passphrase));
    return {};
  }
  luks::Area area = {&file, encryption.offset, encryption.bytes};
  luks::Unlocked unlocked = TRY(luks::Unlock(area, encryption.header, passphrase));
  encryption.cipher = TRY(SectorCipher::Create(encryption.header.cipher, unlocked.key));
  encryption.key = std::move(unlocked.key);
  return {};
}

// "luks" of create's or open's "format".
Result<> CheckFormat(const std::string& format, const char* is) {
  if (format == is) return {};
  return Fail(ErrorCode::kInvalid, fmt::format("encrypt.format={}: the image's is {}", format, is));
}

}  // namespace

InfoValue::Object Encryption::Describe() const {
  if (method == Crypt::kLuks) return luks::Describe(header, true);
  return {{"format", {std::string("aes")}}};
}

Result<> Encryption::Amend(Node& file, Options& options, bool force) {
  if (method != Crypt::kLuks)
    return Fail(ErrorCode::kUnsupported, "the old AES method has no key slots");
  luks::KeyRing ring = {{&file, offset, bytes}, &header, key, secret};
  return luks::AmendKeys(ring, options, force);
}

Result<std::unique_ptr<Encryption>> OpenEncryption(const OpenEnv& env, const Header& header,
                                                   const NodeOptions& node, Options& options,
                                                   Node& file) {
  Options below = options.TakeBelow("encrypt");
  auto in_image = [&](Error error) {
    return Fail(std::move(error).In(fmt::format("'{}'", file.name())));
  };
  if (header.crypt == Crypt::kNone) {
    if (below.empty()) return nullptr;
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}' isn't encrypted, but 'encrypt' is given", file.name()));
  }
  auto encryption = std::make_unique<Encryption>();
  encryption->method = header.crypt;
  encryption->secret = env.secret;
  const char* format = header.crypt == Crypt::kLuks ? "luks" : "aes";
  TRY(CheckFormat(below.Take("format", format), format));
  if (header.crypt == Crypt::kLuks) {
    encryption->offset = header.crypto_offset;
    encryption->bytes = header.crypto_bytes;
    Result<luks::Header> read =
        luks::ReadHeader({&file, header.crypto_offset, header.crypto_bytes});
    if (!read) return in_image(std::move(read).error());
    encryption->header = std::move(*read);
    if (encryption->header.version != 1 || encryption->header.sector_bytes != kSector)
      return in_image({ErrorCode::kUnsupported, "not supported yet: LUKS2 within qcow2"});
  }
  bool key_needed = !node.no_io && !node.for_check;
  if (key_needed || below.Has("key-secret")) {
    std::string passphrase = TRY(luks::TakePassphrase(env.secret, below, "encrypt."));
    Result<> unlocked = Unlock(*encryption, passphrase, file);
    explicit_bzero(passphrase.data(), passphrase.size());
    if (!unlocked) return in_image(std::move(unlocked).error());
  }
  TRY(below.RefuseRest("encrypt", {"format", "key-secret"}));
  return encryption;
}

// The option's value; empty: no encryption.
static Result<std::string> TakeFormat(Options& options) {
  if (TRY(options.TakeBool("encryption", false)))
    return Fail(ErrorCode::kUnsupported,
                "encryption=on is the old AES method: say encrypt.format=luks");
  std::string format = options.Take("encrypt.format", "");
  if (format == "aes") {
    return Fail(ErrorCode::kUnsupported,
                "encrypt.format=aes isn't safe, and is only read here: say encrypt.format=luks");
  }
  if (!format.empty() && format != "luks")
    return Fail(ErrorCode::kInvalid, fmt::format("encrypt.format={}: it is luks", format));
  if (format.empty() && options.HasBelow("encrypt"))
    return Fail(ErrorCode::kInvalid, "options of 'encrypt' are given, but encrypt.format isn't");
  return format;
}

Result<std::optional<NewEncryption>> TakeNewEncryption(const OpenEnv& env, Options& options) {
  std::string format = TRY(TakeFormat(options));
  if (format.empty()) return std::nullopt;
  Options below = options.TakeBelow("encrypt");
  NewEncryption wish;
  wish.options = TRY(luks::TakeCreateOptions(below));
  wish.passphrase = TRY(luks::TakePassphrase(env.secret, below, "encrypt."));
  wish.secret = env.secret;
  TRY(below.RefuseRest("encrypt"));
  return wish;
}

Result<uint64_t> MeasureEncryption(Options& options) {
  std::string format = TRY(TakeFormat(options));
  if (format.empty()) return 0;
  Options below = options.TakeBelow("encrypt");
  below.Take("key-secret");
  luks::CreateOptions create = TRY(luks::TakeCreateOptions(below));
  TRY(below.RefuseRest("encrypt"));
  return luks::HeaderBytes(create.cipher);
}

Result<> Encrypt(Qcow2Node& image, NewEncryption& wish) {
  Metadata& meta = image.metadata();
  Node& file = *image.file();
  auto encryption = std::make_unique<Encryption>();
  encryption->method = Crypt::kLuks;
  encryption->secret = wish.secret;
  encryption->bytes = luks::HeaderBytes(wish.options.cipher);
  Run run;
  int rc = meta.AllocateAll(meta.geometry().Clusters(encryption->bytes), &run);
  if (rc == 0) rc = meta.ZeroRun(run);
  if (rc == 0 && file.grows() && file.size_bytes() < run.offset + encryption->bytes)
    TRY(file.Resize({.size = run.offset + (run.clusters << meta.geometry().cluster_bits)}));
  if (rc != 0) return Fail(IoError(file, "write", run.offset, rc));
  encryption->offset = run.offset;
  Result<SecretBytes> key = luks::Format({&file, run.offset, encryption->bytes}, wish.options,
                                         wish.passphrase, encryption->header);
  explicit_bzero(wish.passphrase.data(), wish.passphrase.size());
  if (!key) return std::unexpected(key.error());
  encryption->key = std::move(*key);
  encryption->cipher = TRY(SectorCipher::Create(encryption->header.cipher, encryption->key));
  meta.header.crypt = Crypt::kLuks;
  meta.header.crypto_offset = encryption->offset;
  meta.header.crypto_bytes = encryption->bytes;
  rc = meta.Commit();
  if (rc == 0) rc = meta.WriteHeader();
  if (rc != 0) return Fail(IoError(file, "write", 0, rc));
  image.SetEncryption(std::move(encryption));
  return {};
}

// Whole sectors, each encrypted by its place on the disk.
int Qcow2Node::ReadOldEncryption(uint64_t host, uint64_t offset, uint64_t length, IovCursor to) {
  if (!encryption_->cipher) return -EACCES;
  while (length > 0) {
    uint64_t skip = offset % kSector;
    uint64_t bytes = std::min<uint64_t>(length, (64 << 10) - skip);
    SecretBytes sectors((skip + bytes + kSector - 1) / kSector * kSector);
    Node& node = meta_->data_node();
    if (int rc = data_file_ ? ReadAt(node, host - skip, sectors)
                            : meta_->ReadBytes(host - skip, sectors))
      return rc;
    encryption_->cipher->Decrypt(offset / kSector, kSector, sectors);
    to.CopyIn(std::span<const uint8_t>(sectors).subspan(skip, bytes));
    offset += bytes;
    host += bytes;
    length -= bytes;
  }
  return 0;
}

}  // namespace kvartz::block::qcow2
