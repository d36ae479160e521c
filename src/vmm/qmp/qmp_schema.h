// The shapes of what QMP commands take, declared as constants: a row a member.
#pragma once

#include <array>
#include <boost/json/value.hpp>
#include <span>
#include <string>
#include <utility>

#include "base/result.h"

namespace kvartz::vmm {

struct QmpMember;
struct QmpBranch;

// Immutable.
struct QmpType {
  enum class Kind {
    kString,
    kInt,
    kBool,
    kEnum,     // a string out of `words`
    kArray,    // of `element`
    kObject,   // with `members`
    kUnion,    // with `members`, one of which (`tag`, of words) says which branch's members it has
    kEither,   // of `element` (no object) or an object with `members`
    kOptions,  // an object whose members its receiver knows
  };
  Kind kind;
  std::span<const char* const> words = {};
  const QmpType* element = nullptr;
  std::span<const QmpMember> members = {};
  const char* tag = nullptr;
  std::span<const QmpBranch> branches = {};
};

enum class QmpNeed { kRequired, kOptional };

// One of the name "*" stands for any others, which the receiver knows.
struct QmpMember {
  const char* name;
  const QmpType& type;
  QmpNeed need = QmpNeed::kRequired;
};

// Rows that several commands have, and those of one.
template <size_t... kSizes>
consteval auto Join(const std::array<QmpMember, kSizes>&... parts) {
  auto two = []<size_t kFirst, size_t kSecond>(const std::array<QmpMember, kFirst>& first,
                                               const std::array<QmpMember, kSecond>& second) {
    return [&]<size_t... i, size_t... j>(std::index_sequence<i...>, std::index_sequence<j...>) {
      return std::array<QmpMember, kFirst + kSecond>{first[i]..., second[j]...};
    }(std::make_index_sequence<kFirst>(), std::make_index_sequence<kSecond>());
  };
  auto all = [&](auto& self, const auto& first, const auto&... rest) {
    if constexpr (sizeof...(rest) == 0) {
      return first;
    } else {
      return two(first, self(self, rest...));
    }
  };
  return all(all, parts...);
}

struct QmpBranch {
  const char* value;
  std::span<const QmpMember> members;
};

inline constexpr QmpType kQmpString{.kind = QmpType::Kind::kString};
inline constexpr QmpType kQmpInt{.kind = QmpType::Kind::kInt};
inline constexpr QmpType kQmpBool{.kind = QmpType::Kind::kBool};
inline constexpr QmpType kQmpStrings{.kind = QmpType::Kind::kArray, .element = &kQmpString};
inline constexpr QmpType kQmpOptions{.kind = QmpType::Kind::kOptions};
inline constexpr QmpMember kQmpAnyMembers[] = {{"*", kQmpOptions, QmpNeed::kOptional}};
inline constexpr QmpNeed kOptional = QmpNeed::kOptional;

// Errors name the member by its path ("actions.0.type") that is missing, unexpected or of another
// type.
Result<> CheckQmpValue(const QmpType& type, const boost::json::value& value,
                       const std::string& path);
Result<> CheckQmpMembers(std::span<const QmpMember> members, const boost::json::object& object,
                         const std::string& path = "");

// ---- what handlers read; the object has been checked

inline bool Has(const boost::json::object& object, std::string_view name) {
  return object.contains(name);
}
std::string Text(const boost::json::object& object, std::string_view name,
                 std::string_view fallback = "");
int64_t Int(const boost::json::object& object, std::string_view name, int64_t fallback = 0);
bool Flag(const boost::json::object& object, std::string_view name, bool fallback = false);
// 0 and more. Errors: a negative value.
Result<uint64_t> Count(const boost::json::object& object, std::string_view name,
                       uint64_t fallback = 0);

}  // namespace kvartz::vmm
