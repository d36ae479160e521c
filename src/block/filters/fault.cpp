// Filter blkdebug: requests fail as they are told to, at once or from an event on. For tests.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <utility>
#include <vector>

#include "block/driver.h"
#include "block/filters/filter_node.h"
#include "block/graph.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kSector = 512;
constexpr size_t kMostRules = 64;

// The first state; a rule of state 0 is for any.
constexpr uint64_t kFirstState = 1;

// inject-error: from its event on, requests fail.
struct Fault {
  DebugEvent event = DebugEvent::kNone;
  uint64_t state = 0;
  std::optional<Request::Kind> kind = {};  // none: any
  std::optional<uint64_t> sector = {};     // requests that touch it
  bool once = false;
  int errno_value = EIO;
  bool active = false;
};

// set-state
struct Transition {
  DebugEvent event = DebugEvent::kNone;
  uint64_t state = 0, new_state = 0;
};

struct KindName {
  const char* name;
  Request::Kind kind;
};
constexpr KindName kKindNames[] = {
    {"read", Request::Kind::kRead},
    {"write", Request::Kind::kWrite},
    {"flush", Request::Kind::kFlush},
    {"discard", Request::Kind::kDiscard},
    {"write-zeroes", Request::Kind::kWriteZeroes},
};

// Loop-owned.
class FaultNode final : public FilterNode {
 public:
  FaultNode(NodePtr file, std::vector<Fault> faults, std::vector<Transition> transitions)
      : FilterNode(std::move(file), "blkdebug"),
        faults_(std::move(faults)),
        transitions_(std::move(transitions)) {
    auto later = [](const auto& rule) { return rule.event != DebugEvent::kNone; };
    debugged_ = std::ranges::any_of(faults_, later) || std::ranges::any_of(transitions_, later);
    FaultNode::OnDebug(DebugEvent::kNone);
  }

 private:
  static bool Matches(const Fault& fault, const Request& request) {
    if (!fault.active || (fault.kind && *fault.kind != request.kind)) return false;
    if (!fault.sector) return true;
    if (request.kind == Request::Kind::kFlush) return false;
    return *fault.sector >= request.offset / kSector &&
           *fault.sector * kSector < request.offset + request.length;
  }
  // The faults of an event replace those of the one before. They are active until another event has
  // some, whatever the state becomes.
  void OnDebug(DebugEvent event) override {
    bool first = true;
    for (Fault& fault : faults_) {
      if (fault.event != event || (fault.state != 0 && fault.state != state_)) continue;
      if (std::exchange(first, false)) {
        for (Fault& other : faults_) other.active = false;
      }
      fault.active = true;
    }
    uint64_t next = state_;
    for (const Transition& transition : transitions_) {
      if (transition.event == event && (transition.state == 0 || transition.state == state_))
        next = transition.new_state;
    }
    state_ = next;
  }
  void Submit(Request* request) override {
    const bool writes = request->kind == Request::Kind::kWrite;
    if (debugged_ && writes) OnDebug(DebugEvent::kPwritev);
    if (debugged_ && request->kind == Request::Kind::kWriteZeroes)
      OnDebug(DebugEvent::kPwritevZero);
    auto fault = std::find_if(faults_.begin(), faults_.end(),
                              [&](const Fault& each) { return Matches(each, *request); });
    if (fault != faults_.end()) {
      int error = fault->errno_value;
      if (fault->once) faults_.erase(fault);
      return FinishLater(request, -error);
    }
    if (debugged_ && (writes || request->kind == Request::Kind::kWriteZeroes))
      return Handle(request);
    Pass(request);
  }
  int Process(Request& request) override {
    int rc = FilterNode::Process(request);
    OnDebug(DebugEvent::kPwritevDone);
    return rc;
  }
  std::vector<Fault> faults_;
  const std::vector<Transition> transitions_;
  uint64_t state_ = kFirstState;
};

Result<Fault> TakeFault(Options& options) {
  Fault fault;
  fault.event = TRY(ParseDebugEvent(options.Take("event", "none")));
  fault.state = TRY(options.TakeNumber("state", 0));
  if (std::optional<std::string> kind = options.Take("iotype")) {
    const auto* found = std::find_if(std::begin(kKindNames), std::end(kKindNames),
                                     [&](const KindName& each) { return *kind == each.name; });
    if (found == std::end(kKindNames)) {
      return Fail(
          ErrorCode::kInvalid,
          fmt::format("iotype={}: it is read, write, write-zeroes, discard or flush", *kind));
    }
    fault.kind = found->kind;
  }
  // -1, as QEMU's default has it: any.
  if (options.Has("sector") && options.all().at("sector").text == "-1") options.Take("sector");
  if (options.Has("sector")) fault.sector = TRY(options.TakeNumber("sector", 0));
  if (fault.sector && *fault.sector > UINT64_MAX / kSector)
    return Fail(ErrorCode::kInvalid, "sector: it is too large");
  fault.once = TRY(options.TakeBool("once", false));
  TRY(options.TakeBool("immediately", false));  // errors never come from within a call
  uint64_t error = TRY(options.TakeNumber("errno", EIO));
  if (error == 0 || error > 4095) return Fail(ErrorCode::kInvalid, "errno: from 1 to 4095");
  fault.errno_value = static_cast<int>(error);
  TRY(options.RefuseRest("inject-error",
                         {"event", "state", "iotype", "sector", "once", "immediately", "errno"}));
  return fault;
}

Result<Transition> TakeTransition(Options& options) {
  Transition transition;
  if (!options.Has("event") || !options.Has("new_state"))
    return Fail(ErrorCode::kInvalid, "set-state needs 'event' and 'new_state'");
  transition.event = TRY(ParseDebugEvent(options.Take("event", "none")));
  transition.state = TRY(options.TakeNumber("state", 0));
  transition.new_state = TRY(options.TakeNumber("new_state", 0));
  TRY(options.RefuseRest("set-state", {"event", "state", "new_state"}));
  return transition;
}

template <typename Rule>
Result<std::vector<Rule>> TakeRules(Options& options, const char* name,
                                    Result<Rule> (*take)(Options&)) {
  std::vector<Rule> rules;
  while (rules.size() < kMostRules) {
    Options rule = options.TakeBelow(fmt::format("{}.{}", name, rules.size()));
    if (rule.empty()) break;
    rules.push_back(TRY(take(rule)));
  }
  return rules;
}

Result<NodePtr> OpenFault(const OpenEnv& env, const NodeOptions& node, Options& options) {
  auto faults = TRY(TakeRules(options, "inject-error", TakeFault));
  auto transitions = TRY(TakeRules(options, "set-state", TakeTransition));
  for (const char* later : {"config", "align"}) {
    if (options.Has(later))
      return Fail(ErrorCode::kUnsupported, fmt::format("not supported yet: blkdebug's {}=", later));
  }
  NodePtr file = TRY(OpenChild(env, options, "image", node));
  if (!file) return Fail(ErrorCode::kInvalid, "blkdebug needs 'image'");
  TRY(options.RefuseRest("blkdebug", {"image", "inject-error.0.iotype", "set-state.0.event"}));
  return std::make_shared<FaultNode>(std::move(file), std::move(faults), std::move(transitions));
}

}  // namespace

extern const Driver kFaultDriver;
const Driver kFaultDriver = {.name = "blkdebug", .kind = Driver::Kind::kFilter, .open = OpenFault};

}  // namespace kvartz::block
