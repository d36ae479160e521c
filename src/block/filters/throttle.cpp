// Filter throttle: its requests keep to the limits of a group.
#include "block/throttle.h"

#include <fmt/format.h>

#include "block/driver.h"
#include "block/filters/filter_node.h"
#include "block/graph.h"

namespace kvartz::block {
namespace {

Result<std::shared_ptr<ThrottleGroup>> TakeGroup(const OpenEnv& env, Options& options) {
  std::string name = options.Take("throttle-group", "");
  if (name.empty()) return Fail(ErrorCode::kInvalid, "throttle needs 'throttle-group'");
  std::shared_ptr<ThrottleGroup> group = env.throttle_group ? env.throttle_group(name) : nullptr;
  if (group) return group;
  return Fail(ErrorCode::kNotFound,
              fmt::format("throttle-group={}: there is no such -object", name));
}

// Loop-owned.
class ThrottleNode final : public FilterNode {
 public:
  ThrottleNode(NodePtr file, std::shared_ptr<ThrottleGroup> group)
      : FilterNode(std::move(file), "throttle"), group_(std::move(group)) {
    Join();
  }
  Result<> MoveTo(EventLoop& loop) override {
    TRY(Node::MoveTo(loop));
    Join();
    return {};
  }
  Result<std::function<void()>> TakeChanges(const OpenEnv& env, Options& options) override {
    std::shared_ptr<ThrottleGroup> group = TRY(TakeGroup(env, options));
    if (group == group_) return nullptr;
    return [this, group] {
      group_ = group;
      Join();
    };
  }

 private:
  struct Line {
    Request *head = nullptr, *tail = nullptr;
  };
  using Direction = ThrottleGroup::Direction;

  void Join() {
    member_.reset();
    member_ = std::make_unique<ThrottleGroup::Member>(group_, loop(), [this] { StartWaiting(); });
  }
  static Direction DirectionOf(const Request& request) {
    return request.kind == Request::Kind::kRead ? Direction::kRead : Direction::kWrite;
  }
  static bool Limited(Request::Kind kind) {
    return kind != Request::Kind::kFlush && kind != Request::Kind::kDiscard;
  }

  void Submit(Request* request) override {
    if (!Limited(request->kind)) return Pass(request);
    Line& line = lines_[static_cast<size_t>(DirectionOf(*request))];
    if (!line.head && member_->Admit(DirectionOf(*request), request->length)) return Pass(request);
    request->next = nullptr;
    (line.tail ? line.tail->next : line.head) = request;
    line.tail = request;
  }
  Request* TakeFirst(Line& line) {
    Request* request = line.head;
    line.head = request->next;
    if (!line.head) line.tail = nullptr;
    return request;
  }
  void StartWaiting() {
    for (Line& line : lines_) {
      while (line.head && member_->Admit(DirectionOf(*line.head), line.head->length))
        Pass(TakeFirst(line));
    }
  }
  // While the machine stops there are no limits.
  void DrainMore() override {
    for (Line& line : lines_) {
      while (line.head) {
        Request* request = TakeFirst(line);
        member_->Count(DirectionOf(*request), request->length);
        Pass(request);
      }
    }
    member_->Withdraw();
  }

  std::shared_ptr<ThrottleGroup> group_;
  std::unique_ptr<ThrottleGroup::Member> member_;
  Line lines_[2];
};

Result<NodePtr> OpenThrottle(const OpenEnv& env, const NodeOptions& node, Options& options) {
  std::shared_ptr<ThrottleGroup> group = TRY(TakeGroup(env, options));
  NodePtr file = TRY(OpenChild(env, options, "file", node));
  if (!file) return Fail(ErrorCode::kInvalid, "throttle needs 'file'");
  TRY(options.RefuseRest("throttle", {"throttle-group", "file"}));
  return std::make_shared<ThrottleNode>(std::move(file), std::move(group));
}

}  // namespace

extern const Driver kThrottleDriver;
const Driver kThrottleDriver = {
    .name = "throttle", .kind = Driver::Kind::kFilter, .open = OpenThrottle};

}  // namespace kvartz::block
