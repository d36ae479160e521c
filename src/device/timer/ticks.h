// Conversion between nanoseconds and ticks of a fixed frequency, without drift and without
// overflow.
#pragma once

#include <cstdint>

namespace kvartz {

constexpr uint64_t NsToTicks(uint64_t ns, uint64_t frequency_hz) {
  return static_cast<unsigned __int128>(ns) * frequency_hz / 1000000000u;
}

// The first nanosecond at which NsToTicks gives `ticks`; saturates.
constexpr uint64_t TicksToNs(uint64_t ticks, uint64_t frequency_hz) {
  unsigned __int128 ns =
      (static_cast<unsigned __int128>(ticks) * 1000000000u + frequency_hz - 1) / frequency_hz;
  return ns > INT64_MAX ? INT64_MAX : static_cast<uint64_t>(ns);
}

// Deadlines are kept at least this far away, so that a guest that programs an absurd rate can't
// occupy the main loop.
constexpr int64_t kShortestTimerNs = 50'000;

// start + delay, saturating, and not nearer than kShortestTimerNs from now.
constexpr int64_t TimerDeadline(int64_t start_ns, uint64_t delay_ns, int64_t now_ns) {
  int64_t deadline;
  if (delay_ns > INT64_MAX ||
      __builtin_add_overflow(start_ns, static_cast<int64_t>(delay_ns), &deadline))
    return INT64_MAX;
  return deadline < now_ns + kShortestTimerNs ? now_ns + kShortestTimerNs : deadline;
}

}  // namespace kvartz
