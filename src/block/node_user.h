// Who uses a node from outside of the graph: a disk of a machine, an NBD export.
#pragma once

#include <string>

#include "block/node.h"

namespace kvartz::block {

// Loop-owned by the loop of its node.
class NodeUser {
 public:
  virtual ~NodeUser() = default;
  virtual std::string UserName() const = 0;  // for messages: "device 'vda'"
  // Null: none. On its loop, or on the main loop within a Registry::Change.
  virtual const NodePtr& node() const = 0;
  virtual bool writes() const = 0;
  // Fiber: returns when no request of it is under way in the node; those that come wait for
  // Unquiesce. Nests.
  virtual void Quiesce() = 0;
  virtual void Unquiesce() = 0;
  // While quiesced: uses this one from now on, which is as large and on `node->loop()`.
  virtual void ReplaceNode(NodePtr node) = 0;
  // While quiesced: the node has another size.
  virtual void NodeResized() = 0;
};

}  // namespace kvartz::block
