#include "host/net/user_net.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>

#include "base/fd.h"

namespace kvartz::host {
namespace {

using Frame = std::vector<uint8_t>;
constexpr uint8_t kGuestMac[6] = {0x52, 0x54, 0x00, 0x12, 0x34, 0x56};
constexpr uint8_t kBroadcast[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

void Put16(Frame& f, uint16_t v) {
  f.push_back(v >> 8);
  f.push_back(v & 0xff);
}
void Put32(Frame& f, uint32_t v) {
  Put16(f, v >> 16);
  Put16(f, v & 0xffff);
}
uint16_t Get16(const Frame& f, size_t at) { return static_cast<uint16_t>(f[at] << 8 | f[at + 1]); }
uint32_t Get32(const Frame& f, size_t at) {
  return uint32_t{Get16(f, at)} << 16 | Get16(f, at + 2);
}

uint16_t Checksum(std::span<const uint8_t> bytes) {
  uint32_t sum = 0;
  for (size_t i = 0; i < bytes.size(); ++i) sum += i % 2 ? bytes[i] : bytes[i] << 8;
  while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
  return static_cast<uint16_t>(~sum);
}

// Ethernet, IPv4, UDP around `payload`.
Frame Udp(const uint8_t* to_mac, uint32_t from, uint32_t to, uint16_t from_port, uint16_t to_port,
          const Frame& payload) {
  Frame f(to_mac, to_mac + 6);
  f.insert(f.end(), kGuestMac, kGuestMac + 6);
  Put16(f, 0x0800);
  size_t ip = f.size();
  Put16(f, 0x4500);
  Put16(f, static_cast<uint16_t>(28 + payload.size()));
  Put32(f, 0);
  Put16(f, 0x4011);
  Put16(f, 0);
  Put32(f, from);
  Put32(f, to);
  uint16_t sum = Checksum(std::span(f).subspan(ip, 20));
  f[ip + 10] = sum >> 8;
  f[ip + 11] = sum & 0xff;
  Put16(f, from_port);
  Put16(f, to_port);
  Put16(f, static_cast<uint16_t>(8 + payload.size()));
  Put16(f, 0);
  f.insert(f.end(), payload.begin(), payload.end());
  return f;
}

// RFC 2131.
Frame Dhcp(uint8_t type, uint32_t requested) {
  Frame p = {1, 1, 6, 0};
  Put32(p, 0xcafe1234);
  p.resize(28);
  p.insert(p.end(), kGuestMac, kGuestMac + 6);
  p.resize(236);
  Put32(p, 0x63825363);
  p.insert(p.end(), {53, 1, type});
  if (requested) {
    p.insert(p.end(), {50, 4});
    Put32(p, requested);
  }
  p.push_back(255);
  p.resize(300);
  return Udp(kBroadcast, 0, 0xffffffff, 68, 67, p);
}

// The value of a DHCP option in a reply, or empty.
Frame DhcpOption(const Frame& f, uint8_t option) {
  for (size_t at = 14 + 28 + 240; at + 1 < f.size() && f[at] != 255; at += 2u + f[at + 1]) {
    if (f[at] == option) return Frame(f.begin() + at + 2, f.begin() + at + 2 + f[at + 1]);
  }
  return {};
}

class UserNetTest : public testing::Test, public NetReceiver {
 protected:
  void SetUp() override { loop_ = EventLoop::Create().value(); }
  void TearDown() override {
    if (net_) net_->SetReceiver(nullptr);
    net_.reset();
    loop_->RunOnce(0);
  }
  Result<> Open(NetOptions options) {
    options.insert(options.begin(), {"type", "user"});
    auto net = CreateNetBackend(options, *loop_);
    if (!net) return Fail(net.error());
    net_ = std::move(*net);
    net_->SetReceiver(this);
    return {};
  }
  std::string ErrorOf(const NetOptions& options) {
    Result<> result = Open(options);
    return result ? "" : result.error().what;
  }
  bool ReceiveFrame(std::span<const uint8_t> frame) override {
    if (!accept_) return false;
    received_.emplace_back(frame.begin(), frame.end());
    return true;
  }
  void Send(const Frame& frame) {
    // In two pieces, as guests do.
    iovec pieces[] = {{const_cast<uint8_t*>(frame.data()), 14},
                      {const_cast<uint8_t*>(frame.data()) + 14, frame.size() - 14}};
    EXPECT_TRUE(net_->Send(pieces));
  }
  // The first frame that `wanted` likes; answers ARP for the guest meanwhile.
  Frame Await(const std::function<bool(const Frame&)>& wanted) {
    int64_t end = MonotonicClock::Instance().NowNs() + 5'000'000'000;
    while (MonotonicClock::Instance().NowNs() < end) {
      loop_->RunOnce(10'000'000);
      std::vector<Frame> frames;
      frames.swap(received_);
      for (size_t i = 0; i < frames.size(); ++i) {
        Frame& frame = frames[i];
        if (wanted(frame)) {
          received_.insert(received_.begin(), frames.begin() + static_cast<ptrdiff_t>(i) + 1,
                           frames.end());
          return frame;
        }
        if (Get16(frame, 12) == 0x0806 && Get16(frame, 20) == 1 && Get32(frame, 38) == kGuestIp)
          AnswerArp(frame);
      }
    }
    return {};
  }
  void AnswerArp(const Frame& request) {
    Frame f(request.begin() + 6, request.begin() + 12);
    f.insert(f.end(), kGuestMac, kGuestMac + 6);
    Put16(f, 0x0806);
    f.insert(f.end(), request.begin() + 14, request.begin() + 20);
    Put16(f, 2);
    f.insert(f.end(), kGuestMac, kGuestMac + 6);
    Put32(f, kGuestIp);
    f.insert(f.end(), request.begin() + 22, request.begin() + 32);
    f.resize(60);
    Send(f);
  }
  Frame AwaitDhcp() {
    return Await([](const Frame& f) {
      return f.size() > 282 && Get16(f, 12) == 0x0800 && Get16(f, 36) == 68;
    });
  }

  static constexpr uint32_t kGuestIp = 0x0a00020f;
  std::unique_ptr<EventLoop> loop_;
  std::unique_ptr<NetBackend> net_;
  std::vector<Frame> received_;
  bool accept_ = true;
};

TEST_F(UserNetTest, DhcpGivesAddressRouterAndName) {
  ASSERT_TRUE(Open({{"hostname", "guest7"}, {"bootfile", "pxe.0"}}));
  Send(Dhcp(1, 0));
  Frame offer = AwaitDhcp();
  ASSERT_FALSE(offer.empty());
  EXPECT_EQ(DhcpOption(offer, 53), Frame{2});
  EXPECT_EQ(Get32(offer, 14 + 28 + 16), kGuestIp);
  EXPECT_EQ(DhcpOption(offer, 3), (Frame{10, 0, 2, 2}));
  EXPECT_EQ(DhcpOption(offer, 6), (Frame{10, 0, 2, 3}));
  EXPECT_EQ(DhcpOption(offer, 1), (Frame{255, 255, 255, 0}));
  EXPECT_EQ(DhcpOption(offer, 12), (Frame{'g', 'u', 'e', 's', 't', '7'}));
  EXPECT_STREQ(reinterpret_cast<const char*>(&offer[14 + 28 + 108]), "pxe.0");
  Send(Dhcp(3, kGuestIp));
  Frame ack = AwaitDhcp();
  ASSERT_FALSE(ack.empty());
  EXPECT_EQ(DhcpOption(ack, 53), Frame{5});
}

TEST_F(UserNetTest, OtherNetworks) {
  ASSERT_TRUE(Open({{"net", "192.168.76.0/24"}, {"dhcpstart", "192.168.76.9"}, {"ipv6", "off"}}));
  Send(Dhcp(1, 0));
  Frame offer = AwaitDhcp();
  ASSERT_FALSE(offer.empty());
  EXPECT_EQ(Get32(offer, 14 + 28 + 16), 0xc0a84c09u);
  EXPECT_EQ(DhcpOption(offer, 3), (Frame{192, 168, 76, 2}));
}

TEST_F(UserNetTest, FramesWaitUntilTheGuestHasRoom) {
  ASSERT_TRUE(Open({}));
  accept_ = false;
  Send(Dhcp(1, 0));
  for (int i = 0; i < 5; ++i) loop_->RunOnce(1'000'000);
  EXPECT_TRUE(received_.empty());
  accept_ = true;
  for (int i = 0; i < 5; ++i) loop_->RunOnce(1'000'000);
  EXPECT_TRUE(received_.empty());  // only when it is told
  net_->ReceiverReady();
  EXPECT_FALSE(AwaitDhcp().empty());
}

TEST_F(UserNetTest, Tftp) {
  std::string dir = "/tmp/kvartz-tftp-" + std::to_string(getpid());
  std::filesystem::create_directory(dir);
  std::ofstream(dir + "/hello") << "served by the host";
  ASSERT_TRUE(Open({{"tftp", dir}}));
  Send(Dhcp(1, 0));
  Frame offer = AwaitDhcp();
  ASSERT_FALSE(offer.empty());
  Frame request = {0, 1};
  for (const char* text : {"hello", "octet"}) request.insert(request.end(), text, text + 6);
  Frame server_mac(offer.begin() + 6, offer.begin() + 12);
  Send(Udp(server_mac.data(), kGuestIp, 0x0a000202, 3000, 69, request));
  Frame reply =
      Await([](const Frame& f) { return Get16(f, 12) == 0x0800 && Get16(f, 36) == 3000; });
  ASSERT_GT(reply.size(), 46u);
  EXPECT_EQ(Get16(reply, 42), 3);  // DATA
  EXPECT_EQ(Get16(reply, 44), 1);
  EXPECT_EQ(std::string(reply.begin() + 46, reply.begin() + 64), "served by the host");
  std::filesystem::remove_all(dir);
}

// A port of 127.0.0.1 that is free now.
int FreePort(UniqueFd* holder, int type) {
  holder->Reset(socket(AF_INET, type, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(bind(holder->get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  socklen_t size = sizeof address;
  getsockname(holder->get(), reinterpret_cast<sockaddr*>(&address), &size);
  if (type == SOCK_STREAM) {
    EXPECT_EQ(listen(holder->get(), 1), 0);
  }
  return ntohs(address.sin_port);
}

TEST_F(UserNetTest, ForwardedUdpPortReachesTheGuest) {
  UniqueFd holder;
  int port = FreePort(&holder, SOCK_DGRAM);
  holder.Reset();
  ASSERT_TRUE(Open({{"hostfwd", "udp:127.0.0.1:" + std::to_string(port) + "-:7"}}));
  Send(Dhcp(1, 0));
  ASSERT_FALSE(AwaitDhcp().empty());
  UniqueFd client(socket(AF_INET, SOCK_DGRAM, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  ASSERT_EQ(
      sendto(client.get(), "ping", 4, 0, reinterpret_cast<sockaddr*>(&address), sizeof address), 4);
  Frame got = Await(
      [](const Frame& f) { return Get16(f, 12) == 0x0800 && f[23] == 17 && Get16(f, 36) == 7; });
  ASSERT_GE(got.size(), 46u);
  EXPECT_EQ(std::string(got.begin() + 42, got.begin() + 46), "ping");
  EXPECT_EQ(Get32(got, 30), kGuestIp);
}

TEST_F(UserNetTest, ForwardedTcpPortAsksTheGuest) {
  UniqueFd holder;
  int port = FreePort(&holder, SOCK_STREAM);
  holder.Reset();
  ASSERT_TRUE(Open({{"hostfwd", "tcp::" + std::to_string(port) + "-10.0.2.15:22"}}));
  UniqueFd client(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  connect(client.get(), reinterpret_cast<sockaddr*>(&address), sizeof address);
  Frame syn = Await(
      [](const Frame& f) { return Get16(f, 12) == 0x0800 && f[23] == 6 && Get16(f, 36) == 22; });
  ASSERT_FALSE(syn.empty());
  EXPECT_EQ(syn[47] & 0x3f, 2);  // SYN
}

TEST_F(UserNetTest, SeveralForwards) {
  UniqueFd first, second, third;
  NetOptions options;
  int i = 0;
  for (UniqueFd* holder : {&first, &second, &third}) {
    const char* names[] = {"hostfwd", "hostfwd.1", "hostfwd.2.str"};
    options.emplace_back(names[i++],
                         "tcp:127.0.0.1:" + std::to_string(FreePort(holder, SOCK_STREAM)) + "-:22");
  }
  for (UniqueFd* holder : {&first, &second, &third}) holder->Reset();
  ASSERT_TRUE(Open(options));
  EXPECT_NE(net_->Describe().find("forwards=3"), std::string::npos);
}

TEST_F(UserNetTest, PortTakenIsSaidInOneLine) {
  UniqueFd holder;
  std::string port = std::to_string(FreePort(&holder, SOCK_STREAM));
  EXPECT_EQ(ErrorOf({{"hostfwd", "tcp:127.0.0.1:" + port + "-:22"}}),
            "hostfwd=tcp:127.0.0.1:" + port + "-:22: port " + port +
                " on 127.0.0.1 is in use by another program: choose another host port");
}

TEST_F(UserNetTest, WrongOptionsAreRefusedByName) {
  const std::pair<NetOptions, const char*> bad[] = {
      {{{"hostfwd", "tcp::22"}},
       "hostfwd=tcp::22: expected [tcp|udp]:[HOSTADDRESS]:HOSTPORT-[GUESTADDRESS]:GUESTPORT"},
      {{{"hostfwd", "tcp::70000-:22"}},
       "hostfwd=tcp::70000-:22: '70000' is not a number from 0 to 65535"},
      {{{"hostfwd", "tcp:nix:70-:22"}}, "hostfwd=tcp:nix:70-:22: 'nix' is not an IPv4 address"},
      {{{"hostfw", "tcp::1-:2"}}, "there is no option 'hostfw': did you mean 'hostfwd'?"},
      {{{"net", "10.0.2.0/40"}}, "net=10.0.2.0/40: '40' is not a number from 4 to 30"},
      {{{"host", "10.0.3.2"}}, "host=10.0.3.2: not an address of the network 10.0.2.0"},
      {{{"dns", "10.0.2.2"}}, "host, dns and dhcpstart must be three different addresses"},
      {{{"guestfwd", "tcp:10.0.2.100:1-cmd:x"}},
       "guestfwd=tcp:10.0.2.100:1-cmd:x: not supported yet: guestfwd (reach host services at the "
       "address host= instead)"},
      {{{"tftp", "/etc/passwd"}}, "tftp=/etc/passwd: not a directory"},
      {{{"restrict", "maybe"}}, "restrict=maybe: say on or off"},
      {{{"ipv4", "off"}, {"ipv6", "off"}}, "ipv4=off,ipv6=off leaves no network"},
  };
  for (const auto& [options, message] : bad) EXPECT_EQ(ErrorOf(options), message);
}

TEST(NetFactory, Types) {
  auto loop = EventLoop::Create().value();
  EXPECT_EQ(CreateNetBackend({{"type", "usr"}}, *loop).error().what,
            "there is no network backend 'usr': did you mean 'user'?");
  EXPECT_EQ(CreateNetBackend({{"type", "vde"}}, *loop).error().what,
            "not supported yet: network backend 'vde' (there are user and tap)");
  EXPECT_EQ(CreateNetBackend({}, *loop).error().what, "the type is missing: say user or tap");
}

}  // namespace
}  // namespace kvartz::host
