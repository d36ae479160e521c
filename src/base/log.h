// One line of log at a time, to standard error or the file of -D. Any thread.
//
//   KLOG(kWarn, "net0: dropped {} packets", n);
//   KLOG_GUEST("uart: write to unknown register {:#x}", offset);   // a guest's misbehaviour: at
//   most 10 a second a site
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/result.h"

namespace kvartz {

enum class LogLevel { kTrace, kDebug, kInfo, kWarn, kError };

namespace log {
// The lowest level that is printed (default kWarn).
void SetLevel(LogLevel level);
bool Enabled(LogLevel level);
// Appends to `path` instead of standard error. Errors: the file can't be opened.
Result<> SetFile(const std::string& path);
// The program's name before each line ("kvartz-vmm: ...").
void SetProgram(std::string_view name);
void Write(LogLevel level, std::string_view text);

// -d items: named trace categories (guest_errors, int, in_asm, cpu_reset, unimp...), off unless
// switched on.
enum class Category : uint32_t {
  kGuestErrors = 1 << 0,
  kUnimp = 1 << 1,
  kInt = 1 << 2,
  kCpuReset = 1 << 3,
  kInAsm = 1 << 4,   // guest code, when it is decoded or translated
  kOutAsm = 1 << 5,  // what it is translated to
  kOp = 1 << 6,      // how
  kExec = 1 << 7,    // when it is run
};
bool CategoryEnabled(Category category);
// Comma-separated names as of -d. Errors: an unknown name (lists the known ones), one that is
// known elsewhere only (says why).
Result<> EnableCategories(std::string_view names);

// Lets through at most 10 lines in a second a site, and says how many were dropped.
class RateLimit {
 public:
  bool Pass();

 private:
  std::atomic<int64_t> window_start_ns_{0};
  std::atomic<uint32_t> count_{0};
};
}  // namespace log
}  // namespace kvartz

// The macros need <fmt/core.h> where they are used; sources include it themselves.
#define KLOG(level, ...)                                                           \
  do {                                                                             \
    if (::kvartz::log::Enabled(::kvartz::LogLevel::level))                         \
      ::kvartz::log::Write(::kvartz::LogLevel::level, ::fmt::format(__VA_ARGS__)); \
  } while (0)

#define KLOG_GUEST(...)                                                                         \
  do {                                                                                          \
    static ::kvartz::log::RateLimit limit_;                                                     \
    if (::kvartz::log::CategoryEnabled(::kvartz::log::Category::kGuestErrors) && limit_.Pass()) \
      ::kvartz::log::Write(::kvartz::LogLevel::kInfo, ::fmt::format(__VA_ARGS__));              \
  } while (0)
