#include "host/net/tap.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#include <array>
#include <cerrno>
#include <climits>
#include <cstring>

#include "base/fd.h"
#include "host/net/option_parser.h"

namespace kvartz::host {
namespace {

struct TapConfig {
  std::string ifname;
  int fd = -1;
  bool vnet_header = true;
  int send_buffer = 0;  // bytes; 0: the host's default
};

constexpr char kScriptRefused[] =
    "not supported yet: set the interface up beforehand (ip tuntap add ... mode tap) and say "
    "script=no,downscript=no";

Result<> TakeScript(TapConfig&, const std::string& value) {
  if (value == "no" || value.empty()) return {};
  return Fail(ErrorCode::kUnsupported, kScriptRefused);
}
Result<> TakeVhost(TapConfig&, const std::string& value) {
  if (!TRY(ParseNetSwitch(value))) return {};
  return Fail(ErrorCode::kUnsupported, "not supported yet: say vhost=off");
}
Result<> TakeQueues(TapConfig&, const std::string& value) {
  if (TRY(ParseNetNumber(value, 1, 1024)) == 1) return {};
  return Fail(ErrorCode::kUnsupported, "not supported yet: more than one queue");
}

using Row = NetOptionRow<TapConfig>;
constexpr Row kOptions[] = {
    {"ifname",
     [](TapConfig& c, const std::string& v) -> Result<> { return c.ifname = v, Result<>{}; }},
    {"fd",
     [](TapConfig& c, const std::string& v) -> Result<> {
       c.fd = static_cast<int>(TRY(ParseNetNumber(v, 0, 1 << 20)));
       return {};
     }},
    {"script", TakeScript},
    {"downscript", TakeScript},
    {"vhost", TakeVhost},
    {"vnet_hdr",
     [](TapConfig& c, const std::string& v) -> Result<> {
       c.vnet_header = TRY(ParseNetSwitch(v));
       return {};
     }},
    {"sndbuf",
     [](TapConfig& c, const std::string& v) -> Result<> {
       c.send_buffer = static_cast<int>(TRY(ParseNetNumber(v, 0, INT32_MAX)));
       return {};
     }},
    {"queues", TakeQueues},
};

constexpr size_t kMaxFrame = 65536 + 64;
// virtio_net_hdr with num_buffers (virtio 1.2 ch. 5.1.6).
constexpr size_t kVnetHeaderSize = 12;
// Frames in one go, before others on the loop have their turn.
constexpr int kBatch = 64;

// Loop-owned.
class Tap final : public NetBackend {
 public:
  Tap(UniqueFd fd, std::string name, bool vnet_header, EventLoop& loop)
      : loop_(loop), fd_(std::move(fd)), name_(std::move(name)), vnet_header_(vnet_header) {
    if (vnet_header_) SetVnetHeader(kVnetHeaderSize);
    loop_.Watch(fd_.get(), FdEvents::kRead, [this](FdEvents ready) { Ready(ready); });
  }
  ~Tap() override { loop_.Unwatch(fd_.get()); }

  bool Send(std::span<const iovec> frame) override {
    ssize_t sent =
        writev(fd_.get(), frame.data(), static_cast<int>(std::min<size_t>(frame.size(), IOV_MAX)));
    if (sent < 0 && errno == EAGAIN) {
      send_blocked_ = true;
      Rearm();
      return false;
    }
    return true;  // what the host refuses (interface down, malformed header) is dropped
  }
  void ReceiverReady() override {
    receive_blocked_ = false;
    Rearm();
  }
  bool has_vnet_header() const override { return vnet_header_; }
  void SetVnetHeader(size_t bytes) override {
    int size = static_cast<int>(bytes);
    int little_endian = 1;
    ioctl(fd_.get(), TUNSETVNETHDRSZ, &size);
    ioctl(fd_.get(), TUNSETVNETLE, &little_endian);
  }
  void SetOffloads(const NetOffloads& offloads) override {
    unsigned flags = 0;
    if (offloads.csum) flags |= TUN_F_CSUM;
    if (offloads.csum && offloads.tso4) flags |= TUN_F_TSO4;
    if (offloads.csum && offloads.tso6) flags |= TUN_F_TSO6;
    if ((offloads.tso4 || offloads.tso6) && offloads.ecn) flags |= TUN_F_TSO_ECN;
    // An old host that doesn't know one of them does without all.
    if (ioctl(fd_.get(), TUNSETOFFLOAD, flags) != 0) ioctl(fd_.get(), TUNSETOFFLOAD, 0);
  }
  std::string Describe() const override { return fmt::format("tap: ifname={}", name_); }

 private:
  void Rearm() {
    uint32_t events = (receive_blocked_ ? 0 : static_cast<uint32_t>(FdEvents::kRead)) |
                      (send_blocked_ ? static_cast<uint32_t>(FdEvents::kWrite) : 0);
    loop_.Rearm(fd_.get(), static_cast<FdEvents>(events));
  }
  void Ready(FdEvents ready) {
    if (static_cast<uint32_t>(ready) & static_cast<uint32_t>(FdEvents::kWrite)) {
      send_blocked_ = false;
      Rearm();
      if (receiver_) receiver_->SendReady();
    }
    if (static_cast<uint32_t>(ready) & static_cast<uint32_t>(FdEvents::kRead)) Receive();
  }
  void Receive() {
    for (int i = 0; i < kBatch; ++i) {
      if (pending_ == 0) {
        ssize_t got = read(fd_.get(), buffer_.data(), buffer_.size());
        if (got <= 0) return;
        pending_ = static_cast<size_t>(got);
      }
      if (receiver_ && !receiver_->ReceiveFrame({buffer_.data(), pending_})) {
        receive_blocked_ = true;
        return Rearm();
      }
      pending_ = 0;
    }
  }

  EventLoop& loop_;
  UniqueFd fd_;
  const std::string name_;
  const bool vnet_header_;
  bool send_blocked_ = false;
  bool receive_blocked_ = false;
  size_t pending_ = 0;  // bytes of a frame in buffer_ that the guest had no room for
  std::array<uint8_t, kMaxFrame> buffer_;
};

Result<UniqueFd> OpenTap(const TapConfig& config, std::string* name, bool vnet_header) {
  if (config.ifname.size() >= IFNAMSIZ) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("ifname={}: longer than {} characters", config.ifname, IFNAMSIZ - 1));
  }
  UniqueFd fd(open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC));
  if (!fd) {
    if (errno == ENOENT || errno == ENODEV || errno == ENXIO) {
      return Fail(ErrorCode::kNotFound,
                  "the host has no /dev/net/tun: load the module tun, or use -nic user");
    }
    return Fail(ErrnoError(errno, "cannot open /dev/net/tun (be root, or use -nic user)"));
  }
  ifreq request{};
  request.ifr_flags = static_cast<short>(IFF_TAP | IFF_NO_PI | (vnet_header ? IFF_VNET_HDR : 0));
  config.ifname.copy(request.ifr_name, IFNAMSIZ - 1);
  if (ioctl(fd.get(), TUNSETIFF, &request) != 0) {
    std::string shown =
        config.ifname.empty() ? "a new tap interface" : "interface '" + config.ifname + "'";
    switch (errno) {
      case EPERM:
        return Fail(ErrorCode::kPermission,
                    fmt::format("not permitted to use {}: have root create it with 'ip tuntap add "
                                "{} mode tap user NAME', "
                                "or use -nic user",
                                shown, config.ifname.empty() ? "tap0" : config.ifname));
      case EBUSY:
        return Fail(ErrorCode::kBusy,
                    shown + " is in use by another program: choose another ifname");
      case EINVAL:
        return Fail(ErrorCode::kInvalid,
                    shown + " exists but is not a tap interface: choose another ifname");
      default:
        return Fail(ErrnoError(errno, "cannot use " + shown));
    }
  }
  *name = request.ifr_name;
  return fd;
}

// A tap that another program opened for us (fd=).
Result<UniqueFd> AdoptTap(int number, std::string* name, bool* vnet_header) {
  UniqueFd fd(fcntl(number, F_DUPFD_CLOEXEC, 3));
  if (!fd) return Fail(ErrnoError(errno, fmt::format("fd={}: not an open descriptor", number)));
  ifreq request{};
  if (ioctl(fd.get(), TUNGETIFF, &request) != 0) {
    return Fail(ErrorCode::kInvalid, fmt::format("fd={}: not a tap", number));
  }
  if (fcntl(fd.get(), F_SETFL, fcntl(fd.get(), F_GETFL) | O_NONBLOCK) != 0) {
    return Fail(ErrnoError(errno, fmt::format("fd={}", number)));
  }
  *name = request.ifr_name;
  *vnet_header = request.ifr_flags & IFF_VNET_HDR;
  return fd;
}

}  // namespace

Result<std::unique_ptr<NetBackend>> CreateTap(const NetOptions& options, EventLoop& loop) {
  TapConfig config;
  TRY(TakeNetOptions(kOptions, options, &config));
  if (config.fd >= 0 && !config.ifname.empty())
    return Fail(ErrorCode::kInvalid, "say either fd= or ifname=");
  std::string name;
  bool vnet_header = config.vnet_header;
  UniqueFd fd = config.fd >= 0 ? TRY(AdoptTap(config.fd, &name, &vnet_header))
                               : TRY(OpenTap(config, &name, vnet_header));
  if (config.send_buffer > 0 && ioctl(fd.get(), TUNSETSNDBUF, &config.send_buffer) != 0) {
    return Fail(ErrnoError(errno, "cannot set sndbuf"));
  }
  return std::make_unique<Tap>(std::move(fd), name, vnet_header, loop);
}

}  // namespace kvartz::host
