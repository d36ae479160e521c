// Secrets as objects: --object secret,id=ID,data=TEXT|file=FILE[,format=raw|base64][,keyid=,iv=].
#pragma once

#include <map>
#include <string>

#include "base/result.h"
#include "block/options.h"

namespace kvartz::block {

// Loop-owned. Wiped when it goes.
class SecretStore {
 public:
  SecretStore() = default;
  ~SecretStore();
  SecretStore(const SecretStore&) = delete;
  SecretStore& operator=(const SecretStore&) = delete;

  // `options`: without the type; takes them all. With "keyid" the data are encrypted by AES-256 in
  // CBC mode (padding as PKCS#7), with the key in that secret and "iv" (base64). Errors: a mistake
  // in them, a file that can't be read, an id that is taken.
  Result<> Add(Options options);
  Result<> Remove(const std::string& id);
  Result<std::string> Find(const std::string& id) const;

 private:
  Result<std::string> Read(Options& options) const;
  Result<std::string> Decrypt(const std::string& key_id, const std::string& iv,
                              const std::string& data) const;
  std::map<std::string, std::string> secrets_;
};

}  // namespace kvartz::block
