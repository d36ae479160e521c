// Filter blkdebug: requests fail as they are told to. For tests.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <vector>

#include "block/driver.h"
#include "block/filters/filter_node.h"
#include "block/graph.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kSector = 512;
constexpr size_t kMostRules = 64;

struct Rule {
  std::optional<Request::Kind> kind = {};  // none: any
  std::optional<uint64_t> sector = {};     // requests that touch it
  bool once = false;
  int errno_value = EIO;
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
  FaultNode(NodePtr file, std::vector<Rule> rules)
      : FilterNode(std::move(file), "blkdebug"), rules_(std::move(rules)) {}

 private:
  static bool Matches(const Rule& rule, const Request& request) {
    if (rule.kind && *rule.kind != request.kind) return false;
    if (!rule.sector) return true;
    if (request.kind == Request::Kind::kFlush) return false;
    return *rule.sector >= request.offset / kSector &&
           *rule.sector * kSector < request.offset + request.length;
  }
  void Submit(Request* request) override {
    auto rule = std::find_if(rules_.begin(), rules_.end(),
                             [&](const Rule& each) { return Matches(each, *request); });
    if (rule == rules_.end()) return file_->Start(request);
    int error = rule->errno_value;
    if (rule->once) rules_.erase(rule);
    FinishLater(request, -error);
  }
  std::vector<Rule> rules_;
};

Result<Rule> TakeRule(Options& options) {
  Rule rule;
  std::string event = options.Take("event", "none");
  if (event != "none") {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: inject-error with event={} (say none)", event));
  }
  if (std::optional<std::string> kind = options.Take("iotype")) {
    const auto* found = std::find_if(std::begin(kKindNames), std::end(kKindNames),
                                     [&](const KindName& each) { return *kind == each.name; });
    if (found == std::end(kKindNames)) {
      return Fail(
          ErrorCode::kInvalid,
          fmt::format("iotype={}: it is read, write, write-zeroes, discard or flush", *kind));
    }
    rule.kind = found->kind;
  }
  if (options.Has("sector")) rule.sector = TRY(options.TakeNumber("sector", 0));
  if (rule.sector && *rule.sector > UINT64_MAX / kSector)
    return Fail(ErrorCode::kInvalid, "sector: it is too large");
  rule.once = TRY(options.TakeBool("once", false));
  TRY(options.TakeBool("immediately", false));  // errors never come from within a call
  uint64_t error = TRY(options.TakeNumber("errno", EIO));
  if (error == 0 || error > 4095) return Fail(ErrorCode::kInvalid, "errno: from 1 to 4095");
  rule.errno_value = static_cast<int>(error);
  TRY(options.RefuseRest("inject-error",
                         {"event", "iotype", "sector", "once", "immediately", "errno"}));
  return rule;
}

Result<NodePtr> OpenFault(const OpenEnv& env, const NodeOptions& node, Options& options) {
  std::vector<Rule> rules;
  for (size_t i = 0; rules.size() < kMostRules; i++) {
    Options rule = options.TakeBelow(fmt::format("inject-error.{}", i));
    if (rule.empty()) break;
    rules.push_back(TRY(TakeRule(rule)));
  }
  NodePtr file = TRY(OpenChild(env, options, "image", node));
  if (!file) return Fail(ErrorCode::kInvalid, "blkdebug needs 'image'");
  TRY(options.RefuseRest("blkdebug", {"image", "inject-error.0.iotype"}));
  return std::make_shared<FaultNode>(std::move(file), std::move(rules));
}

}  // namespace

extern const Driver kFaultDriver;
const Driver kFaultDriver = {.name = "blkdebug", .kind = Driver::Kind::kFilter, .open = OpenFault};

}  // namespace kvartz::block
