// The commands of QMP: one row each, with typed arguments.
#pragma once

#include <boost/json/object.hpp>
#include <boost/json/value.hpp>
#include <span>
#include <string_view>

#include "base/result.h"
#include "vmm/qmp/qmp_schema.h"

namespace kvartz::vmm {

class Vm;

struct QmpCommand {
  const char* name;
  std::span<const QmpMember> arguments;
  // What it returns; {} where there is nothing to say. `arguments` has been checked against the
  // row.
  Result<boost::json::value> (*run)(Vm& vm, const boost::json::object& arguments);
  // kFiber: it runs in a fiber, may wait, and others of the same monitor come after it. kLoop: it
  // runs at once.
  enum class Where { kLoop, kFiber } where = Where::kLoop;
  // The class of its kNotFound errors, where clients tell those from others.
  const char* not_found_class = "GenericError";
};

inline Result<boost::json::value> Done() { return boost::json::object(); }

// All of them, table by table.
std::span<const std::span<const QmpCommand>> QmpCommandTables();
// Null: there is no such command.
const QmpCommand* FindQmpCommand(std::string_view name);

// {"qemu": {"major": ...}, "package": ...}: the protocol's level in that field's terms, and what we
// are.
boost::json::object QmpVersion();

}  // namespace kvartz::vmm
