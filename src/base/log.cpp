#include "base/log.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <iterator>

#include "base/clock.h"
#include "base/fd.h"
#include "base/sync.h"

namespace kvartz::log {
namespace {

constexpr uint32_t kLinesPerSecond = 10;
constexpr int64_t kSecondNs = 1'000'000'000;

struct CategoryName {
  std::string_view name;
  Category category;
};
constexpr CategoryName kCategories[] = {
    {"guest_errors", Category::kGuestErrors},
    {"unimp", Category::kUnimp},
    {"int", Category::kInt},
    {"cpu_reset", Category::kCpuReset},
    {"in_asm", Category::kInAsm},
    {"out_asm", Category::kOutAsm},
    {"op", Category::kOp},
    {"exec", Category::kExec},
};

// Known elsewhere.
struct Unsupported {
  std::string_view name, why;
};
constexpr Unsupported kUnsupported[] = {
    {"trace", "there are no trace points"},
};

std::atomic<LogLevel> g_level{LogLevel::kWarn};
std::atomic<uint32_t> g_categories{0};

struct Sink {
  std::string program;
  UniqueFd file;  // none: standard error
};

// Never destroyed: threads may log while the process ends.
Guarded<Sink>& TheSink() {
  static auto* sink = new Guarded<Sink>;
  return *sink;
}

std::string_view Prefix(LogLevel level) {
  switch (level) {
    case LogLevel::kTrace:
    case LogLevel::kDebug:
    case LogLevel::kError:
      return "";
    case LogLevel::kInfo:
      return "info: ";
    case LogLevel::kWarn:
      return "warning: ";
  }
  return "";
}

// Text of a guest must not be able to forge a line or drive a terminal.
void AppendPrintable(std::string& line, std::string_view text) {
  for (char c : text) {
    auto byte = static_cast<unsigned char>(c);
    if ((byte < 0x20 && c != '\t') || byte == 0x7f) {
      fmt::format_to(std::back_inserter(line), "\\x{:02x}", byte);
    } else {
      line += c;
    }
  }
}

}  // namespace

void SetLevel(LogLevel level) { g_level.store(level, std::memory_order_relaxed); }

bool Enabled(LogLevel level) { return level >= g_level.load(std::memory_order_relaxed); }

Result<> SetFile(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640));
  if (!fd) return Fail(ErrnoError(errno, "cannot open log file '" + path + "'"));
  TheSink().Lock()->file = std::move(fd);
  return {};
}

void SetProgram(std::string_view name) { TheSink().Lock()->program = name; }

void Write(LogLevel level, std::string_view text) {
  std::string line;
  line.reserve(text.size() + 40);
  auto sink = TheSink().Lock();
  if (!sink->program.empty()) line += sink->program + ": ";
  line += Prefix(level);
  AppendPrintable(line, text);
  line += '\n';
  // One write a line, so that lines of several processes on one terminal don't mix.
  int fd = sink->file ? sink->file.get() : STDERR_FILENO;
  [[maybe_unused]] ssize_t n = write(fd, line.data(), line.size());
}

bool CategoryEnabled(Category category) {
  return (g_categories.load(std::memory_order_relaxed) & static_cast<uint32_t>(category)) != 0;
}

Result<> EnableCategories(std::string_view names) {
  uint32_t mask = 0;
  while (!names.empty()) {
    size_t comma = names.find(',');
    std::string_view name = names.substr(0, comma);
    names = comma == names.npos ? "" : names.substr(comma + 1);
    uint32_t bit = 0;
    std::string known;
    for (const auto& row : kCategories) {
      if (row.name == name) bit = static_cast<uint32_t>(row.category);
      known += (known.empty() ? "" : ", ") + std::string(row.name);
    }
    for (const Unsupported& row : kUnsupported) {
      if (row.name != name) continue;
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("not supported yet: log item '{}': {}", name, row.why));
    }
    if (bit == 0) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("unknown log item '{}'; the items are: {}", name, known));
    }
    mask |= bit;
  }
  g_categories.fetch_or(mask, std::memory_order_relaxed);
  return {};
}

bool RateLimit::Pass() {
  int64_t now = MonotonicClock::Instance().NowNs();
  int64_t start = window_start_ns_.load(std::memory_order_relaxed);
  if (now - start >= kSecondNs &&
      window_start_ns_.compare_exchange_strong(start, now, std::memory_order_relaxed)) {
    uint32_t before = count_.exchange(0, std::memory_order_relaxed);
    if (before > kLinesPerSecond) {
      Write(LogLevel::kInfo,
            fmt::format("{} lines like the next one were left out", before - kLinesPerSecond));
    }
  }
  return count_.fetch_add(1, std::memory_order_relaxed) < kLinesPerSecond;
}

}  // namespace kvartz::log
