#include "cpu/x86/jit/mode.h"

#include <algorithm>

namespace kvartz::cpu::x86::jit {
namespace {

// Without XSAVE x87 is left to the interpreter.
bool HostHasAvx() { return __builtin_cpu_supports("avx") != 0; }

uint16_t Legacy(const Cpu& cpu) {
  constexpr unsigned kData = 1 << kEs | 1 << kSs | 1 << kDs;
  const Segment& cs = cpu.seg[kCs];
  unsigned bits = cpu.code_mode == CodeMode::k16 ? mode::kCode16 : mode::kCode32;
  if (!cpu.protected_mode() || cpu.virtual_8086()) bits |= mode::kReal;
  if (cpu.stack_size == 4) bits |= mode::kStack32;
  if ((cpu.flat_read & cpu.flat_write & kData) == kData) bits |= mode::kFlat;
  if (cs.base == 0 && cs.limit == 0xffffffff) bits |= mode::kCodeFlat;
  if ((cs.base & 0xfff) == 0) bits |= mode::kCodeAligned;
  return static_cast<uint16_t>(bits);
}

}  // namespace

bool CodePageFits(const Cpu& cpu, uint64_t linear) {
  if (cpu.code_mode == CodeMode::k64) return true;
  const int64_t last = cpu.code_mode == CodeMode::k16
                           ? std::min<int64_t>(cpu.seg[kCs].limit, 0xffff)
                           : cpu.seg[kCs].limit;
  return static_cast<int64_t>(cpu.rip - (linear & 0xfff) + 0xfff) <= last;
}

uint16_t ModeOf(const Cpu& cpu) {
  const bool busy = (cpu.cr0 & cr0::kTs) != 0;
  const bool sse = !busy && !(cpu.cr0 & cr0::kEm) && (cpu.cr4 & cr4::kOsfxsr);
  const bool avx = !busy && (cpu.cr4 & cr4::kOsxsave) && (cpu.xcr0 & 6) == 6;
  // Without CR0.NE a pending exception does nothing.
  const bool x87 = HostHasAvx() && (cpu.cr0 & (cr0::kTs | cr0::kEm | cr0::kNe)) == cr0::kNe;
  return static_cast<uint16_t>((cpu.cpl == 3 ? mode::kUser : 0) |
                               cpu.tlb->data_class() << mode::kClassShift | (sse ? mode::kSse : 0) |
                               (avx ? mode::kAvx : 0) | (x87 ? mode::kX87 : 0) |
                               (cpu.code_mode == CodeMode::k64 ? 0 : Legacy(cpu)));
}

unsigned ClassOf(uint16_t mode) { return mode >> mode::kClassShift & 3; }

UnitMode UnitModeOf(uint16_t mode) {
  const auto has = [mode](uint16_t bit) { return (mode & bit) != 0; };
  UnitMode unit{.sse = has(mode::kSse),
                .avx = has(mode::kAvx),
                .x87 = has(mode::kX87),
                .supervisor = !has(mode::kUser)};
  if (!has(mode::kLegacy)) return unit;
  unit.code_size = has(mode::kCode32) ? 4 : 2;
  unit.stack_size = has(mode::kStack32) ? 4 : 2;
  unit.real = has(mode::kReal);
  unit.flat = has(mode::kFlat);
  unit.code_flat = has(mode::kCodeFlat);
  unit.code_aligned = has(mode::kCodeAligned);
  return unit;
}

DecodeContext DecodeContextOf(uint16_t mode, const FeatureSet& features) {
  return {.mode = (mode & mode::kCode16) != 0   ? CodeMode::k16
                  : (mode & mode::kCode32) != 0 ? CodeMode::k32
                                                : CodeMode::k64,
          .protected_mode = (mode & mode::kReal) == 0,
          .cpl = static_cast<uint8_t>((mode & mode::kUser) != 0 ? 3 : 0),
          .features = features};
}

}  // namespace kvartz::cpu::x86::jit
