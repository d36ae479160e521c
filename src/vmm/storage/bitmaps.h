// Dirty bitmaps of nodes by name: those that live in an image, and those that live while the
// machine does.
#pragma once

#include <boost/json/array.hpp>
#include <memory>
#include <string>

#include "block/dirty_bitmap.h"
#include "block/registry.h"

namespace kvartz::vmm {

struct BitmapSettings {
  std::string name = {};
  uint32_t granularity = 65536;  // bytes
  bool persistent = false;
  bool disabled = false;
};

// Fiber, main loop. Errors: no such bitmap (kNotFound), the name is taken, the node can't keep
// bitmaps, what is inconsistent can only be removed.
Result<std::shared_ptr<block::DirtyBitmap>> RequireBitmap(block::Registry& registry,
                                                          const block::NodePtr& node,
                                                          const std::string& name);
Result<> AddBitmap(block::Registry& registry, const block::NodePtr& node,
                   const BitmapSettings& settings);
Result<> RemoveBitmap(block::Registry& registry, const block::NodePtr& node,
                      const std::string& name);
Result<> ClearBitmap(block::Registry& registry, const block::NodePtr& node,
                     const std::string& name);
Result<> EnableBitmap(block::Registry& registry, const block::NodePtr& node,
                      const std::string& name, bool enabled);
// What `source` has becomes dirty in `name`.
Result<> MergeBitmap(block::Registry& registry, const block::NodePtr& node, const std::string& name,
                     const block::DirtyBitmap& source);
// A copy of its contents, to undo the above.
Result<std::shared_ptr<block::DirtyBitmap>> CopyOfBitmap(block::Registry& registry,
                                                         const block::NodePtr& node,
                                                         const std::string& name);

// BlockDirtyInfo of QMP.
boost::json::array DescribeBitmaps(block::Registry& registry, block::Node& node);

}  // namespace kvartz::vmm
