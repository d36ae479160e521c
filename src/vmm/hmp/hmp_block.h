// HMP on disks and jobs: a row each, most by the QMP command that does the same.
#pragma once

#include <span>

#include "vmm/hmp/hmp_commands.h"

namespace kvartz::vmm {

std::span<const HmpCommand> BlockInfos();
std::span<const HmpCommand> BlockHmpCommands();

}  // namespace kvartz::vmm
