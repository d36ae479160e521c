// What img prints: JSON in qemu-img's form, sizes, and trees of names and values for people.
#pragma once

#include <string>

#include "block/image_info.h"

namespace kvartz::cli::img {

// Indented by 4; members in the order in which qemu-img prints them.
std::string JsonText(const block::InfoValue& value);
// The same members, "name: value", for people; `depth` counts indentation by 4.
std::string HumanText(const block::InfoValue::Object& object, int depth);

std::string SizeText(uint64_t bytes);  // "1.21 MiB"
std::string SnapshotTable(const std::vector<block::SnapshotInfo>& snapshots);
block::InfoValue SnapshotValue(const block::SnapshotInfo& snapshot);

inline block::InfoField Field(std::string name, bool value) { return {std::move(name), {value}}; }
inline block::InfoField Field(std::string name, uint64_t value) {
  return {std::move(name), {value}};
}
inline block::InfoField Field(std::string name, std::string value) {
  return {std::move(name), {std::move(value)}};
}
inline block::InfoField Field(std::string name, const char* value) {
  return {std::move(name), {std::string(value)}};
}

}  // namespace kvartz::cli::img
