// What nodes are opened with: the keys of QEMU's -blockdev, flattened ("file.filename"), values as
// people write them. Each driver takes those that it knows, and what is left is refused by name.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace kvartz::block {

class Node;

// Plain text to values, as in option values and command lines.
Result<bool> ParseBool(const std::string& text);      // on/off, true/false, yes/no, y/n
Result<uint64_t> ParseSize(const std::string& text);  // 512, 0x200, 64k, 1.5G, 1T; bytes
Result<uint64_t> ParseNumber(const std::string& text);

class Options {
 public:
  Options() = default;
  // "file=a.img,size=1G" style lists: key=value, ",," is a comma; a key alone is "on".
  static Result<Options> Parse(std::string_view text);
  // {"driver":"qcow2","file":{...}}
  static Result<Options> ParseJson(std::string_view text);

  void Set(const std::string& key, std::string value) {
    values_[key] = {std::move(value), nullptr};
  }
  // A child that is there already.
  void SetNode(const std::string& key, std::shared_ptr<Node> node) {
    values_[key] = {{}, std::move(node)};
  }
  bool Has(const std::string& key) const { return values_.contains(key); }
  bool HasBelow(const std::string& prefix) const;  // "file": "file.x" or "file" itself
  bool empty() const { return values_.empty(); }

  std::optional<std::string> Take(const std::string& key);
  std::string Take(const std::string& key, const std::string& fallback);
  Result<bool> TakeBool(const std::string& key, bool fallback);
  Result<uint64_t> TakeSize(const std::string& key, uint64_t fallback);
  Result<uint64_t> TakeNumber(const std::string& key, uint64_t fallback);
  std::shared_ptr<Node> TakeNode(const std::string& key);
  // The options below "prefix.", without the prefix.
  Options TakeBelow(const std::string& prefix);
  // Error if any is left: names it, and the nearest of `known` (may be empty).
  Result<> RefuseRest(const std::string& what,
                      const std::vector<std::string_view>& known = {}) const;

  struct Value {
    std::string text;
    std::shared_ptr<Node> node;
  };
  const std::map<std::string, Value>& all() const { return values_; }

 private:
  std::map<std::string, Value> values_;
};

}  // namespace kvartz::block
