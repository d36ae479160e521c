#include "host/net/net_factory.h"

#include <arpa/inet.h>
#include <fmt/core.h>

#include <algorithm>
#include <charconv>

#include "base/text.h"
#include "host/net/option_parser.h"
#include "host/net/tap.h"
#include "host/net/user_net.h"

namespace kvartz::host {
namespace {

struct Kind {
  std::string_view name;
  Result<std::unique_ptr<NetBackend>> (*create)(const NetOptions& options,
                                                EventLoop& loop);  // null: not yet
};
constexpr Kind kKinds[] = {
    {"user", CreateUserNet}, {"tap", CreateTap},      {"bridge", nullptr},     {"socket", nullptr},
    {"stream", nullptr},     {"dgram", nullptr},      {"vde", nullptr},        {"l2tpv3", nullptr},
    {"hubport", nullptr},    {"vhost-user", nullptr}, {"vhost-vdpa", nullptr}, {"passt", nullptr},
};

}  // namespace

Result<std::unique_ptr<NetBackend>> CreateNetBackend(const NetOptions& options, EventLoop& loop) {
  auto type = std::ranges::find(options, "type", [](const auto& pair) { return pair.first; });
  if (type == options.end())
    return Fail(ErrorCode::kInvalid, "the type is missing: say user or tap");
  auto kind = std::ranges::find(kKinds, type->second, &Kind::name);
  if (kind == std::end(kKinds)) {
    std::vector<std::string_view> names;
    for (const Kind& row : kKinds) names.push_back(row.name);
    std::string_view nearest = NearestName(type->second, names);
    return Fail(ErrorCode::kInvalid,
                fmt::format("there is no network backend '{}': {}", type->second,
                            nearest.empty() ? "say user or tap"
                                            : fmt::format("did you mean '{}'?", nearest)));
  }
  if (!kind->create) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: network backend '{}' (there are user and tap)",
                            kind->name));
  }
  return kind->create(options, loop);
}

std::string NetOptionName(const std::string& full_name) {
  size_t dot = full_name.find('.');
  if (dot == std::string::npos || dot + 1 == full_name.size()) return full_name;
  std::string_view place = std::string_view(full_name).substr(dot + 1);
  if (place.ends_with(".str")) place.remove_suffix(4);
  bool number = std::ranges::all_of(place, [](char c) { return c >= '0' && c <= '9'; });
  return number ? full_name.substr(0, dot) : full_name;
}

Error UnknownNetOption(const std::string& name, std::span<const std::string_view> known) {
  std::string_view nearest = NearestName(name, known);
  std::string hint;
  if (!nearest.empty()) {
    hint = fmt::format("did you mean '{}'?", nearest);
  } else {
    for (std::string_view option : known)
      hint += fmt::format("{}{}", hint.empty() ? "known are " : ", ", option);
  }
  return {ErrorCode::kInvalid, fmt::format("there is no option '{}': {}", name, hint)};
}

Result<bool> ParseNetSwitch(const std::string& text) {
  if (text == "on" || text == "yes" || text == "true" || text == "y") return true;
  if (text == "off" || text == "no" || text == "false" || text == "n") return false;
  return Fail(ErrorCode::kInvalid, "say on or off");
}

Result<unsigned> ParseNetNumber(std::string_view text, unsigned low, unsigned high) {
  unsigned value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < low || value > high) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}' is not a number from {} to {}", text, low, high));
  }
  return value;
}

Result<in_addr> ParseIpv4(const std::string& text) {
  in_addr address;
  if (inet_pton(AF_INET, text.c_str(), &address) == 1) return address;
  return Fail(ErrorCode::kInvalid, fmt::format("'{}' is not an IPv4 address", text));
}

Result<in6_addr> ParseIpv6(const std::string& text) {
  in6_addr address;
  if (inet_pton(AF_INET6, text.c_str(), &address) == 1) return address;
  return Fail(ErrorCode::kInvalid, fmt::format("'{}' is not an IPv6 address", text));
}

std::string FormatIpv4(in_addr address) {
  char text[INET_ADDRSTRLEN];
  inet_ntop(AF_INET, &address, text, sizeof text);
  return text;
}

}  // namespace kvartz::host
