// Protocol nodes on files and block devices of the host.
#pragma once

#include "base/fd.h"
#include "block/node.h"

namespace kvartz::block {

// Opens, checks and locks the file of `options`. A length that isn't a multiple of 512 is rounded
// up, the rest reads as zeros until it is written.
Result<std::shared_ptr<Node>> OpenFileNode(EventLoop& loop, const ImageOptions& options);

}  // namespace kvartz::block
