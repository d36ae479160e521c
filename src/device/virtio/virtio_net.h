// virtio network card (virtio 1.2 ch. 5.1) on a network backend: one pair of queues and the control
// queue.
#pragma once

#include <array>
#include <bitset>
#include <memory>
#include <string>
#include <vector>

#include "device/virtio/virtio_device.h"
#include "host/net/net_backend.h"

namespace kvartz {

struct NetConfig {
  VirtioConfig virtio;
  std::string netdev;
  MacAddress mac;
  uint16_t rx_queue_size = 256, tx_queue_size = 256;
  bool csum = true, guest_csum = true;
  bool host_tso4 = true, host_tso6 = true, host_ecn = true;
  bool guest_tso4 = true, guest_tso6 = true, guest_ecn = true;
  bool mrg_rxbuf = true;
  bool status = true;
  bool ctrl_vq = true, ctrl_rx = true, ctrl_rx_extra = true, ctrl_vlan = true, ctrl_mac_addr = true;
  bool guest_announce = true;
  bool mq = false;
  uint16_t host_mtu = 0;  // 0: not said
};
extern const std::span<const PropertySpec> kNetProperties;

// As VirtioDevice; everything happens on the main loop.
class VirtioNet final : public VirtioDevice, private host::NetReceiver {
 public:
  // `backend` null: a card without a cable. Errors: values that can't be.
  static Result<std::unique_ptr<VirtioNet>> Create(const DeviceEnv& env, const NetConfig& config,
                                                   host::NetBackend* backend);
  ~VirtioNet() override;

  // set_link. Takes the lock.
  void SetLink(bool up);
  const MacAddress& mac() const { return mac_; }

 protected:
  uint64_t DeviceFeatures() const override;
  std::span<const uint8_t> ConfigSpace() override;
  void ConfigWritten(unsigned offset, std::span<const uint8_t> bytes, VirtioInterface by) override;
  void QueueKicked(unsigned queue) override;
  void FeaturesSettled() override;
  void Started() override;
  void DeviceReset() override;
  void VisitDevice(StateVisitor& visitor) override;

 private:
  static constexpr unsigned kRx = 0, kTx = 1, kControl = 2;
  // Addresses that the filter knows one by one; with more it lets all of their kind pass
  // (5.1.6.5.2).
  static constexpr size_t kMaxAddresses = 64;
  struct AddressTable {
    std::array<uint8_t, kMaxAddresses * 6> bytes{};
    uint32_t count = 0;
    bool overflow = false;
    bool Contains(const uint8_t* mac) const;
  };
  struct RxMode {
    bool promisc = true, allmulti = false, alluni = false, nomulti = false, nouni = false,
         nobcast = false;
  };
  enum class Delivery { kDone, kNoRoom };

  VirtioNet(const DeviceEnv& env, const NetConfig& config, host::NetBackend* backend);
  bool ReceiveFrame(std::span<const uint8_t> frame) override;
  void SendReady() override;
  Delivery Deliver(std::span<const uint8_t> header, std::span<const uint8_t> frame);
  Delivery PlaceInBuffers(std::span<const uint8_t> header, std::span<const uint8_t> frame);
  bool Wanted(std::span<const uint8_t> frame) const;
  void Transmit();
  bool TransmitElement(const VirtqElement& element);
  size_t HeaderSize() const;
  bool backend_header() const { return backend_ && backend_->has_vnet_header(); }

  void Control(VirtqElement& element);
  bool ControlCommand(uint8_t command_class, uint8_t command, std::span<const uint8_t> data);
  bool ControlRx(uint8_t command, std::span<const uint8_t> data);
  bool ControlMac(uint8_t command, std::span<const uint8_t> data);
  bool ControlVlan(uint8_t command, std::span<const uint8_t> data);
  bool TakeAddresses(std::span<const uint8_t>* data, AddressTable* table);

  // virtio_net_config (5.1.4), up to mtu.
  struct Space {
    uint8_t mac[6];
    uint16_t status;
    uint16_t max_virtqueue_pairs;
    uint16_t mtu;
  };

  const NetConfig config_;
  host::NetBackend* const backend_;
  Space space_{};
  MacAddress mac_;
  bool link_up_ = true;
  bool announce_ = false;    // the driver is to announce its addresses
  bool loaded_ = false;      // from saved state, and not started since
  bool tx_blocked_ = false;  // the backend is busy
  bool rx_blocked_ = false;  // the backend waits for buffers
  RxMode rx_mode_;
  AddressTable unicast_, multicast_;
  std::bitset<4096> vlans_;

  VirtqElement element_;
  std::vector<VirtqElement> rx_elements_;
  std::vector<iovec> tx_pieces_;
  std::vector<uint8_t> control_data_;
};

}  // namespace kvartz
