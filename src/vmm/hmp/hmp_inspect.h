// HMP's views into the machine: registers, memory, address maps.
#pragma once

#include <string>
#include <string_view>

#include "base/result.h"
#include "vmm/hmp/hmp_commands.h"

namespace kvartz::vmm {

// Handlers of HmpCommand.
std::string InfoRegisters(HmpContext& context, std::string_view arguments);
std::string InfoJit(HmpContext& context, std::string_view arguments);
std::string InfoMtree(HmpContext& context, std::string_view arguments);
std::string DumpVirtual(HmpContext& context, std::string_view arguments);
std::string DumpPhysical(HmpContext& context, std::string_view arguments);

// What InfoJit prints. Errors: the engine translates nothing.
Result<std::string> JitText(Vm& vm);

}  // namespace kvartz::vmm
