// Registry: changes of the graph while it is in use.
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "base/check.h"
#include "base/log.h"
#include "block/dirty_bitmap.h"
#include "block/fiber_io.h"
#include "block/graph.h"
#include "block/registry.h"

namespace kvartz::block {
namespace {

constexpr uint32_t kSector = 512;

std::string NameOfNode(const Node& node) { return fmt::format("node '{}'", node.node_name()); }

// A device has told its guest what requests must look like.
Result<> CheckFits(const Node& from, const Node& to, const NodeUser& user) {
  if (to.limits().request_alignment <= std::max(kSector, from.limits().request_alignment))
    return {};
  return Fail(ErrorCode::kUnsupported,
              fmt::format("'{}' takes requests in units of {} bytes only, smaller ones are used by "
                          "{}",
                          to.name(), to.limits().request_alignment, user.UserName()));
}

bool Contains(std::initializer_list<const Node*> nodes, const Node* node) {
  return std::find(nodes.begin(), nodes.end(), node) != nodes.end();
}

std::string RealPath(const std::string& name) {
  std::unique_ptr<char, decltype(&free)> path(realpath(name.c_str(), nullptr), &free);
  return path ? path.get() : "";
}

// Names in an image count from its directory, the nodes' from ours.
std::string NameForImage(const Node& overlay, const Node& backing) {
  std::string path = RealPath(backing.name());
  if (path.empty()) return backing.name();  // no file
  const std::string& name = overlay.name();
  size_t slash = name.rfind('/');
  std::string directory = RealPath(slash == std::string::npos ? "." : name.substr(0, slash + 1));
  size_t end = path.rfind('/');
  return path.substr(0, end) == directory ? path.substr(end + 1) : path;
}

// What isn't given when a node is reopened is as if it had been opened without.
Result<> KeepsCache(Options& options, const char* key, bool before) {
  if (TRY(options.TakeBool(key, false)) == before) return {};
  return Fail(ErrorCode::kUnsupported,
              fmt::format("not supported yet: changing {} (it is {})", key, before ? "on" : "off"));
}

std::unexpected<Error> CannotChange(const std::string& key, const Node& node) {
  return Fail(ErrorCode::kInvalid,
              fmt::format("Cannot change the option '{}' of '{}'", key, node.node_name()));
}

bool IsOfChild(const std::string& key) {
  return key.starts_with("file.") || key.starts_with("backing.") || key == "file" ||
         key == "backing";
}

// `now`: the options of its own that a node is reopened with; `rest`: of them, those that it can't
// change.
Result<> KeepsOthers(const Node& node, const Options& now, const Options& rest) {
  const Options none;
  const Options& before = node.own_options() ? *node.own_options() : none;
  for (const auto& [key, value] : rest.all()) {
    auto it = before.all().find(key);
    if (it == before.all().end() || it->second.text != value.text) return CannotChange(key, node);
  }
  for (const auto& [key, value] : before.all()) {
    if (!IsOfChild(key) && !now.Has(key)) return CannotChange(key, node);
  }
  return {};
}

}  // namespace

Result<> Registry::CheckReplace(const Node& from, const Node& to, Except except) const {
  for (const NodePtr& parent : ParentsOf(from)) {
    if (Contains(except, parent.get()) || parent->backing() == &from) continue;
    if (!parent->is_filter()) {
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("not supported yet: another file below {}", NameOfNode(*parent)));
    }
  }
  for (const NodeUser* user : users_) {
    if (user->node().get() != &from) continue;
    TRY(CheckFits(from, to, *user));
    if (from.size_bytes() == to.size_bytes()) continue;
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}' has {} bytes, but {} has {}", to.name(), to.size_bytes(),
                            user->UserName(), from.size_bytes()));
  }
  return {};
}

Result<> Registry::Replace(const NodePtr& from, const NodePtr& to, Except except) {
  Change change(*this);
  TRY(CheckReplace(*from, *to, except));
  VERIFY(&from->loop() == &to->loop());
  Quiesced quiet(*this, from.get());
  std::vector<NodePtr> parents = ParentsOf(*from);
  return On(*from, [&]() -> Result<> {
    for (const NodePtr& parent : parents) {
      if (Contains(except, parent.get())) continue;
      if (parent->backing() == from.get()) {
        TRY(parent->SetBacking(to));
      } else {
        TRY(parent->SetFile(to));
      }
    }
    for (NodeUser* user : users_) {
      if (user->node() == from) user->ReplaceNode(to);
    }
    return {};
  });
}

Result<> Registry::InsertFilter(const NodePtr& node, const NodePtr& filter) {
  Change change(*this);
  VERIFY(filter->is_filter() && filter->file() == node.get());
  TRY(Adopt(filter, Owner::kUsed));
  Result<> replaced = Replace(node, filter, {filter.get()});
  if (!replaced) {
    VERIFY(filter->SetFile(nullptr));
    std::erase_if(entries_, [&](const Entry& entry) { return entry.node == filter; });
  }
  return replaced;
}

Result<> Registry::RemoveFilter(const NodePtr& filter) {
  Change change(*this);
  NodePtr below = PtrOf(*filter->file());
  TRY(Replace(filter, below));
  On(*filter, [&] { VERIFY(filter->SetFile(nullptr)); });
  std::erase_if(entries_, [&](const Entry& entry) { return entry.node == filter; });
  return {};
}

// ---- snapshots ----

Result<> Registry::CheckOverlay(const Node& node, const Node& overlay) const {
  auto invalid = [](const char* what) { return Fail(ErrorCode::kInvalid, what); };
  TRY(CheckFree(node));
  if (overlay.backing()) return invalid("The overlay already has a backing image");
  bool used = !ParentsOf(overlay).empty();
  for (const NodeUser* user : users_) used |= user->node().get() == &overlay;
  if (used) return invalid("The overlay is already in use");
  if (overlay.read_only()) return invalid("The overlay is read-only");
  return CheckReplace(node, overlay, {});
}

Result<> Registry::Snapshot(const NodePtr& node, const NodePtr& overlay) {
  Change change(*this);
  TRY(CheckOverlay(*node, *overlay));
  if (&overlay->loop() != &node->loop()) TRY(MoveTo(overlay, node->loop()));
  Quiesced quiet(*this, node.get());
  Result<> stacked = On(*node, [&] {
    Result<> flushed = Flush(*node);
    return flushed ? overlay->SetBacking(node) : flushed;
  });
  TRY(std::move(stacked));
  Result<> replaced = Replace(node, overlay, {overlay.get()});
  if (!replaced) {
    On(*node, [&] { VERIFY(overlay->SetBacking(nullptr)); });
    return replaced;
  }
  if (node->read_only()) return {};
  // Nobody writes to it any more; where it can't be told so, that remains true.
  Result<> closed = On(*node, [&] { return node->SetReadOnly(true); });
  if (!closed)
    KLOG(kWarn, "{} stays writable below its snapshot: {}", NameOfNode(*node), closed.error().what);
  return {};
}

Result<> Registry::UndoSnapshot(const NodePtr& node, const NodePtr& overlay) {
  Change change(*this);
  Quiesced quiet(*this, overlay.get());
  TRY(On(*node, [&] { return node->SetReadOnly(false); }));
  TRY(Replace(overlay, node));
  return On(*node, [&] { return overlay->SetBacking(nullptr); });
}

Result<> Registry::SetBacking(const NodePtr& overlay, const NodePtr& backing, Record record) {
  if (record == Record::kImage) {
    return SetBackingAs(overlay, backing, backing ? NameForImage(*overlay, *backing) : "",
                        backing ? SkipFilters(backing.get())->driver() : "");
  }
  Change change(*this);
  Quiesced quiet(*this, overlay.get());
  TRY(On(*overlay, [&] { return overlay->SetBacking(backing); }));
  CollectUnused();
  return {};
}

// The image first: a crash between leaves one that shows the same by either.
Result<> Registry::SetBackingAs(const NodePtr& overlay, const NodePtr& backing,
                                const std::string& filename, const std::string& format) {
  Change change(*this);
  Quiesced quiet(*this, overlay.get());
  Result<> set = On(*overlay, [&]() -> Result<> {
    if (!overlay->editor()) return overlay->SetBacking(backing);
    bool was_read_only = overlay->read_only();
    if (was_read_only) TRY(overlay->SetReadOnly(false));
    Result<> recorded = overlay->editor()->RecordBacking(filename, format);
    if (recorded) recorded = Flush(*overlay);
    if (was_read_only) {
      Result<> back = overlay->SetReadOnly(true);
      if (recorded) recorded = std::move(back);
    }
    TRY(std::move(recorded));
    return overlay->SetBacking(backing);
  });
  TRY(std::move(set));
  CollectUnused();
  return {};
}

// ---- size, options ----

void Registry::TellResized(Node& node) {
  for (const auto& bitmap : node.attached_bitmaps()) bitmap->Resize(node.size_bytes());
  for (NodeUser* user : users_) {
    if (user->node().get() == &node) user->NodeResized();
  }
  for (const NodePtr& parent : ParentsOf(node)) {
    if (parent->file() != &node || parent->size_bytes() == node.size_bytes()) continue;
    parent->FileResized();
    if (parent->size_bytes() == node.size_bytes()) TellResized(*parent);
  }
}

Result<> Registry::Resize(const NodePtr& node, uint64_t size_bytes) {
  Change change(*this);
  Node* real = SkipFilters(node.get());
  TRY(CheckFree(*node));
  TRY(CheckFree(*real));
  Quiesced quiet(*this, real);
  return On(*real, [&]() -> Result<> {
    TRY(real->Resize({.size = size_bytes, .zero_added = true}));
    TellResized(*real);
    return {};
  });
}

bool Registry::StandsOn(const Node& top, const Node& node) const {
  if (&top == &node) return true;
  for (const NodePtr& parent : ParentsOf(node)) {
    if (StandsOn(top, *parent)) return true;
  }
  return false;
}

// Of a filter that stays: the node `name` comes in its file's place.
Result<NodePtr> Registry::FindOtherFile(const NodePtr& filter, const std::string& name) {
  if (!filter->is_filter()) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: another 'file' of '{}'", filter->node_name()));
  }
  NodePtr other = TRY(Require(name));
  const Node& before = *filter->file();
  if (StandsOn(*other, *filter)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}' stands on '{}' already", name, filter->node_name()));
  }
  TRY(CheckFree(*other));
  if (!filter->read_only()) TRY(CheckWriter(*other, nullptr));
  if (other->size_bytes() != before.size_bytes()) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}' has {} bytes, but '{}' has {}", name, other->size_bytes(),
                            before.node_name(), before.size_bytes()));
  }
  for (const NodePtr& parent : ParentsOf(*filter)) {
    if (!parent->is_filter() && parent->backing() != filter.get()) {
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("not supported yet: another file below {}", NameOfNode(*parent)));
    }
  }
  for (const NodeUser* user : users_) {
    if (user->node() == filter) TRY(CheckFits(before, *other, *user));
  }
  return other;
}

Result<> Registry::CheckNotWritten(const Node& node) const {
  std::string who;
  for (const NodeUser* user : users_) {
    if (user->node().get() == &node && user->writes()) who = user->UserName();
  }
  for (const NodePtr& parent : ParentsOf(node)) {
    if (parent->backing() != &node && !parent->read_only()) who = NameOfNode(*parent);
  }
  if (who.empty()) return {};
  return Fail(ErrorCode::kBusy, fmt::format("{} writes to '{}'", who, node.node_name()));
}

// Nothing changes before all that was asked for is understood. What stands on others goes first: it
// may still have to write to them.
Result<> Registry::Reopen(std::vector<Options> all) {
  Change change(*this);
  std::vector<Reopening> left;
  left.reserve(all.size());
  for (Options& options : all) left.push_back(TRY(PlanReopening(std::move(options))));
  while (!left.empty()) {
    auto next = std::ranges::find_if(left, [&](const auto& one) {
      return std::ranges::none_of(left, [&](const auto& other) {
        return other.node != one.node && StandsOn(*other.node, *one.node);
      });
    });
    Reopening one = std::move(*next);
    left.erase(next);
    TRY(Apply(std::move(one)));
  }
  CollectUnused();
  return {};
}

Result<Registry::Reopening> Registry::PlanReopening(Options options) {
  std::optional<std::string> node_name = options.Take("node-name");
  if (!node_name) return Fail(ErrorCode::kInvalid, "node-name not specified");
  Reopening plan = {.node = TRY(Require(*node_name))};
  Node& node = *plan.node;
  TRY(CheckFree(node));
  std::string driver = options.Take("driver", node.driver());
  if (driver != node.driver()) return CannotChange("driver", node);
  if (node.file()) {
    std::string name = options.Take("file", node.file()->node_name());
    if (name != node.file()->node_name()) plan.file = TRY(FindOtherFile(plan.node, name));
  }
  const NodeOptions& before = node.opened_with();
  NodeOptions& wished = plan.wished = before;
  wished.read_only = TRY(options.TakeBool("read-only", false));
  wished.auto_read_only = TRY(options.TakeBool("auto-read-only", false));
  wished.discard_unmap = TRY(TakeDiscard(options, !IsNamed(node)));
  wished.detect_zeroes = TRY(ParseDetectZeroes(options.Take("detect-zeroes", "off")));
  if (wished.detect_zeroes == DetectZeroes::kUnmap && !wished.discard_unmap)
    return Fail(ErrorCode::kInvalid, "detect-zeroes=unmap needs discard=unmap");
  TRY(KeepsCache(options, "cache.direct", before.cache_direct));
  TRY(KeepsCache(options, "cache.no-flush", before.cache_no_flush));
  if (std::optional<std::string> backing = options.Take("backing"))
    plan.backing = backing->empty() ? NodePtr() : TRY(Require(*backing));
  plan.own = std::make_shared<Options>(options);
  plan.change_own = TRY(node.TakeChanges(env_, options));
  TRY(KeepsOthers(node, *plan.own, options));
  if (node.own_options() && !plan.file) {
    for (const auto& [key, value] : node.own_options()->all()) {
      if (IsOfChild(key) && !plan.own->Has(key)) plan.own->Set(key, value.text);
    }
  }
  return plan;
}

Result<> Registry::Apply(Reopening plan) {
  Node& node = *plan.node;
  if (plan.wished.read_only) TRY(CheckNotWritten(node));
  if (plan.file && plan.file->read_only() && !plan.wished.read_only)
    return Fail(ErrorCode::kInvalid, fmt::format("'{}' is read-only", plan.file->node_name()));
  for (const NodePtr& other : {plan.backing.value_or(nullptr), plan.file}) {
    if (other && &other->loop() != &node.loop()) TRY(MoveTo(other, node.loop()));
  }
  Quiesced quiet(*this, &node);
  return On(node, [&]() -> Result<> {
    if (plan.backing) TRY(node.SetBacking(*plan.backing));
    if (plan.file) {
      TRY(Flush(node));
      TRY(node.SetFile(plan.file));
    }
    if (plan.wished.read_only != node.read_only()) TRY(node.SetReadOnly(plan.wished.read_only));
    if (plan.change_own) plan.change_own();
    node.set_opened_with(plan.wished);
    node.set_own_options(std::move(plan.own));
    return {};
  });
}

}  // namespace kvartz::block
