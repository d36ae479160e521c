#include "host/net/user_net.h"

#include <fmt/core.h>
#include <poll.h>
#include <slirp/libslirp.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "host/net/option_parser.h"

namespace kvartz::host {
namespace {

struct PortForward {
  std::string text;  // as the user wrote it
  bool udp = false;
  in_addr host_address{};  // any
  unsigned host_port = 0;
  in_addr guest_address{};  // 0: the first DHCP address
  unsigned guest_port = 0;
};

struct UserNetConfig {
  bool ipv4 = true, ipv6 = true;
  bool restricted = false;
  in_addr network{htonl(0x0a000200)}, netmask{htonl(0xffffff00)};  // 10.0.2.0/24
  in_addr host{}, dhcp_start{}, dns{};                             // 0: .2, .15, .3 of the network
  in6_addr prefix6{};
  unsigned prefix6_length = 64;
  in6_addr host6{}, dns6{};  // 0: ::2, ::3 of the prefix
  std::string hostname, domainname, tftp, tftp_server_name, bootfile;
  std::vector<std::string> dns_search;
  std::vector<PortForward> forwards;
};

// ---- options

Result<> TakeNetwork(UserNetConfig& c, const std::string& value) {
  size_t slash = value.find('/');
  c.network = TRY(ParseIpv4(value.substr(0, slash)));
  uint32_t address = ntohl(c.network.s_addr);
  // Without a mask, the address's class says.
  uint32_t mask = !(address & 0x80000000)               ? 0xff000000
                  : (address & 0xf0000000) < 0xc0000000 ? 0xffff0000
                                                        : 0xffffff00;
  if (slash != std::string::npos) {
    std::string text = value.substr(slash + 1);
    if (text.find('.') != std::string::npos) {
      mask = ntohl(TRY(ParseIpv4(text)).s_addr);
    } else {
      mask = ~0u << (32 - TRY(ParseNetNumber(text, 4, 30)));
    }
  }
  if (mask == 0 || (~mask & (~mask + 1)) != 0)
    return Fail(ErrorCode::kInvalid, "the mask has holes");
  c.netmask.s_addr = htonl(mask);
  c.network.s_addr = htonl(address & mask);
  return {};
}

// ADDRESS:PORT; the address may be empty.
Result<> ParseEnd(const std::string& text, unsigned low_port, in_addr* address, unsigned* port) {
  size_t colon = text.rfind(':');
  if (colon == std::string::npos)
    return Fail(ErrorCode::kInvalid, fmt::format("'{}' has no port", text));
  if (colon > 0) *address = TRY(ParseIpv4(text.substr(0, colon)));
  *port = TRY(ParseNetNumber(text.substr(colon + 1), low_port, 65535));
  return {};
}

Result<> TakeForward(UserNetConfig& c, const std::string& value) {
  PortForward forward;
  forward.text = value;
  size_t colon = value.find(':');
  size_t dash = value.find('-');
  std::string protocol = value.substr(0, colon);
  if (colon == std::string::npos || dash == std::string::npos || dash < colon ||
      (protocol != "tcp" && protocol != "udp" && !protocol.empty())) {
    return Fail(ErrorCode::kInvalid,
                "expected [tcp|udp]:[HOSTADDRESS]:HOSTPORT-[GUESTADDRESS]:GUESTPORT");
  }
  forward.udp = protocol == "udp";
  TRY(ParseEnd(value.substr(colon + 1, dash - colon - 1), 0, &forward.host_address,
               &forward.host_port));
  TRY(ParseEnd(value.substr(dash + 1), 1, &forward.guest_address, &forward.guest_port));
  c.forwards.push_back(std::move(forward));
  return {};
}

Result<> TakeDirectory(UserNetConfig& c, const std::string& value) {
  struct stat info;
  if (stat(value.c_str(), &info) != 0)
    return Fail(ErrnoError(errno, "cannot serve this directory"));
  if (!S_ISDIR(info.st_mode)) return Fail(ErrorCode::kInvalid, "not a directory");
  c.tftp = value;
  return {};
}

template <auto kMember>
Result<> TakeText(UserNetConfig& c, const std::string& value) {
  c.*kMember = value;
  return {};
}
template <auto kMember>
Result<> TakeSwitch(UserNetConfig& c, const std::string& value) {
  c.*kMember = TRY(ParseNetSwitch(value));
  return {};
}
template <auto kMember>
Result<> TakeIpv4(UserNetConfig& c, const std::string& value) {
  c.*kMember = TRY(ParseIpv4(value));
  return {};
}
template <auto kMember>
Result<> TakeIpv6(UserNetConfig& c, const std::string& value) {
  c.*kMember = TRY(ParseIpv6(value));
  return {};
}
Result<> TakePrefixLength(UserNetConfig& c, const std::string& value) {
  c.prefix6_length = TRY(ParseNetNumber(value, 1, 126));
  return {};
}
Result<> TakeNetwork6(UserNetConfig& c, const std::string& value) {
  size_t slash = value.find('/');
  c.prefix6 = TRY(ParseIpv6(value.substr(0, slash)));
  return slash == std::string::npos ? Result<>{} : TakePrefixLength(c, value.substr(slash + 1));
}
Result<> RefuseGuestForward(UserNetConfig&, const std::string&) {
  return Fail(ErrorCode::kUnsupported,
              "not supported yet: guestfwd (reach host services at the address host= instead)");
}
Result<> RefuseSmb(UserNetConfig&, const std::string&) {
  return Fail(ErrorCode::kUnsupported,
              "not supported yet: smb (share files over ssh or tftp= instead)");
}

using Row = NetOptionRow<UserNetConfig>;
constexpr Row kOptions[] = {
    {"net", TakeNetwork},
    {"host", TakeIpv4<&UserNetConfig::host>},
    {"dhcpstart", TakeIpv4<&UserNetConfig::dhcp_start>},
    {"dns", TakeIpv4<&UserNetConfig::dns>},
    {"hostname", TakeText<&UserNetConfig::hostname>},
    {"domainname", TakeText<&UserNetConfig::domainname>},
    {"dnssearch",
     [](UserNetConfig& c, const std::string& v) { return c.dns_search.push_back(v), Result<>{}; }},
    {"restrict", TakeSwitch<&UserNetConfig::restricted>},
    {"tftp", TakeDirectory},
    {"tftp-server-name", TakeText<&UserNetConfig::tftp_server_name>},
    {"bootfile", TakeText<&UserNetConfig::bootfile>},
    {"hostfwd", TakeForward},
    {"guestfwd", RefuseGuestForward},
    {"smb", RefuseSmb},
    {"smbserver", RefuseSmb},
    {"ipv4", TakeSwitch<&UserNetConfig::ipv4>},
    {"ipv6", TakeSwitch<&UserNetConfig::ipv6>},
    {"ipv6-net", TakeNetwork6},
    {"ipv6-prefix", TakeIpv6<&UserNetConfig::prefix6>},
    {"ipv6-prefixlen", TakePrefixLength},
    {"ipv6-host", TakeIpv6<&UserNetConfig::host6>},
    {"ipv6-dns", TakeIpv6<&UserNetConfig::dns6>},
};

in_addr InNetwork(const UserNetConfig& c, uint32_t host_part) {
  return {htonl(ntohl(c.network.s_addr) | (host_part & ~ntohl(c.netmask.s_addr)))};
}

bool IsZero(const in6_addr& address) { return IN6_IS_ADDR_UNSPECIFIED(&address); }

// Fills what was left to defaults. Errors: addresses that are not of the network, or two that are
// the same.
Result<> Complete(UserNetConfig* c) {
  if (!c->ipv4 && !c->ipv6) return Fail(ErrorCode::kInvalid, "ipv4=off,ipv6=off leaves no network");
  struct Part {
    const char* name;
    in_addr* address;
    uint32_t host_part;
  };
  const Part parts[] = {
      {"host", &c->host, 2}, {"dns", &c->dns, 3}, {"dhcpstart", &c->dhcp_start, 15}};
  for (const Part& part : parts) {
    if (part.address->s_addr == 0) *part.address = InNetwork(*c, part.host_part);
    if ((part.address->s_addr & c->netmask.s_addr) != c->network.s_addr) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("{}={}: not an address of the network {}", part.name,
                              FormatIpv4(*part.address), FormatIpv4(c->network)));
    }
  }
  if (c->host.s_addr == c->dns.s_addr || c->host.s_addr == c->dhcp_start.s_addr ||
      c->dns.s_addr == c->dhcp_start.s_addr) {
    return Fail(ErrorCode::kInvalid, "host, dns and dhcpstart must be three different addresses");
  }
  if (IsZero(c->prefix6)) c->prefix6 = {{{0xfe, 0xc0}}};
  for (auto [address, last] : {std::pair(&c->host6, 2), std::pair(&c->dns6, 3)}) {
    if (!IsZero(*address)) continue;
    *address = c->prefix6;
    address->s6_addr[15] |= static_cast<uint8_t>(last);
  }
  return {};
}

// ---- the backend

constexpr size_t kMaxFrame = 65536 + 64;
// Frames that the guest has no room for yet.
constexpr size_t kQueueLimit = 1 << 20;
constexpr size_t kQueueHighWater = 256 << 10;

// Frames in a row, each after its length. Storage is kept.
class FrameQueue {
 public:
  size_t bytes() const { return data_.size() - begin_; }
  bool empty() const { return bytes() == 0; }
  void Push(std::span<const uint8_t> frame) {
    if (empty()) Clear();
    auto size = static_cast<uint32_t>(frame.size());
    const auto* head = reinterpret_cast<const uint8_t*>(&size);
    data_.insert(data_.end(), head, head + sizeof size);
    data_.insert(data_.end(), frame.begin(), frame.end());
  }
  std::span<const uint8_t> front() const {
    uint32_t size;
    std::memcpy(&size, &data_[begin_], sizeof size);
    return {&data_[begin_ + sizeof size], size};
  }
  void Pop() { begin_ += sizeof(uint32_t) + front().size(); }
  // A queue that never runs empty would creep on; called when a batch was taken out.
  void Compact() {
    if (empty()) return Clear();
    if (begin_ < kQueueLimit) return;
    data_.erase(data_.begin(), data_.begin() + static_cast<ptrdiff_t>(begin_));
    begin_ = 0;
  }
  void Clear() {
    data_.clear();
    begin_ = 0;
  }

 private:
  std::vector<uint8_t> data_;
  size_t begin_ = 0;
};

// Loop-owned.
class UserNet final : public NetBackend {
 public:
  UserNet(UserNetConfig config, EventLoop& loop);
  ~UserNet() override;
  Result<> AddForwards();

  bool Send(std::span<const iovec> frame) override;
  void ReceiverReady() override;
  std::string Describe() const override;

 private:
  // libslirp's timer: opaque to it.
  struct SlirpTimer {
    UserNet* net;
    SlirpTimerId id;
    void* context;
    std::unique_ptr<Timer> timer;
  };
  static const SlirpCb kCallbacks;
  static UserNet& Self(void* opaque) { return *static_cast<UserNet*>(opaque); }
  static ssize_t FrameFromSlirp(const void* data, size_t size, void* opaque);
  static void* NewTimer(SlirpTimerId id, void* context, void* opaque);
  static void SetTimer(void* timer, int64_t expire_ms, void* opaque);

  void Schedule();
  void Turn();
  void PollSockets();
  void WatchSockets();
  void Unwatch(int fd);
  void Deliver();
  int AddPoll(int fd, int events);

  const UserNetConfig config_;
  EventLoop& loop_;
  Timer timeout_;
  Slirp* slirp_ = nullptr;
  std::vector<pollfd> polls_;  // what libslirp waits for
  std::unordered_map<int, FdEvents> watched_;
  FrameQueue queue_;
  std::vector<uint8_t> frame_;  // one frame of the guest in one piece
  bool blocked_ = false;        // the guest has no room
  bool scheduled_ = false;
  uint64_t dropped_ = 0;
  // Null for posted tasks that come after the end.
  std::shared_ptr<UserNet*> self_;
};

const SlirpCb UserNet::kCallbacks = {
    .send_packet = FrameFromSlirp,
    .guest_error = [](const char* text, void*) { KLOG_GUEST("user network: {}", text); },
    .clock_get_ns = [](void* opaque) { return Self(opaque).loop_.clock().NowNs(); },
    .timer_new = nullptr,
    .timer_free = [](void* timer, void*) { delete static_cast<SlirpTimer*>(timer); },
    .timer_mod = SetTimer,
    .register_poll_fd = [](int, void*) {},
    .unregister_poll_fd = [](int fd, void* opaque) { Self(opaque).Unwatch(fd); },
    .notify = [](void* opaque) { Self(opaque).Schedule(); },
    .init_completed = nullptr,
    .timer_new_opaque = NewTimer,
};

const char* TextOrNull(const std::string& text) { return text.empty() ? nullptr : text.c_str(); }

UserNet::UserNet(UserNetConfig config, EventLoop& loop)
    : config_(std::move(config)),
      loop_(loop),
      timeout_(loop, [this] { Turn(); }),
      self_(std::make_shared<UserNet*>(this)) {
  std::vector<const char*> search;
  for (const std::string& domain : config_.dns_search) search.push_back(domain.c_str());
  search.push_back(nullptr);
  SlirpConfig slirp{};
  slirp.version = 4;
  slirp.restricted = config_.restricted;
  slirp.in_enabled = config_.ipv4;
  slirp.vnetwork = config_.network;
  slirp.vnetmask = config_.netmask;
  slirp.vhost = config_.host;
  slirp.in6_enabled = config_.ipv6;
  slirp.vprefix_addr6 = config_.prefix6;
  slirp.vprefix_len = static_cast<uint8_t>(config_.prefix6_length);
  slirp.vhost6 = config_.host6;
  slirp.vhostname = TextOrNull(config_.hostname);
  slirp.tftp_server_name = TextOrNull(config_.tftp_server_name);
  slirp.tftp_path = TextOrNull(config_.tftp);
  slirp.bootfile = TextOrNull(config_.bootfile);
  slirp.vdhcp_start = config_.dhcp_start;
  slirp.vnameserver = config_.dns;
  slirp.vnameserver6 = config_.dns6;
  slirp.vdnssearch = search.size() > 1 ? search.data() : nullptr;
  slirp.vdomainname = TextOrNull(config_.domainname);
  slirp_ = slirp_new(&slirp, &kCallbacks, this);
  if (slirp_) Schedule();
}

UserNet::~UserNet() {
  *self_ = nullptr;
  if (slirp_) slirp_cleanup(slirp_);
  for (const auto& [fd, events] : watched_) loop_.Unwatch(fd);
}

Result<> UserNet::AddForwards() {
  if (!slirp_)
    return Fail(ErrorCode::kInvalid,
                "libslirp refuses these addresses: use net=10.0.2.0/24 or leave them out");
  for (const PortForward& forward : config_.forwards) {
    in_addr guest = forward.guest_address.s_addr ? forward.guest_address : config_.dhcp_start;
    errno = 0;
    if (slirp_add_hostfwd(slirp_, forward.udp, forward.host_address,
                          static_cast<int>(forward.host_port), guest,
                          static_cast<int>(forward.guest_port)) == 0) {
      continue;
    }
    int error = errno;
    std::string where = fmt::format("hostfwd={}: port {} on {}", forward.text, forward.host_port,
                                    FormatIpv4(forward.host_address));
    switch (error) {
      case EADDRINUSE:
        return Fail(ErrorCode::kBusy,
                    where + " is in use by another program: choose another host port");
      case EACCES:
        return Fail(ErrorCode::kPermission,
                    where + " is reserved for root: choose a host port from 1024 on");
      case EADDRNOTAVAIL:
        return Fail(ErrorCode::kNotFound,
                    where + " is not an address of this host: leave it out or use 127.0.0.1");
      default:
        return Fail(ErrnoError(error ? error : EIO, where + " cannot be forwarded"));
    }
  }
  return {};
}

// ---- frames

bool UserNet::Send(std::span<const iovec> frame) {
  frame_.clear();
  for (const iovec& piece : frame) {
    if (frame_.size() + piece.iov_len > kMaxFrame)
      return true;  // larger than any Ethernet frame: dropped
    const auto* bytes = static_cast<const uint8_t*>(piece.iov_base);
    frame_.insert(frame_.end(), bytes, bytes + piece.iov_len);
  }
  slirp_input(slirp_, frame_.data(), static_cast<int>(frame_.size()));
  Schedule();
  return true;
}

ssize_t UserNet::FrameFromSlirp(const void* data, size_t size, void* opaque) {
  UserNet& net = Self(opaque);
  auto length = static_cast<ssize_t>(size);
  if (!net.receiver_) return length;
  if (net.queue_.bytes() + size > kQueueLimit) {
    ++net.dropped_;  // TCP sends it again, more slowly
    return length;
  }
  net.queue_.Push({static_cast<const uint8_t*>(data), size});
  net.Schedule();
  return length;
}

void UserNet::Deliver() {
  while (!queue_.empty() && !blocked_) {
    if (receiver_ && !receiver_->ReceiveFrame(queue_.front())) {
      blocked_ = true;
    } else {
      queue_.Pop();
    }
  }
  queue_.Compact();
}

void UserNet::ReceiverReady() {
  blocked_ = false;
  Schedule();
}

// ---- the loop

// Once a turn of the loop is enough, whatever happened in it.
void UserNet::Schedule() {
  if (std::exchange(scheduled_, true)) return;
  loop_.Post([self = self_] {
    if (*self) (*self)->Turn();
  });
}

void UserNet::Turn() {
  scheduled_ = false;
  // While the guest takes nothing, the sockets wait too.
  if (!blocked_ || queue_.bytes() <= kQueueHighWater) PollSockets();
  Deliver();
  if (blocked_ && queue_.bytes() > kQueueHighWater) {
    for (const auto& [fd, events] : watched_) loop_.Rearm(fd, FdEvents::kNone);
    timeout_.Cancel();
  } else {
    WatchSockets();
  }
}

void UserNet::PollSockets() {
  int result = polls_.empty() ? 0 : poll(polls_.data(), polls_.size(), 0);
  auto revents = [](int index, void* opaque) {
    int happened = Self(opaque).polls_[static_cast<size_t>(index)].revents;
    int events = 0;
    if (happened & POLLIN) events |= SLIRP_POLL_IN;
    if (happened & POLLOUT) events |= SLIRP_POLL_OUT;
    if (happened & POLLPRI) events |= SLIRP_POLL_PRI;
    if (happened & POLLERR) events |= SLIRP_POLL_ERR;
    if (happened & POLLHUP) events |= SLIRP_POLL_HUP;
    return events;
  };
  slirp_pollfds_poll(slirp_, result < 0, revents, this);
}

int UserNet::AddPoll(int fd, int events) {
  short wanted = 0;
  if (events & SLIRP_POLL_IN) wanted |= POLLIN;
  if (events & SLIRP_POLL_OUT) wanted |= POLLOUT;
  if (events & SLIRP_POLL_PRI) wanted |= POLLPRI;
  polls_.push_back({fd, wanted, 0});
  return static_cast<int>(polls_.size()) - 1;
}

void UserNet::WatchSockets() {
  polls_.clear();
  uint32_t timeout_ms = UINT32_MAX;
  slirp_pollfds_fill(
      slirp_, &timeout_ms,
      [](int fd, int events, void* opaque) { return Self(opaque).AddPoll(fd, events); }, this);
  for (auto& [fd, events] : watched_) events = FdEvents::kNone;
  for (const pollfd& poll : polls_) {
    uint32_t wanted =
        (poll.events & (POLLIN | POLLPRI) ? static_cast<uint32_t>(FdEvents::kRead) : 0) |
        (poll.events & POLLOUT ? static_cast<uint32_t>(FdEvents::kWrite) : 0);
    auto [at, added] = watched_.try_emplace(poll.fd, FdEvents::kNone);
    at->second = static_cast<FdEvents>(static_cast<uint32_t>(at->second) | wanted);
    if (added) loop_.Watch(poll.fd, FdEvents::kNone, [this](FdEvents) { Schedule(); });
  }
  for (auto at = watched_.begin(); at != watched_.end();) {
    if (at->second == FdEvents::kNone) {
      loop_.Unwatch(at->first);
      at = watched_.erase(at);
    } else {
      loop_.Rearm(at->first, at->second);
      ++at;
    }
  }
  if (timeout_ms != UINT32_MAX) {
    timeout_.Arm(loop_.clock().NowNs() + int64_t{timeout_ms} * 1'000'000);
  } else {
    timeout_.Cancel();
  }
}

// libslirp is about to close it.
void UserNet::Unwatch(int fd) {
  if (watched_.erase(fd) > 0) loop_.Unwatch(fd);
  for (pollfd& poll : polls_) {
    if (poll.fd == fd) poll.fd = -1;  // libslirp knows the others by their index
  }
}

void* UserNet::NewTimer(SlirpTimerId id, void* context, void* opaque) {
  auto* timer = new SlirpTimer{&Self(opaque), id, context, nullptr};
  timer->timer = std::make_unique<Timer>(timer->net->loop_, [timer] {
    UserNet& net = *timer->net;
    slirp_handle_timer(net.slirp_, timer->id, timer->context);
    net.Schedule();
  });
  return timer;
}

void UserNet::SetTimer(void* timer, int64_t expire_ms, void* /*opaque*/) {
  static_cast<SlirpTimer*>(timer)->timer->Arm(expire_ms * 1'000'000);
}

std::string UserNet::Describe() const {
  return fmt::format("user: net={}, restrict={}, forwards={}, dropped={}",
                     FormatIpv4(config_.network), config_.restricted ? "on" : "off",
                     config_.forwards.size(), dropped_);
}

}  // namespace

Result<std::unique_ptr<NetBackend>> CreateUserNet(const NetOptions& options, EventLoop& loop) {
  UserNetConfig config;
  TRY(TakeNetOptions(kOptions, options, &config));
  TRY(Complete(&config));
  auto net = std::make_unique<UserNet>(std::move(config), loop);
  TRY(net->AddForwards());
  return net;
}

}  // namespace kvartz::host
