// The commands of the human monitor: one row each.
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace kvartz::vmm {

class Vm;

struct HmpContext {
  Vm& vm;
  unsigned cpu = 0;  // whose registers and addresses are meant
};

struct HmpCommand {
  const char* name;
  const char* alias;  // or null
  const char* arguments;
  const char* help;
  // What is printed; lines end with "\n".
  std::string (*run)(HmpContext& context, std::string_view arguments);
  // kFiber: it may wait; kLoop: it mustn't be called within a fiber.
  enum class Where { kLoop, kFiber } where = Where::kLoop;
};

// All of them, table by table.
std::span<const std::span<const HmpCommand>> HmpCommandTables();
// Fiber: runs one line ("info status"). An empty line does nothing.
std::string RunHmpCommand(HmpContext& context, std::string_view line);

}  // namespace kvartz::vmm
