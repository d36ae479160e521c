#include "cpu/x86/code_log.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "cpu/x86/engine.h"

namespace kvartz::cpu::x86 {
namespace {

constexpr size_t kBytesInLine = 32;

unsigned IndexOf(const Cpu& cpu) { return cpu.vcpu == nullptr ? 0 : cpu.vcpu->index(); }

std::string Hex(std::span<const uint8_t> bytes) {
  std::string text;
  for (const uint8_t byte : bytes)
    fmt::format_to(std::back_inserter(text), "{}{:02x}", text.empty() ? "" : " ", byte);
  return text;
}

}  // namespace

void LogGuestCode(const Cpu& cpu, const char* what, uint64_t linear, unsigned insn_count) {
  KLOG(kInfo, "in_asm: cpu {}: {} at {:#x}, {} instructions", IndexOf(cpu), what, linear,
       insn_count);
}

void LogGuestInsn(const Cpu& cpu, uint64_t linear, const Insn& insn) {
  const Row& row = *insn.row;
  KLOG(kInfo, "in_asm: cpu {}: {:#018x}: {:32}{}{}{}", IndexOf(cpu), linear, Hex(insn.code()),
       row.mnemonic, row.operand_count == 0 ? "" : " ", row.operand_text);
}

void LogHostCode(const Cpu& cpu, uint64_t linear, std::span<const uint8_t> code) {
  KLOG(kInfo, "out_asm: cpu {}: unit at {:#x}, {} bytes", IndexOf(cpu), linear, code.size());
  while (!code.empty()) {
    const size_t count = std::min(kBytesInLine, code.size());
    KLOG(kInfo, "out_asm: cpu {}: {:#x}: {}", IndexOf(cpu),
         reinterpret_cast<uintptr_t>(code.data()), Hex(code.first(count)));
    code = code.subspan(count);
  }
}

void LogOp(const Cpu& cpu, std::string_view text) {
  KLOG(kInfo, "op: cpu {}: {}", IndexOf(cpu), text);
}

void LogExecution(const Cpu& cpu, const char* what) {
  KLOG(kInfo, "exec: cpu {}: {} at {:#x}, CPL {}", IndexOf(cpu), what, cpu.rip, cpu.cpl);
}

}  // namespace kvartz::cpu::x86
