// -netdev tap: a tap interface of the host.
#pragma once

#include <memory>

#include "host/net/net_factory.h"

namespace kvartz::host {

// Options: ifname, fd, script=no, downscript=no, vnet_hdr, vhost=off, sndbuf. Errors: those of
// CreateNetBackend.
Result<std::unique_ptr<NetBackend>> CreateTap(const NetOptions& options, EventLoop& loop);

}  // namespace kvartz::host
