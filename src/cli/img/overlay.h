// What is written to an image goes elsewhere until the end (--snapshot of the tools).
#pragma once

#include "cli/img/img.h"

namespace kvartz::cli::img {

// Fiber: a qcow2 over `base`, whose file (in /var/tmp) has no name any more.
Result<block::NodePtr> TemporaryOverlay(Session& session, block::NodePtr base);

}  // namespace kvartz::cli::img
