// What -d in_asm, op, out_asm and exec say: guest code as it is decoded to be run, the host code
// that it becomes, and when it runs. Each line names the CPU, so that several may be told apart.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "base/log.h"
#include "cpu/x86/cpu.h"
#include "cpu/x86/decode/insn.h"

namespace kvartz::cpu::x86 {

inline bool LogsGuestCode() { return log::CategoryEnabled(log::Category::kInAsm); }
inline bool LogsHostCode() { return log::CategoryEnabled(log::Category::kOutAsm); }
// Then units aren't linked: each is run from C++, and told of.
inline bool LogsExecution() { return log::CategoryEnabled(log::Category::kExec); }

// `what`: who will run it. `linear`: where it begins.
void LogGuestCode(const Cpu& cpu, const char* what, uint64_t linear, unsigned insn_count);
// One of its instructions: the bytes, and the row of the instruction tables that it matches.
void LogGuestInsn(const Cpu& cpu, uint64_t linear, const Insn& insn);
// The bytes as they are before anything is linked, at the addresses where they run.
void LogHostCode(const Cpu& cpu, uint64_t linear, std::span<const uint8_t> code);
// A line of -d op.
void LogOp(const Cpu& cpu, std::string_view text);
// `what` is about to run at RIP.
void LogExecution(const Cpu& cpu, const char* what);

}  // namespace kvartz::cpu::x86
