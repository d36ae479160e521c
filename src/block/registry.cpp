#include "block/registry.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/check.h"
#include "base/log.h"
#include "block/dirty_bitmap.h"
#include "block/fiber_io.h"
#include "block/graph.h"

namespace kvartz::block {
namespace {

constexpr size_t kMostNodes = 10000;

std::string NameOfNode(const Node& node) { return fmt::format("node '{}'", node.node_name()); }

std::vector<Node*> ChildrenOf(const Node& node) {
  std::vector<Node*> children;
  for (Node* child : {node.file(), node.data_file(), node.backing()}) {
    if (child) children.push_back(child);
  }
  return children;
}

NodePtr SharedOf(Node& node) {
  NodePtr shared = node.weak_from_this().lock();
  VERIFY(shared);
  return shared;
}

template <typename Visit>
void ForTree(Node& node, Visit visit) {
  visit(node);
  for (Node* child : ChildrenOf(node)) ForTree(*child, visit);
}

}  // namespace

Registry::Change::Change(Registry& registry) : registry_(registry) {
  if (registry_.changer_ != Fiber::Current()) registry_.changing_.Lock();
  registry_.changer_ = Fiber::Current();
  registry_.change_depth_++;
}

Registry::Change::~Change() {
  if (--registry_.change_depth_ > 0) return;
  registry_.changer_ = nullptr;
  registry_.changing_.Unlock();
}

Registry::Registry(EventLoop& loop) : loop_(loop), env_{.loop = loop} {
  env_.find_node = [this](const std::string& name) { return Find(name); };
}

Registry::~Registry() { VERIFY(users_.empty()); }

// ---- who is there ----

const Registry::Entry* Registry::Get(const Node& node) const {
  for (const Entry& entry : entries_) {
    if (entry.node.get() == &node) return &entry;
  }
  return nullptr;
}

Registry::Entry* Registry::Get(const Node& node) {
  return const_cast<Entry*>(std::as_const(*this).Get(node));
}

NodePtr Registry::Find(const std::string& node_name) const {
  for (const Entry& entry : entries_) {
    if (entry.node->node_name() == node_name) return entry.node;
  }
  return nullptr;
}

Result<NodePtr> Registry::Require(const std::string& node_name) const {
  if (NodePtr node = Find(node_name)) return node;
  return Fail(ErrorCode::kNotFound,
              fmt::format("Cannot find device='' nor node-name='{}'", node_name));
}

NodePtr Registry::PtrOf(const Node& node) const {
  const Entry* entry = Get(node);
  return entry ? entry->node : nullptr;
}

std::vector<NodePtr> Registry::nodes() const {
  std::vector<NodePtr> nodes;
  for (const Entry& entry : entries_) nodes.push_back(entry.node);
  return nodes;
}

bool Registry::IsNamed(const Node& node) const {
  const Entry* entry = Get(node);
  return entry && entry->owner == Owner::kNamed;
}

std::vector<NodePtr> Registry::ParentsOf(const Node& node) const {
  std::vector<NodePtr> parents;
  for (const Entry& entry : entries_) {
    for (const Node* child : ChildrenOf(*entry.node)) {
      if (child != &node) continue;
      parents.push_back(entry.node);
      break;
    }
  }
  return parents;
}

std::vector<std::string> Registry::UsersOf(const Node& node) const {
  std::vector<std::string> names;
  for (const NodePtr& parent : ParentsOf(node)) names.push_back(NameOfNode(*parent));
  for (const NodeUser* user : users_) {
    if (user->node().get() == &node) names.push_back(user->UserName());
  }
  if (const Entry* entry = Get(node))
    names.insert(names.end(), entry->claims.begin(), entry->claims.end());
  return names;
}

bool Registry::Used(const Node& node) const { return !UsersOf(node).empty(); }

// ---- coming and going ----

std::string Registry::FreshName() {
  std::string name;
  do {
    name = fmt::format("#block{}", next_name_++);
  } while (Find(name));
  return name;
}

Result<> Registry::Adopt(const NodePtr& node, Owner owner) {
  std::vector<std::string> names;
  Result<> result;
  ForTree(*node, [&](Node& each) {
    const std::string& name = each.node_name();
    if (Get(each) || name.empty()) return;
    if (Find(name) || std::find(names.begin(), names.end(), name) != names.end())
      result = Fail(ErrorCode::kExists, fmt::format("Duplicate nodes with node-name='{}'", name));
    names.push_back(name);
  });
  TRY(std::move(result));
  if (entries_.size() + names.size() > kMostNodes)
    return Fail(ErrorCode::kNoSpace, fmt::format("more than {} nodes", kMostNodes));
  AdoptTree(node, owner);
  return {};
}

void Registry::AdoptTree(const NodePtr& node, Owner owner) {
  if (Get(*node)) return;
  if (node->node_name().empty()) node->set_node_name(FreshName());
  entries_.push_back({.node = node, .owner = owner});
  for (Node* child : ChildrenOf(*node)) AdoptTree(SharedOf(*child), Owner::kUsed);
}

// A node that is served by another loop can't be put below one that is opened here.
Result<> Registry::CheckReferences(const Options& options) const {
  for (const auto& [key, value] : options.all()) {
    size_t dot = key.rfind('.');
    std::string last = dot == std::string::npos ? key : key.substr(dot + 1);
    if (last != "file" && last != "backing" && last != "data-file") continue;
    NodePtr node = Find(value.text);
    if (node && &node->loop() != &loop_) {
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("{}={}: not supported yet: the node is in use by an I/O thread", key,
                              value.text));
    }
  }
  return {};
}

Result<NodePtr> Registry::Add(Options options, Owner owner, const NodeOptions& inherited) {
  Change change(*this);
  auto name = options.all().find("node-name");
  if (owner == Owner::kNamed && (name == options.all().end() || name->second.text.empty()))
    return Fail(ErrorCode::kInvalid, "'node-name' must be specified for the root node");
  if (name != options.all().end() && Find(name->second.text)) {
    return Fail(ErrorCode::kExists,
                fmt::format("Duplicate nodes with node-name='{}'", name->second.text));
  }
  TRY(CheckReferences(options));
  NodePtr node = TRY(OpenNode(env_, std::move(options), inherited));
  Result<> adopted = Adopt(node, owner);
  if (adopted) return node;
  DetachShared(*node);
  if (Result<> closed = node->Close(); !closed) KLOG(kWarn, "{}", closed.error().what);
  return Fail(std::move(adopted).error());
}

Result<> Registry::Remove(const std::string& node_name) {
  Change change(*this);
  NodePtr node = Find(node_name);
  if (!node)
    return Fail(ErrorCode::kNotFound,
                fmt::format("Failed to find node with node-name='{}'", node_name));
  if (!IsNamed(*node)) {
    return Fail(ErrorCode::kState, fmt::format("Node '{}' is not owned by the monitor", node_name));
  }
  std::vector<std::string> users = UsersOf(*node);
  if (!users.empty()) {
    return Fail(ErrorCode::kBusy,
                fmt::format("Block device {} is in use by {}", node_name, users.front()));
  }
  Result<> closed = CloseNode(node);
  CollectUnused();
  return closed;
}

// What others have, too, isn't closed with it: backing nodes, and what filters stand on.
void Registry::DetachShared(Node& node) {
  if (node.is_filter() && node.file()) {
    VERIFY(node.SetFile(nullptr));
  } else if (node.backing()) {
    VERIFY(node.SetBacking(nullptr));
  }
}

Result<> Registry::CloseNode(const NodePtr& node) {
  std::vector<Node*> below;
  Result<> closed = On(*node, [&]() -> Result<> {
    DetachShared(*node);
    for (Node* child : ChildrenOf(*node)) {
      ForTree(*child, [&](Node& each) { below.push_back(&each); });
    }
    return node->Close();
  });
  std::erase_if(entries_, [&](const Entry& entry) { return entry.node == node; });
  // Its files were closed along.
  for (Node* child : below) {
    const Entry* entry = Get(*child);
    if (!entry || entry->owner == Owner::kNamed || Used(*child)) continue;
    std::erase_if(entries_, [&](const Entry& other) { return other.node.get() == child; });
  }
  return closed;
}

void Registry::CollectUnused() {
  Change change(*this);
  for (bool found = true; found;) {
    found = false;
    for (const Entry& entry : entries_) {
      // Who has just opened it and is about to use it holds it.
      if (entry.owner == Owner::kNamed || entry.node.use_count() > 1 || Used(*entry.node)) continue;
      NodePtr node = entry.node;
      if (Result<> closed = CloseNode(node); !closed) KLOG(kError, "{}", closed.error().what);
      found = true;
      break;
    }
  }
  // Nobody needs the rest to be served elsewhere.
  for (const NodePtr& node : nodes()) {
    if (&node->loop() == &loop_ || Used(*node)) continue;
    if (Result<> moved = MoveTo(node, loop_); !moved) KLOG(kWarn, "{}", moved.error().what);
  }
}

Result<> Registry::CloseAll() {
  Change change(*this);
  VERIFY(users_.empty());
  Result<> result;
  while (!entries_.empty()) {
    auto top = std::find_if(entries_.begin(), entries_.end(),
                            [&](const Entry& entry) { return ParentsOf(*entry.node).empty(); });
    VERIFY(top != entries_.end());
    NodePtr node = top->node;
    Result<> closed = CloseNode(node);
    if (result) result = std::move(closed);
  }
  return result;
}

// ---- users and claims ----

Result<> Registry::CheckFree(const Node& node) const {
  const Entry* entry = Get(node);
  if (!entry || entry->claims.empty()) return {};
  return Fail(ErrorCode::kBusy, fmt::format("Node '{}' is busy: it is in use by {}",
                                            node.node_name(), entry->claims.front()));
}

Result<> Registry::CheckUnused(const Node& node) const {
  TRY(CheckFree(node));
  std::vector<std::string> users = UsersOf(node);
  if (users.empty()) return {};
  return Fail(ErrorCode::kBusy, fmt::format("Node '{}' is busy: it is in use by {}",
                                            node.node_name(), users.front()));
}

Result<> Registry::Claim(const Node& node, const std::string& by) {
  TRY(CheckFree(node));
  Entry* entry = Get(node);
  VERIFY(entry);
  entry->claims.push_back(by);
  return {};
}

void Registry::Unclaim(const Node& node, const std::string& by) {
  if (Entry* entry = Get(node)) std::erase(entry->claims, by);
}

Result<> Registry::CheckWriter(const Node& node, const NodeUser* user) const {
  std::string who;
  for (const NodeUser* other : users_) {
    if (other != user && other->writes() && other->node().get() == &node) who = other->UserName();
  }
  for (const NodePtr& parent : ParentsOf(node)) who = NameOfNode(*parent);
  if (who.empty()) return {};
  return Fail(ErrorCode::kBusy, fmt::format("node '{}' can't be written to: it is in use by {}",
                                            node.node_name(), who));
}

Result<> Registry::Attach(NodeUser& user, NodePtr node, EventLoop& loop, bool share_write) {
  Change change(*this);
  TRY(CheckFree(*node));
  if (user.writes() && !node->read_only() && !share_write) TRY(CheckWriter(*node, &user));
  TRY(MoveTo(node, loop));
  On(*node, [&] { user.ReplaceNode(node); });
  users_.push_back(&user);
  return {};
}

Result<> Registry::Detach(NodeUser& user) {
  Change change(*this);
  NodePtr node = user.node();
  if (!node) return {};
  On(*node, [&] {
    user.Quiesce();
    user.ReplaceNode(nullptr);
    user.Unquiesce();
  });
  std::erase(users_, &user);
  node.reset();
  CollectUnused();
  return {};
}

Result<> Registry::MoveTo(const NodePtr& node, EventLoop& loop) {
  Change change(*this);
  std::vector<Node*> tree;
  bool elsewhere = false;
  ForTree(*node, [&](Node& each) {
    tree.push_back(&each);
    elsewhere |= &each.loop() != &loop;
  });
  if (!elsewhere) return {};
  for (const Node* each : tree) {
    std::string who;
    for (const NodePtr& parent : ParentsOf(*each)) {
      if (std::find(tree.begin(), tree.end(), parent.get()) == tree.end())
        who = NameOfNode(*parent);
    }
    for (const NodeUser* user : users_) {
      if (user->node().get() == each) who = user->UserName();
    }
    if (const Entry* entry = Get(*each); entry && !entry->claims.empty())
      who = entry->claims.front();
    if (who.empty()) continue;
    return Fail(ErrorCode::kBusy, fmt::format("node '{}' is served by another thread for {}",
                                              each->node_name(), who));
  }
  return On(*node, [&] { return node->MoveTo(loop); });
}

// ---- quiet ----

void Registry::CollectUsers(const Node& node, std::vector<NodeUser*>& users) const {
  for (NodeUser* user : users_) {
    if (user->node().get() == &node && std::find(users.begin(), users.end(), user) == users.end())
      users.push_back(user);
  }
  for (const NodePtr& parent : ParentsOf(node)) CollectUsers(*parent, users);
}

Registry::Quiesced::Quiesced(Registry& registry, const Node* node)
    : registry_(registry), change_(registry) {
  if (node) {
    registry_.CollectUsers(*node, users_);
  } else {
    users_ = registry_.users_;
  }
  for (NodeUser* user : users_) {
    if (user->node()) registry_.On(*user->node(), [&] { user->Quiesce(); });
  }
}

Registry::Quiesced::~Quiesced() {
  for (NodeUser* user : users_) {
    if (user->node()) registry_.On(*user->node(), [&] { user->Unquiesce(); });
  }
}

}  // namespace kvartz::block
