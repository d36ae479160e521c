#include "machine/acpi/aml.h"

#include "base/check.h"

namespace kvartz::machine::aml {

namespace {
// Opcodes, ACPI 6.4 table 20.4.
constexpr uint8_t kZero = 0x00, kOne = 0x01, kName = 0x08, kByte = 0x0a, kWord = 0x0b,
                  kDword = 0x0c, kString = 0x0d, kQword = 0x0e, kScope = 0x10, kBuffer = 0x11,
                  kPackage = 0x12, kMethod = 0x14, kDualName = 0x2e, kMultiName = 0x2f,
                  kExtended = 0x5b, kRoot = '\\', kParent = '^', kLocal0 = 0x60, kArg0 = 0x68,
                  kStore = 0x70, kAnd = 0x7b, kOr = 0x7d, kNotify = 0x86, kCreateDwordField = 0x8a,
                  kEqual = 0x93, kIf = 0xa0, kReturn = 0xa4;
constexpr uint8_t kExtRegion = 0x80, kExtField = 0x81, kExtDevice = 0x82;

void AppendLe(Bytes& out, uint64_t value, unsigned size) {
  for (unsigned i = 0; i < size; i++) out.push_back(value >> (8 * i));
}
void Append(Bytes& out, const Bytes& more) { out.insert(out.end(), more.begin(), more.end()); }

// PkgLength counts itself (20.2.4).
Bytes PackageLength(size_t body) {
  if (body + 1 < 0x40) return {static_cast<uint8_t>(body + 1)};
  for (unsigned extra = 1; extra <= 3; extra++) {
    size_t total = body + 1 + extra;
    if (total >= 1ull << (4 + 8 * extra)) continue;
    Bytes out = {static_cast<uint8_t>(extra << 6 | (total & 0xf))};
    AppendLe(out, total >> 4, extra);
    return out;
  }
  VERIFY(!"AML package too long");
}

Bytes Packed(Bytes head, const Bytes& body) {
  Append(head, PackageLength(body.size()));
  Append(head, body);
  return head;
}

// Length of a field in the encoding of PkgLength, which here doesn't count itself.
Bytes FieldLength(unsigned bits) {
  if (bits < 0x40) return {static_cast<uint8_t>(bits)};
  return {static_cast<uint8_t>(0x40 | (bits & 0xf)), static_cast<uint8_t>(bits >> 4)};
}

// Word, dword and qword address space descriptors (6.4.3.5).
Bytes Window(uint8_t tag, unsigned width, uint8_t type, uint8_t type_flags, uint64_t first,
             uint64_t last) {
  Bytes out = {tag};
  AppendLe(out, 3 + 5 * width, 2);
  out.push_back(type);
  out.push_back(0x0c);  // producer, positive decode, both ends fixed
  out.push_back(type_flags);
  AppendLe(out, 0, width);  // granularity
  AppendLe(out, first, width);
  AppendLe(out, last, width);
  AppendLe(out, 0, width);  // translation
  AppendLe(out, last - first + 1, width);
  return out;
}
constexpr uint8_t kWordWindow = 0x88, kDwordWindow = 0x87, kQwordWindow = 0x8a;
constexpr uint8_t kTypeMemory = 0, kTypeIo = 1, kTypeBus = 2;
uint8_t MemoryFlags(Cacheable cacheable) {
  return 0x01 | (cacheable == Cacheable::kYes ? 0x02 : 0);
}  // read and write
}  // namespace

Bytes Concat(const Terms& terms) {
  Bytes out;
  for (const Bytes& term : terms) Append(out, term);
  return out;
}

Bytes Integer(uint64_t value) {
  if (value == 0) return {kZero};
  if (value == 1) return {kOne};
  unsigned size = value <= 0xff ? 1 : value <= 0xffff ? 2 : value <= 0xffffffff ? 4 : 8;
  Bytes out = {size == 1 ? kByte : size == 2 ? kWord : size == 4 ? kDword : kQword};
  AppendLe(out, value, size);
  return out;
}

Bytes String(std::string_view text) {
  Bytes out = {kString};
  out.insert(out.end(), text.begin(), text.end());
  out.push_back(0);
  return out;
}

Bytes Buffer(const Bytes& data) {
  Bytes body = Integer(data.size());
  Append(body, data);
  return Packed({kBuffer}, body);
}

Bytes Package(const Terms& elements) {
  VERIFY(elements.size() <= 255);
  Bytes body = {static_cast<uint8_t>(elements.size())};
  Append(body, Concat(elements));
  return Packed({kPackage}, body);
}

Bytes EisaId(std::string_view id) {
  VERIFY(id.size() == 7);
  auto letter = [&](unsigned i) { return (id[i] - 'A' + 1) & 0x1f; };
  auto digit = [&](unsigned i) { return id[i] <= '9' ? id[i] - '0' : id[i] - 'A' + 10; };
  uint16_t maker = letter(0) << 10 | letter(1) << 5 | letter(2);
  Bytes out = {kDword, static_cast<uint8_t>(maker >> 8), static_cast<uint8_t>(maker)};
  out.push_back(digit(3) << 4 | digit(4));
  out.push_back(digit(5) << 4 | digit(6));
  return out;
}

Bytes Path(std::string_view path) {
  Bytes out;
  while (!path.empty() && (path[0] == kRoot || path[0] == kParent)) {
    out.push_back(path[0]);
    path.remove_prefix(1);
  }
  if (path.empty()) {
    out.push_back(0);
    return out;
  }
  size_t segments = (path.size() + 1) / 5;
  VERIFY(segments >= 1 && segments <= 255 && path.size() == segments * 5 - 1);
  if (segments == 2) out.push_back(kDualName);
  if (segments > 2) {
    out.push_back(kMultiName);
    out.push_back(segments);
  }
  for (size_t i = 0; i < segments; i++)
    out.insert(out.end(), path.begin() + i * 5, path.begin() + i * 5 + 4);
  return out;
}

Bytes Name(std::string_view path, const Bytes& object) {
  return Concat({{kName}, Path(path), object});
}

Bytes Scope(std::string_view path, const Terms& body) {
  return Packed({kScope}, Concat({Path(path), Concat(body)}));
}

Bytes Device(std::string_view name, const Terms& body) {
  return Packed({kExtended, kExtDevice}, Concat({Path(name), Concat(body)}));
}

Bytes Method(std::string_view name, unsigned arguments, Serialized serialized, const Terms& body) {
  uint8_t flags = arguments | (serialized == Serialized::kYes ? 8 : 0);
  return Packed({kMethod}, Concat({Path(name), {flags}, Concat(body)}));
}

Bytes OperationRegion(std::string_view name, RegionSpace space, uint64_t offset, uint64_t length) {
  return Concat({{kExtended, kExtRegion},
                 Path(name),
                 {static_cast<uint8_t>(space)},
                 Integer(offset),
                 Integer(length)});
}

Bytes Field(std::string_view region, FieldAccess access, const std::vector<FieldUnit>& units) {
  Bytes body = Path(region);
  body.push_back(static_cast<uint8_t>(access));  // no lock, preserve
  for (const FieldUnit& unit : units) {
    if (unit.name.empty()) {
      body.push_back(0);
    } else {
      Append(body, Path(unit.name));
    }
    Append(body, FieldLength(unit.bits));
  }
  return Packed({kExtended, kExtField}, body);
}

Bytes Arg(unsigned index) { return {static_cast<uint8_t>(kArg0 + index)}; }
Bytes Local(unsigned index) { return {static_cast<uint8_t>(kLocal0 + index)}; }
Bytes Return(const Bytes& value) { return Concat({{kReturn}, value}); }
Bytes Store(const Bytes& value, const Bytes& target) { return Concat({{kStore}, value, target}); }
Bytes And(const Bytes& a, const Bytes& b) { return Concat({{kAnd}, a, b, {kZero}}); }
Bytes Or(const Bytes& a, const Bytes& b, const Bytes& target) {
  return Concat({{kOr}, a, b, target});
}
Bytes Equal(const Bytes& a, const Bytes& b) { return Concat({{kEqual}, a, b}); }
Bytes If(const Bytes& predicate, const Terms& body) {
  return Packed({kIf}, Concat({predicate, Concat(body)}));
}
Bytes CreateDwordField(const Bytes& buffer, unsigned offset, std::string_view name) {
  return Concat({{kCreateDwordField}, buffer, Integer(offset), Path(name)});
}
Bytes Notify(std::string_view object, uint8_t value) {
  return Concat({{kNotify}, Path(object), Integer(value)});
}

Bytes Resources(const Terms& descriptors) {
  Bytes data = Concat(descriptors);
  data.push_back(0x79);  // end tag; a checksum of zero is taken for right (6.4.2.9)
  data.push_back(0x00);
  return Buffer(data);
}

Bytes IoPorts(uint16_t base, uint8_t length) {
  Bytes out = {0x47, 0x01};  // 16-bit decode
  AppendLe(out, base, 2);
  AppendLe(out, base, 2);
  out.push_back(1);
  out.push_back(length);
  return out;
}

Bytes IrqNoFlags(unsigned irq) {
  Bytes out = {0x22};
  AppendLe(out, 1u << irq, 2);
  return out;
}

Bytes Interrupts(Trigger trigger, Sharing sharing, const std::vector<uint32_t>& gsis) {
  Bytes out = {0x89};
  AppendLe(out, 2 + 4 * gsis.size(), 2);
  out.push_back(0x01 | (trigger == Trigger::kEdge ? 0x02 : 0) |
                (sharing == Sharing::kShared ? 0x08 : 0));  // consumer
  out.push_back(gsis.size());
  for (uint32_t gsi : gsis) AppendLe(out, gsi, 4);
  return out;
}

Bytes Memory32Fixed(uint32_t base, uint32_t length) {
  Bytes out = {0x86, 0x09, 0x00, 0x01};
  AppendLe(out, base, 4);
  AppendLe(out, length, 4);
  return out;
}

Bytes BusNumbers(uint16_t first, uint16_t last) {
  return Window(kWordWindow, 2, kTypeBus, 0, first, last);
}
Bytes IoWindow(uint16_t first, uint16_t last) {
  return Window(kWordWindow, 2, kTypeIo, 3, first, last);
}
Bytes MemoryWindow32(uint32_t first, uint32_t last, Cacheable cacheable) {
  return Window(kDwordWindow, 4, kTypeMemory, MemoryFlags(cacheable), first, last);
}
Bytes MemoryWindow64(uint64_t first, uint64_t last, Cacheable cacheable) {
  return Window(kQwordWindow, 8, kTypeMemory, MemoryFlags(cacheable), first, last);
}

}  // namespace kvartz::machine::aml
