#include "vmm/qmp/qmp_monitor.h"

#include <fmt/core.h>

#include <boost/json/parse.hpp>
#include <cstring>

#include "base/fiber.h"
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
  ++session_;
  items_.clear();
  parser_.reset();
  command_bytes_ = 0;
  skip_line_ = negotiated_ = false;
  SendValue(json::object{
      {"QMP", json::object{{"version", QmpVersion()}, {"capabilities", json::array()}}}});
}

void QmpMonitor::CharEventArrived(host::CharEvent event) {
  if (event == host::CharEvent::kOpened) Begin();
  if (event == host::CharEvent::kClosed) {
    ++session_;
    items_.clear();
    negotiated_ = false;
  }
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
      Item item{parser_.release(), ""};
      parser_.reset();
      command_bytes_ = 0;
      Take(std::move(item));
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
  Take({nullptr, fmt::format("malformed JSON: {}", why)});
}

void QmpMonitor::Take(Item item) {
  items_.push_back(std::move(item));
  // Input may also come while an event of a job's fiber is written out.
  if (!Fiber::Inside()) return HandleItems();
  Fiber::Start([] {}, [this] { HandleItems(); });
}

void QmpMonitor::HandleItems() {
  if (std::exchange(handling_, true)) return;
  while (!busy_ && !items_.empty()) {
    Item item = std::move(items_.front());
    items_.pop_front();
    if (item.malformed.empty()) {
      Handle(item.request);
    } else {
      ReplyError(kGenericError, item.malformed, nullptr);
    }
  }
  handling_ = false;
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
  Execute(execute->as_string(), given ? given->as_object() : json::object(), id);
}

void QmpMonitor::Execute(std::string_view name, json::object arguments, const json::value* id) {
  if (name == "qmp_capabilities") return Negotiate(arguments, id);
  if (!negotiated_) {
    return ReplyError(kCommandNotFound,
                      fmt::format("'{}' comes too early: begin with qmp_capabilities", name), id);
  }
  const QmpCommand* command = FindQmpCommand(name);
  if (!command)
    return ReplyError(kCommandNotFound, fmt::format("there is no command '{}'", name), id);
  if (Result<> checked = CheckQmpMembers(command->arguments, arguments); !checked) {
    return ReplyError(kGenericError, checked.error().what, id);
  }
  if (command->where == QmpCommand::Where::kLoop)
    return Answer(*command, command->run(vm_, arguments), id);
  Start(*command, std::move(arguments), id);
}

void QmpMonitor::Negotiate(const json::object& arguments, const json::value* id) {
  if (negotiated_)
    return ReplyError(kCommandNotFound, "capabilities have been negotiated already", id);
  const json::value* enable = arguments.if_contains("enable");
  if (arguments.size() > (enable ? 1 : 0) ||
      (enable && (!enable->is_array() || !enable->as_array().empty()))) {
    return ReplyError(kGenericError, "there are no capabilities that could be enabled", id);
  }
  negotiated_ = true;
  Reply(json::object{{"return", json::object()}}, id);
}

void QmpMonitor::Start(const QmpCommand& command, json::object arguments, const json::value* id) {
  struct Run {
    json::object arguments;
    json::value id;
    bool has_id;
    uint64_t session;
    Result<json::value> result;
  };
  auto run = std::make_shared<Run>(
      Run{std::move(arguments), id ? *id : json::value(), id != nullptr, session_, json::value()});
  busy_ = true;
  Fiber::Start([this, run, &command] { run->result = command.run(vm_, run->arguments); },
               [this, run, &command] {
                 busy_ = false;
                 if (run->session == session_)
                   Answer(command, std::move(run->result), run->has_id ? &run->id : nullptr);
                 HandleItems();
                 if (!busy_) port().AcceptInput();
               });
}

void QmpMonitor::Answer(const QmpCommand& command, Result<json::value> result,
                        const json::value* id) {
  if (result) return Reply(json::object{{"return", std::move(*result)}}, id);
  const Error& error = result.error();
  ReplyError(error.code == ErrorCode::kNotFound ? command.not_found_class : kGenericError,
             error.what, id);
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
