// A VMDK and the one that it stands on: a child records its parent's content ID, which changes with
// the parent's content. Spec: "Virtual Disk Format 5.0", "The Descriptor File".
#pragma once

#include <string>

#include "block/formats/vmdk/layout.h"
#include "block/node.h"

namespace kvartz::block::vmdk {

// Random, and even: never that of "no parent".
uint32_t NewCid();
// A descriptor's text, with another CID in place of the one that it has.
std::string WithCid(std::string text, uint32_t cid);
// Fiber: the CID of a VMDK, whose children record it. Errors: it is none.
Result<uint32_t> CidOf(Node& image);
// Fiber: `parent` is the one that `child`, of this descriptor, was made on, and as it was then.
Result<> CheckParent(const Node& child, const Descriptor& descriptor, Node& parent);
// What `child` says of its parent.
void TellParent(const Node& child, const Descriptor& descriptor, ImageInfo& info);

}  // namespace kvartz::block::vmdk
