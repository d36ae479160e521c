#include "vmm/qmp/qmp_schema.h"

#include <fmt/core.h>

#include <algorithm>
#include <boost/json/array.hpp>
#include <boost/json/object.hpp>

namespace kvartz::vmm {
namespace {

namespace json = boost::json;
using Kind = QmpType::Kind;

const char* KindName(Kind kind) {
  switch (kind) {
    case Kind::kString:
    case Kind::kEnum:
      return "a string";
    case Kind::kInt:
      return "an integer";
    case Kind::kBool:
      return "a boolean";
    case Kind::kArray:
      return "an array";
    case Kind::kEither:
      return "a value or an object";
    case Kind::kObject:
    case Kind::kUnion:
    case Kind::kOptions:
      return "an object";
  }
  return "?";
}

bool HasKind(const json::value& value, Kind kind) {
  switch (kind) {
    case Kind::kString:
    case Kind::kEnum:
      return value.is_string();
    case Kind::kInt:
      return value.is_int64();
    case Kind::kBool:
      return value.is_bool();
    case Kind::kArray:
      return value.is_array();
    case Kind::kObject:
    case Kind::kUnion:
    case Kind::kOptions:
      return value.is_object();
    case Kind::kEither:
      return true;
  }
  return false;
}

std::unexpected<Error> Bad(const std::string& path, std::string_view why) {
  return Fail(ErrorCode::kInvalid, fmt::format("argument '{}' {}", path, why));
}

std::string Below(const std::string& path, std::string_view name) {
  return path.empty() ? std::string(name) : fmt::format("{}.{}", path, name);
}

Result<> CheckPresent(std::span<const QmpMember> members, const json::object& object,
                      const std::string& path) {
  for (const QmpMember& member : members) {
    const json::value* value = object.if_contains(member.name);
    if (member.name == std::string_view("*")) continue;
    if (value) {
      TRY(CheckQmpValue(member.type, *value, Below(path, member.name)));
    } else if (member.need == QmpNeed::kRequired) {
      return Bad(Below(path, member.name), "is missing");
    }
  }
  return {};
}

Result<> CheckKnown(std::span<const QmpMember> members, std::span<const QmpMember> more,
                    const json::object& object, const std::string& path) {
  auto has = [](std::span<const QmpMember> list, json::string_view name) {
    return std::ranges::any_of(list, [&](const QmpMember& member) {
      return name == member.name || member.name == std::string_view("*");
    });
  };
  for (const auto& field : object) {
    if (!has(members, field.key()) && !has(more, field.key()))
      return Bad(Below(path, std::string_view(field.key())), "is unexpected");
  }
  return {};
}

Result<> CheckUnion(const QmpType& type, const json::object& object, const std::string& path) {
  TRY(CheckPresent(type.members, object, path));
  std::span<const QmpMember> more;
  for (const QmpBranch& branch : type.branches) {
    const json::value* tag = object.if_contains(type.tag);
    if (tag && tag->as_string() == branch.value) more = branch.members;
  }
  TRY(CheckPresent(more, object, path));
  return CheckKnown(type.members, more, object, path);
}

}  // namespace

// Recursion ends with the types, which are constants without cycles.
Result<> CheckQmpValue(const QmpType& type, const json::value& value, const std::string& path) {
  if (!HasKind(value, type.kind)) return Bad(path, fmt::format("must be {}", KindName(type.kind)));
  switch (type.kind) {
    case Kind::kEnum: {
      std::string_view word(value.as_string());
      if (std::ranges::find(type.words, word) == type.words.end())
        return Bad(path, fmt::format("doesn't take the value '{}'", word));
      return {};
    }
    case Kind::kArray: {
      const json::array& array = value.as_array();
      for (size_t i = 0; i < array.size(); ++i)
        TRY(CheckQmpValue(*type.element, array[i], Below(path, std::to_string(i))));
      return {};
    }
    case Kind::kObject:
      return CheckQmpMembers(type.members, value.as_object(), path);
    case Kind::kUnion:
      return CheckUnion(type, value.as_object(), path);
    case Kind::kEither:
      return value.is_object() ? CheckQmpMembers(type.members, value.as_object(), path)
                               : CheckQmpValue(*type.element, value, path);
    default:
      return {};
  }
}

Result<> CheckQmpMembers(std::span<const QmpMember> members, const json::object& object,
                         const std::string& path) {
  TRY(CheckPresent(members, object, path));
  return CheckKnown(members, {}, object, path);
}

std::string Text(const json::object& object, std::string_view name, std::string_view fallback) {
  const json::value* value = object.if_contains(name);
  return value ? std::string(value->as_string()) : std::string(fallback);
}

int64_t Int(const json::object& object, std::string_view name, int64_t fallback) {
  const json::value* value = object.if_contains(name);
  return value ? value->as_int64() : fallback;
}

bool Flag(const json::object& object, std::string_view name, bool fallback) {
  const json::value* value = object.if_contains(name);
  return value ? value->as_bool() : fallback;
}

Result<uint64_t> Count(const json::object& object, std::string_view name, uint64_t fallback) {
  if (!object.contains(name)) return fallback;
  int64_t value = Int(object, name);
  if (value < 0) return Bad(std::string(name), "must not be negative");
  return static_cast<uint64_t>(value);
}

}  // namespace kvartz::vmm
