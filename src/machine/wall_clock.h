// The host's time of day as a clock.
#pragma once

#include "base/clock.h"

namespace kvartz::machine {

// Any thread.
class WallClock final : public Clock {
 public:
  int64_t NowNs() const override { return HostRealtimeNs(); }
  static const WallClock& Instance() {
    static const WallClock kClock;
    return kClock;
  }
};

}  // namespace kvartz::machine
