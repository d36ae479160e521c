// The grammar of option arguments: "implied,name=value,nested.name=value", "flag" and "noflag",
// commas in values doubled; or a JSON object.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/result.h"
#include "device/core/properties.h"

namespace kvartz::vmm {

// `implied`: the name of a first value that has none ("driver" for -device); empty: none is
// implied. Nested JSON objects and lists become dotted names ("file.driver", "cpus.0"). Errors:
// malformed, a name twice with JSON, nested too deeply.
Result<Properties> ParseKeyval(std::string_view text, std::string_view implied);

// Takes `name` out of `properties`: its value, or `fallback`.
std::string Take(Properties* properties, std::string_view name, std::string_view fallback = "");
// "on", "off", "yes", "no", "true", "false". Errors name the property.
Result<bool> TakeBool(Properties* properties, std::string_view name, bool fallback);
Result<uint64_t> TakeNumber(Properties* properties, std::string_view name, uint64_t fallback,
                            uint64_t low, uint64_t high);
Result<uint64_t> TakeSize(Properties* properties, std::string_view name, uint64_t fallback);
// What is left over isn't known here. Errors: the first of them by name, with the nearest of
// `known` (space-separated).
Result<> RefuseRest(const Properties& properties, std::string_view known);

Result<bool> ParseSwitch(std::string_view text);
// "512", "512M", "1.5G", "0x1000", "4k". `default_suffix`: what a bare number counts ('B' or 'M').
Result<uint64_t> ParseSize(std::string_view text, char default_suffix = 'B');
Result<uint64_t> ParseNumber(std::string_view text, uint64_t low, uint64_t high);
// Whether the user asks for a list ("help", "?").
bool AsksForHelp(const Properties& properties);

}  // namespace kvartz::vmm
