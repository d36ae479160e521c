#include "cpu/x86/jit/comparison.h"

#include <Zydis/Zydis.h>
#include <fmt/format.h>

#include <cstring>

namespace kvartz::cpu::x86::programs {
namespace {

class Comparison {
 public:
  void Number(const char* what, uint64_t first, uint64_t second) {
    if (first != second)
      text_ += fmt::format("  {}: interpreter {:#x} jit {:#x}\n", what, first, second);
  }
  void Bytes(const std::string& what, std::span<const uint8_t> first,
             std::span<const uint8_t> second) {
    if (std::memcmp(first.data(), second.data(), first.size()) == 0) return;
    text_ += fmt::format("  {}: interpreter {} jit {}\n", what, Hex(first), Hex(second));
  }

  void Ends(const End& first, const End& second) {
    Number("vector", static_cast<uint64_t>(first.vector), static_cast<uint64_t>(second.vector));
    Number("stopped", first.stopped, second.stopped);
    Number("triple fault", first.triple_fault, second.triple_fault);
    Number("error code", first.error, second.error);
    Number("rip at the end", first.rip, second.rip);
    Number("rsp at the end", first.rsp, second.rsp);
    Number("cs at the end", first.cs, second.cs);
    Number("ss at the end", first.ss, second.ss);
    Number("cr2", first.cr2, second.cr2);
  }

  void Cpus(const Cpu& first, const Cpu& second, uint64_t flags) {
    static const char* const kNames[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                         "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
    for (unsigned i = 0; i < 16; ++i) Number(kNames[i], first.gpr[i], second.gpr[i]);
    Number("rflags", first.rflags & flags, second.rflags & flags);
    static const char* const kSegments[] = {"es", "cs", "ss", "ds", "fs", "gs"};
    for (unsigned i = 0; i < kSegCount; ++i) {
      Number(kSegments[i], first.seg[i].selector, second.seg[i].selector);
      Number(kSegments[i], first.seg[i].base, second.seg[i].base);
    }
    Number("cr0", first.cr0, second.cr0);
    Number("cr3", first.cr3, second.cr3);
    Number("dr6", first.dr[6], second.dr[6]);
    Fpus(first.fpu, second.fpu);
  }

  void Memory(const ProgramBoard::Area& first, const ProgramBoard::Area& second) {
    const size_t size = first.bytes.size();
    if (std::memcmp(first.bytes.data(), second.bytes.data(), size) == 0) return;
    const bool table = first.linear == kPageTableLinear;
    // When an engine reads ahead it may mark a page as accessed.
    const auto differ = [&](size_t i) {
      const uint8_t difference = first.bytes[i] ^ second.bytes[i];
      return (table && i % 4 == 0 ? difference & ~0x20 : difference) != 0;
    };
    unsigned lines = 0;
    for (size_t i = 0; i < size && lines < 4; ++i) {
      if (!differ(i)) continue;
      i &= ~size_t{7};
      Bytes(fmt::format("{} at {:#x}", first.name, first.linear + i), first.bytes.subspan(i, 8),
            second.bytes.subspan(i, 8));
      i += 7;
      ++lines;
    }
  }

  const std::string& text() const { return text_; }

 private:
  static std::string Hex(std::span<const uint8_t> bytes) {
    std::string text;
    for (uint8_t byte : bytes) text += fmt::format("{:02x}", byte);
    return text;
  }

  void Fpus(const XsaveArea& first, const XsaveArea& second) {
    Number("fcw", first.fcw, second.fcw);
    Number("fsw", first.fsw, second.fsw);
    Number("ftw", first.ftw, second.ftw);
    Number("fop", first.fop, second.fop);
    Number("fip", first.fip, second.fip);
    Number("fdp", first.fdp, second.fdp);
    Number("mxcsr", first.mxcsr, second.mxcsr);
    Number("xstate_bv", first.xstate_bv, second.xstate_bv);
    for (unsigned i = 0; i < 8; ++i)
      Bytes(fmt::format("st{}", i), {first.st[i], 10}, {second.st[i], 10});
    for (unsigned i = 0; i < 16; ++i) {
      Bytes(fmt::format("xmm{}", i), first.xmm[i], second.xmm[i]);
      Bytes(fmt::format("ymm{} high", i), first.ymm_high[i], second.ymm_high[i]);
    }
  }

  std::string text_;
};

// Which status flags have a defined value at the end.
uint64_t DefinedFlags(const Image& image, const End& end) {
  const bool fault = end.triple_fault || (end.vector != -1 && end.vector != kEndVector);
  if (fault && !kCompareFaultFlags) return 0;
  uint64_t undefined = 0;
  for (const Image::Line& line : image.lines) {
    if (fault || line.end) undefined |= line.undefined;
  }
  return rflags::kStatus & ~undefined;
}

}  // namespace

std::string Compare(const Image& image, ProgramBoard& first, const End& first_end,
                    ProgramBoard& second, const End& second_end) {
  Comparison comparison;
  comparison.Ends(first_end, second_end);
  const uint64_t flags = ~rflags::kStatus | DefinedFlags(image, first_end);
  if (first_end.vector != -1)
    comparison.Number("saved rflags", first_end.rflags & flags, second_end.rflags & flags);
  comparison.Cpus(first.cpu(), second.cpu(), flags);
  // There may be halves of frames, with flags that nobody reads.
  const bool wrapped = first.cpu().stack_size == 2 && ((first_end.rsp + 64) & 0xffff) < 128;
  if (first_end.triple_fault || (wrapped && first_end.vector != kEndVector))
    return comparison.text();
  const auto areas = first.Areas(), others = second.Areas();
  for (size_t i = 0; i < areas.size(); ++i) comparison.Memory(areas[i], others[i]);
  return comparison.text();
}

std::string Describe(const Program& program) {
  static const char* const kShapes[] = {"64",          "compat32", "pae32",  "paged32",
                                        "flat32",      "paged16",  "real16", "segmented32",
                                        "unaligned16", "unreal16", "vm86"};
  return fmt::format(
      "seed {} shape {} cpl {}{}{}{}", program.seed, kShapes[static_cast<unsigned>(program.shape)],
      program.cpl, program.code_writable ? ", code writable" : "",
      program.high_half ? ", high half" : "", program.interrupted ? ", interrupted" : "");
}

std::string Disassemble(const Program& program, const Image& image) {
  const Layout layout = LayoutOf(program.shape);
  ZydisDecoder decoder;
  ZydisDecoderInit(&decoder,
                   layout.is64()   ? ZYDIS_MACHINE_MODE_LONG_64
                   : layout.is16() ? ZYDIS_MACHINE_MODE_LEGACY_16
                                   : ZYDIS_MACHINE_MODE_LEGACY_32,
                   layout.is64()   ? ZYDIS_STACK_WIDTH_64
                   : layout.is16() ? ZYDIS_STACK_WIDTH_16
                                   : ZYDIS_STACK_WIDTH_32);
  ZydisFormatter formatter;
  ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
  const uint64_t base =
      layout.code - layout.code_base + (program.high_half ? kHighHalf : uint64_t{0});
  std::string text;
  for (const Image::Line& line : image.lines) {
    for (uint64_t at = line.offset; at < line.offset + line.size;) {
      ZydisDecodedInstruction insn;
      ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];
      char shown[160] = "(bad)";
      uint64_t length = line.offset + line.size - at;
      if (ZYAN_SUCCESS(
              ZydisDecoderDecodeFull(&decoder, &image.code[at], length, &insn, operands))) {
        length = insn.length;
        ZydisFormatterFormatInstruction(&formatter, &insn, operands, insn.operand_count_visible,
                                        shown, sizeof(shown), base + at, nullptr);
      }
      std::string bytes;
      for (uint64_t i = 0; i < length; ++i) bytes += fmt::format("{:02x}", image.code[at + i]);
      text += fmt::format("  {}{:x}  {:30} {}\n", at == line.offset ? ' ' : '|', base + at, bytes,
                          shown);
      at += length;
    }
  }
  return text;
}

}  // namespace kvartz::cpu::x86::programs
