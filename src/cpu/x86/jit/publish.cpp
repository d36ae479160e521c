// Who wants to know of translated code is told: the log (-d in_asm, op, out_asm) and perf's map.
#include <fmt/core.h>

#include "cpu/x86/code_log.h"
#include "cpu/x86/engine.h"
#include "cpu/x86/jit/engine.h"
#include "cpu/x86/jit/unit_log.h"

namespace kvartz::cpu::x86::jit {

// Stubs first.
void Engine::PublishStubs(const PerfMap& map) {
  map.Add(memory_.At(0).run(), stubs_end_, "kvartz-stubs");
}

// `block` was made from unit_ a moment ago, at Cpu::rip.
void Engine::Publish(const Block& block) const {
  const Cpu& c = state_.cpu;
  const size_t size = static_cast<size_t>(block.end - block.entries.checked);
  if (LogsGuestCode()) {
    LogGuestCode(c, "unit", c.rip, unit_.count());
    for (unsigned i = 0; i < unit_.count(); ++i)
      LogGuestInsn(c, c.rip - block.offset + unit_[i].offset, unit_[i].insn);
  }
  if (LogsUnits()) LogUnit(c, c.rip - block.offset, unit_, block.mode, block.exit_count);
  if (LogsHostCode()) LogHostCode(c, c.rip, {block.entries.checked, size});
  const PerfMap* map = c.vcpu == nullptr ? nullptr : c.vcpu->accel().perf_map();
  if (map != nullptr) map->Add(block.entries.checked, size, fmt::format("guest:{:#x}", c.rip));
}

}  // namespace kvartz::cpu::x86::jit
