// The commands of QMP: one row each, with typed arguments.
#pragma once

#include <boost/json/value.hpp>
#include <span>
#include <string_view>

#include "base/result.h"

namespace kvartz::vmm {

class Vm;

enum class QmpType { kString, kInt, kBool };

struct QmpArgument {
  const char* name;
  QmpType type;
  bool optional;
};

struct QmpCommand {
  const char* name;
  std::span<const QmpArgument> arguments;
  // What it returns; {} where there is nothing to say. `arguments` has been checked against the
  // row.
  Result<boost::json::value> (*run)(Vm& vm, const boost::json::object& arguments);
};

std::span<const QmpCommand> QmpCommands();
// Null: there is no such command.
const QmpCommand* FindQmpCommand(std::string_view name);
// Checks arguments against the row. Errors name the argument that is missing, unexpected or of
// another type.
Result<> CheckQmpArguments(const QmpCommand& command, const boost::json::object& arguments);

// {"qemu": {"major": ...}, "package": ...}: the protocol's level in that field's terms, and what we
// are.
boost::json::object QmpVersion();

}  // namespace kvartz::vmm
