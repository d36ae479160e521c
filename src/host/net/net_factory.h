// -netdev: which backends there are.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/event_loop.h"
#include "base/result.h"
#include "host/net/net_backend.h"

namespace kvartz::host {

// Options of -netdev and -nic as name=value, in the user's order; some may be repeated (hostfwd,
// dnssearch), or be members of a list ("hostfwd.1", "hostfwd.1.str").
using NetOptions = std::vector<std::pair<std::string, std::string>>;

// `options` has "type" (user, tap) and its options; "id" and "model" are passed over. Errors:
// unknown or unsupported type or option (by name), malformed value, what the host refuses (port
// taken, tap not permitted...).
Result<std::unique_ptr<NetBackend>> CreateNetBackend(const NetOptions& options, EventLoop& loop);

}  // namespace kvartz::host
