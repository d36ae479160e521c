#include "cli/img/output.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/json.hpp>
#include <cmath>
#include <ctime>

namespace kvartz::cli::img {
namespace {

using block::InfoField;
using block::InfoValue;

// qemu-img prints members in the order of a hash table's 512 buckets. Programs don't care, but
// people compare outputs. The hash is that of TDB.
uint32_t Bucket(const std::string& name) {
  uint32_t value = 0x238F13AF * static_cast<uint32_t>(name.size());
  for (uint32_t i = 0; i < name.size(); i++)
    value += static_cast<uint32_t>(static_cast<unsigned char>(name[i])) << (i * 5 % 24);
  return (1103515243 * value + 12345) % 512;
}

std::vector<const InfoField*> InOrder(const InfoValue::Object& object) {
  std::vector<const InfoField*> fields;
  for (const InfoField& field : object) fields.push_back(&field);
  std::stable_sort(fields.begin(), fields.end(), [](const InfoField* a, const InfoField* b) {
    return Bucket(a->name) < Bucket(b->name);
  });
  return fields;
}

std::string ScalarText(const InfoValue& value) {
  if (const bool* flag = std::get_if<bool>(&value.value)) return *flag ? "true" : "false";
  if (const uint64_t* number = std::get_if<uint64_t>(&value.value)) return std::to_string(*number);
  return std::get<std::string>(value.value);
}

void AppendJson(std::string& out, const InfoValue& value, int depth) {
  std::string inner(static_cast<size_t>(depth + 1) * 4, ' ');
  std::string outer(static_cast<size_t>(depth) * 4, ' ');
  if (const auto* object = std::get_if<InfoValue::Object>(&value.value)) {
    out += "{";
    const char* separator = "\n";
    for (const InfoField* field : InOrder(*object)) {
      out += separator + inner + boost::json::serialize(field->name) + ": ";
      AppendJson(out, field->value, depth + 1);
      separator = ",\n";
    }
    out += "\n" + outer + "}";
  } else if (const auto* array = std::get_if<InfoValue::Array>(&value.value)) {
    out += "[";
    const char* separator = "\n";
    for (const InfoValue& item : *array) {
      out += separator + inner;
      AppendJson(out, item, depth + 1);
      separator = ",\n";
    }
    out += "\n" + outer + "]";
  } else if (const auto* text = std::get_if<std::string>(&value.value)) {
    out += boost::json::serialize(*text);
  } else {
    out += ScalarText(value);
  }
}

bool IsTree(const InfoValue& value) { return value.value.index() >= 3; }

void AppendHuman(std::string& out, const InfoValue& value, int depth);

void AppendMember(std::string& out, const std::string& name, const InfoValue& value, int depth) {
  out += std::string(static_cast<size_t>(depth) * 4, ' ') + name + ":";
  if (IsTree(value)) {
    out += "\n";
    AppendHuman(out, value, depth + 1);
  } else {
    out += " " + ScalarText(value) + "\n";
  }
}

void AppendHuman(std::string& out, const InfoValue& value, int depth) {
  if (const auto* object = std::get_if<InfoValue::Object>(&value.value)) {
    for (const InfoField* field : InOrder(*object)) {
      std::string name = field->name;
      std::replace(name.begin(), name.end(), '-', ' ');
      AppendMember(out, name, field->value, depth);
    }
  } else if (const auto* array = std::get_if<InfoValue::Array>(&value.value)) {
    for (size_t i = 0; i < array->size(); i++)
      AppendMember(out, fmt::format("[{}]", i), (*array)[i], depth);
  }
}

}  // namespace

std::string JsonText(const InfoValue& value) {
  std::string out;
  AppendJson(out, value, 0);
  return out;
}

std::string HumanText(const InfoValue::Object& object, int depth) {
  std::string out;
  AppendHuman(out, {object}, depth);
  return out;
}

std::string SizeText(uint64_t bytes) {
  constexpr const char* kUnits[] = {"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"};
  // 1000 of a unit are 0.977 of the next.
  int exponent = 0;
  frexp(static_cast<double>(bytes) / (1000.0 / 1024.0), &exponent);
  int unit = std::max(0, (exponent - 1) / 10);
  return fmt::format("{:.3g} {}B", static_cast<double>(bytes) / std::exp2(10 * unit), kUnits[unit]);
}

std::string SnapshotTable(const std::vector<block::SnapshotInfo>& snapshots) {
  std::string out = fmt::format("{:<10}{:<17}{:>8}{:>20}{:>13}{:>11}\n", "ID", "TAG", "VM SIZE",
                                "DATE", "VM CLOCK", "ICOUNT");
  for (const block::SnapshotInfo& snapshot : snapshots) {
    char date[32];
    time_t seconds = snapshot.date_sec;
    tm local = {};
    localtime_r(&seconds, &local);
    strftime(date, sizeof date, "%Y-%m-%d %H:%M:%S", &local);
    uint64_t clock = snapshot.vm_clock_nsec / 1'000'000;
    std::string time = fmt::format("{:02}:{:02}:{:02}.{:03}", clock / 3'600'000,
                                   clock / 60'000 % 60, clock / 1000 % 60, clock % 1000);
    std::string icount = snapshot.icount == UINT64_MAX ? "" : std::to_string(snapshot.icount);
    out += fmt::format("{:<10}{:<17}{:>8}{:>20}{:>13}{:>11}\n", snapshot.id, snapshot.name,
                       SizeText(snapshot.vm_state_size), date, time, icount);
  }
  return out;
}

InfoValue SnapshotValue(const block::SnapshotInfo& snapshot) {
  constexpr uint64_t kSecond = 1'000'000'000;
  InfoValue::Object object = {
      Field("vm-state-size", snapshot.vm_state_size),
      Field("vm-clock-sec", snapshot.vm_clock_nsec / kSecond),
      Field("vm-clock-nsec", snapshot.vm_clock_nsec % kSecond),
      Field("date-sec", static_cast<uint64_t>(snapshot.date_sec)),
      Field("date-nsec", uint64_t{snapshot.date_nsec}),
      Field("name", snapshot.name),
      Field("id", snapshot.id),
  };
  if (snapshot.icount != UINT64_MAX) object.push_back(Field("icount", snapshot.icount));
  return {std::move(object)};
}

}  // namespace kvartz::cli::img
