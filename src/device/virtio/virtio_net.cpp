#include "device/virtio/virtio_net.h"

#include <fmt/core.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/endian.h"
#include "device/virtio/net_constants.h"

namespace kvartz {

using namespace virtio_net;

namespace {

constexpr PropertySpec kProperties[] = {
    PROPERTY(NetConfig, "netdev", netdev, "what the card is connected to: id of a -netdev"),
    PROPERTY(NetConfig, "mac", mac, "address of the card"),
    PROPERTY(NetConfig, "rx_queue_size", rx_queue_size,
             "receive buffers, a power of two from 64 to 1024"),
    PROPERTY(NetConfig, "tx_queue_size", tx_queue_size,
             "transmit elements, a power of two from 64 to 1024"),
    PROPERTY(NetConfig, "csum", csum, "checksums may be left to the host (backends with offloads)"),
    PROPERTY(NetConfig, "guest_csum", guest_csum, "checksums may be left to the guest"),
    PROPERTY(NetConfig, "host_tso4", host_tso4, "the host cuts IPv4 segments"),
    PROPERTY(NetConfig, "host_tso6", host_tso6, "the host cuts IPv6 segments"),
    PROPERTY(NetConfig, "host_ecn", host_ecn, "... with ECN"),
    PROPERTY(NetConfig, "guest_tso4", guest_tso4, "the guest takes large IPv4 segments"),
    PROPERTY(NetConfig, "guest_tso6", guest_tso6, "the guest takes large IPv6 segments"),
    PROPERTY(NetConfig, "guest_ecn", guest_ecn, "... with ECN"),
    PROPERTY(NetConfig, "mrg_rxbuf", mrg_rxbuf, "a frame may fill several receive buffers"),
    PROPERTY(NetConfig, "status", status, "offer the link's status"),
    PROPERTY(NetConfig, "ctrl_vq", ctrl_vq, "offer the control queue"),
    PROPERTY(NetConfig, "ctrl_rx", ctrl_rx, "offer receive modes"),
    PROPERTY(NetConfig, "ctrl_rx_extra", ctrl_rx_extra, "offer more receive modes"),
    PROPERTY(NetConfig, "ctrl_vlan", ctrl_vlan, "offer the VLAN filter"),
    PROPERTY(NetConfig, "ctrl_mac_addr", ctrl_mac_addr, "the guest may change the address"),
    PROPERTY(NetConfig, "guest_announce", guest_announce,
             "the guest announces itself after a migration"),
    PROPERTY(NetConfig, "mq", mq, "more than one pair of queues"),
    PROPERTY(NetConfig, "host_mtu", host_mtu, "MTU that the guest is told (0: none)"),
    VIRTIO_PROPERTIES(NetConfig),
};

// virtio_net_hdr (5.1.6): the last field is there with VIRTIO_F_VERSION_1 or VIRTIO_NET_F_MRG_RXBUF
// only.
constexpr size_t kLongHeader = 12, kShortHeader = 10, kNumBuffersOffset = 10;
constexpr size_t kMaxFrame = 65536 + 64;
constexpr size_t kEthernetHeader = 14;
constexpr size_t kMaxControlBytes = 64 << 10;
constexpr uint8_t kBroadcast[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

bool IsQueueSize(uint16_t size) { return std::has_single_bit(size) && size >= 64 && size <= 1024; }

}  // namespace

const std::span<const PropertySpec> kNetProperties = kProperties;

Result<std::unique_ptr<VirtioNet>> VirtioNet::Create(const DeviceEnv& env, const NetConfig& config,
                                                     host::NetBackend* backend) {
  if (!IsQueueSize(config.rx_queue_size) || !IsQueueSize(config.tx_queue_size)) {
    return Fail(ErrorCode::kInvalid,
                "rx_queue_size and tx_queue_size: powers of two from 64 to 1024");
  }
  if (config.mq) return Fail(ErrorCode::kUnsupported, "not supported yet: mq=on");
  if (config.mac.bytes[0] & 1)
    return Fail(ErrorCode::kInvalid, "mac: this is a group's address; the first byte must be even");
  return std::unique_ptr<VirtioNet>(new VirtioNet(env, config, backend));
}

VirtioNet::VirtioNet(const DeviceEnv& env, const NetConfig& config, host::NetBackend* backend)
    : VirtioDevice(env, VIRTIO_ID_NET, config.virtio,
                   config.ctrl_vq
                       ? std::vector<uint16_t>{config.rx_queue_size, config.tx_queue_size, 64}
                       : std::vector<uint16_t>{config.rx_queue_size, config.tx_queue_size}),
      config_(config),
      backend_(backend),
      link_up_(backend != nullptr) {
  space_.max_virtqueue_pairs = 1;
  space_.mtu = config_.host_mtu;
  DeviceReset();
  if (backend_) backend_->SetReceiver(this);
}

VirtioNet::~VirtioNet() {
  if (backend_) backend_->SetReceiver(nullptr);
}

uint64_t VirtioNet::DeviceFeatures() const {
  struct Feature {
    unsigned bit;
    bool offered;
  };
  bool offloads = backend_header();
  bool csum = offloads && config_.csum, guest_csum = offloads && config_.guest_csum;
  const Feature features[] = {
      {VIRTIO_NET_F_MAC, true},
      {VIRTIO_NET_F_CSUM, csum},
      {VIRTIO_NET_F_HOST_TSO4, csum && config_.host_tso4},
      {VIRTIO_NET_F_HOST_TSO6, csum && config_.host_tso6},
      {VIRTIO_NET_F_HOST_ECN, csum && config_.host_ecn && (config_.host_tso4 || config_.host_tso6)},
      {VIRTIO_NET_F_GUEST_CSUM, guest_csum},
      {VIRTIO_NET_F_GUEST_TSO4, guest_csum && config_.guest_tso4},
      {VIRTIO_NET_F_GUEST_TSO6, guest_csum && config_.guest_tso6},
      {VIRTIO_NET_F_GUEST_ECN,
       guest_csum && config_.guest_ecn && (config_.guest_tso4 || config_.guest_tso6)},
      {VIRTIO_NET_F_MRG_RXBUF, config_.mrg_rxbuf},
      {VIRTIO_NET_F_STATUS, config_.status},
      {VIRTIO_NET_F_CTRL_VQ, config_.ctrl_vq},
      {VIRTIO_NET_F_CTRL_RX, config_.ctrl_vq && config_.ctrl_rx},
      {VIRTIO_NET_F_CTRL_RX_EXTRA, config_.ctrl_vq && config_.ctrl_rx && config_.ctrl_rx_extra},
      {VIRTIO_NET_F_CTRL_VLAN, config_.ctrl_vq && config_.ctrl_vlan},
      {VIRTIO_NET_F_CTRL_MAC_ADDR, config_.ctrl_vq && config_.ctrl_mac_addr},
      {VIRTIO_NET_F_GUEST_ANNOUNCE, config_.ctrl_vq && config_.status && config_.guest_announce},
      {VIRTIO_NET_F_MTU, config_.host_mtu > 0},
  };
  uint64_t bits = 0;
  for (const Feature& feature : features) bits |= uint64_t{feature.offered} << feature.bit;
  return bits;
}

std::span<const uint8_t> VirtioNet::ConfigSpace() {
  std::ranges::copy(mac_.bytes, space_.mac);
  space_.status = (link_up_ ? VIRTIO_NET_S_LINK_UP : 0) | (announce_ ? VIRTIO_NET_S_ANNOUNCE : 0);
  return {reinterpret_cast<const uint8_t*>(&space_), sizeof space_};
}

// 5.1.4.3: only legacy drivers write here, and only the address.
void VirtioNet::ConfigWritten(unsigned offset, std::span<const uint8_t> bytes, VirtioInterface by) {
  if (by != VirtioInterface::kLegacy || offset + bytes.size() > mac_.bytes.size()) return;
  std::ranges::copy(bytes, mac_.bytes.begin() + offset);
}

size_t VirtioNet::HeaderSize() const {
  return Negotiated(VIRTIO_F_VERSION_1) || Negotiated(VIRTIO_NET_F_MRG_RXBUF) ? kLongHeader
                                                                              : kShortHeader;
}

void VirtioNet::FeaturesSettled() {
  if (!backend_header()) return;
  backend_->SetVnetHeader(HeaderSize());
  backend_->SetOffloads({.csum = Negotiated(VIRTIO_NET_F_GUEST_CSUM),
                         .tso4 = Negotiated(VIRTIO_NET_F_GUEST_TSO4),
                         .tso6 = Negotiated(VIRTIO_NET_F_GUEST_TSO6),
                         .ecn = Negotiated(VIRTIO_NET_F_GUEST_ECN)});
}

void VirtioNet::Started() {
  if (std::exchange(loaded_, false) && Negotiated(VIRTIO_NET_F_GUEST_ANNOUNCE)) {
    announce_ = true;
    ConfigChanged();
  }
}

void VirtioNet::SetLink(bool up) {
  LockGuard guard(lock());
  bool now = up && backend_;
  if (std::exchange(link_up_, now) != now) ConfigChanged();
}

void VirtioNet::QueueKicked(unsigned index) {
  switch (index) {
    case kRx:
      queue(kRx).DisableKicks();
      if (std::exchange(rx_blocked_, false) && backend_) backend_->ReceiverReady();
      return;
    case kTx:
      return Transmit();
    default:
      return ServeQueue(kControl, &element_, [&](VirtqElement& element) {
        Control(element);
        return true;
      });
  }
}

// ---- transmission (5.1.6.2)

void VirtioNet::Transmit() {
  if (tx_blocked_) return;
  Virtqueue& ring = queue(kTx);
  Virtqueue::Position before = ring.position();
  ServeQueue(kTx, &element_, [&](VirtqElement& element) {
    if (!TransmitElement(element)) {
      // It stays in the ring, so that saved state needs no copy of it.
      ring.Rewind(before);
      tx_blocked_ = true;
      return false;
    }
    ring.Fill(element, 0);
    before = ring.position();
    return true;
  });
}

// False: the backend is busy.
bool VirtioNet::TransmitElement(const VirtqElement& element) {
  size_t header = HeaderSize();
  if (element.readable_bytes < header) {
    NeedReset("frame without header");
    return true;
  }
  if (!link_up_ || element.readable_bytes > header + kMaxFrame) return true;
  size_t skip = backend_header() ? 0 : header;
  tx_pieces_.clear();
  for (const iovec& piece : element.readable) {
    size_t part = std::min(skip, piece.iov_len);
    skip -= part;
    if (part < piece.iov_len)
      tx_pieces_.push_back({static_cast<uint8_t*>(piece.iov_base) + part, piece.iov_len - part});
  }
  return tx_pieces_.empty() || backend_->Send(tx_pieces_);
}

void VirtioNet::SendReady() {
  LockGuard guard(lock());
  tx_blocked_ = false;
  RingDoorbell(kTx);
}

// ---- reception (5.1.6.3, 5.1.6.4)

bool VirtioNet::ReceiveFrame(std::span<const uint8_t> frame) {
  LockGuard guard(lock());
  size_t header_bytes = backend_header() ? HeaderSize() : 0;
  if (frame.size() < header_bytes + kEthernetHeader) return true;
  uint8_t header[kLongHeader] = {};
  std::memcpy(header, frame.data(), header_bytes);
  frame = frame.subspan(header_bytes);
  if (!link_up_ || !queue(kRx).usable() || !Wanted(frame)) return true;
  // Stopped: the frame is for later, when everything is looked at again.
  rx_blocked_ = !serving() || Deliver(std::span(header, HeaderSize()), frame) == Delivery::kNoRoom;
  return !rx_blocked_;
}

VirtioNet::Delivery VirtioNet::Deliver(std::span<const uint8_t> header,
                                       std::span<const uint8_t> frame) {
  Delivery delivery = PlaceInBuffers(header, frame);
  FinishQueue(kRx);
  return queue(kRx).usable() ? delivery : Delivery::kDone;
}

VirtioNet::Delivery VirtioNet::PlaceInBuffers(std::span<const uint8_t> header,
                                              std::span<const uint8_t> frame) {
  Virtqueue& ring = queue(kRx);
  Virtqueue::Position before = ring.position();
  bool mergeable = Negotiated(VIRTIO_NET_F_MRG_RXBUF);
  uint64_t wanted = header.size() + frame.size();
  uint64_t room = 0;
  size_t count = 0;
  while (room < wanted) {
    if (count == rx_elements_.size()) rx_elements_.emplace_back();
    if (!ring.Pop(&rx_elements_[count])) {
      // The driver kicks when it adds buffers to these; perhaps it just did.
      if (ring.EnableKicks()) continue;
      ring.Rewind(before);
      return Delivery::kNoRoom;
    }
    room += rx_elements_[count++].writable_bytes;
    if (rx_elements_[0].writable_bytes < header.size()) {
      NeedReset("receive buffer smaller than the header");
      return Delivery::kDone;
    }
    if (!mergeable && room < wanted) {
      ring.Rewind(before);
      return Delivery::kDone;  // dropped: the driver said that it takes no frames of this size
    }
  }
  size_t done = rx_elements_[0].CopyIn(0, header.data(), header.size());
  if (header.size() == kLongHeader) {
    Le16 buffers = static_cast<uint16_t>(count);
    rx_elements_[0].CopyIn(kNumBuffersOffset, &buffers, sizeof buffers);
  }
  for (size_t i = 0; i < count; ++i) {
    size_t start = i == 0 ? done : 0;
    size_t placed = rx_elements_[i].CopyIn(start, frame.data(), frame.size());
    frame = frame.subspan(placed);
    ring.Fill(rx_elements_[i], static_cast<uint32_t>(start + placed));
  }
  return Delivery::kDone;
}

// The receive filter (5.1.6.5.1 to 5.1.6.5.3).
bool VirtioNet::Wanted(std::span<const uint8_t> frame) const {
  if (rx_mode_.promisc) return true;
  const uint8_t* to = frame.data();
  bool tagged = frame[12] == 0x81 && frame[13] == 0x00;
  if (tagged && frame.size() >= 16 && Negotiated(VIRTIO_NET_F_CTRL_VLAN)) {
    unsigned vlan = (frame[14] << 8 | frame[15]) & 0xfff;
    if (!vlans_[vlan]) return false;
  }
  if (std::memcmp(to, kBroadcast, 6) == 0) return !rx_mode_.nobcast;
  if (to[0] & 1) {
    return !rx_mode_.nomulti &&
           (rx_mode_.allmulti || multicast_.overflow || multicast_.Contains(to));
  }
  if (rx_mode_.nouni) return false;
  return rx_mode_.alluni || unicast_.overflow || std::memcmp(to, mac_.bytes.data(), 6) == 0 ||
         unicast_.Contains(to);
}

bool VirtioNet::AddressTable::Contains(const uint8_t* mac) const {
  for (uint32_t i = 0; i < count; ++i) {
    if (std::memcmp(&bytes[i * 6], mac, 6) == 0) return true;
  }
  return false;
}

// ---- control queue (5.1.6.5)

void VirtioNet::Control(VirtqElement& element) {
  uint8_t ack = VIRTIO_NET_ERR;
  if (element.readable_bytes < 2 || element.writable_bytes < 1)
    return NeedReset("control command without header or ack");
  if (element.readable_bytes <= kMaxControlBytes) {
    control_data_.resize(element.readable_bytes);
    element.CopyOut(0, control_data_.data(), control_data_.size());
    if (ControlCommand(control_data_[0], control_data_[1], std::span(control_data_).subspan(2)))
      ack = VIRTIO_NET_OK;
  }
  element.CopyIn(0, &ack, 1);
  queue(kControl).Fill(element, 1);
}

bool VirtioNet::ControlCommand(uint8_t command_class, uint8_t command,
                               std::span<const uint8_t> data) {
  switch (command_class) {
    case VIRTIO_NET_CTRL_RX:
      return ControlRx(command, data);
    case VIRTIO_NET_CTRL_MAC:
      return ControlMac(command, data);
    case VIRTIO_NET_CTRL_VLAN:
      return ControlVlan(command, data);
    case VIRTIO_NET_CTRL_ANNOUNCE:
      if (command != VIRTIO_NET_CTRL_ANNOUNCE_ACK || !Negotiated(VIRTIO_NET_F_GUEST_ANNOUNCE))
        return false;
      announce_ = false;
      return true;
    default:
      return false;
  }
}

bool VirtioNet::ControlRx(uint8_t command, std::span<const uint8_t> data) {
  struct Mode {
    uint8_t command;
    unsigned feature;
    bool RxMode::* member;
  };
  static constexpr Mode kModes[] = {
      {VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_F_CTRL_RX, &RxMode::promisc},
      {VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_F_CTRL_RX, &RxMode::allmulti},
      {VIRTIO_NET_CTRL_RX_ALLUNI, VIRTIO_NET_F_CTRL_RX_EXTRA, &RxMode::alluni},
      {VIRTIO_NET_CTRL_RX_NOMULTI, VIRTIO_NET_F_CTRL_RX_EXTRA, &RxMode::nomulti},
      {VIRTIO_NET_CTRL_RX_NOUNI, VIRTIO_NET_F_CTRL_RX_EXTRA, &RxMode::nouni},
      {VIRTIO_NET_CTRL_RX_NOBCAST, VIRTIO_NET_F_CTRL_RX_EXTRA, &RxMode::nobcast},
  };
  auto mode = std::ranges::find(kModes, command, &Mode::command);
  if (mode == std::end(kModes) || !Negotiated(mode->feature) || data.empty()) return false;
  rx_mode_.*mode->member = data[0] != 0;
  return true;
}

bool VirtioNet::ControlMac(uint8_t command, std::span<const uint8_t> data) {
  if (command == VIRTIO_NET_CTRL_MAC_ADDR_SET) {
    if (!Negotiated(VIRTIO_NET_F_CTRL_MAC_ADDR) || data.size() != mac_.bytes.size()) return false;
    std::ranges::copy(data, mac_.bytes.begin());
    return true;
  }
  if (command != VIRTIO_NET_CTRL_MAC_TABLE_SET || !Negotiated(VIRTIO_NET_F_CTRL_RX)) return false;
  AddressTable unicast, multicast;
  if (!TakeAddresses(&data, &unicast) || !TakeAddresses(&data, &multicast) || !data.empty())
    return false;
  unicast_ = unicast;
  multicast_ = multicast;
  return true;
}

bool VirtioNet::TakeAddresses(std::span<const uint8_t>* data, AddressTable* table) {
  Le32 count;
  if (data->size() < sizeof count) return false;
  std::memcpy(&count, data->data(), sizeof count);
  *data = data->subspan(sizeof count);
  if (count > data->size() / 6) return false;
  table->overflow = count > kMaxAddresses;
  if (!table->overflow) {
    table->count = count;
    std::ranges::copy(data->first(size_t{count} * 6), table->bytes.begin());
  }
  *data = data->subspan(size_t{count} * 6);
  return true;
}

bool VirtioNet::ControlVlan(uint8_t command, std::span<const uint8_t> data) {
  Le16 vlan;
  if (!Negotiated(VIRTIO_NET_F_CTRL_VLAN) || data.size() != sizeof vlan) return false;
  std::memcpy(&vlan, data.data(), sizeof vlan);
  if (vlan >= vlans_.size() ||
      (command != VIRTIO_NET_CTRL_VLAN_ADD && command != VIRTIO_NET_CTRL_VLAN_DEL))
    return false;
  vlans_[vlan] = command == VIRTIO_NET_CTRL_VLAN_ADD;
  return true;
}

// ---- reset, state

void VirtioNet::DeviceReset() {
  mac_ = config_.mac;
  rx_mode_ = {};
  unicast_ = multicast_ = {};
  vlans_.reset();
  announce_ = loaded_ = false;
  tx_blocked_ = false;
  // A backend that waits goes on when the driver has started the device again: its doorbells ring
  // on the backend's loop, and this may be a vCPU.
}

void VirtioNet::VisitDevice(StateVisitor& v) {
  v.Version(1);
  v.Field("mac", mac_.bytes);
  v.Field("announce", announce_);
  v.Field("promisc", rx_mode_.promisc);
  v.Field("allmulti", rx_mode_.allmulti);
  v.Field("alluni", rx_mode_.alluni);
  v.Field("nomulti", rx_mode_.nomulti);
  v.Field("nouni", rx_mode_.nouni);
  v.Field("nobcast", rx_mode_.nobcast);
  for (auto [name, table] :
       {std::pair("unicast", &unicast_), std::pair("multicast", &multicast_)}) {
    v.Section(name, [&] {
      v.Field("count", table->count);
      v.Field("overflow", table->overflow);
      v.Field("addresses", table->bytes);
      v.Bounded("count", table->count, 0, kMaxAddresses);
      if (v.failed()) table->count = 0;
    });
  }
  std::array<uint8_t, 4096 / 8> vlans{};
  for (size_t i = 0; i < vlans_.size(); ++i)
    vlans[i / 8] |= static_cast<uint8_t>(vlans_[i] << i % 8);
  v.Field("vlans", vlans);
  if (!v.loading()) return;
  for (size_t i = 0; i < vlans_.size(); ++i) vlans_[i] = vlans[i / 8] >> i % 8 & 1;
  loaded_ = true;
  tx_blocked_ = false;
  rx_blocked_ = true;  // the backend is told at the doorbell
}

}  // namespace kvartz
