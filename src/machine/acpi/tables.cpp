#include "machine/acpi/tables.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/endian.h"

namespace kvartz::machine {

using aml::Bytes;

namespace {
constexpr char kOemId[] = "KVARTZ", kOemTableId[] = "KVARTZ  ", kCreator[] = "KVTZ";
constexpr uint32_t kHeaderSize = 36, kHeaderChecksum = 9;
constexpr uint32_t kRsdpV1Size = 20, kRsdpSize = 36;

void PutLe(Bytes& out, uint64_t value, unsigned size) {
  for (unsigned i = 0; i < size; i++) out.push_back(value >> (8 * i));
}
void SetLe(Bytes& out, size_t offset, uint64_t value, unsigned size) {
  for (unsigned i = 0; i < size; i++) out[offset + i] = value >> (8 * i);
}
uint64_t GetLe(const Bytes& in, size_t offset, unsigned size) {
  uint64_t value = 0;
  for (unsigned i = 0; i < size; i++) value |= uint64_t{in[offset + i]} << (8 * i);
  return value;
}
void PutText(Bytes& out, const char* text, size_t size) {
  for (size_t i = 0; i < size; i++) out.push_back(i < std::strlen(text) ? text[i] : 0);
}

constexpr uint32_t kLapicAddress = 0xfee00000, kIoApicAddress = 0xfec00000;
constexpr uint16_t kActiveHighLevel = 0x000d;

// Commands of the loader script.
constexpr char kTablesFile[] = "etc/acpi/tables", kRsdpFile[] = "etc/acpi/rsdp";
constexpr size_t kFileNameSize = 56, kCommandSize = 128;
constexpr uint32_t kAllocate = 1, kAddPointer = 2, kAddChecksum = 3;
constexpr uint8_t kZoneHigh = 1, kZoneFseg = 2;
}  // namespace

void AcpiTables::Align(unsigned alignment) {
  while (tables_.size() % alignment) tables_.push_back(0);
}

uint32_t AcpiTables::Add(const char* signature, uint8_t revision, const Bytes& body,
                         const std::vector<Field>& pointers) {
  Align(16);
  uint32_t offset = tables_.size(), length = kHeaderSize + body.size();
  PutText(tables_, signature, 4);
  PutLe(tables_, length, 4);
  tables_.push_back(revision);
  tables_.push_back(0);  // checksum
  PutText(tables_, kOemId, 6);
  PutText(tables_, kOemTableId, 8);
  PutLe(tables_, 1, 4);
  PutText(tables_, kCreator, 4);
  PutLe(tables_, 1, 4);
  tables_.insert(tables_.end(), body.begin(), body.end());
  for (const Field& field : pointers)
    pointers_.push_back({false, offset + field.offset, field.size});
  checksums_.push_back({false, offset + kHeaderChecksum, offset, length});
  return offset;
}

uint32_t AcpiTables::AddFacs() {
  Align(64);
  uint32_t offset = tables_.size();
  PutText(tables_, "FACS", 4);
  PutLe(tables_, 64, 4);
  tables_.resize(offset + 64);
  return offset;
}

void AcpiTables::Finish(const std::vector<uint32_t>& offsets) {
  Bytes rsdt, xsdt;
  std::vector<Field> rsdt_fields, xsdt_fields;
  for (uint32_t offset : offsets) {
    rsdt_fields.push_back({kHeaderSize + static_cast<uint32_t>(rsdt.size()), 4});
    xsdt_fields.push_back({kHeaderSize + static_cast<uint32_t>(xsdt.size()), 8});
    PutLe(rsdt, offset, 4);
    PutLe(xsdt, offset, 8);
  }
  uint32_t rsdt_offset = Add("RSDT", 1, rsdt, rsdt_fields);
  uint32_t xsdt_offset = Add("XSDT", 1, xsdt, xsdt_fields);
  PutText(rsdp_, "RSD PTR ", 8);
  rsdp_.push_back(0);  // checksum of the first 20 bytes
  PutText(rsdp_, kOemId, 6);
  rsdp_.push_back(2);
  PutLe(rsdp_, rsdt_offset, 4);
  PutLe(rsdp_, kRsdpSize, 4);
  PutLe(rsdp_, xsdt_offset, 8);
  rsdp_.push_back(0);  // extended checksum
  rsdp_.resize(kRsdpSize);
  pointers_.push_back({true, 16, 4});
  pointers_.push_back({true, 24, 8});
  checksums_.push_back({true, 8, 0, kRsdpV1Size});
  checksums_.push_back({true, 32, 0, kRsdpSize});
}

std::vector<uint8_t> AcpiTables::PlaceAt(uint64_t base) const {
  constexpr uint64_t kTablesAt = 64;  // behind the RSDP
  std::vector<uint8_t> rsdp = rsdp_, tables = tables_;
  for (const Pointer& p : pointers_) {
    Bytes& in = p.in_rsdp ? rsdp : tables;
    SetLe(in, p.offset, GetLe(in, p.offset, p.size) + base + kTablesAt, p.size);
  }
  for (const Checksum& c : checksums_) {
    Bytes& in = c.in_rsdp ? rsdp : tables;
    uint8_t sum = 0;
    for (uint32_t i = 0; i < c.length; i++) sum += in[c.start + i];
    in[c.offset] -= sum;
  }
  rsdp.resize(kTablesAt);
  rsdp.insert(rsdp.end(), tables.begin(), tables.end());
  return rsdp;
}

std::vector<uint8_t> AcpiTables::LoaderScript() const {
  Bytes script;
  auto command = [&](uint32_t number, const Bytes& arguments) {
    Bytes entry;
    PutLe(entry, number, 4);
    entry.insert(entry.end(), arguments.begin(), arguments.end());
    entry.resize(kCommandSize);
    script.insert(script.end(), entry.begin(), entry.end());
  };
  auto file = [](bool rsdp) {
    Bytes name;
    PutText(name, rsdp ? kRsdpFile : kTablesFile, kFileNameSize);
    return name;
  };
  auto allocate = [&](bool rsdp, uint32_t align, uint8_t zone) {
    Bytes arguments = file(rsdp);
    PutLe(arguments, align, 4);
    arguments.push_back(zone);
    command(kAllocate, arguments);
  };
  allocate(true, 16, kZoneFseg);
  allocate(false, 64, kZoneHigh);
  for (const Pointer& p : pointers_) {
    Bytes arguments = file(p.in_rsdp);
    Bytes target = file(false);
    arguments.insert(arguments.end(), target.begin(), target.end());
    PutLe(arguments, p.offset, 4);
    arguments.push_back(p.size);
    command(kAddPointer, arguments);
  }
  for (const Checksum& c : checksums_) {
    Bytes arguments = file(c.in_rsdp);
    PutLe(arguments, c.offset, 4);
    PutLe(arguments, c.start, 4);
    PutLe(arguments, c.length, 4);
    command(kAddChecksum, arguments);
  }
  return script;
}

// 5.2.12.
Bytes MadtBody(const AcpiCpus& cpus, LegacyPics pics, const std::vector<unsigned>& level_lines) {
  Bytes out;
  PutLe(out, kLapicAddress, 4);
  PutLe(out, pics == LegacyPics::kYes, 4);
  bool wide = false;
  for (size_t i = 0; i < cpus.apic_ids.size(); i++) {
    uint32_t id = cpus.apic_ids[i];
    if (id < 255 && i < 255) {
      out.insert(out.end(), {0, 8, static_cast<uint8_t>(i), static_cast<uint8_t>(id)});
      PutLe(out, 1, 4);
    } else {
      wide = true;
      out.insert(out.end(), {9, 16, 0, 0});
      PutLe(out, id, 4);
      PutLe(out, 1, 4);
      PutLe(out, i, 4);
    }
  }
  out.insert(out.end(), {1, 12, 0, 0});
  PutLe(out, kIoApicAddress, 4);
  PutLe(out, 0, 4);
  auto override_line = [&](uint8_t line, uint32_t gsi, uint16_t flags) {
    out.insert(out.end(), {2, 10, 0, line});
    PutLe(out, gsi, 4);
    PutLe(out, flags, 2);
  };
  if (pics == LegacyPics::kYes) override_line(0, 2, 0);
  for (unsigned line : level_lines) override_line(line, line, kActiveHighLevel);
  out.insert(out.end(), {4, 6, 0xff, 0, 0, 1});  // NMI at LINT1 of all
  if (wide) {
    out.insert(out.end(), {0xa, 12, 0, 0});
    PutLe(out, 0xffffffff, 4);
    out.insert(out.end(), {1, 0, 0, 0});
  }
  return out;
}

Bytes ProcessorDevices(const AcpiCpus& cpus) {
  Bytes out;
  for (size_t i = 0; i < cpus.apic_ids.size(); i++) {
    constexpr char kHex[] = "0123456789ABCDEF";
    char name[5] = {'C', kHex[i >> 8 & 15], kHex[i >> 4 & 15], kHex[i & 15], 0};
    Bytes device = aml::Device(
        name, {aml::Name("_HID", aml::String("ACPI0007")), aml::Name("_UID", aml::Integer(i))});
    out.insert(out.end(), device.begin(), device.end());
  }
  return out;
}

// IA-PC HPET specification 1.0a, 3.2.4.
Bytes HpetBody(uint64_t address) {
  Bytes out;
  PutLe(out, 0x8086a201, 4);
  out.insert(out.end(), {0, 64, 0, 0});
  PutLe(out, address, 8);
  out.push_back(0);
  PutLe(out, 0, 2);
  out.push_back(0);
  return out;
}

// 5.2.9; revision 6.3, the length of ACPI 6.
uint32_t AddFadt(AcpiTables& tables, const Fadt& f) {
  constexpr uint32_t kLength = 276, kX86DsdtOffset = 140, kFacsOffset = 36, kDsdtOffset = 40;
  Bytes t(kLength - kHeaderSize);
  auto set = [&](uint32_t offset, uint64_t value, unsigned size) {
    SetLe(t, offset - kHeaderSize, value, size);
  };
  auto set_register = [&](uint32_t offset, const Fadt::Register& r) {
    if (r.address == 0) return;
    set(offset, r.space, 1);
    set(offset + 1, r.width_bits, 1);
    set(offset + 3, r.width_bits == 8 ? 1 : r.width_bits == 16 ? 2 : 3, 1);
    set(offset + 4, r.address, 8);
  };
  set(kFacsOffset, f.facs, 4);
  set(kDsdtOffset, f.dsdt, 4);
  set(46, f.sci, 2);
  set(56, f.pm1_event, 4);
  set(64, f.pm1_control, 4);
  set(76, f.pm_timer, 4);
  set(80, f.gpe0, 4);
  set(88, f.pm1_event ? 4 : 0, 1);
  set(89, f.pm1_control ? 2 : 0, 1);
  set(91, f.pm_timer ? 4 : 0, 1);
  set(92, f.gpe0_length, 1);
  set(96, 0xfff, 2);  // no C2
  set(98, 0xfff, 2);  // no C3
  set(108, f.century, 1);
  set(109, f.boot_arch, 2);
  set(112, f.flags, 4);
  set_register(116, f.reset);
  set(128, f.reset_value, 1);
  set(131, 3, 1);  // minor version
  set(kX86DsdtOffset, f.dsdt, 8);
  if (f.pm1_event) set_register(148, {1, 32, f.pm1_event});
  if (f.pm1_control) set_register(172, {1, 16, f.pm1_control});
  if (f.pm_timer) set_register(208, {1, 32, f.pm_timer});
  if (f.gpe0) set_register(220, {1, static_cast<uint8_t>(f.gpe0_length * 8), f.gpe0});
  set_register(244, f.sleep_control);
  set_register(256, f.sleep_status);
  std::vector<AcpiTables::Field> pointers = {{kDsdtOffset, 4}, {kX86DsdtOffset, 8}};
  if (f.facs || !(f.flags & Fadt::kHwReduced)) pointers.push_back({kFacsOffset, 4});
  return tables.Add("FACP", 6, t, pointers);
}

}  // namespace kvartz::machine
