// What -d op says of a unit: what the translator made of each instruction, and where memory is
// checked.
#pragma once

#include <cstdint>

#include "base/log.h"
#include "cpu/x86/cpu.h"
#include "cpu/x86/jit/unit.h"

namespace kvartz::cpu::x86::jit {

inline bool LogsUnits() { return log::CategoryEnabled(log::Category::kOp); }

// `page`: RIP where the unit's page begins. `mode`: mode.h. `exits`: branches out of it that can be
// linked. The unit has just been translated.
void LogUnit(const Cpu& cpu, uint64_t page, const Unit& unit, uint16_t mode, unsigned exits);

}  // namespace kvartz::cpu::x86::jit
