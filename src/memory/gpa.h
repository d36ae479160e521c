// Guest-physical addresses.
#pragma once

#include <compare>
#include <cstdint>

namespace kvartz {

struct Gpa {
  uint64_t value = 0;
  constexpr Gpa() = default;
  constexpr explicit Gpa(uint64_t v) : value(v) {}
  constexpr auto operator<=>(const Gpa&) const = default;
  constexpr Gpa operator+(uint64_t delta) const { return Gpa(value + delta); }
};

constexpr uint64_t kPageSize = 4096;

}  // namespace kvartz
