// Constants of virtio 1.2 ch. 5.1, by the specification's names (the host's own header for them is
// not C++).
#pragma once

#include <cstdint>

namespace kvartz::virtio_net {

// Feature bits (5.1.3).
constexpr unsigned VIRTIO_NET_F_CSUM = 0, VIRTIO_NET_F_GUEST_CSUM = 1, VIRTIO_NET_F_MTU = 3,
                   VIRTIO_NET_F_MAC = 5, VIRTIO_NET_F_GUEST_TSO4 = 7, VIRTIO_NET_F_GUEST_TSO6 = 8,
                   VIRTIO_NET_F_GUEST_ECN = 9, VIRTIO_NET_F_HOST_TSO4 = 11,
                   VIRTIO_NET_F_HOST_TSO6 = 12, VIRTIO_NET_F_HOST_ECN = 13,
                   VIRTIO_NET_F_MRG_RXBUF = 15, VIRTIO_NET_F_STATUS = 16, VIRTIO_NET_F_CTRL_VQ = 17,
                   VIRTIO_NET_F_CTRL_RX = 18, VIRTIO_NET_F_CTRL_VLAN = 19,
                   VIRTIO_NET_F_CTRL_RX_EXTRA = 20, VIRTIO_NET_F_GUEST_ANNOUNCE = 21,
                   VIRTIO_NET_F_CTRL_MAC_ADDR = 23;

// virtio_net_config.status (5.1.4).
constexpr uint16_t VIRTIO_NET_S_LINK_UP = 1, VIRTIO_NET_S_ANNOUNCE = 2;

// Control queue (5.1.6.5): acknowledgements, classes, commands.
constexpr uint8_t VIRTIO_NET_OK = 0, VIRTIO_NET_ERR = 1;
constexpr uint8_t VIRTIO_NET_CTRL_RX = 0, VIRTIO_NET_CTRL_MAC = 1, VIRTIO_NET_CTRL_VLAN = 2,
                  VIRTIO_NET_CTRL_ANNOUNCE = 3;
constexpr uint8_t VIRTIO_NET_CTRL_RX_PROMISC = 0, VIRTIO_NET_CTRL_RX_ALLMULTI = 1,
                  VIRTIO_NET_CTRL_RX_ALLUNI = 2, VIRTIO_NET_CTRL_RX_NOMULTI = 3,
                  VIRTIO_NET_CTRL_RX_NOUNI = 4, VIRTIO_NET_CTRL_RX_NOBCAST = 5;
constexpr uint8_t VIRTIO_NET_CTRL_MAC_TABLE_SET = 0, VIRTIO_NET_CTRL_MAC_ADDR_SET = 1;
constexpr uint8_t VIRTIO_NET_CTRL_VLAN_ADD = 0, VIRTIO_NET_CTRL_VLAN_DEL = 1;
constexpr uint8_t VIRTIO_NET_CTRL_ANNOUNCE_ACK = 0;

}  // namespace kvartz::virtio_net
