// JSON as QMP peers print it: ", " and ": " between, or indented.
#pragma once

#include <boost/json/value.hpp>
#include <string>

namespace kvartz::vmm {

enum class JsonStyle { kLine, kIndented };
std::string JsonText(const boost::json::value& value, JsonStyle style);

}  // namespace kvartz::vmm
