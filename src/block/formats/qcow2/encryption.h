// Encrypted qcow2 images: LUKS, whose header is in clusters of the image, and (read only) the old
// AES method. Spec: qcow2.txt, "Full disk encryption header pointer" and "Data encryption".
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "block/crypto/cipher.h"
#include "block/driver.h"
#include "block/formats/luks/volume.h"
#include "block/formats/qcow2/layout.h"

namespace kvartz::block::qcow2 {

class Qcow2Node;

// Loop-owned by its image. What is encrypted are the clusters of the disk (and VM state), by their
// place in the file; tables, bitmaps and compressed clusters aren't.
struct Encryption {
  Crypt method = Crypt::kNone;
  std::shared_ptr<const SectorCipher> cipher;  // null: the key isn't known
  // kLuks:
  luks::Header header = {};
  uint64_t offset = 0, bytes = 0;  // of the LUKS header, in the file
  SecretBytes key = {};
  std::function<Result<std::string>(const std::string& id)> secret = {};

  InfoValue::Object Describe() const;
  // Fiber. Key slots; takes the options below "encrypt.".
  Result<> Amend(Node& file, Options& options, bool force);
};

// Fiber. Takes the options below "encrypt."; null: the image isn't encrypted. Without key-secret
// there is no cipher, where `node` says that none is needed. Errors: a passphrase is missing, or
// wrong; a broken header.
Result<std::unique_ptr<Encryption>> OpenEncryption(const OpenEnv& env, const Header& header,
                                                   const NodeOptions& node, Options& options,
                                                   Node& file);

struct NewEncryption {
  luks::CreateOptions options;
  std::string passphrase;
  std::function<Result<std::string>(const std::string& id)> secret;
};
// Takes create's options below "encrypt."; nothing: none is wanted.
Result<std::optional<NewEncryption>> TakeNewEncryption(const OpenEnv& env, Options& options);
// Bytes of the LUKS header that they ask for; 0: none.
Result<uint64_t> MeasureEncryption(Options& options);
// Fiber. Of an image that is new and empty.
Result<> Encrypt(Qcow2Node& image, NewEncryption& wish);

}  // namespace kvartz::block::qcow2
