#include "device/core/properties.h"

#include <fmt/core.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>

namespace kvartz {
namespace {

constexpr std::string_view kPlacement[] = {"addr",   "bootindex", "bus",
                                           "driver", "id",        "multifunction"};

struct TypeName {
  PropertyType type;
  const char* name;    // as QEMU's lists have it
  const char* values;  // as an error says what is expected
};
constexpr TypeName kTypeNames[] = {
    {PropertyType::kBool, "bool", "on|off"},
    {PropertyType::kOnOffAuto, "OnOffAuto", "on|off|auto"},
    {PropertyType::kUint16, "uint16", "a number from 0 to 65535"},
    {PropertyType::kUint32, "uint32", "a number of 32 bits"},
    {PropertyType::kUint64, "uint64", "a number of 64 bits"},
    {PropertyType::kInt32, "int32", "a signed number of 32 bits"},
    {PropertyType::kString, "str", "text"},
    {PropertyType::kMac, "str", "an address such as 52:54:00:12:34:56"},
};

const TypeName& NamesOf(PropertyType type) {
  return *std::ranges::find(kTypeNames, type, &TypeName::type);
}

std::optional<bool> ParseBool(std::string_view text) {
  if (text == "on" || text == "yes" || text == "true" || text == "y") return true;
  if (text == "off" || text == "no" || text == "false" || text == "n") return false;
  return std::nullopt;
}

// Decimal or 0x, with an optional binary suffix k, M, G or T.
std::optional<uint64_t> ParseNumber(std::string_view text) {
  unsigned base = 10;
  if (text.starts_with("0x") || text.starts_with("0X")) {
    base = 16;
    text.remove_prefix(2);
  }
  unsigned shift = 0;
  if (!text.empty() && base == 10) {
    constexpr std::string_view kSuffixes = "kmgt";
    size_t at = kSuffixes.find(static_cast<char>(text.back() | 0x20));
    if (at != std::string_view::npos) {
      shift = 10 * (static_cast<unsigned>(at) + 1);
      text.remove_suffix(1);
    }
  }
  if (text.empty()) return std::nullopt;
  uint64_t value = 0;
  for (char c : text) {
    unsigned digit = c >= '0' && c <= '9'                     ? c - '0'
                     : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10
                                                              : 99;
    if (digit >= base) return std::nullopt;
    if (value > (std::numeric_limits<uint64_t>::max() - digit) / base) return std::nullopt;
    value = value * base + digit;
  }
  if (shift != 0 && value >> (64 - shift) != 0) return std::nullopt;
  return value << shift;
}

template <typename T>
void Store(void* config, size_t offset, const T& value) {
  *reinterpret_cast<T*>(static_cast<char*>(config) + offset) = value;
}
template <typename T>
const T& Load(const void* config, size_t offset) {
  return *reinterpret_cast<const T*>(static_cast<const char*>(config) + offset);
}

template <typename T>
bool StoreNumber(void* config, size_t offset, const std::string& text) {
  bool negative = std::is_signed_v<T> && text.starts_with('-');
  std::optional<uint64_t> value = ParseNumber(std::string_view(text).substr(negative ? 1 : 0));
  if (!value || *value > static_cast<uint64_t>(std::numeric_limits<T>::max())) return false;
  Store<T>(config, offset,
           negative ? static_cast<T>(-static_cast<int64_t>(*value)) : static_cast<T>(*value));
  return true;
}

// False: malformed or out of range.
bool StoreText(const PropertySpec& spec, const std::string& text, void* config) {
  switch (spec.type) {
    case PropertyType::kBool: {
      std::optional<bool> value = ParseBool(text);
      if (value) Store(config, spec.offset, *value);
      return value.has_value();
    }
    case PropertyType::kOnOffAuto: {
      std::optional<bool> value = ParseBool(text);
      if (!value && text != "auto") return false;
      Store(config, spec.offset,
            !value   ? OnOffAuto::kAuto
            : *value ? OnOffAuto::kOn
                     : OnOffAuto::kOff);
      return true;
    }
    case PropertyType::kUint16:
      return StoreNumber<uint16_t>(config, spec.offset, text);
    case PropertyType::kUint32:
      return StoreNumber<uint32_t>(config, spec.offset, text);
    case PropertyType::kUint64:
      return StoreNumber<uint64_t>(config, spec.offset, text);
    case PropertyType::kInt32:
      return StoreNumber<int32_t>(config, spec.offset, text);
    case PropertyType::kString:
      Store(config, spec.offset, text);
      return true;
    case PropertyType::kMac: {
      Result<MacAddress> mac = ParseMac(text);
      if (mac) Store(config, spec.offset, *mac);
      return mac.has_value();
    }
  }
  return false;
}

// As JSON; empty: none.
std::string DefaultOf(const PropertySpec& spec, const void* config) {
  switch (spec.type) {
    case PropertyType::kBool:
      return Load<bool>(config, spec.offset) ? "true" : "false";
    case PropertyType::kOnOffAuto: {
      OnOffAuto value = Load<OnOffAuto>(config, spec.offset);
      return value == OnOffAuto::kAuto ? "\"auto\""
             : value == OnOffAuto::kOn ? "\"on\""
                                       : "\"off\"";
    }
    case PropertyType::kUint16:
      return fmt::format("{}", Load<uint16_t>(config, spec.offset));
    case PropertyType::kUint32:
      return fmt::format("{}", Load<uint32_t>(config, spec.offset));
    case PropertyType::kUint64:
      return fmt::format("{}", Load<uint64_t>(config, spec.offset));
    case PropertyType::kInt32:
      return fmt::format("{}", Load<int32_t>(config, spec.offset));
    case PropertyType::kString: {
      const auto& text = Load<std::string>(config, spec.offset);
      return text.empty() ? "" : fmt::format("\"{}\"", text);
    }
    case PropertyType::kMac: {
      const auto& mac = Load<MacAddress>(config, spec.offset);
      return mac == MacAddress{} ? "" : fmt::format("\"{}\"", FormatMac(mac));
    }
  }
  return "";
}

}  // namespace

void Properties::Set(std::string name, std::string value) {
  Remove(name);
  all_.emplace_back(std::move(name), std::move(value));
}

void Properties::Remove(std::string_view name) {
  std::erase_if(all_, [&](const auto& pair) { return pair.first == name; });
}

const std::string* Properties::Find(std::string_view name) const {
  for (const auto& [key, value] : all_) {
    if (key == name) return &value;
  }
  return nullptr;
}

bool IsPlacementProperty(std::string_view name) {
  return std::ranges::find(kPlacement, name) != std::end(kPlacement);
}

Result<> ApplyProperties(std::span<const PropertySpec> table, const Properties& properties,
                         std::string_view driver, void* config) {
  for (const auto& [name, value] : properties.all()) {
    if (IsPlacementProperty(name)) continue;
    auto spec =
        std::ranges::find_if(table, [&](const PropertySpec& row) { return name == row.name; });
    if (spec == table.end()) {
      std::vector<std::string_view> names(std::begin(kPlacement), std::end(kPlacement));
      for (const PropertySpec& row : table) names.emplace_back(row.name);
      std::string_view nearest = NearestName(name, names);
      std::string hint = nearest.empty() ? fmt::format("see -device {},help", driver)
                                         : fmt::format("did you mean '{}'?", nearest);
      return Fail(ErrorCode::kInvalid,
                  fmt::format("device {} has no property '{}': {}", driver, name, hint));
    }
    if (!StoreText(*spec, value, config)) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("device {}: '{}' is not a value for {} (expected {})", driver, value,
                              name, NamesOf(spec->type).values));
    }
  }
  return {};
}

std::string DescribeProperty(std::string_view name, std::string_view type,
                             std::string_view description, std::string_view fallback) {
  std::string line = fmt::format("{:<24} - {}", fmt::format("  {}=<{}>", name, type), description);
  if (!fallback.empty()) line += fmt::format(" (default: {})", fallback);
  return line;
}

std::vector<std::string> DescribeProperties(std::span<const PropertySpec> table,
                                            const void* defaults) {
  std::vector<std::string> lines;
  for (const PropertySpec& row : table) {
    lines.push_back(DescribeProperty(row.name, NamesOf(row.type).name, row.description,
                                     DefaultOf(row, defaults)));
  }
  return lines;
}

Result<MacAddress> ParseMac(std::string_view text) {
  auto malformed = [&] {
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}' is not a MAC address such as 52:54:00:12:34:56", text));
  };
  if (text.size() != 17) return malformed();
  MacAddress mac;
  for (size_t i = 0; i < 6; ++i) {
    if (i != 0 && text[i * 3 - 1] != ':' && text[i * 3 - 1] != '-') return malformed();
    std::optional<uint64_t> byte = ParseNumber("0x" + std::string(text.substr(i * 3, 2)));
    if (!byte) return malformed();
    mac.bytes[i] = static_cast<uint8_t>(*byte);
  }
  return mac;
}

std::string FormatMac(const MacAddress& mac) {
  return fmt::format("{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", mac.bytes[0], mac.bytes[1],
                     mac.bytes[2], mac.bytes[3], mac.bytes[4], mac.bytes[5]);
}

}  // namespace kvartz
