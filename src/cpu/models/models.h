// The table of named CPU models.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace kvartz::cpu {

// Immutable.
struct CpuModel {
  std::string_view names;  // "Haswell|Haswell-v1"
  std::string_view base;   // features start with those of this model; may be empty
  const char* vendor;
  uint16_t family;
  uint8_t model, stepping;
  uint32_t level, xlevel;  // highest basic and extended leaf; more where a feature needs it
  const char* brand;
  std::string_view features;  // "name" adds, "-name" takes away
};

std::span<const CpuModel> CpuModels();

}  // namespace kvartz::cpu
