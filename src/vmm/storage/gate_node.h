// What an export shows: another node, which jobs and snapshots may replace and resize beneath it.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "base/fiber.h"
#include "block/node_user.h"

namespace kvartz::vmm {

// Loop-owned by its node's loop. Requests go on to the node as they are; while it is quiesced they
// wait. Its node is given by Registry::Attach. Status tells of the whole chain as one.
class GateNode final : public block::Node, public block::NodeUser {
 public:
  GateNode(EventLoop& loop, std::string user_name, bool writes);
  ~GateNode() override;

  // Node.
  const char* driver() const override { return "export"; }
  void Drain() override;
  Result<block::Extent> Status(uint64_t offset, uint64_t length) override;
  Result<> Close() override { return {}; }  // the node is its owners'

  // NodeUser.
  std::string UserName() const override { return user_name_; }
  const block::NodePtr& node() const override { return node_; }
  bool writes() const override { return writes_; }
  void Quiesce() override;
  void Unquiesce() override;
  void ReplaceNode(block::NodePtr node) override;
  void NodeResized() override;

 private:
  struct Passing {
    block::Request inner;
    block::Request* outer = nullptr;
    GateNode* gate = nullptr;
  };
  void Submit(block::Request* request) override;
  void Launch(block::Request* request);
  static void Done(block::Request* inner, int result);
  void OneLess();

  const std::string user_name_;
  const bool writes_;
  block::NodePtr node_;
  unsigned quiesced_ = 0;
  uint64_t in_flight_ = 0;
  std::deque<block::Request*> waiting_;
  FiberQueue quiet_, open_;
  std::vector<std::unique_ptr<Passing>> free_;
};

}  // namespace kvartz::vmm
