// The nodes of a process, by name: blockdev-add and -del, who uses which, and changes of the graph
// while it is in use.
#pragma once

#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/call_on.h"
#include "block/driver.h"
#include "block/node_user.h"

namespace kvartz::block {

// Owned by the main loop. A node is served by one loop, which may be another one, together with
// all that is below it; what touches it there is called over. Fiber: all that returns a Result.
//
// Who may use a node: one that writes (a disk, a writable export, a job's target), any number that
// read; graph changes wait in line. A claim keeps everybody else from changing a node's place in
// the graph, its size or its being there; errors name who holds it.
class Registry {
 public:
  explicit Registry(EventLoop& loop);
  ~Registry();
  Registry(const Registry&) = delete;
  Registry& operator=(const Registry&) = delete;

  // For nodes that are opened here. find_node is the registry's.
  OpenEnv& env() { return env_; }
  EventLoop& loop() { return loop_; }

  // ---- nodes ----
  // blockdev-add, -drive: opens what OpenNode does. All nodes of it get names ("#block12" unless
  // they have one). kNamed: it stays until Remove (and needs "node-name"); kUsed: until nobody uses
  // it any more.
  enum class Owner : uint8_t { kNamed, kUsed };
  Result<NodePtr> Add(Options options, Owner owner, const NodeOptions& inherited = {});
  // One that was made otherwise (its subtree, too).
  Result<> Adopt(const NodePtr& node, Owner owner);
  // blockdev-del. Errors: unknown, not of kNamed, in use (by whom).
  Result<> Remove(const std::string& node_name);
  NodePtr Find(const std::string& node_name) const;  // null: there is none
  Result<NodePtr> Require(const std::string& node_name) const;
  NodePtr PtrOf(const Node& node) const;
  std::vector<NodePtr> nodes() const;  // in the order they came
  bool IsNamed(const Node& node) const;
  // Parents in the graph and users, as messages say them: "device 'vda'", "node 'ovl'".
  std::vector<std::string> UsersOf(const Node& node) const;
  std::vector<NodePtr> ParentsOf(const Node& node) const;
  const std::vector<NodeUser*>& users() const { return users_; }

  // ---- users ----
  // `user` has `node` from now on. The subtree moves to `loop`. Errors: another one writes to it
  // (unless `share_write`), it is claimed, it is served by another loop and in use there.
  Result<> Attach(NodeUser& user, NodePtr node, EventLoop& loop, bool share_write = false);
  // It has none any more; what nobody uses then is closed, and what stays moves to the main loop.
  Result<> Detach(NodeUser& user);

  // ---- claims ----
  // Errors: kBusy, "node 'a' is in use by job 'b'".
  Result<> CheckFree(const Node& node) const;
  // For a job that writes to it: nobody else uses it.
  Result<> CheckUnused(const Node& node) const;
  Result<> Claim(const Node& node, const std::string& by);
  void Unclaim(const Node& node, const std::string& by);

  // ---- changes ----
  // Other fibers' changes wait until it is destroyed; its own go on.
  class Change {
   public:
    explicit Change(Registry& registry);
    ~Change();
    Change(const Change&) = delete;
    Change& operator=(const Change&) = delete;

   private:
    Registry& registry_;
  };
  // Until it is destroyed, no request of any user is under way in `node` and what is above it
  // (without a node: in any). Fiber: both.
  class Quiesced {
   public:
    explicit Quiesced(Registry& registry, const Node* node = nullptr);
    ~Quiesced();
    Quiesced(const Quiesced&) = delete;
    Quiesced& operator=(const Quiesced&) = delete;

   private:
    Registry& registry_;
    const Change change_;
    std::vector<NodeUser*> users_;
  };
  // All parents and users of `from` (`except` not) have `to` from now on.
  using Except = std::initializer_list<const Node*>;
  Result<> Replace(const NodePtr& from, const NodePtr& to, Except except = {});
  // `filter`, whose file is `node` already, comes between it and all that is above.
  Result<> InsertFilter(const NodePtr& node, const NodePtr& filter);
  Result<> RemoveFilter(const NodePtr& filter);
  // blockdev-snapshot: `overlay`, which has no backing node yet, stands on `node`, and whoever had
  // `node` has it. `node` becomes read-only.
  Result<> Snapshot(const NodePtr& node, const NodePtr& overlay);
  // Undoes that while nothing was written to it since.
  Result<> UndoSnapshot(const NodePtr& node, const NodePtr& overlay);
  // `overlay`'s backing node becomes `backing` (may be null), in memory and, with `record`, in the
  // image.
  enum class Record : uint8_t { kMemory, kImage };
  Result<> SetBacking(const NodePtr& overlay, const NodePtr& backing, Record record);
  // As above with another name than the node's own in the image (backing-file=).
  Result<> SetBackingAs(const NodePtr& overlay, const NodePtr& backing, const std::string& filename,
                        const std::string& format);
  // block_resize: users are told.
  Result<> Resize(const NodePtr& node, uint64_t size_bytes);
  // blockdev-reopen of nodes, each with its "node-name", of what may change: read-only, discard,
  // detect-zeroes, backing ("" or null: none, a node's name), a filter's file, and what the node
  // itself can change. Where the options are wrong nothing changes; where a node can't do what they
  // say, those before it stay changed.
  Result<> Reopen(std::vector<Options> all);
  // Serves the subtree by another loop. Errors: others use it where it is.
  Result<> MoveTo(const NodePtr& node, EventLoop& loop);
  // Closes and forgets what nobody uses any more. After each change; Fiber.
  void CollectUnused();
  // All of them, at the end; users are gone. Answers the first error.
  Result<> CloseAll();

  // Fiber: runs `body` where the node is served.
  template <typename Body>
  auto On(const Node& node, Body body) {
    return CallOn(loop_, node.loop(), std::move(body));
  }

 private:
  struct Entry {
    NodePtr node;
    Owner owner = Owner::kUsed;
    std::vector<std::string> claims = {};
  };
  // One node's part of Reopen.
  struct Reopening {
    NodePtr node;
    NodeOptions wished = {};
    std::optional<NodePtr> backing = {};
    NodePtr file = {};  // null: stays
    std::shared_ptr<Options> own = {};
    std::function<void()> change_own = {};
  };
  Result<Reopening> PlanReopening(Options options);
  Result<> Apply(Reopening plan);
  Entry* Get(const Node& node);
  const Entry* Get(const Node& node) const;
  void AdoptTree(const NodePtr& node, Owner owner);
  std::string FreshName();
  bool Used(const Node& node) const;
  static void DetachShared(Node& node);
  Result<> CloseNode(const NodePtr& node);
  void CollectUsers(const Node& node, std::vector<NodeUser*>& users) const;
  Result<> CheckWriter(const Node& node, const NodeUser* user) const;
  Result<> CheckReferences(const Options& options) const;
  Result<> CheckReplace(const Node& from, const Node& to, Except except) const;
  Result<> CheckOverlay(const Node& node, const Node& overlay) const;
  void TellResized(Node& node);
  bool StandsOn(const Node& top, const Node& node) const;
  Result<> CheckNotWritten(const Node& node) const;
  Result<NodePtr> FindOtherFile(const NodePtr& filter, const std::string& name);

  EventLoop& loop_;
  OpenEnv env_;
  std::vector<Entry> entries_;
  std::vector<NodeUser*> users_;
  FiberMutex changing_;
  Fiber* changer_ = nullptr;
  unsigned change_depth_ = 0;
  uint64_t next_name_ = 100;
};

}  // namespace kvartz::block
