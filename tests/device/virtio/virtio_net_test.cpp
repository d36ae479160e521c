#include "device/virtio/virtio_net.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "device/virtio/test_machine.h"
#include "device/virtio/virtio_pci.h"
#include "host/net/net_factory.h"

namespace kvartz::test {
namespace {

constexpr uint64_t kPacked = 1ull << 34, kEventIdx = 1ull << 29;
constexpr uint64_t kMrgRxbuf = 1 << 15, kStatus = 1 << 16, kCtrlVq = 1 << 17, kCtrlRx = 1 << 18,
                   kCtrlVlan = 1 << 19, kCtrlRxExtra = 1 << 20, kAnnounce = 1 << 21,
                   kCtrlMac = 1 << 23, kCsum = 1, kGuestCsum = 2, kGuestTso4 = 1 << 7;
constexpr uint16_t kRx = 0, kTx = 1, kControl = 2;

// A cable whose other end is the test.
class FakeBackend final : public host::NetBackend {
 public:
  bool Send(std::span<const iovec> frame) override {
    if (busy) return false;
    std::vector<uint8_t> bytes;
    for (const iovec& piece : frame) {
      const auto* data = static_cast<const uint8_t*>(piece.iov_base);
      bytes.insert(bytes.end(), data, data + piece.iov_len);
    }
    sent.push_back(std::move(bytes));
    return true;
  }
  void ReceiverReady() override { ++ready; }
  bool has_vnet_header() const override { return vnet_header; }
  void SetVnetHeader(size_t bytes) override { header_bytes = bytes; }
  void SetOffloads(const host::NetOffloads& wanted) override { offloads = wanted; }
  std::string Describe() const override { return "fake"; }
  bool Receive(const std::vector<uint8_t>& frame) { return receiver_->ReceiveFrame(frame); }
  void NoLongerBusy() {
    busy = false;
    receiver_->SendReady();
  }

  bool busy = false;
  bool vnet_header = false;
  size_t header_bytes = 0;
  host::NetOffloads offloads;
  int ready = 0;
  std::vector<std::vector<uint8_t>> sent;
};

std::vector<uint8_t> FrameTo(std::initializer_list<uint8_t> mac, size_t size = 64) {
  std::vector<uint8_t> frame(size);
  for (size_t i = 0; i < size; ++i) frame[i] = static_cast<uint8_t>(i);
  std::copy(mac.begin(), mac.end(), frame.begin());
  frame[12] = 0x08;
  frame[13] = 0x00;
  return frame;
}

class VirtioNetTest : public testing::TestWithParam<uint64_t> {
 protected:
  void TearDown() override { machine_.Unplug(); }
  void Open(Properties properties = {}) {
    machine_.netdev = &backend_;
    properties.Set("netdev", "n0");
    properties.Set("packed", "on");
    ASSERT_NE(machine_.Plug("virtio-net-pci", properties), nullptr) << machine_.error;
    driver_ = std::make_unique<ModernDriver>(machine_);
  }
  void Start(uint64_t features) {
    ASSERT_TRUE(driver_->Negotiate(features | GetParam()));
    for (uint16_t i = 0; i < 3; ++i) driver_->SetUpQueue(i, 64);
    driver_->Start();
    machine_.Settle();
  }
  uint64_t AddRxBuffer(uint32_t size) {
    uint64_t gpa;
    machine_.Allocate(size, &gpa);
    driver_->ring(kRx).Add({{gpa, size, true}});
    return gpa;
  }
  bool Control(uint8_t command_class, uint8_t command, const std::vector<uint8_t>& data) {
    uint64_t header, payload, ack;
    uint8_t* at = machine_.Allocate(2, &header);
    at[0] = command_class;
    at[1] = command;
    std::memcpy(machine_.Allocate(data.size(), &payload), data.data(), data.size());
    uint8_t* answer = machine_.Allocate(1, &ack);
    *answer = 0xff;
    EXPECT_EQ(driver_->Transact(kControl, {{header, 2, false},
                                           {payload, static_cast<uint32_t>(data.size()), false},
                                           {ack, 1, true}}),
              1u);
    EXPECT_LE(*answer, 1);
    return *answer == 0;
  }
  // Whether the card lets a frame through to the driver.
  bool Passes(const std::vector<uint8_t>& frame) {
    AddRxBuffer(2048);
    EXPECT_TRUE(backend_.Receive(frame));
    return driver_->ring(kRx).Take().has_value();
  }

  TestMachine machine_;
  FakeBackend backend_;
  std::unique_ptr<ModernDriver> driver_;
};

TEST_P(VirtioNetTest, Configuration) {
  Open({{"mac", "52:54:00:ab:cd:ef"}});
  Start(kStatus);
  EXPECT_EQ(driver_->ReadConfig(0, 4), 0xab005452u);
  EXPECT_EQ(driver_->ReadConfig(4, 2), 0xefcdu);
  EXPECT_EQ(driver_->ReadConfig(6, 2), 1u);  // link up
  EXPECT_EQ(driver_->offered() & (kCsum | kGuestCsum), 0u);
  static_cast<VirtioNet*>(VirtioDeviceOf(*machine_.device()))->SetLink(false);
  EXPECT_EQ(driver_->ReadConfig(6, 2), 0u);
  EXPECT_EQ(driver_->ReadIsr(), 2);
}

TEST_P(VirtioNetTest, SendsFrames) {
  Open();
  Start(kMrgRxbuf);
  uint64_t header, frame;
  std::memset(machine_.Allocate(12, &header), 0, 12);
  std::vector<uint8_t> bytes = FrameTo({1, 2, 3, 4, 5, 6}, 100);
  std::memcpy(machine_.Allocate(100, &frame), bytes.data(), 100);
  EXPECT_EQ(
      driver_->Transact(kTx, {{header, 12, false}, {frame, 40, false}, {frame + 40, 60, false}}),
      0u);
  ASSERT_EQ(backend_.sent.size(), 1u);
  EXPECT_EQ(backend_.sent[0], bytes);
  // While the backend is busy, the ring keeps them.
  backend_.busy = true;
  driver_->ring(kTx).Add({{header, 12, false}, {frame, 100, false}});
  driver_->ring(kTx).Add({{header, 12, false}, {frame, 50, false}});
  driver_->Kick(kTx);
  machine_.Settle();
  EXPECT_FALSE(driver_->ring(kTx).Take());
  backend_.NoLongerBusy();
  machine_.Settle();
  EXPECT_TRUE(driver_->ring(kTx).Take() && driver_->ring(kTx).Take());
  ASSERT_EQ(backend_.sent.size(), 3u);
  EXPECT_EQ(backend_.sent[2].size(), 50u);
  EXPECT_FALSE(driver_->Transact(kTx, {{header, 11, false}}));
  EXPECT_TRUE(driver_->needs_reset());
}

TEST_P(VirtioNetTest, ReceivesIntoMergedBuffers) {
  Open();
  Start(kMrgRxbuf);
  std::vector<uint64_t> buffers;
  for (int i = 0; i < 3; ++i) buffers.push_back(AddRxBuffer(40));
  std::vector<uint8_t> frame = FrameTo({1, 2, 3, 4, 5, 6}, 100);
  EXPECT_TRUE(backend_.Receive(frame));  // 12 + 100 bytes: 40 + 40 + 32
  std::vector<uint8_t> got;
  uint32_t lengths[] = {40, 40, 32};
  for (int i = 0; i < 3; ++i) {
    std::optional<Used> used = driver_->ring(kRx).Take();
    ASSERT_TRUE(used);
    EXPECT_EQ(used->length, lengths[i]);
    got.insert(got.end(), machine_.ram(buffers[i]), machine_.ram(buffers[i]) + used->length);
  }
  EXPECT_EQ(std::vector<uint8_t>(got.begin(), got.begin() + 12),
            (std::vector<uint8_t>{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0}));
  EXPECT_TRUE(std::equal(frame.begin(), frame.end(), got.begin() + 12));
}

TEST_P(VirtioNetTest, FramesWaitForBuffers) {
  Open();
  Start(kMrgRxbuf);
  std::vector<uint8_t> frame = FrameTo({1, 2, 3, 4, 5, 6}, 100);
  EXPECT_FALSE(backend_.Receive(frame));
  AddRxBuffer(64);
  EXPECT_FALSE(backend_.Receive(frame));  // not enough yet, and none is used up
  EXPECT_FALSE(driver_->ring(kRx).Take());
  AddRxBuffer(64);
  EXPECT_TRUE(driver_->ring(kRx).DeviceWantsKick());
  int before = backend_.ready;
  driver_->Kick(kRx);
  machine_.Settle();
  EXPECT_EQ(backend_.ready, before + 1);
  EXPECT_TRUE(backend_.Receive(frame));
  EXPECT_TRUE(driver_->ring(kRx).Take() && driver_->ring(kRx).Take());
}

TEST_P(VirtioNetTest, WithoutMergingFramesThatDontFitAreDropped) {
  Open();
  Start(0);
  uint64_t gpa = AddRxBuffer(100);
  EXPECT_TRUE(backend_.Receive(FrameTo({1, 2, 3, 4, 5, 6}, 100)));
  EXPECT_FALSE(driver_->ring(kRx).Take());
  EXPECT_TRUE(backend_.Receive(FrameTo({1, 2, 3, 4, 5, 6}, 88)));
  ASSERT_TRUE(driver_->ring(kRx).Take());
  EXPECT_EQ(machine_.ram(gpa)[10], 1);  // num_buffers, with VIRTIO_F_VERSION_1 always
  AddRxBuffer(8);
  EXPECT_TRUE(backend_.Receive(FrameTo({1, 2, 3, 4, 5, 6}, 88)));
  EXPECT_TRUE(driver_->needs_reset());
}

TEST_P(VirtioNetTest, ReceiveFilter) {
  Open({{"mac", "52:54:00:00:00:01"}});
  Start(kMrgRxbuf | kCtrlVq | kCtrlRx | kCtrlRxExtra | kCtrlVlan | kCtrlMac);
  const auto own = FrameTo({0x52, 0x54, 0, 0, 0, 1}), other = FrameTo({0x52, 0x54, 0, 0, 0, 2}),
             broadcast = FrameTo({0xff, 0xff, 0xff, 0xff, 0xff, 0xff}),
             group = FrameTo({0x33, 0x33, 0, 0, 0, 9});
  EXPECT_TRUE(Passes(other));  // promiscuous until the driver says otherwise
  ASSERT_TRUE(Control(0, 0, {0}));
  EXPECT_TRUE(Passes(own) && Passes(broadcast));
  EXPECT_FALSE(Passes(other));
  EXPECT_FALSE(Passes(group));
  ASSERT_TRUE(
      Control(1, 0, {1, 0, 0, 0, 0x52, 0x54, 0, 0, 0, 2, 1, 0, 0, 0, 0x33, 0x33, 0, 0, 0, 9}));
  EXPECT_TRUE(Passes(other) && Passes(group));
  EXPECT_FALSE(
      Control(1, 0, {2, 0, 0, 0, 0x52, 0x54, 0, 0, 0, 2, 0, 0, 0, 0}));  // fewer than it says
  EXPECT_FALSE(Control(1, 0, {255, 255, 255, 255, 0x52}));
  EXPECT_TRUE(Passes(other));  // a refused table changes nothing
  ASSERT_TRUE(Control(1, 0, {0, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_FALSE(Passes(group));
  ASSERT_TRUE(Control(0, 1, {1}));
  EXPECT_TRUE(Passes(group));
  ASSERT_TRUE(Control(0, 5, {1}));
  EXPECT_FALSE(Passes(broadcast));
  ASSERT_TRUE(Control(1, 1, {0x52, 0x54, 0, 0, 0, 2}));
  EXPECT_TRUE(Passes(other));
  EXPECT_EQ(driver_->ReadConfig(4, 2), 0x0200u);
  auto tagged = other;
  tagged[12] = 0x81;
  tagged[13] = 0x00;
  tagged[14] = 0x20;
  tagged[15] = 0x05;
  EXPECT_FALSE(Passes(tagged));
  ASSERT_TRUE(Control(2, 0, {5, 0}));
  EXPECT_TRUE(Passes(tagged));
  ASSERT_TRUE(Control(2, 1, {5, 0}));
  EXPECT_FALSE(Passes(tagged));
  EXPECT_FALSE(Control(2, 0, {0, 0x10}));
  EXPECT_FALSE(Control(4, 0, {1, 0}));  // multiqueue wasn't offered
  EXPECT_FALSE(Control(0, 0, {}));
}

TEST_P(VirtioNetTest, OffloadsOfTheBackend) {
  backend_.vnet_header = true;
  Open();
  Start(kMrgRxbuf | kCsum | kGuestCsum | kGuestTso4);
  EXPECT_EQ(driver_->features() & (kCsum | kGuestCsum | kGuestTso4),
            kCsum | kGuestCsum | kGuestTso4);
  EXPECT_EQ(backend_.header_bytes, 12u);
  EXPECT_TRUE(backend_.offloads.csum && backend_.offloads.tso4);
  EXPECT_FALSE(backend_.offloads.tso6);
  uint64_t packet;
  uint8_t* at = machine_.Allocate(72, &packet);
  std::memset(at, 7, 72);
  EXPECT_EQ(driver_->Transact(kTx, {{packet, 72, false}}), 0u);
  ASSERT_EQ(backend_.sent.size(), 1u);
  EXPECT_EQ(backend_.sent[0], std::vector<uint8_t>(72, 7));
  uint64_t gpa = AddRxBuffer(2048);
  std::vector<uint8_t> frame = FrameTo({1, 2, 3, 4, 5, 6});
  frame.insert(frame.begin(), {1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0});
  EXPECT_TRUE(backend_.Receive(frame));
  ASSERT_TRUE(driver_->ring(kRx).Take());
  frame[10] = 1;
  EXPECT_TRUE(std::equal(frame.begin(), frame.end(), machine_.ram(gpa)));
}

TEST_P(VirtioNetTest, AnnouncesItselfAfterALoad) {
  Open();
  Start(kMrgRxbuf | kStatus | kCtrlVq | kAnnounce | kCtrlRx);
  ASSERT_TRUE(Control(0, 0, {0}));
  AddRxBuffer(2048);
  Device* device = machine_.device();
  device->Quiesce();
  EXPECT_FALSE(backend_.Receive(FrameTo({0xff, 0xff, 0xff, 0xff, 0xff, 0xff})));  // kept for later
  std::vector<uint8_t> saved = SaveState([&](StateVisitor& v) {
    LockGuard guard(device->lock());
    device->VisitState(v);
  });
  device = machine_.Plug("virtio-net-pci", {{"netdev", "n0"}, {"packed", "on"}});
  ASSERT_NE(device, nullptr) << machine_.error;
  Result<> loaded = LoadState(saved, [&](StateVisitor& v) {
    LockGuard guard(device->lock());
    device->VisitState(v);
  });
  ASSERT_TRUE(loaded) << loaded.error().what;
  machine_.Settle();
  EXPECT_EQ(driver_->ReadConfig(6, 2), 3u);
  EXPECT_TRUE(Control(3, 0, {}));
  EXPECT_EQ(driver_->ReadConfig(6, 2), 1u);
  EXPECT_TRUE(backend_.Receive(FrameTo({0xff, 0xff, 0xff, 0xff, 0xff, 0xff})));
  EXPECT_TRUE(driver_->ring(kRx).Take());
  EXPECT_TRUE(backend_.Receive(FrameTo({2, 2, 2, 2, 2, 2})));  // the filter was saved too
  EXPECT_FALSE(driver_->ring(kRx).Take());
}

TEST_P(VirtioNetTest, OneCardABackend) {
  Open();
  class Other : public host::NetReceiver {
    bool ReceiveFrame(std::span<const uint8_t>) override { return true; }
  } other;
  machine_.Unplug();
  backend_.SetReceiver(&other);
  EXPECT_EQ(machine_.Plug("virtio-net-pci", {{"netdev", "n0"}}), nullptr);
  EXPECT_EQ(machine_.error, "netdev=n0: another card is connected to it");
  machine_.netdev = nullptr;
  EXPECT_EQ(machine_.Plug("virtio-net-pci", {{"netdev", "n1"}}), nullptr);
  EXPECT_EQ(machine_.error, "netdev=n1: there is no such -netdev");
}

INSTANTIATE_TEST_SUITE_P(Rings, VirtioNetTest,
                         testing::Values(0, kEventIdx, kPacked, kPacked | kEventIdx));

// A DHCP exchange through the card and libslirp.
TEST(VirtioNetUser, DhcpThroughTheCard) {
  TestMachine machine;
  auto net = host::CreateNetBackend({{"type", "user"}}, machine.loop());
  ASSERT_TRUE(net) << net.error().what;
  machine.netdev = net->get();
  ASSERT_NE(machine.Plug("virtio-net-pci", {{"netdev", "n0"}}), nullptr);
  ModernDriver driver(machine);
  ASSERT_TRUE(driver.Negotiate(kMrgRxbuf));
  driver.SetUpQueue(kRx);
  driver.SetUpQueue(kTx);
  driver.Start();
  uint64_t rx, tx;
  uint8_t* got = machine.Allocate(2048, &rx);
  driver.ring(kRx).Add({{rx, 2048, true}});
  // Header, then Ethernet, IPv4 (checksum 0x79a6 for these fields), UDP, DHCPDISCOVER.
  std::vector<uint8_t> packet(12 + 14 + 28 + 300);
  const uint8_t kHeaders[] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0,    0x12, 0x34,
                              0x56, 8,    0,    0x45, 0,    0x01, 0x48, 0,    0,    0,    0,
                              0x40, 0x11, 0x79, 0xa6, 0,    0,    0,    0,    0xff, 0xff, 0xff,
                              0xff, 0,    68,   0,    67,   0x01, 0x34, 0,    0};
  std::copy(std::begin(kHeaders), std::end(kHeaders), packet.begin() + 12);
  uint8_t* dhcp = &packet[12 + 42];
  dhcp[0] = dhcp[1] = 1;
  dhcp[2] = 6;
  const uint8_t kMac[] = {0x52, 0x54, 0, 0x12, 0x34, 0x56};
  std::copy(std::begin(kMac), std::end(kMac), dhcp + 28);
  const uint8_t kOptions[] = {0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255};
  std::copy(std::begin(kOptions), std::end(kOptions), dhcp + 236);
  std::memcpy(machine.Allocate(packet.size(), &tx), packet.data(), packet.size());
  ASSERT_EQ(driver.Transact(kTx, {{tx, static_cast<uint32_t>(packet.size()), false}}), 0u);
  std::optional<Used> used;
  ASSERT_TRUE(machine.TurnUntil([&] { return (used = driver.ring(kRx).Take()).has_value(); }));
  EXPECT_GT(used->length, 12u + 42 + 240);
  EXPECT_EQ(got[12 + 37], 68);                                           // to the client's port
  EXPECT_EQ(std::memcmp(got + 12 + 42 + 16, "\x0a\x00\x02\x0f", 4), 0);  // yiaddr
  machine.Unplug();
}

}  // namespace
}  // namespace kvartz::test
