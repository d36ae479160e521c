// How the backends take their options apart.
#pragma once

#include <netinet/in.h>

#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/result.h"
#include "host/net/net_factory.h"

namespace kvartz::host {

// One option of a backend whose config struct is `Config`.
template <typename Config>
struct NetOptionRow {
  std::string_view name;
  Result<> (*take)(Config& config, const std::string& value);
};

// Without the place in a list.
std::string NetOptionName(const std::string& full_name);
Error UnknownNetOption(const std::string& name, std::span<const std::string_view> known);

template <typename Config, size_t kRows>
Result<> TakeNetOptions(const NetOptionRow<Config> (&rows)[kRows], const NetOptions& options,
                        Config* config) {
  for (const auto& [full_name, value] : options) {
    std::string name = NetOptionName(full_name);
    if (name == "type" || name == "id" || name == "model" || name == "mac") continue;
    const NetOptionRow<Config>* found = nullptr;
    for (const auto& row : rows) {
      if (row.name == name) found = &row;
    }
    if (!found) {
      std::string_view names[kRows];
      for (size_t i = 0; i < kRows; ++i) names[i] = rows[i].name;
      return Fail(UnknownNetOption(name, names));
    }
    Result<> taken = found->take(*config, value);
    if (!taken) return Fail(std::move(taken).error().In(name + "=" + value));
  }
  return {};
}

Result<bool> ParseNetSwitch(const std::string& text);
Result<unsigned> ParseNetNumber(std::string_view text, unsigned low, unsigned high);
Result<in_addr> ParseIpv4(const std::string& text);
Result<in6_addr> ParseIpv6(const std::string& text);
std::string FormatIpv4(in_addr address);

}  // namespace kvartz::host
