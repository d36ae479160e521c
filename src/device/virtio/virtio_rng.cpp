#include "device/virtio/virtio_rng.h"

#include <linux/virtio_ids.h>
#include <sys/random.h>

#include <algorithm>

namespace kvartz {
namespace {

constexpr PropertySpec kProperties[] = {
    PROPERTY(RngConfig, "max-bytes", max_bytes, "bytes that the guest gets at most in a period"),
    PROPERTY(RngConfig, "period", period_ms, "length of a period in milliseconds"),
    PROPERTY(RngConfig, "rng", rng, "source (all are the host's kernel)"),
    VIRTIO_PROPERTIES(RngConfig),
};

// Of one buffer; the driver asks again for more.
constexpr uint64_t kMaxFill = 64 << 10;

// As much of `piece` as the host gives.
size_t FillRandom(uint8_t* data, size_t size) {
  size_t done = 0;
  while (done < size) {
    ssize_t got = getrandom(data + done, std::min<size_t>(size - done, 256), 0);
    if (got <= 0) break;
    done += static_cast<size_t>(got);
  }
  return done;
}

}  // namespace

const std::span<const PropertySpec> kRngProperties = kProperties;

VirtioRng::VirtioRng(const DeviceEnv& env, const RngConfig& config)
    : VirtioDevice(env, VIRTIO_ID_RNG, config.virtio, {8}),
      config_(config),
      quota_bytes_(config.max_bytes),
      period_(env.loop, [this] { PeriodOver(); }) {}

void VirtioRng::QueueKicked(unsigned index) {
  if (quota_bytes_ == 0) return;  // until the period is over
  ServeQueue(index, &element_, [&](VirtqElement& element) {
    uint64_t wanted = std::min({element.writable_bytes, quota_bytes_, kMaxFill});
    uint32_t written = 0;
    for (const iovec& piece : element.writable) {
      size_t part = std::min<uint64_t>(piece.iov_len, wanted - written);
      if (part == 0) break;
      size_t got = FillRandom(static_cast<uint8_t*>(piece.iov_base), part);
      written += got;
      if (got < part) break;
    }
    quota_bytes_ -= written;
    queue(index).Fill(element, written);
    if (quota_bytes_ > 0) return true;
    if (!period_.armed())
      period_.Arm(env_.loop.clock().NowNs() + int64_t{config_.period_ms} * 1'000'000);
    return false;
  });
}

void VirtioRng::PeriodOver() {
  LockGuard guard(lock());
  quota_bytes_ = config_.max_bytes;
  RingDoorbell(0);
}

void VirtioRng::DeviceReset() {
  // The quota is the host's: a reset doesn't give the guest more.
}

void VirtioRng::VisitDevice(StateVisitor& v) { v.Version(1); }

}  // namespace kvartz
