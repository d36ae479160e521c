#include "block/options.h"

#include <fmt/format.h>

#include <boost/json.hpp>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "base/text.h"
#include "block/node.h"

namespace kvartz::block {
namespace {

constexpr size_t kMaxDepth = 128;  // of JSON: chains are nested

void Flatten(const std::string& key, const boost::json::value& value, Options& options) {
  std::string prefix = key.empty() ? "" : key + ".";
  if (const auto* object = value.if_object()) {
    for (const auto& member : *object)
      Flatten(prefix + std::string(member.key()), member.value(), options);
  } else if (const auto* array = value.if_array()) {
    for (size_t i = 0; i < array->size(); i++)
      Flatten(prefix + std::to_string(i), (*array)[i], options);
  } else if (const auto* text = value.if_string()) {
    options.Set(key, std::string(*text));
  } else if (const bool* flag = value.if_bool()) {
    options.Set(key, *flag ? "on" : "off");
  } else if (value.is_null()) {
    options.Set(key, "");
  } else {
    options.Set(key, boost::json::serialize(value));
  }
}

// Factor of a size's suffix; 0: none of them.
uint64_t SuffixFactor(std::string_view suffix) {
  if (suffix.empty() || suffix == "b" || suffix == "B") return 1;
  constexpr std::string_view kLetters = "KMGTPE";
  char letter = static_cast<char>(suffix[0] & ~0x20);
  size_t power = kLetters.find(letter);
  if (power == std::string_view::npos || suffix.size() > 1) return 0;
  return uint64_t{1} << (10 * (power + 1));
}

}  // namespace

Result<bool> ParseBool(const std::string& text) {
  for (const char* name : {"on", "true", "yes", "y"}) {
    if (text == name) return true;
  }
  for (const char* name : {"off", "false", "no", "n"}) {
    if (text == name) return false;
  }
  return Fail(ErrorCode::kInvalid, fmt::format("'{}' is neither on nor off", text));
}

Result<uint64_t> ParseNumber(const std::string& text) {
  bool hex = text.starts_with("0x") || text.starts_with("0X");
  const char* end = text.data() + text.size();
  uint64_t value = 0;
  auto [at, error] = std::from_chars(text.data() + (hex ? 2 : 0), end, value, hex ? 16 : 10);
  if (error != std::errc() || at != end || text.empty())
    return Fail(ErrorCode::kInvalid, fmt::format("'{}' is no number", text));
  return value;
}

Result<uint64_t> ParseSize(const std::string& text) {
  auto bad = [&] {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("'{}' is no size: write bytes, or a number with k, M, G, T, P or E", text));
  };
  if (text.starts_with("0x") || text.starts_with("0X")) return ParseNumber(text);
  const char* begin = text.data();
  const char* end = begin + text.size();
  uint64_t whole = 0;
  auto [at, error] = std::from_chars(begin, end, whole, 10);
  if (error != std::errc()) return bad();
  double fraction = 0;
  if (at != end && *at == '.') {
    const char* point = at;
    std::string digits = "0.";
    for (at++; at != end && *at >= '0' && *at <= '9'; at++) digits += *at;
    if (at == point + 1 && at == end) return bad();
    fraction = strtod(digits.c_str(), nullptr);
  }
  uint64_t factor = SuffixFactor({at, end});
  if (factor == 0 || (fraction != 0 && factor == 1)) return bad();
  uint64_t value = 0;
  if (__builtin_mul_overflow(whole, factor, &value) ||
      __builtin_add_overflow(
          value, static_cast<uint64_t>(std::llround(fraction * static_cast<double>(factor))),
          &value)) {
    return bad();
  }
  return value;
}

Result<Options> Options::Parse(std::string_view text) {
  Options options;
  size_t at = 0;
  while (at < text.size()) {
    std::string item;
    for (; at < text.size(); at++) {
      if (text[at] == ',') {
        if (at + 1 >= text.size() || text[at + 1] != ',') break;
        at++;
      }
      item += text[at];
    }
    at++;
    size_t equals = item.find('=');
    std::string key = item.substr(0, equals);
    if (key.empty())
      return Fail(ErrorCode::kInvalid, fmt::format("'{}' has an option without a name", text));
    options.Set(key, equals == std::string::npos ? "on" : item.substr(equals + 1));
  }
  return options;
}

Result<Options> Options::ParseJson(std::string_view text) {
  boost::json::error_code error;
  boost::json::parse_options parse;
  parse.max_depth = kMaxDepth;
  boost::json::value value = boost::json::parse(text, error, {}, parse);
  if (error || !value.is_object())
    return Fail(ErrorCode::kInvalid, fmt::format("json:{} is no JSON object", text));
  Options options;
  Flatten("", value, options);
  return options;
}

bool Options::HasBelow(const std::string& prefix) const {
  if (Has(prefix)) return true;
  auto it = values_.lower_bound(prefix + ".");
  return it != values_.end() && it->first.starts_with(prefix + ".");
}

std::optional<std::string> Options::Take(const std::string& key) {
  auto it = values_.find(key);
  if (it == values_.end() || it->second.node) return std::nullopt;
  std::string text = std::move(it->second.text);
  values_.erase(it);
  return text;
}

std::string Options::Take(const std::string& key, const std::string& fallback) {
  return Take(key).value_or(fallback);
}

Result<bool> Options::TakeBool(const std::string& key, bool fallback) {
  std::optional<std::string> text = Take(key);
  if (!text) return fallback;
  Result<bool> value = ParseBool(*text);
  if (!value) return Fail(std::move(value).error().In(key));
  return *value;
}

Result<uint64_t> Options::TakeSize(const std::string& key, uint64_t fallback) {
  std::optional<std::string> text = Take(key);
  if (!text) return fallback;
  Result<uint64_t> value = ParseSize(*text);
  if (!value) return Fail(std::move(value).error().In(key));
  return *value;
}

Result<uint64_t> Options::TakeNumber(const std::string& key, uint64_t fallback) {
  std::optional<std::string> text = Take(key);
  if (!text) return fallback;
  Result<uint64_t> value = ParseNumber(*text);
  if (!value) return Fail(std::move(value).error().In(key));
  return *value;
}

NodePtr Options::TakeNode(const std::string& key) {
  auto it = values_.find(key);
  if (it == values_.end() || !it->second.node) return nullptr;
  NodePtr node = std::move(it->second.node);
  values_.erase(it);
  return node;
}

Options Options::TakeBelow(const std::string& prefix) {
  Options below;
  std::string start = prefix + ".";
  for (auto it = values_.lower_bound(start); it != values_.end() && it->first.starts_with(start);) {
    below.values_[it->first.substr(start.size())] = std::move(it->second);
    it = values_.erase(it);
  }
  return below;
}

Result<> Options::RefuseRest(const std::string& what,
                             const std::vector<std::string_view>& known) const {
  if (values_.empty()) return {};
  const std::string& key = values_.begin()->first;
  std::string_view nearest = NearestName(key, known);
  return Fail(ErrorCode::kInvalid,
              fmt::format("{} has no option '{}'{}", what, key,
                          nearest.empty() ? "" : fmt::format(" (did you mean '{}'?)", nearest)));
}

}  // namespace kvartz::block
