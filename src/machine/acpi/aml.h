// A builder for ACPI machine language: each function gives the bytes of one term. ACPI 6.4, ch. 20
// (AML); 6.4 (resources).
//
//   Bytes dsdt = Scope("\\_SB_", {Device("PWRB", {Name("_HID", EisaId("PNP0C0C")), Name("_UID",
//   Integer(0))})});
//
// Names are paths of segments of four characters, as in AML ("\\_SB_.PCI0").
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string_view>
#include <vector>

namespace kvartz::machine::aml {

using Bytes = std::vector<uint8_t>;
// Terms in sequence; from a braced list or a vector.
using Terms = std::vector<Bytes>;

Bytes Concat(const Terms& terms);

// Data.
Bytes Integer(uint64_t value);
Bytes String(std::string_view text);
Bytes Buffer(const Bytes& data);
Bytes Package(const Terms& elements);
Bytes EisaId(std::string_view id);  // "PNP0A03"

// Named objects.
Bytes Path(std::string_view path);
Bytes Name(std::string_view path, const Bytes& object);
Bytes Scope(std::string_view path, const Terms& body);
Bytes Device(std::string_view name, const Terms& body);
enum class Serialized { kNo, kYes };
Bytes Method(std::string_view name, unsigned arguments, Serialized serialized, const Terms& body);
enum class RegionSpace : uint8_t { kMemory = 0, kIo = 1, kPciConfig = 2 };
Bytes OperationRegion(std::string_view name, RegionSpace space, uint64_t offset, uint64_t length);
struct FieldUnit {
  std::string_view name;  // empty: reserved
  unsigned bits;
};
enum class FieldAccess : uint8_t { kAny = 0, kByte = 1, kWord = 2, kDword = 3 };
Bytes Field(std::string_view region, FieldAccess access, const std::vector<FieldUnit>& units);

// Statements and expressions.
Bytes Arg(unsigned index);
Bytes Local(unsigned index);
Bytes Return(const Bytes& value);
Bytes Store(const Bytes& value, const Bytes& target);
Bytes And(const Bytes& a, const Bytes& b);  // without a target
Bytes Or(const Bytes& a, const Bytes& b, const Bytes& target);
Bytes Equal(const Bytes& a, const Bytes& b);
Bytes If(const Bytes& predicate, const Terms& body);
Bytes CreateDwordField(const Bytes& buffer, unsigned offset, std::string_view name);
Bytes Notify(std::string_view object, uint8_t value);

// Resource templates.
Bytes Resources(const Terms& descriptors);
Bytes IoPorts(uint16_t base, uint8_t length);
Bytes IrqNoFlags(unsigned irq);
enum class Trigger : uint8_t { kLevel, kEdge };
enum class Sharing : uint8_t { kExclusive, kShared };
// Active high. One or several choices.
Bytes Interrupts(Trigger trigger, Sharing sharing, const std::vector<uint32_t>& gsis);
Bytes Memory32Fixed(uint32_t base, uint32_t length);
// Windows that a bridge hands on.
Bytes BusNumbers(uint16_t first, uint16_t last);
Bytes IoWindow(uint16_t first, uint16_t last);
enum class Cacheable : uint8_t { kNo, kYes };
Bytes MemoryWindow32(uint32_t first, uint32_t last, Cacheable cacheable);
Bytes MemoryWindow64(uint64_t first, uint64_t last, Cacheable cacheable);

}  // namespace kvartz::machine::aml
