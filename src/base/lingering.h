// What a process that was killed had open may stay so for some milliseconds after it is gone: until
// the kernel has ended its last requests (io_uring's).
#pragma once

#include <unistd.h>

#include <cstdint>

namespace kvartz {

// Of what seems to be in use by nobody: look, Wait, look again.
class Lingering {
 public:
  // Blocks. False: that was long enough, somebody uses it.
  bool Wait() {
    if (waited_us_ >= kPatienceUs) return false;
    usleep(next_us_);
    waited_us_ += next_us_;
    next_us_ *= 2;
    return true;
  }

 private:
  static constexpr uint32_t kPatienceUs = 500'000;
  uint32_t waited_us_ = 0, next_us_ = 1000;
};

}  // namespace kvartz
