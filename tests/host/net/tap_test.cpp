#include "host/net/tap.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/if.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <net/ethernet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>

#include "base/fd.h"

namespace kvartz::host {
namespace {

class TapTest : public testing::Test, public NetReceiver {
 protected:
  void SetUp() override {
    loop_ = EventLoop::Create().value();
    auto net = CreateNetBackend({{"type", "tap"}, {"ifname", name_}, {"script", "no"}}, *loop_);
    if (!net) GTEST_SKIP() << "this host gives no tap: " << net.error().what;
    net_ = std::move(*net);
    net_->SetReceiver(this);
    // The host's end: a packet socket on the interface, which is up.
    socket_.Reset(socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK, htons(ETH_P_ALL)));
    if (!socket_) GTEST_SKIP() << "this host gives no packet socket";
    ifreq request{};
    name_.copy(request.ifr_name, IFNAMSIZ - 1);
    ASSERT_EQ(ioctl(socket_.get(), SIOCGIFINDEX, &request), 0);
    sockaddr_ll address{};
    address.sll_family = AF_PACKET;
    address.sll_protocol = htons(ETH_P_ALL);
    address.sll_ifindex = request.ifr_ifindex;
    ASSERT_EQ(bind(socket_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    request.ifr_flags = IFF_UP;
    ASSERT_EQ(ioctl(socket_.get(), SIOCSIFFLAGS, &request), 0);
  }
  bool ReceiveFrame(std::span<const uint8_t> frame) override {
    if (!accept_) return false;
    if (frame.size() >= 12 + 14 && frame[12 + 12] == 0x88 && frame[12 + 13] == 0xb5) {
      received_.assign(frame.begin(), frame.end());
    }
    return true;
  }
  // Ethernet type 0x88b5 is for local experiments (IEEE 802).
  static std::vector<uint8_t> Frame() {
    std::vector<uint8_t> frame(60, 0x42);
    std::memset(frame.data(), 0xff, 6);
    frame[6] = 0x52;
    frame[12] = 0x88;
    frame[13] = 0xb5;
    return frame;
  }

  std::string name_ = "kvt" + std::to_string(getpid());
  std::unique_ptr<EventLoop> loop_;
  std::unique_ptr<NetBackend> net_;
  UniqueFd socket_;
  std::vector<uint8_t> received_;
  bool accept_ = true;
};

TEST_F(TapTest, FramesGoBothWays) {
  EXPECT_TRUE(net_->has_vnet_header());
  net_->SetOffloads({.csum = true, .tso4 = true, .tso6 = true, .ecn = false});
  std::vector<uint8_t> frame = Frame();
  uint8_t header[12] = {};
  iovec pieces[] = {{header, sizeof header}, {frame.data(), frame.size()}};
  ASSERT_TRUE(net_->Send(pieces));
  bool seen = false;
  uint8_t buffer[2048];
  pollfd readable{socket_.get(), POLLIN, 0};
  while (!seen && poll(&readable, 1, 5000) == 1) {
    ssize_t got = recv(socket_.get(), buffer, sizeof buffer, 0);
    seen = got == 60 && std::memcmp(buffer, frame.data(), 60) == 0;
  }
  EXPECT_TRUE(seen);
  // The other way, and with a receiver that has no room at first.
  accept_ = false;
  ASSERT_EQ(send(socket_.get(), frame.data(), frame.size(), 0), 60);
  for (int i = 0; i < 3; ++i) loop_->RunOnce(1'000'000);
  EXPECT_TRUE(received_.empty());
  accept_ = true;
  net_->ReceiverReady();
  for (int i = 0; i < 500 && received_.empty(); ++i) loop_->RunOnce(10'000'000);
  ASSERT_EQ(received_.size(), 72u);
  EXPECT_EQ(std::memcmp(received_.data() + 12, frame.data(), 60), 0);
}

TEST_F(TapTest, AnInterfaceHasOneUser) {
  auto second = CreateNetBackend({{"type", "tap"}, {"ifname", name_}}, *loop_);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().what,
            "interface '" + name_ + "' is in use by another program: choose another ifname");
}

TEST(Tap, WrongOptionsAreRefused) {
  auto loop = EventLoop::Create().value();
  auto error = [&](NetOptions options) {
    options.insert(options.begin(), {"type", "tap"});
    auto net = CreateNetBackend(options, *loop);
    return net ? std::string() : net.error().what;
  };
  EXPECT_EQ(error({{"ifname", "a-name-that-is-too-long"}}),
            "ifname=a-name-that-is-too-long: longer than 15 characters");
  EXPECT_EQ(error({{"fd", "999"}}), "fd=999: not an open descriptor: Bad file descriptor");
  EXPECT_EQ(error({{"fd", "0"}, {"ifname", "x"}}), "say either fd= or ifname=");
  EXPECT_EQ(error({{"vhost", "on"}}), "vhost=on: not supported yet: say vhost=off");
  EXPECT_NE(error({{"script", "/etc/ifup"}}).find("not supported yet"), std::string::npos);
  UniqueFd null(open("/dev/null", O_RDWR));
  EXPECT_EQ(error({{"fd", std::to_string(null.get())}}),
            "fd=" + std::to_string(null.get()) + ": not a tap");
  if (access("/dev/net/tun", R_OK | W_OK) == 0) {
    EXPECT_EQ(error({{"ifname", "lo"}}),
              "interface 'lo' exists but is not a tap interface: choose another ifname");
  }
}

}  // namespace
}  // namespace kvartz::host
