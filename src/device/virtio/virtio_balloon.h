// virtio memory balloon (virtio 1.2 ch. 5.5): the guest gives pages back to the host, and gets them
// again.
#pragma once

#include <linux/virtio_balloon.h>

#include <functional>
#include <memory>
#include <optional>

#include "base/event_loop.h"
#include "device/virtio/virtio_device.h"

namespace kvartz {

struct BalloonConfig {
  VirtioConfig virtio;
  bool deflate_on_oom = false;
  bool free_page_reporting = false;
};
extern const std::span<const PropertySpec> kBalloonProperties;

// As VirtioDevice; everything happens on the main loop.
class VirtioBalloon final : public VirtioDevice {
 public:
  VirtioBalloon(const DeviceEnv& env, const BalloonConfig& config);

  // For the monitor, on the main loop; each takes the lock.
  // Asks the guest to keep `guest_bytes` of its RAM (QMP: balloon).
  void SetTarget(uint64_t guest_bytes);
  // What it has now (query-balloon).
  uint64_t GuestBytes();
  // Told on the main loop when that has changed (the event BALLOON_CHANGE).
  void OnChange(std::function<void(uint64_t guest_bytes)> change);
  // 0: no statistics.
  void SetStatsInterval(uint32_t seconds);
  struct Stats {
    int64_t updated_s = 0;                                            // wall clock; 0: never
    std::array<std::optional<uint64_t>, VIRTIO_BALLOON_S_NR> values;  // by tag
  };
  Stats stats();

 protected:
  uint64_t DeviceFeatures() const override;
  std::span<const uint8_t> ConfigSpace() override;
  void ConfigWritten(unsigned offset, std::span<const uint8_t> bytes, VirtioInterface by) override;
  void QueueKicked(unsigned queue) override;
  void Started() override;
  void DeviceReset() override;
  void VisitDevice(StateVisitor& visitor) override;

 private:
  static constexpr unsigned kInflate = 0, kDeflate = 1, kStats = 2, kReporting = 3;
  uint64_t RamBytes();
  uint64_t GuestBytesLocked();
  void Inflate(const VirtqElement& element);
  void Discard(Gpa gpa, uint64_t size);
  void TakeStats();
  void AskForStats();

  const BalloonConfig config_;
  virtio_balloon_config space_{};
  ViewCache view_;
  VirtqElement element_;
  std::function<void(uint64_t)> change_;
  Stats stats_;
  uint32_t stats_interval_s_ = 0;
  bool stats_waiting_ = false;  // the driver's buffer is there, its statistics are read
  Timer stats_timer_;
  std::shared_ptr<VirtioBalloon*> self_;

 public:
  ~VirtioBalloon() override { *self_ = nullptr; }
};

}  // namespace kvartz
