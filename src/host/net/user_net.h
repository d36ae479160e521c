// -netdev user: a network of its own for the guest, through libslirp: DHCP, DNS, TFTP, NAT to what
// the host can reach, and forwarded ports. Needs no privileges.
#pragma once

#include <memory>

#include "host/net/net_factory.h"

namespace kvartz::host {

// Options: net, host, dhcpstart, dns, hostname, domainname, dnssearch, restrict, tftp,
// tftp-server-name, bootfile, hostfwd, ipv4, ipv6, ipv6-net, ipv6-prefix, ipv6-prefixlen,
// ipv6-host, ipv6-dns. Errors: those of CreateNetBackend.
Result<std::unique_ptr<NetBackend>> CreateUserNet(const NetOptions& options, EventLoop& loop);

}  // namespace kvartz::host
