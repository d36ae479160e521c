#include "vmm/qmp/qmp_monitor.h"

#include <fmt/core.h>

#include <boost/json/parse.hpp>
#include <cstring>

#include "vmm/qmp/json_text.h"
#include "vmm/qmp/qmp_commands.h"

namespace kvartz::vmm {
namespace {

namespace json = boost::json;

constexpr const char* kGenericError = "GenericError";
constexpr const char* kCommandNotFound = "CommandNotFound";

json::parse_options Limits(unsigned depth) {
  json::parse_options options;
  options.max_depth = depth;
  return options;
}

}  // namespace

QmpMonitor::QmpMonitor(Vm& vm, bool pretty)
    : vm_(vm), pretty_(pretty), parser_({}, Limits(kDepthMax)) {
  vm_.AddObserver(this);
}

QmpMonitor::~QmpMonitor() { vm_.RemoveObserver(this); }

void QmpMonitor::Begin() {
  DropOutput();
  parser_.reset();
  command_bytes_ = 0;
  skip_line_ = negotiated_ = false;
  SendValue(json::object{
      {"QMP", json::object{{"version", QmpVersion()}, {"capabilities", json::array()}}}});
}

void QmpMonitor::CharEventArrived(host::CharEvent event) {
  if (event == host::CharEvent::kOpened) Begin();
  if (event == host::CharEvent::kClosed) negotiated_ = false;
}

void QmpMonitor::Receive(std::span<const uint8_t> data) {
  const char* text = reinterpret_cast<const char*>(data.data());
  size_t left = data.size();
  while (left > 0) {
    if (skip_line_) {
      const void* end = std::memchr(text, '\n', left);
      size_t skipped = end ? static_cast<size_t>(static_cast<const char*>(end) - text) + 1 : left;
      skip_line_ = !end;
      text += skipped;
      left -= skipped;
      continue;
    }
    json::error_code error;
    size_t used = parser_.write_some(text, left, error);
    command_bytes_ += used;
    text += used;
    left -= used;
    if (error) {
      Malformed(error.message());
    } else if (parser_.done()) {
      json::value request = parser_.release();
      parser_.reset();
      command_bytes_ = 0;
      Handle(request);
    } else if (command_bytes_ > kCommandMax) {
      Malformed(fmt::format("more than {} bytes", kCommandMax));
    }
  }
}

// The rest of the line can't be told from commands: it goes.
void QmpMonitor::Malformed(std::string_view why) {
  parser_.reset();
  command_bytes_ = 0;
  skip_line_ = true;
  ReplyError(kGenericError, fmt::format("malformed JSON: {}", why), nullptr);
}

void QmpMonitor::Handle(const json::value& request) {
  const json::object* object = request.if_object();
  if (!object) return ReplyError(kGenericError, "a command must be an object", nullptr);
  const json::value* id = object->if_contains("id");
  const json::value* execute = object->if_contains("execute");
  const json::value* given = object->if_contains("arguments");
  for (const auto& field : *object) {
    if (field.key() == "execute" || field.key() == "arguments" || field.key() == "id") continue;
    return ReplyError(
        kGenericError,
        fmt::format("member '{}' of the command is unexpected", std::string_view(field.key())), id);
  }
  if (!execute || !execute->is_string())
    return ReplyError(kGenericError, "'execute' must be a string", id);
  if (given && !given->is_object())
    return ReplyError(kGenericError, "'arguments' must be an object", id);
  json::object arguments = given ? given->as_object() : json::object();
  std::string_view name(execute->as_string());

  if (name == "qmp_capabilities") {
    if (negotiated_)
      return ReplyError(kCommandNotFound, "capabilities have been negotiated already", id);
    const json::value* enable = arguments.if_contains("enable");
    if (arguments.size() > (enable ? 1 : 0) ||
        (enable && (!enable->is_array() || !enable->as_array().empty()))) {
      return ReplyError(kGenericError, "there are no capabilities that could be enabled", id);
    }
    negotiated_ = true;
    return Reply(json::object{{"return", json::object()}}, id);
  }
  if (!negotiated_) {
    return ReplyError(kCommandNotFound,
                      fmt::format("'{}' comes too early: begin with qmp_capabilities", name), id);
  }
  const QmpCommand* command = FindQmpCommand(name);
  if (!command)
    return ReplyError(kCommandNotFound, fmt::format("there is no command '{}'", name), id);
  if (Result<> checked = CheckQmpArguments(*command, arguments); !checked) {
    return ReplyError(kGenericError, checked.error().what, id);
  }
  Result<json::value> result = command->run(vm_, arguments);
  if (!result) return ReplyError(kGenericError, result.error().what, id);
  Reply(json::object{{"return", std::move(*result)}}, id);
}

void QmpMonitor::Reply(json::object answer, const json::value* id) {
  if (id) answer["id"] = *id;
  SendValue(answer);
}

void QmpMonitor::ReplyError(const char* error_class, std::string_view text, const json::value* id) {
  Reply(json::object{{"error", json::object{{"class", error_class}, {"desc", text}}}}, id);
}

void QmpMonitor::VmEvent(std::string_view name, std::string_view data) {
  if (!negotiated_ || flooded()) return;
  int64_t now_us = HostRealtimeNs() / 1000;
  json::object event{{"timestamp", json::object{{"seconds", now_us / 1'000'000},
                                                {"microseconds", now_us % 1'000'000}}},
                     {"event", name}};
  if (!data.empty()) event["data"] = json::parse({data.data(), data.size()});
  SendValue(event);
}

void QmpMonitor::SendValue(const json::value& value) {
  Send(JsonText(value, pretty_ ? JsonStyle::kIndented : JsonStyle::kLine) + "\r\n");
}

}  // namespace kvartz::vmm
