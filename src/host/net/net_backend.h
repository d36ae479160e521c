// The host side of a network card.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace kvartz::host {

// What a backend that understands virtio_net_hdr can be asked to leave to the guest (virtio 1.2,
// ch. 5.1.3).
struct NetOffloads {
  bool csum = false;  // frames for the guest may carry a partial checksum
  bool tso4 = false;
  bool tso6 = false;
  bool ecn = false;
};

// Who gets the frames from the host. Called on the backend's loop, never from within Send.
class NetReceiver {
 public:
  virtual ~NetReceiver() = default;
  // One Ethernet frame for the guest, with its virtio_net_hdr before it if the backend has one.
  // False: no room now; the backend keeps the frame and stops until ReceiverReady.
  virtual bool ReceiveFrame(std::span<const uint8_t> frame) = 0;
  // Send may be tried again.
  virtual void SendReady() {}
};

// Loop-owned (the main loop).
class NetBackend {
 public:
  virtual ~NetBackend() = default;

  // At most one receiver; null disconnects. Without one, frames are dropped.
  void SetReceiver(NetReceiver* receiver) {
    receiver_ = receiver;
    if (receiver) ReceiverReady();
  }
  bool connected() const { return receiver_ != nullptr; }

  // One frame from the guest, header first if there is one. False: the host is busy; the sender
  // keeps the frame until SendReady. A frame that the host refuses is dropped (true).
  virtual bool Send(std::span<const iovec> frame) = 0;
  // The receiver has room again.
  virtual void ReceiverReady() = 0;

  // 0: bare frames; else 10 or 12, the virtio_net_hdr before each frame, as set.
  virtual bool has_vnet_header() const { return false; }
  virtual void SetVnetHeader(size_t /*bytes*/) {}
  virtual void SetOffloads(const NetOffloads& /*offloads*/) {}

  // For "info network".
  virtual std::string Describe() const = 0;

 protected:
  NetReceiver* receiver_ = nullptr;
};

}  // namespace kvartz::host
