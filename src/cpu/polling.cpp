#include "cpu/polling.h"

#include <sched.h>

namespace kvartz::cpu {

int64_t PollingNs(unsigned cpu_count) {
  constexpr int64_t kPollingNs = 50'000;
  cpu_set_t ours;
  if (sched_getaffinity(0, sizeof(ours), &ours) != 0) return 0;
  return static_cast<unsigned>(CPU_COUNT(&ours)) > cpu_count ? kPollingNs : 0;
}

}  // namespace kvartz::cpu
