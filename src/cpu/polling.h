// Whether who waits looks out for a while before it sleeps.
#pragma once

#include <cstdint>

namespace kvartz::cpu {

// How long a halted vCPU of the own engine, and a thread that serves it, look out for what they
// wait for before they sleep: to be woken takes the host longer than a cached disk to answer.
// 0 where `cpu_count` vCPUs leave none of the host's processors to others.
int64_t PollingNs(unsigned cpu_count);

}  // namespace kvartz::cpu
