#include "vmm/qmp/json_text.h"

#include <boost/json/serialize.hpp>

namespace kvartz::vmm {
namespace {

namespace json = boost::json;

void Separate(JsonStyle style, bool first, int depth, std::string* out) {
  if (!first) *out += style == JsonStyle::kLine ? ", " : ",";
  if (style == JsonStyle::kIndented)
    *out += "\n" + std::string(static_cast<size_t>(depth) * 4, ' ');
}

// Recursion is bounded: values come from our own handlers, or from a parser with a limit on depth.
void Append(const json::value& value, JsonStyle style, int depth, std::string* out) {
  bool first = true;
  if (const json::object* object = value.if_object(); object && !object->empty()) {
    *out += '{';
    for (const auto& field : *object) {
      Separate(style, first, depth + 1, out);
      first = false;
      *out += json::serialize(json::string_view(field.key())) + ": ";
      Append(field.value(), style, depth + 1, out);
    }
    if (style == JsonStyle::kIndented) Separate(style, true, depth, out);
    *out += '}';
  } else if (const json::array* array = value.if_array(); array && !array->empty()) {
    *out += '[';
    for (const json::value& element : *array) {
      Separate(style, first, depth + 1, out);
      first = false;
      Append(element, style, depth + 1, out);
    }
    if (style == JsonStyle::kIndented) Separate(style, true, depth, out);
    *out += ']';
  } else {
    *out += json::serialize(value);
  }
}

}  // namespace

std::string JsonText(const json::value& value, JsonStyle style) {
  std::string text;
  Append(value, style, 0, &text);
  return text;
}

}  // namespace kvartz::vmm
