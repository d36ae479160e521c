// virtio block device (virtio 1.2 ch. 5.2) on a disk.
#pragma once

#include <linux/virtio_blk.h>

#include <memory>
#include <vector>

#include "block/disk.h"
#include "device/core/backends.h"
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

// As VirtioDevice. All queues are served on the disk's loop, and requests complete there.
class VirtioBlk final : public VirtioDevice {
 public:
  // Errors: values that don't fit each other or the disk.
  static Result<std::unique_ptr<VirtioBlk>> Create(const DeviceEnv& env, BlkConfig config,
                                                   DiskPort& port);

 protected:
  uint64_t DeviceFeatures() const override;
  std::span<const uint8_t> ConfigSpace() override;
  void ConfigWritten(unsigned offset, std::span<const uint8_t> bytes, VirtioInterface by) override;
  void QueueKicked(unsigned queue) override;
  void Started() override;
  void DeviceReset() override;
  void VisitDevice(StateVisitor& visitor) override;
  bool RequestsUnderWay() const override { return under_way_ > 0; }
  void DrainRequests() override;
  void DropRequests() override;
  EventLoop& QueueLoop(unsigned) override { return disk_.loop(); }

 private:
  struct BlkRequest;
  VirtioBlk(const DeviceEnv& env, const BlkConfig& config, DiskPort& port);
  BlkRequest* NewRequest();
  void Begin(BlkRequest* request);
  bool Parse(BlkRequest* request, virtio_blk_outhdr* header);
  void BeginTransfer(BlkRequest* request, block::Request::Kind kind, uint64_t sector);
  void BeginRange(BlkRequest* request, block::Request::Kind kind);
  void AnswerId(BlkRequest* request);
  void Submit(BlkRequest* request);
  void Complete(BlkRequest* request, uint8_t status);
  static void Done(block::DiskRequest* io, int result);
  bool WriteBack() const;
  void TakeSize();

  const BlkConfig config_;
  DiskPort& port_;
  block::Disk& disk_;
  // As the disk was at first: its nodes change on its loop, the driver asks on its own threads.
  const bool read_only_;
  const block::Limits limits_;
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
