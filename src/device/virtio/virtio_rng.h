// virtio entropy device (virtio 1.2 ch. 5.4): random bytes of the host's kernel.
#pragma once

#include <memory>

#include "base/event_loop.h"
#include "device/virtio/virtio_device.h"

namespace kvartz {

struct RngConfig {
  VirtioConfig virtio;
  uint64_t max_bytes = INT64_MAX;  // in a period
  uint32_t period_ms = 65536;
  std::string rng;  // id of a source; all sources are the host's kernel
};
extern const std::span<const PropertySpec> kRngProperties;

// As VirtioDevice.
class VirtioRng final : public VirtioDevice {
 public:
  VirtioRng(const DeviceEnv& env, const RngConfig& config);

 protected:
  uint64_t DeviceFeatures() const override { return 0; }
  std::span<const uint8_t> ConfigSpace() override { return {}; }
  void QueueKicked(unsigned queue) override;
  void DeviceReset() override;
  void VisitDevice(StateVisitor& visitor) override;

 private:
  void PeriodOver();

  const RngConfig config_;
  uint64_t quota_bytes_;
  VirtqElement element_;
  Timer period_;
};

}  // namespace kvartz
