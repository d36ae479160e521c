#include "cpu/x86/jit/perf_map.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>

#include <cerrno>

#include "base/log.h"

namespace kvartz::cpu::x86::jit {

std::string PerfMap::PathOfProcess() { return fmt::format("/tmp/perf-{}.map", getpid()); }

Result<PerfMap> PerfMap::Create(const std::string& path) {
  // Others may write to the directory: what they left there is neither followed nor used.
  UniqueFd fd(
      open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_APPEND | O_CLOEXEC, 0600));
  if (!fd && errno == EEXIST) {
    return Fail(ErrorCode::kExists,
                fmt::format("cannot make {}: there is one already; remove it", path));
  }
  if (!fd) return Fail(ErrnoError(errno, "cannot make " + path));
  return PerfMap(std::move(fd));
}

void PerfMap::Add(const uint8_t* begin, size_t size, std::string_view name) const {
  const std::string line =
      fmt::format("{:x} {:x} {}\n", reinterpret_cast<uintptr_t>(begin), size, name);
  if (write(fd_.get(), line.data(), line.size()) == static_cast<ssize_t>(line.size())) return;
  static log::RateLimit limit;
  if (limit.Pass()) KLOG(kWarn, "-perfmap: a line could not be written");
}

}  // namespace kvartz::cpu::x86::jit
