// Small helpers for names that people type.
#pragma once

#include <span>
#include <string_view>

namespace kvartz {

// The candidate that differs least from `name`, if it is near enough to be a slip of the pen; else
// empty.
std::string_view NearestName(std::string_view name, std::span<const std::string_view> candidates);

}  // namespace kvartz
