// Names for translated code in the file where perf looks for those of code that no program file
// has (Linux, tools/perf/Documentation/jit-interface.txt).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/fd.h"
#include "base/result.h"

namespace kvartz::cpu::x86::jit {

// Any thread. The file stays when the process ends: perf report reads it then.
class PerfMap {
 public:
  // /tmp/perf-PID.map
  static std::string PathOfProcess();
  // Makes `path`, readable by this user only. Errors: it is there already (of whatever kind), or
  // can't be made.
  static Result<PerfMap> Create(const std::string& path);

  // `name`: one line. A host that can't take it (disk full) is warned of, no more.
  void Add(const uint8_t* begin, size_t size, std::string_view name) const;

 private:
  explicit PerfMap(UniqueFd fd) : fd_(std::move(fd)) {}
  UniqueFd fd_;  // appends: lines of several threads don't mix
};

}  // namespace kvartz::cpu::x86::jit
