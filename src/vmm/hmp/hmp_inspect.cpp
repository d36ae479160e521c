#include "vmm/hmp/hmp_inspect.h"

#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <optional>

#include "memory/guest_memory.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

constexpr uint64_t kDumpMax = 4096;  // units

// Parks the CPUs while it lives.
class Parked {
 public:
  explicit Parked(Vm& vm) : vm_(vm), was_running_(vm.vcpus().running()) { vm_.vcpus().PauseAll(); }
  ~Parked() {
    if (was_running_) vm_.vcpus().ResumeAll();
  }

 private:
  Vm& vm_;
  const bool was_running_;
};

Result<cpu::X86State> StateOf(Vm& vm, unsigned index) {
  cpu::X86State state;
  TRY(vm.board().vcpu(index).GetState(&state));
  return state;
}

std::string SegmentText(const char* name, const cpu::Segment& segment) {
  return fmt::format("{:4}={:04x} {:016x} {:08x} {:08x}\n", name, segment.selector, segment.base,
                     segment.limit, segment.attributes);
}

std::string RegistersText(unsigned index, const cpu::X86State& s) {
  static constexpr const char* kNames[] = {"RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI",
                                           "R8 ", "R9 ", "R10", "R11", "R12", "R13", "R14", "R15"};
  static constexpr const char* kSegments[] = {"ES", "CS", "SS", "DS", "FS", "GS"};
  std::string text = fmt::format("\nCPU#{}\n", index);
  for (unsigned i = 0; i < 16; ++i)
    text += fmt::format("{}={:016x}{}", kNames[i], s.gpr[i], i % 4 == 3 ? "\n" : " ");
  text += fmt::format("RIP={:016x} RFL={:08x} CPL={} HLT={}\n", s.rip, s.rflags,
                      s.seg[cpu::kCs].selector & 3, s.mp_state == cpu::MpState::kHalted ? 1 : 0);
  for (unsigned i = 0; i < cpu::kSegCount; ++i) text += SegmentText(kSegments[i], s.seg[i]);
  text += SegmentText("LDT", s.ldtr) + SegmentText("TR", s.tr);
  text += fmt::format("GDT =     {:016x} {:08x}\nIDT =     {:016x} {:08x}\n", s.gdtr.base,
                      s.gdtr.limit, s.idtr.base, s.idtr.limit);
  text +=
      fmt::format("CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x}\n", s.cr0, s.cr2, s.cr3, s.cr4);
  text += fmt::format("DR0={:016x} DR1={:016x} DR2={:016x} DR3={:016x}\n", s.dr[0], s.dr[1],
                      s.dr[2], s.dr[3]);
  text += fmt::format("DR6={:016x} DR7={:016x}\nEFER={:016x}\n", s.dr[6], s.dr[7], s.efer);
  return text;
}

void ViewText(const AddressSpace& space, std::string* text) {
  *text += fmt::format("address space: {}\n", space.name());
  static constexpr const char* kKinds[] = {"ram", "rom", "i/o"};
  for (const FlatRange& range : space.view()->ranges()) {
    *text += fmt::format("  {:016x}-{:016x} ({}): {}", range.base, range.end() - 1,
                         kKinds[static_cast<unsigned>(range.region->kind)], range.region->name);
    if (range.region_offset) *text += fmt::format(" @{:016x}", range.region_offset);
    *text += "\n";
  }
}

// SDM vol. 3 ch. 4: the linear address under the CPU's present paging. Reads only; sets no accessed
// bits.
std::optional<uint64_t> Translate(GuestMemory& memory, const cpu::X86State& s, uint64_t address) {
  constexpr uint64_t kPg = 1u << 31, kPae = 1u << 5, kPse = 1u << 4, kLa57 = 1u << 12,
                     kLma = 1u << 10;
  constexpr uint64_t kPresent = 1, kLarge = 1 << 7, kFrame = 0x000ffffffffff000;
  if (!(s.cr0 & kPg)) return address;
  if (!(s.cr4 & kPae)) {
    uint32_t entry = 0;
    if (!memory.ReadObject(Gpa((s.cr3 & 0xfffff000) + (address >> 22 & 0x3ff) * 4), &entry) ||
        !(entry & kPresent))
      return {};
    if ((entry & kLarge) && (s.cr4 & kPse))
      return (entry & 0xffc00000) | (uint64_t{entry & 0x1fe000} << 19) | (address & 0x3fffff);
    if (!memory.ReadObject(Gpa((entry & 0xfffff000) + (address >> 12 & 0x3ff) * 4), &entry) ||
        !(entry & kPresent))
      return {};
    return (entry & 0xfffff000) | (address & 0xfff);
  }
  bool long_mode = s.efer & kLma;
  int level = !long_mode ? 3 : s.cr4 & kLa57 ? 5 : 4;
  uint64_t table = long_mode ? s.cr3 & kFrame : s.cr3 & 0xffffffe0;
  for (; level > 0; --level) {
    int shift = 12 + 9 * (level - 1);
    uint64_t entry = 0;
    uint64_t index = address >> shift & (!long_mode && level == 3 ? 3 : 0x1ff);
    if (!memory.ReadObject(Gpa(table + index * 8), &entry) || !(entry & kPresent)) return {};
    table = entry & kFrame;
    uint64_t page_mask = (uint64_t{1} << shift) - 1;
    if (level == 1 || (level <= 3 && (entry & kLarge) && !(level == 3 && !long_mode))) {
      return (table & ~page_mask) | (address & page_mask);
    }
  }
  return {};
}

struct DumpFormat {
  uint64_t count = 1;
  char base = 'x';
  unsigned size = 4;
};

Result<std::pair<DumpFormat, uint64_t>> ParseDump(std::string_view text) {
  DumpFormat format;
  auto skip_spaces = [&] {
    text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
  };
  skip_spaces();
  if (text.starts_with('/')) {
    text.remove_prefix(1);
    auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), format.count);
    if (error == std::errc()) text.remove_prefix(static_cast<size_t>(end - text.data()));
    for (; !text.empty() && text.front() != ' ' && text.front() != '\t'; text.remove_prefix(1)) {
      char c = text.front();
      constexpr std::string_view kSizes = "bhwg";
      if (std::string_view("oxduc").find(c) != std::string_view::npos) {
        format.base = c;
        if (c == 'c') format.size = 1;
      } else if (size_t at = kSizes.find(c); at != std::string_view::npos) {
        format.size = 1u << at;
      } else {
        return Fail(ErrorCode::kInvalid,
                    fmt::format("format '{}': known are o x d u c and b h w g", c));
      }
    }
  }
  skip_spaces();
  if (text.starts_with("0x")) text.remove_prefix(2);
  uint64_t address = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), address, 16);
  if (error != std::errc() || format.count > kDumpMax) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("needed: /FMT and a hexadecimal address, at most {} units", kDumpMax));
  }
  return std::pair(format, address);
}

std::string UnitText(const DumpFormat& format, uint64_t value) {
  int64_t extended =
      static_cast<int64_t>(value << (64 - format.size * 8)) >> (64 - format.size * 8);
  switch (format.base) {
    case 'o':
      return fmt::format("0{:o}", value);
    case 'd':
      return fmt::format("{}", extended);
    case 'u':
      return fmt::format("{}", value);
    case 'c':
      return value >= 0x20 && value < 0x7f ? fmt::format("'{}'", static_cast<char>(value))
                                           : fmt::format("'\\x{:02x}'", value);
    default:
      return fmt::format("0x{:0{}x}", value, format.size * 2);
  }
}

enum class Space { kVirtual, kPhysical };

std::string Dump(HmpContext& context, std::string_view arguments, Space space) {
  auto parsed = ParseDump(arguments);
  if (!parsed) return "Error: " + parsed.error().what + "\n";
  auto [format, address] = *parsed;
  Parked parked(context.vm);
  Result<cpu::X86State> state = StateOf(context.vm, context.cpu);
  if (!state) return "Error: " + state.error().what + "\n";
  GuestMemory memory(context.vm.board().memory());
  unsigned per_line = format.base == 'c' ? 8 : std::max(1u, 16 / format.size);
  std::string text;
  for (uint64_t i = 0; i < format.count; ++i, address += format.size) {
    if (i % per_line == 0) text += fmt::format("{}{:016x}:", i ? "\n" : "", address);
    uint64_t value = 0;
    for (unsigned byte = 0; byte < format.size; ++byte) {
      std::optional<uint64_t> physical = address + byte;
      if (space == Space::kVirtual) physical = Translate(memory, *state, address + byte);
      uint8_t one = 0;
      if (!physical || !memory.Read(Gpa(*physical), &one, 1))
        return text + "\nError: no memory there\n";
      value |= uint64_t{one} << (8 * byte);
    }
    text += " " + UnitText(format, value);
  }
  return text + "\n";
}

}  // namespace

std::string InfoRegisters(HmpContext& context, std::string_view arguments) {
  bool all = arguments.find("-a") != std::string_view::npos;
  Parked parked(context.vm);
  std::string text;
  for (unsigned i = 0; i < context.vm.board().vcpu_count(); ++i) {
    if (!all && i != context.cpu) continue;
    Result<cpu::X86State> state = StateOf(context.vm, i);
    text += state ? RegistersText(i, *state) : "Error: " + state.error().what + "\n";
  }
  return text;
}

Result<std::string> JitText(Vm& vm) {
  Parked parked(vm);
  std::string text;
  for (unsigned i = 0; i < vm.board().vcpu_count(); ++i) {
    text += fmt::format("{}CPU#{}\n", i == 0 ? "" : "\n", i);
    for (const cpu::EngineStatistic& row : TRY(vm.board().vcpu(i).JitStatistics()))
      text += fmt::format("{:26}{:14}  {}\n", row.name, row.value, row.meaning);
  }
  return text;
}

std::string InfoJit(HmpContext& context, std::string_view) {
  Result<std::string> text = JitText(context.vm);
  return text ? *text : "Error: " + text.error().what + "\n";
}

std::string InfoMtree(HmpContext& context, std::string_view) {
  std::string text;
  ViewText(context.vm.board().memory(), &text);
  ViewText(context.vm.board().ports(), &text);
  return text;
}

std::string DumpVirtual(HmpContext& context, std::string_view arguments) {
  return Dump(context, arguments, Space::kVirtual);
}
std::string DumpPhysical(HmpContext& context, std::string_view arguments) {
  return Dump(context, arguments, Space::kPhysical);
}

}  // namespace kvartz::vmm
