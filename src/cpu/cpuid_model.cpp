// -cpu: names, features and properties.
#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <optional>

#include "base/text.h"
#include "cpu/cpuid.h"
#include "cpu/models/models.h"

namespace kvartz::cpu {
namespace {

// What a property's value must be.
enum class Kind { kBool, kNumber, kText };
struct PropertyRow {
  std::string_view name;
  Kind kind;
  uint64_t low = 0, high = 0;
};
constexpr PropertyRow kProperties[] = {
    {"enforce", Kind::kBool},
    {"check", Kind::kBool},
    {"migratable", Kind::kBool},
    {"kvm", Kind::kBool},
    {"pmu", Kind::kBool},
    {"host-phys-bits", Kind::kBool},
    {"host-cache-info", Kind::kBool},
    {"l3-cache", Kind::kBool},
    {"family", Kind::kNumber, 0, 0xff + 0xf},
    {"model", Kind::kNumber, 0, 0xff},
    {"stepping", Kind::kNumber, 0, 0xf},
    {"level", Kind::kNumber, 0, 0xff},
    {"min-level", Kind::kNumber, 0, 0xff},
    {"xlevel", Kind::kNumber, 0x80000000, 0x800000ff},
    {"min-xlevel", Kind::kNumber, 0x80000000, 0x800000ff},
    {"phys-bits", Kind::kNumber, 32, 52},
    {"tsc-frequency", Kind::kNumber, 1, 1000000000000},
    {"vendor", Kind::kText},
    {"model-id", Kind::kText},
};

constexpr std::string_view kSpecialModels[] = {"max", "host", "base"};

const PropertyRow* FindProperty(std::string_view name) {
  auto it = std::ranges::find(kProperties, name, &PropertyRow::name);
  return it == std::end(kProperties) ? nullptr : it;
}

template <typename Visit>
void SplitAt(std::string_view text, char separator, Visit visit) {
  for (;;) {
    size_t end = text.find(separator);
    visit(text.substr(0, end));
    if (end == text.npos) return;
    text.remove_prefix(end + 1);
  }
}

bool IsModel(std::string_view name) {
  if (std::ranges::find(kSpecialModels, name) != std::end(kSpecialModels)) return true;
  bool found = false;
  for (const CpuModel& model : CpuModels()) {
    SplitAt(model.names, '|', [&](std::string_view each) { found |= each == name; });
  }
  return found;
}

std::string Hint(std::string_view name, const std::vector<std::string_view>& candidates) {
  std::string_view nearest = NearestName(name, candidates);
  if (nearest.empty()) return "see -cpu help";
  return fmt::format("did you mean '{}'?", nearest);
}

std::unexpected<Error> UnknownModel(std::string_view name) {
  std::vector<std::string> names = CpuModelNames();
  return Fail(ErrorCode::kNotFound,
              fmt::format("unknown CPU model '{}': {}", name,
                          Hint(name, std::vector<std::string_view>(names.begin(), names.end()))));
}

std::unexpected<Error> UnknownFeature(std::string_view name) {
  if (name.starts_with("hv-") || name.starts_with("hv_") || name.starts_with("vmx-")) {
    return Fail(ErrorCode::kUnsupported, fmt::format("not supported yet: CPU feature '{}'", name));
  }
  std::vector<std::string_view> names;
  for (const CpuidFeature& feature : CpuidFeatures()) names.push_back(feature.name);
  for (const PropertyRow& property : kProperties) names.push_back(property.name);
  return Fail(ErrorCode::kNotFound,
              fmt::format("unknown CPU feature '{}': {}", name, Hint(name, names)));
}

std::optional<bool> ParseBool(std::string_view text) {
  if (text == "on" || text == "yes" || text == "true") return true;
  if (text == "off" || text == "no" || text == "false") return false;
  return std::nullopt;
}

std::optional<uint64_t> ParseNumber(std::string_view text) {
  int base = 10;
  if (text.starts_with("0x") || text.starts_with("0X")) {
    text.remove_prefix(2);
    base = 16;
  }
  uint64_t value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

Result<> CheckProperty(const PropertyRow& property, std::string_view value) {
  switch (property.kind) {
    case Kind::kBool:
      if (ParseBool(value)) return {};
      return Fail(ErrorCode::kInvalid, fmt::format("CPU property '{}': '{}' is neither on nor off",
                                                   property.name, value));
    case Kind::kNumber: {
      std::optional<uint64_t> number = ParseNumber(value);
      if (number && *number >= property.low && *number <= property.high) return {};
      return Fail(ErrorCode::kInvalid,
                  fmt::format("CPU property '{}': '{}' is not a number from {:#x} to {:#x}",
                              property.name, value, property.low, property.high));
    }
    case Kind::kText: {
      if (property.name != "vendor" || value.size() == 12) return {};
      return Fail(ErrorCode::kInvalid,
                  fmt::format("CPU property 'vendor': '{}' does not have 12 characters", value));
    }
  }
  return {};
}

Result<> ParseItem(std::string_view item, CpuModelRequest* request) {
  size_t equals = item.find('=');
  std::string_view name = item.substr(0, equals);
  std::string_view value = equals == item.npos ? "on" : item.substr(equals + 1);
  bool plus_or_minus = item.starts_with('+') || item.starts_with('-');
  if (plus_or_minus) {
    if (equals != item.npos) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("CPU feature '{}': write '+name', '-name' or 'name=on|off'", item));
    }
    value = item[0] == '+' ? "on" : "off";
    name.remove_prefix(1);
  }
  if (const PropertyRow* property = FindProperty(name); property != nullptr && !plus_or_minus) {
    TRY(CheckProperty(*property, value));
    if (name == "enforce") request->enforce = *ParseBool(value);
    request->properties.emplace_back(name, value);
    return {};
  }
  if (FindCpuidFeature(name) == nullptr) return UnknownFeature(name);
  std::optional<bool> on = ParseBool(value);
  if (!on) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("CPU feature '{}': '{}' is neither on nor off", name, value));
  }
  request->features.emplace_back(name, *on);
  return {};
}

}  // namespace

const std::string* CpuModelRequest::Property(std::string_view name) const {
  const std::string* found = nullptr;
  for (const auto& [key, value] : properties) {
    if (key == name) found = &value;
  }
  return found;
}

Result<uint64_t> CpuModelRequest::Number(std::string_view name, uint64_t fallback) const {
  const std::string* text = Property(name);
  if (text == nullptr) return fallback;
  const PropertyRow* property = FindProperty(name);
  if (property == nullptr) return UnknownFeature(name);
  TRY(CheckProperty(*property, *text));
  return property->kind == Kind::kBool ? uint64_t{*ParseBool(*text)} : *ParseNumber(*text);
}

Result<CpuModelRequest> ParseCpuModel(const std::string& text) {
  CpuModelRequest request;
  Result<> result;
  bool first = true;
  SplitAt(text, ',', [&](std::string_view item) {
    if (!result) return;
    if (first) {
      request.model = item;
      if (!IsModel(item)) result = UnknownModel(item);
    } else {
      result = ParseItem(item, &request);
    }
    first = false;
  });
  if (!result) return std::unexpected(result.error());
  return request;
}

std::vector<std::string> CpuModelNames() {
  std::vector<std::string> names(std::begin(kSpecialModels), std::end(kSpecialModels));
  for (const CpuModel& model : CpuModels()) {
    SplitAt(model.names, '|', [&](std::string_view name) { names.emplace_back(name); });
  }
  return names;
}

std::string DescribeCpuModels() {
  std::string text = "Available CPUs:\n";
  text += fmt::format("  {:<27} {}\n", "host",
                      "the host's CPU, with everything that the engine supports");
  text += fmt::format("  {:<27} {}\n", "max", "everything that the engine supports");
  text += fmt::format("  {:<27} {}\n", "base", "no features at all");
  for (const CpuModel& model : CpuModels()) {
    std::string_view main = model.names.substr(0, model.names.find('|'));
    SplitAt(model.names, '|', [&](std::string_view name) {
      text += name == main ? fmt::format("  {:<27} {}\n", name, model.brand)
                           : fmt::format("  {:<27} (alias of {})\n", name, main);
    });
  }
  text += "\nRecognized CPUID flags:\n";
  std::string line = " ";
  std::vector<std::string_view> names;
  for (const CpuidFeature& feature : CpuidFeatures()) names.push_back(feature.name);
  std::ranges::sort(names);
  for (std::string_view name : names) {
    if (line.size() + name.size() > 78) {
      text += line + "\n";
      line = " ";
    }
    line += fmt::format(" {}", name);
  }
  return text + line + "\n";
}

}  // namespace kvartz::cpu
