#include "vmm/keyval.h"

#include <fmt/core.h>

#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>
#include <charconv>
#include <cmath>
#include <vector>

#include "base/text.h"

namespace kvartz::vmm {
namespace {

constexpr size_t kJsonDepthMax = 16;
constexpr size_t kJsonFieldsMax = 1024;

Result<> Flatten(const boost::json::value& value, const std::string& name, Properties* out) {
  namespace json = boost::json;
  if (out->all().size() > kJsonFieldsMax) return Fail(ErrorCode::kInvalid, "too many fields");
  if (const json::object* object = value.if_object()) {
    for (const auto& field : *object) {
      TRY(Flatten(field.value(),
                  name.empty() ? std::string(field.key()) : name + "." + std::string(field.key()),
                  out));
    }
  } else if (const json::array* array = value.if_array()) {
    for (size_t i = 0; i < array->size(); ++i)
      TRY(Flatten((*array)[i], fmt::format("{}.{}", name, i), out));
  } else if (const json::string* text = value.if_string()) {
    out->Set(name, std::string(*text));
  } else if (value.is_bool()) {
    out->Set(name, value.as_bool() ? "on" : "off");
  } else if (!value.is_null()) {
    out->Set(name, json::serialize(value));
  }
  return {};
}

Result<Properties> ParseJson(std::string_view text) {
  boost::json::parse_options options;
  options.max_depth = kJsonDepthMax;
  boost::json::error_code error;
  boost::json::value value = boost::json::parse({text.data(), text.size()}, error, {}, options);
  if (error) return Fail(ErrorCode::kInvalid, "malformed JSON: " + error.message());
  if (!value.is_object()) return Fail(ErrorCode::kInvalid, "the JSON argument must be an object");
  Properties properties;
  TRY(Flatten(value, "", &properties));
  return properties;
}

// The next item up to a single comma; ",," stands for a comma. `text` is advanced past it.
std::string NextItem(std::string_view* text) {
  std::string item;
  while (!text->empty()) {
    char c = text->front();
    text->remove_prefix(1);
    if (c == ',') {
      if (text->empty() || text->front() != ',') return item;
      text->remove_prefix(1);
    }
    item.push_back(c);
  }
  return item;
}

// Options that may be given several times: the second becomes "hostfwd.1", as in JSON lists.
std::string NameAmong(const Properties& properties, const std::string& name) {
  if (name != "hostfwd" && name != "guestfwd" && name != "dnssearch") return name;
  std::string numbered = name;
  for (unsigned i = 1; properties.Find(numbered); ++i) numbered = fmt::format("{}.{}", name, i);
  return numbered;
}

Error Bad(std::string_view name, std::string_view value, std::string_view wanted) {
  return {ErrorCode::kInvalid, fmt::format("{}={}: {}", name, value, wanted)};
}

}  // namespace

Result<Properties> ParseKeyval(std::string_view text, std::string_view implied) {
  if (text.starts_with('{')) return ParseJson(text);
  Properties properties;
  for (bool first = true; !text.empty(); first = false) {
    std::string item = NextItem(&text);
    size_t equals = item.find('=');
    if (equals == 0 || item.empty())
      return Fail(ErrorCode::kInvalid, fmt::format("'{}': a name=value is expected", item));
    if (equals != std::string::npos) {
      properties.Set(NameAmong(properties, item.substr(0, equals)), item.substr(equals + 1));
    } else if (first && !implied.empty()) {
      properties.Set(std::string(implied), item);
    } else if (item != "nographic" && item.starts_with("no") && item.size() > 2) {
      properties.Set(item.substr(2), "off");
    } else {
      properties.Set(item, "on");
    }
  }
  return properties;
}

std::string Take(Properties* properties, std::string_view name, std::string_view fallback) {
  const std::string* found = properties->Find(name);
  std::string value = found ? *found : std::string(fallback);
  if (found) properties->Remove(name);
  return value;
}

Result<bool> ParseSwitch(std::string_view text) {
  if (text == "on" || text == "yes" || text == "true" || text == "y") return true;
  if (text == "off" || text == "no" || text == "false" || text == "n") return false;
  return Fail(ErrorCode::kInvalid, "must be on or off");
}

Result<bool> TakeBool(Properties* properties, std::string_view name, bool fallback) {
  if (!properties->Find(name)) return fallback;
  std::string text = Take(properties, name);
  Result<bool> value = ParseSwitch(text);
  if (!value) return Fail(Bad(name, text, value.error().what));
  return value;
}

Result<uint64_t> ParseNumber(std::string_view text, uint64_t low, uint64_t high) {
  uint64_t value = 0;
  bool hex = text.starts_with("0x") || text.starts_with("0X");
  const char* begin = text.data() + (hex ? 2 : 0);
  auto [end, error] = std::from_chars(begin, text.data() + text.size(), value, hex ? 16 : 10);
  if (error != std::errc() || end != text.data() + text.size() || value < low || value > high) {
    return Fail(ErrorCode::kInvalid, fmt::format("must be a number from {} to {}", low, high));
  }
  return value;
}

Result<uint64_t> TakeNumber(Properties* properties, std::string_view name, uint64_t fallback,
                            uint64_t low, uint64_t high) {
  if (!properties->Find(name)) return fallback;
  std::string text = Take(properties, name);
  Result<uint64_t> value = ParseNumber(text, low, high);
  if (!value) return Fail(Bad(name, text, value.error().what));
  return value;
}

Result<uint64_t> ParseSize(std::string_view text, char default_suffix) {
  constexpr std::string_view kSuffixes = "BKMGTPE";
  auto error = Fail(ErrorCode::kInvalid, "must be a size such as 512M or 4G");
  if (text.empty()) return error;
  if (text.starts_with("0x") || text.starts_with("0X")) {
    Result<uint64_t> value = ParseNumber(text, 0, INT64_MAX);
    if (!value) return error;
    return value;
  }
  char suffix = text.back() >= 'a' && text.back() <= 'z'
                    ? static_cast<char>(text.back() - 'a' + 'A')
                    : text.back();
  if (suffix >= '0' && suffix <= '9') {
    suffix = default_suffix;
  } else {
    text.remove_suffix(1);
  }
  size_t power = kSuffixes.find(suffix);
  // Digits, and a fraction of the unit if there is one; a sign, inf and nan are no sizes.
  if (power == std::string_view::npos || text.empty() ||
      text.find_first_not_of("0123456789.") != std::string_view::npos) {
    return error;
  }
  unsigned shift = static_cast<unsigned>(power) * 10;
  uint64_t whole = 0;
  auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), whole);
  if (failed != std::errc() || whole > (static_cast<uint64_t>(INT64_MAX) >> shift)) return error;
  uint64_t bytes = whole << shift;
  if (end == text.data() + text.size()) return bytes;
  double fraction = 0;
  auto [fraction_end, bad] = std::from_chars(end, text.data() + text.size(), fraction);
  if (bad != std::errc() || fraction_end != text.data() + text.size() || shift == 0 ||
      fraction >= 1)
    return error;
  return bytes + static_cast<uint64_t>(std::ldexp(fraction, static_cast<int>(shift)));
}

Result<uint64_t> TakeSize(Properties* properties, std::string_view name, uint64_t fallback) {
  if (!properties->Find(name)) return fallback;
  std::string text = Take(properties, name);
  Result<uint64_t> value = ParseSize(text);
  if (!value) return Fail(Bad(name, text, value.error().what));
  return value;
}

Result<> RefuseRest(const Properties& properties, std::string_view known) {
  if (properties.all().empty()) return {};
  const std::string& name = properties.all().front().first;
  std::vector<std::string_view> names;
  while (!known.empty()) {
    size_t space = known.find(' ');
    names.push_back(known.substr(0, space));
    known = space == std::string_view::npos ? "" : known.substr(space + 1);
  }
  std::string_view nearest = NearestName(name, names);
  return Fail(ErrorCode::kUnsupported,
              nearest.empty() ? fmt::format("unknown or not supported yet: {}=", name)
                              : fmt::format("unknown: {}=; did you mean {}=?", name, nearest));
}

bool AsksForHelp(const Properties& properties) {
  if (properties.Find("help") || properties.Find("?")) return true;
  for (const auto& [name, value] : properties.all()) {
    if ((name == "driver" || name == "type" || name == "backend" || name == "model" ||
         name == "qom-type") &&
        (value == "help" || value == "?")) {
      return true;
    }
  }
  return false;
}

}  // namespace kvartz::vmm
