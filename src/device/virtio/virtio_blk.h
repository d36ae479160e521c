// virtio block device (virtio 1.2 ch. 5.2) on a block node.
#pragma once

#include <linux/virtio_blk.h>

#include <memory>
#include <vector>

#include "block/node.h"
#include "device/virtio/virtio_device.h"

namespace kvartz {

struct BlkConfig {
  static constexpr uint16_t kAutoQueues = UINT16_MAX;
  VirtioConfig virtio;
  std::string drive;
  std::string iothread;
  std::string serial;  // 20 characters reach the guest
  uint16_t num_queues = kAutoQueues;
  uint16_t queue_size = 256;
  bool config_wce = true;
  OnOffAuto write_cache = OnOffAuto::kAuto;
  uint32_t logical_block_size = 512;
  uint32_t physical_block_size = 512;
  uint32_t min_io_size = 0, opt_io_size = 0;  // bytes; 0: not said
  bool discard = true;
  bool write_zeroes = true;
  uint32_t max_discard_sectors = 0x3fffff;
  uint32_t max_write_zeroes_sectors = 0x3fffff;
  bool share_rw = false;
  std::string rerror = "auto", werror = "auto";
};
extern const std::span<const PropertySpec> kBlkProperties;

// As VirtioDevice. All queues are served on the node's loop, and requests complete there.
class VirtioBlk final : public VirtioDevice {
 public:
  // Errors: values that don't fit each other or the node.
  static Result<std::unique_ptr<VirtioBlk>> Create(const DeviceEnv& env, BlkConfig config,
                                                   block::Node& node);

 protected:
  uint64_t DeviceFeatures() const override;
  std::span<const uint8_t> ConfigSpace() override;
  void ConfigWritten(unsigned offset, std::span<const uint8_t> bytes, VirtioInterface by) override;
  void QueueKicked(unsigned queue) override;
  void DeviceReset() override;
  void VisitDevice(StateVisitor& visitor) override;
  bool RequestsUnderWay() const override { return under_way_ > 0; }
  void DrainRequests() override;
  EventLoop& QueueLoop(unsigned) override { return node_.loop(); }

 private:
  struct BlkRequest;
  VirtioBlk(const DeviceEnv& env, const BlkConfig& config, block::Node& node);
  BlkRequest* NewRequest();
  void Begin(BlkRequest* request);
  bool Parse(BlkRequest* request, virtio_blk_outhdr* header);
  void BeginTransfer(BlkRequest* request, block::Request::Kind kind, uint64_t sector);
  void BeginRange(BlkRequest* request, block::Request::Kind kind);
  void AnswerId(BlkRequest* request);
  void Submit(BlkRequest* request);
  void Complete(BlkRequest* request, uint8_t status);
  static void Done(block::Request* io, int result);
  bool WriteBack() const;

  const BlkConfig config_;
  block::Node& node_;
  virtio_blk_config space_{};
  bool write_cache_ = true;  // the driver's wish: false: each write is stable when it is done
  // Those that are free; there are as many as were ever under way at once.
  std::vector<BlkRequest*> free_;
  std::vector<std::unique_ptr<BlkRequest>> requests_;
  unsigned under_way_ = 0;
  // Requests of before a reset are never given back.
  uint32_t life_ = 0;

 public:
  ~VirtioBlk() override;
};

}  // namespace kvartz
