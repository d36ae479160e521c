// The options of a device as the user wrote them, and the tables that give them types, defaults and
// descriptions.
//
//   struct RngConfig { uint64_t max_bytes = INT64_MAX; uint32_t period = 65536; };
//   constexpr PropertySpec kRngProperties[] = {
//       PROPERTY(RngConfig, "max-bytes", max_bytes, "bytes a period that the guest gets at most"),
//       PROPERTY(RngConfig, "period", period, "milliseconds"),
//   };
//   RngConfig config;
//   TRY(ApplyProperties(kRngProperties, properties, "virtio-rng-pci", &config));
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/result.h"
#include "base/text.h"

namespace kvartz {

// name=value pairs in the user's order; a later value replaces an earlier one of the same name.
// Immutable once built.
class Properties {
 public:
  Properties() = default;
  Properties(std::initializer_list<std::pair<std::string, std::string>> values) : all_(values) {}
  void Set(std::string name, std::string value);
  void Remove(std::string_view name);
  const std::string* Find(std::string_view name) const;  // null: not given
  const std::vector<std::pair<std::string, std::string>>& all() const { return all_; }

 private:
  std::vector<std::pair<std::string, std::string>> all_;
};

enum class OnOffAuto : uint8_t { kAuto, kOn, kOff };

struct MacAddress {
  std::array<uint8_t, 6> bytes{};
  auto operator<=>(const MacAddress&) const = default;
};

enum class PropertyType : uint8_t {
  kBool,
  kOnOffAuto,
  kUint16,
  kUint32,
  kUint64,
  kInt32,
  kString,
  kMac
};

struct PropertySpec {
  const char* name;
  PropertyType type;
  size_t offset;  // of the member in its config struct
  const char* description;
};

template <typename T>
constexpr PropertyType PropertyTypeOf() {
  if constexpr (std::is_same_v<T, bool>)
    return PropertyType::kBool;
  else if constexpr (std::is_same_v<T, OnOffAuto>)
    return PropertyType::kOnOffAuto;
  else if constexpr (std::is_same_v<T, uint16_t>)
    return PropertyType::kUint16;
  else if constexpr (std::is_same_v<T, uint32_t>)
    return PropertyType::kUint32;
  else if constexpr (std::is_same_v<T, uint64_t>)
    return PropertyType::kUint64;
  else if constexpr (std::is_same_v<T, int32_t>)
    return PropertyType::kInt32;
  else if constexpr (std::is_same_v<T, std::string>)
    return PropertyType::kString;
  else {
    static_assert(std::is_same_v<T, MacAddress>, "a type that properties don't know");
    return PropertyType::kMac;
  }
}

// Standard-layout config structs only.
#define PROPERTY(Config, name, member, description)                                       \
  ::kvartz::PropertySpec {                                                                \
    name, ::kvartz::PropertyTypeOf<decltype(Config::member)>(), offsetof(Config, member), \
        description                                                                       \
  }

// Names that the machine takes for itself when it plugs a device (id, bus, addr, multifunction,
// bootindex, driver); ApplyProperties passes over them.
bool IsPlacementProperty(std::string_view name);

// Sets the members of `config` (its defaults are already there) that `properties` names. Several
// tables make one set of names over one struct. Errors, all naming driver and property: unknown
// (with the nearest name), malformed value, out of range.
Result<> ApplyProperties(std::span<const PropertySpec> table, const Properties& properties,
                         std::string_view driver, void* config);

// One line of "-device X,help" in QEMU's form, "  name=<type> - description (default: json)",
// without its newline. `fallback` empty: no default.
std::string DescribeProperty(std::string_view name, std::string_view type,
                             std::string_view description, std::string_view fallback);
// One line a property, in the table's order. `defaults` points at a fresh config struct.
std::vector<std::string> DescribeProperties(std::span<const PropertySpec> table,
                                            const void* defaults);
template <typename Config>
std::vector<std::string> DescribeProperties(std::span<const PropertySpec> table) {
  const Config fresh{};
  return DescribeProperties(table, &fresh);
}

// "52:54:00:12:34:56" (also with dashes). Errors: malformed.
Result<MacAddress> ParseMac(std::string_view text);
std::string FormatMac(const MacAddress& mac);

}  // namespace kvartz
