#include "machine/smbios.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace kvartz::machine {

namespace {
using Bytes = std::vector<uint8_t>;

void PutLe(Bytes& out, uint64_t value, unsigned size) {
  for (unsigned i = 0; i < size; i++) out.push_back(value >> (8 * i));
}

// One structure: formatted area, then its strings.
class Structure {
 public:
  Structure(uint8_t type, uint16_t handle) {
    area_ = {type, 0};
    PutLe(area_, handle, 2);
  }
  Structure& Int(uint64_t value, unsigned size) {
    PutLe(area_, value, size);
    return *this;
  }
  Structure& Raw(const Bytes& bytes) {
    area_.insert(area_.end(), bytes.begin(), bytes.end());
    return *this;
  }
  // A string's number; an empty one has none.
  Structure& Text(const std::string& text) {
    if (text.empty()) return Int(0, 1);
    strings_.push_back(text.substr(0, 64));
    return Int(strings_.size(), 1);
  }
  // A string that the formatted area doesn't refer to.
  Structure& Loose(const std::string& text) {
    strings_.push_back(text);
    return *this;
  }
  void AppendTo(Bytes& out) const {
    size_t begin = out.size();
    out.insert(out.end(), area_.begin(), area_.end());
    out[begin + 1] = area_.size();
    for (const std::string& text : strings_)
      out.insert(out.end(), text.c_str(), text.c_str() + text.size() + 1);
    if (strings_.empty()) out.push_back(0);
    out.push_back(0);
  }
  size_t size() const {
    size_t size = area_.size() + 1;
    for (const std::string& text : strings_) size += text.size() + 1;
    return strings_.empty() ? size + 1 : size;
  }

 private:
  Bytes area_;
  std::vector<std::string> strings_;
};

// Handles, by type.
constexpr uint16_t kBios = 0x0000, kSystem = 0x0100, kBoard = 0x0200, kChassis = 0x0300,
                   kCpu = 0x0400, kOem = 0x0e00, kArray = 0x1000, kMemory = 0x1100,
                   kArrayMap = 0x1300, kBootInfo = 0x2000, kEnd = 0x7f00;
constexpr uint64_t kKiB = 1024, kGiB = 1ull << 30;
constexpr uint64_t kLargestDevice = 16 * kGiB;  // RAM is shown as modules of at most this

std::string Or(const std::string& text, const std::string& fallback) {
  return text.empty() ? fallback : text;
}

// The 6.1 UUID format: the first three fields little-endian.
Bytes WireUuid(const std::array<uint8_t, 16>& u) {
  return {u[3], u[2], u[1],  u[0],  u[5],  u[4],  u[7],  u[6],
          u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]};
}
}  // namespace

SmbiosTables BuildSmbios(const SmbiosInput& in) {
  const SmbiosConfig& t = *in.texts;
  SmbiosTables result;
  uint16_t count = 0, largest = 0;
  auto add = [&](const Structure& s) {
    largest = std::max<uint16_t>(largest, s.size());
    s.AppendTo(result.tables);
    count++;
  };

  // 7.1 BIOS information: virtual machine, ACPI; characteristics otherwise unknown.
  add(Structure(0, kBios)
          .Text(Or(t.bios_vendor, "Kvartz"))
          .Text(Or(t.bios_version, "0.1"))
          .Int(0xe800, 2)
          .Text(Or(t.bios_date, "01/01/2026"))
          .Int(0, 1)
          .Int(1 << 3, 8)
          .Int(0x01, 1)
          .Int(0x1c, 1)
          .Int(0, 1)
          .Int(1, 1)
          .Int(0xff, 1)
          .Int(0xff, 1));
  // 7.2 System.
  add(Structure(1, kSystem)
          .Text(Or(t.manufacturer, "Kvartz"))
          .Text(Or(t.product, "Kvartz virtual machine"))
          .Text(Or(t.version, in.machine_name))
          .Text(t.serial)
          .Raw(WireUuid(in.uuid))
          .Int(6, 1)
          .Text(t.sku)
          .Text(t.family));
  // 7.3 Baseboard, only if it was described.
  if (!t.board_manufacturer.empty() || !t.board_product.empty() || !t.board_version.empty() ||
      !t.board_serial.empty() || !t.board_asset.empty()) {
    add(Structure(2, kBoard)
            .Text(Or(t.board_manufacturer, "Kvartz"))
            .Text(t.board_product)
            .Text(t.board_version)
            .Text(t.board_serial)
            .Text(t.board_asset)
            .Int(1, 1)
            .Text("")
            .Int(kChassis, 2)
            .Int(0x0a, 1)
            .Int(0, 1));
  }
  // 7.4 Chassis: "other", states safe.
  add(Structure(3, kChassis)
          .Text(Or(t.chassis_manufacturer, "Kvartz"))
          .Int(1, 1)
          .Text(Or(t.chassis_version, in.machine_name))
          .Text(t.chassis_serial)
          .Text(t.chassis_asset)
          .Int(3, 1)
          .Int(3, 1)
          .Int(3, 1)
          .Int(2, 1)
          .Int(0, 4)
          .Int(0, 1)
          .Int(0, 1)
          .Int(0, 1)
          .Int(0, 1)
          .Text(t.chassis_sku));
  // 7.5 Processors, one a socket.
  for (unsigned i = 0; i < in.sockets; i++) {
    add(Structure(4, kCpu + i)
            .Text("CPU " + std::to_string(i))
            .Int(3, 1)
            .Int(1, 1)
            .Text(Or(t.manufacturer, "Kvartz"))
            .Int(in.cpuid_signature, 4)
            .Int(in.cpuid_features, 4)
            .Text(Or(t.version, in.machine_name))
            .Int(0, 1)
            .Int(0, 2)
            .Int(2000, 2)
            .Int(2000, 2)
            .Int(0x41, 1)
            .Int(1, 1)
            .Int(0xffff, 2)
            .Int(0xffff, 2)
            .Int(0xffff, 2)
            .Text("")
            .Text("")
            .Text("")
            .Int(std::min(in.cores_per_socket, 255u), 1)
            .Int(std::min(in.cores_per_socket, 255u), 1)
            .Int(std::min(in.threads_per_socket, 255u), 1)
            .Int(1 << 1, 2)
            .Int(1, 2)
            .Int(in.cores_per_socket, 2)
            .Int(in.cores_per_socket, 2)
            .Int(in.threads_per_socket, 2));
  }
  // 7.12 OEM strings.
  if (!t.oem_strings.empty()) {
    Structure oem(11, kOem);
    size_t count_of_strings = std::min<size_t>(t.oem_strings.size(), 255);
    oem.Int(count_of_strings, 1);
    for (size_t i = 0; i < count_of_strings; i++) oem.Loose(t.oem_strings[i]);
    add(oem);
  }
  // 7.17 and 7.18: the memory array and its modules; 7.20: where they appear.
  uint64_t ram = 0;
  for (const SmbiosInput::Range& range : in.ram) ram += range.size;
  uint64_t modules = std::max<uint64_t>(1, (ram + kLargestDevice - 1) / kLargestDevice);
  bool wide = ram / kKiB >= 0x80000000;
  add(Structure(16, kArray)
          .Int(1, 1)
          .Int(3, 1)
          .Int(6, 1)
          .Int(wide ? 0x80000000 : ram / kKiB, 4)
          .Int(0xfffe, 2)
          .Int(modules, 2)
          .Int(wide ? ram : 0, 8));
  uint64_t rest = ram;
  for (uint64_t i = 0; i < modules; i++) {
    uint64_t size = std::min(rest, kLargestDevice);
    rest -= size;
    uint64_t mib = size >> 20;
    add(Structure(17, kMemory + i)
            .Int(kArray, 2)
            .Int(0xfffe, 2)
            .Int(0xffff, 2)
            .Int(0xffff, 2)
            .Int(std::min<uint64_t>(mib, 0x7fff), 2)
            .Int(9, 1)
            .Int(0, 1)
            .Text("DIMM " + std::to_string(i))
            .Text("")
            .Int(7, 1)
            .Int(1 << 1, 2)
            .Int(0, 2)
            .Text(Or(t.manufacturer, "Kvartz"))
            .Text("")
            .Text("")
            .Text("")
            .Int(0, 1)
            .Int(mib >= 0x7fff ? mib : 0, 4)
            .Int(0, 2)
            .Int(0, 2)
            .Int(0, 2)
            .Int(0, 2));
  }
  uint16_t map = 0;
  for (const SmbiosInput::Range& range : in.ram) {
    uint64_t begin = range.base / kKiB, end = (range.base + range.size) / kKiB - 1;
    bool extended = end >= 0xffffffff;
    add(Structure(19, kArrayMap + map++)
            .Int(extended ? 0xffffffff : begin, 4)
            .Int(extended ? 0xffffffff : end, 4)
            .Int(kArray, 2)
            .Int(1, 1)
            .Int(extended ? range.base : 0, 8)
            .Int(extended ? range.base + range.size - 1 : 0, 8));
  }
  // 7.33 no boot errors; 7.45 the end.
  add(Structure(32, kBootInfo).Raw(Bytes(6)).Int(0, 1));
  add(Structure(127, kEnd));

  // 5.2.1.
  Bytes& a = result.anchor;
  a = {'_', 'S', 'M', '_', 0, 0x1f, 2, 8};
  PutLe(a, largest, 2);
  a.resize(0x10);
  a.insert(a.end(), {'_', 'D', 'M', 'I', '_', 0});
  PutLe(a, std::min<size_t>(result.tables.size(), 0xffff), 2);
  PutLe(a, 0, 4);
  PutLe(a, count, 2);
  a.push_back(0x28);
  return result;
}

std::vector<uint8_t> SmbiosTables::PlaceAt(uint32_t base) const {
  constexpr uint32_t kTablesAt = 32;
  Bytes out = anchor;
  for (unsigned i = 0; i < 4; i++) out[0x18 + i] = (base + kTablesAt) >> (8 * i);
  auto sum = [&](size_t begin, size_t end) {
    uint8_t total = 0;
    for (size_t i = begin; i < end; i++) total += out[i];
    return static_cast<uint8_t>(-total);
  };
  out[0x15] = sum(0x10, 0x1f);
  out[4] = sum(0, 0x1f);
  out.resize(kTablesAt);
  out.insert(out.end(), tables.begin(), tables.end());
  return out;
}

}  // namespace kvartz::machine
