#include "device/virtio/virtio_balloon.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/virtio_ids.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "base/clock.h"
#include "base/endian.h"

namespace kvartz {
namespace {

constexpr PropertySpec kProperties[] = {
    PROPERTY(BalloonConfig, "deflate-on-oom", deflate_on_oom,
             "the guest may take pages back rather than run out of memory"),
    PROPERTY(BalloonConfig, "free-page-reporting", free_page_reporting,
             "the guest tells of its free pages"),
    VIRTIO_PROPERTIES(BalloonConfig),
};

constexpr uint64_t kBalloonPage = 1 << VIRTIO_BALLOON_PFN_SHIFT;

// Drivers send lists of 1 to 4 KiB; more would only keep the loop busy.
constexpr uint64_t kMaxListBytes = 64 << 10;

// One statistic on the wire (5.5.6.3.1).
struct WireStat {
  Le16 tag;
  Le64 value;
};
static_assert(sizeof(WireStat) == 10);

}  // namespace

const std::span<const PropertySpec> kBalloonProperties = kProperties;

VirtioBalloon::VirtioBalloon(const DeviceEnv& env, const BalloonConfig& config)
    : VirtioDevice(env, VIRTIO_ID_BALLOON, config.virtio,
                   config.free_page_reporting ? std::vector<uint16_t>{128, 128, 128, 32}
                                              : std::vector<uint16_t>{128, 128, 128}),
      config_(config),
      view_(env.memory),
      stats_timer_(env.loop, [this] { AskForStats(); }),
      self_(std::make_shared<VirtioBalloon*>(this)) {}

uint64_t VirtioBalloon::DeviceFeatures() const {
  uint64_t features = 1ull << VIRTIO_BALLOON_F_STATS_VQ;
  if (config_.deflate_on_oom) features |= 1ull << VIRTIO_BALLOON_F_DEFLATE_ON_OOM;
  if (config_.free_page_reporting) features |= 1ull << VIRTIO_BALLOON_F_REPORTING;
  return features;
}

std::span<const uint8_t> VirtioBalloon::ConfigSpace() {
  // Up to `actual`: neither hinting nor poisoning is offered.
  return {reinterpret_cast<const uint8_t*>(&space_),
          offsetof(virtio_balloon_config, free_page_hint_cmd_id)};
}

void VirtioBalloon::ConfigWritten(unsigned offset, std::span<const uint8_t> bytes,
                                  VirtioInterface /*by*/) {
  constexpr unsigned kActual = offsetof(virtio_balloon_config, actual);
  if (offset < kActual) return;
  std::memcpy(reinterpret_cast<uint8_t*>(&space_) + offset, bytes.data(), bytes.size());
  // The monitor hears of it on the main loop; this may be a vCPU.
  env_.loop.Post([self = self_] {
    VirtioBalloon* balloon = *self;
    if (balloon && balloon->change_) balloon->change_(balloon->GuestBytes());
  });
}

// ---- the monitor's side

uint64_t VirtioBalloon::RamBytes() {
  uint64_t bytes = 0;
  for (const FlatRange& range : view_.Get().ranges()) {
    if (range.region->kind == RegionKind::kRam) bytes += range.size;
  }
  return bytes;
}

uint64_t VirtioBalloon::GuestBytesLocked() {
  uint64_t ram = RamBytes();
  return ram - std::min(ram, uint64_t{space_.actual} * kBalloonPage);
}

uint64_t VirtioBalloon::GuestBytes() {
  LockGuard guard(lock());
  return GuestBytesLocked();
}

void VirtioBalloon::SetTarget(uint64_t guest_bytes) {
  LockGuard guard(lock());
  uint64_t ram = RamBytes();
  space_.num_pages = static_cast<uint32_t>(
      std::min<uint64_t>((ram - std::min(ram, guest_bytes)) / kBalloonPage, UINT32_MAX));
  ConfigChanged();
}

void VirtioBalloon::OnChange(std::function<void(uint64_t guest_bytes)> change) {
  change_ = std::move(change);
}

VirtioBalloon::Stats VirtioBalloon::stats() {
  LockGuard guard(lock());
  return stats_;
}

// ---- queues

void VirtioBalloon::QueueKicked(unsigned index) {
  if (index == kStats) return TakeStats();
  ServeQueue(index, &element_, [&](const VirtqElement& element) {
    if (index == kInflate) Inflate(element);
    if (index == kReporting) {
      for (const VirtqElement::Range& range : element.writable_ranges)
        Discard(range.gpa, range.size);
    }
    // Deflated pages come back by themselves when they are touched.
    queue(index).Fill(element, 0);
    return true;
  });
}

// The buffer is a list of page numbers; neighbours are given back together.
void VirtioBalloon::Inflate(const VirtqElement& element) {
  if (element.readable_bytes > kMaxListBytes) return NeedReset("list of ballooned pages too long");
  Le32 pages[256];
  Gpa start;
  uint64_t size = 0;
  for (uint64_t at = 0; at < element.readable_bytes;) {
    size_t got = element.CopyOut(at, pages, sizeof pages) / sizeof(Le32);
    if (got == 0) break;
    at += got * sizeof(Le32);
    for (size_t i = 0; i < got; ++i) {
      Gpa page(uint64_t{pages[i]} << VIRTIO_BALLOON_PFN_SHIFT);
      if (size > 0 && page == start + size) {
        size += kBalloonPage;
        continue;
      }
      Discard(start, size);
      start = page;
      size = kBalloonPage;
    }
  }
  Discard(start, size);
}

// Whole pages of RAM go back to the host and read as zeros; what isn't RAM stays.
void VirtioBalloon::Discard(Gpa gpa, uint64_t size) {
  uint64_t at = (gpa.value + kPageSize - 1) & ~(kPageSize - 1);
  uint64_t end = gpa.value + size < gpa.value ? 0 : (gpa.value + size) & ~(kPageSize - 1);
  const FlatView& view = view_.Get();
  while (at < end) {
    const FlatRange* range = view.Find(at);
    if (!range || range->region->kind != RegionKind::kRam) {
      at += kPageSize;
      continue;
    }
    uint64_t length = std::min(end, range->end()) - at;
    RamBlock& ram = *range->region->ram;
    uint64_t offset = range->region->ram_offset + range->region_offset + (at - range->base);
    bool done = ram.fd() >= 0
                    ? fallocate(ram.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                static_cast<off_t>(offset), static_cast<off_t>(length)) == 0
                    : madvise(range->Host(at), length, MADV_DONTNEED) == 0;
    if (done) ram.dirty().Mark(offset, length);
    at += length;
  }
}

// ---- statistics (5.5.6.3)

// The driver's buffer stays in the ring until new statistics are wanted: giving it back asks for
// them.
void VirtioBalloon::TakeStats() {
  Virtqueue& ring = queue(kStats);
  Virtqueue::Position before = ring.position();
  if (ring.Pop(&element_)) {
    WireStat wire[64];
    size_t count = element_.CopyOut(0, wire, sizeof wire) / sizeof(WireStat);
    for (const WireStat& stat : std::span(wire, count)) {
      if (stat.tag < stats_.values.size()) stats_.values[stat.tag] = stat.value;
    }
    stats_.updated_s = HostRealtimeNs() / 1'000'000'000;
    ring.Rewind(before);
    stats_waiting_ = true;
  }
  if (stats_interval_s_ > 0 && !stats_timer_.armed()) {
    stats_timer_.Arm(env_.loop.clock().NowNs() + int64_t{stats_interval_s_} * 1'000'000'000);
  }
}

void VirtioBalloon::AskForStats() {
  LockGuard guard(lock());
  if (serving() && std::exchange(stats_waiting_, false)) {
    Virtqueue& ring = queue(kStats);
    if (ring.Pop(&element_)) ring.Fill(element_, 0);
    FinishQueue(kStats);
  }
  if (stats_interval_s_ > 0) {
    stats_timer_.Arm(env_.loop.clock().NowNs() + int64_t{stats_interval_s_} * 1'000'000'000);
  }
}

void VirtioBalloon::SetStatsInterval(uint32_t seconds) {
  LockGuard guard(lock());
  stats_interval_s_ = seconds;
  if (seconds == 0) return stats_timer_.Cancel();
  stats_timer_.Arm(env_.loop.clock().NowNs() + int64_t{seconds} * 1'000'000'000);
}

// ---- reset, state

void VirtioBalloon::Started() {
  // A guest that was restarted hears of the target that still stands.
  if (space_.num_pages != space_.actual) ConfigChanged();
}

void VirtioBalloon::DeviceReset() {
  space_.actual = 0;
  stats_ = {};
  stats_waiting_ = false;
}

void VirtioBalloon::VisitDevice(StateVisitor& v) {
  v.Version(1);
  v.Field("num_pages", space_.num_pages);
  v.Field("actual", space_.actual);
  v.Field("stats_interval_s", stats_interval_s_);
  if (v.loading()) stats_waiting_ = false;  // the doorbell rings: they are read again
}

}  // namespace kvartz
