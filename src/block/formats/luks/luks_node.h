// Format luks as a node.
#pragma once

#include "block/crypto/crypt_node.h"
#include "block/driver.h"
#include "block/formats/luks/volume.h"

namespace kvartz::block::luks {

// Key slots are changed where the image is open, by options of amend.
struct KeyRing {
  Area area;
  Header* header = nullptr;
  std::span<const uint8_t> key = {};  // empty: not known
  std::function<Result<std::string>(const std::string& id)> secret = {};
};
// Fiber. Takes "state", "new-secret", "old-secret", "keyslot", "iter-time". `force`: also what
// makes the volume unreadable.
Result<> AmendKeys(const KeyRing& ring, Options& options, bool force);

// Takes "cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "iter-time".
Result<CreateOptions> TakeCreateOptions(Options& options);
// Takes "key-secret"; the secret's contents. Errors name the option with `prefix` before it.
Result<std::string> TakePassphrase(
    const std::function<Result<std::string>(const std::string& id)>& secret, Options& options,
    const char* prefix);

// Rows for create and amend, as in formats' tables; `kPrefix` for qcow2's.
#define KVARTZ_LUKS_CREATE_OPTIONS(prefix)                                                      \
  {prefix "cipher-alg", OptionRow::Type::kString, "Name of encryption cipher algorithm"},       \
      {prefix "cipher-mode", OptionRow::Type::kString, "Name of encryption cipher mode"},       \
      {prefix "hash-alg", OptionRow::Type::kString, "Name of encryption hash algorithm"},       \
      {prefix "iter-time", OptionRow::Type::kNumber, "Time to spend in PBKDF in milliseconds"}, \
      {prefix "ivgen-alg", OptionRow::Type::kString, "Name of IV generator algorithm"},         \
      {prefix "ivgen-hash-alg", OptionRow::Type::kString, "Name of IV generator hash algorithm"}
#define KVARTZ_LUKS_AMEND_OPTIONS(prefix)                                                   \
  {prefix "iter-time", OptionRow::Type::kNumber, "Time to spend in PBKDF in milliseconds"}, \
      {prefix "keyslot", OptionRow::Type::kNumber,                                          \
       "Select a single keyslot to modify explicitly"},                                     \
      {prefix "new-secret", OptionRow::Type::kString, "New secret to set in the keyslot"},  \
      {prefix "old-secret", OptionRow::Type::kString,                                       \
       "Select all keyslots that match this password"},                                     \
      {prefix "state", OptionRow::Type::kString,                                            \
       "Select new state of affected keyslots (active/inactive)"}

}  // namespace kvartz::block::luks
