#include <fmt/core.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>

#include "base/clock.h"
#include "base/print.h"
#include "cli/img/img.h"

namespace kvartz::cli::img {
namespace {

std::atomic<bool> g_asked = false;  // set by the signal's handler

constexpr int64_t kRemainingAfterNs = 2'000'000'000;

}  // namespace

Progress::Show ShowProgress(const Arguments& arguments) {
  return arguments.Has("p") && !arguments.Has("q") ? Progress::Show::kYes : Progress::Show::kNo;
}

void ListenForProgressSignal() {
  struct sigaction action = {};
  action.sa_handler = [](int) { g_asked = true; };
  action.sa_flags = SA_RESTART;
  sigaction(SIGUSR1, &action, nullptr);
}

Progress::Progress(Show show, double step_percent)
    : show_(show == Show::kYes),
      step_percent_(step_percent),
      started_ns_(MonotonicClock::Instance().NowNs()) {
  Update(0, 1);
}

Progress::~Progress() {
  if (show_) Print("\n");
  fflush(stdout);
}

void Progress::Update(uint64_t done, uint64_t total) {
  double percent =
      total == 0 ? 100
                 : std::min(100.0, 100.0 * static_cast<double>(done) / static_cast<double>(total));
  if (g_asked.exchange(false)) Print(stderr, "    ({:.2f}/100%)\n", percent);
  if (!show_ || finished_ || (percent < 100 && percent < last_ + step_percent_)) return;
  last_ = percent;
  finished_ = percent >= 100;
  std::string remaining;
  int64_t spent = MonotonicClock::Instance().NowNs() - started_ns_;
  // For people only: programs read what qemu-img prints.
  if (isatty(STDOUT_FILENO) && percent > 0 && spent > kRemainingAfterNs && !finished_) {
    double seconds = static_cast<double>(spent) / 1e9 * (100 - percent) / percent;
    remaining = fmt::format(" {:.0f} s left", seconds);
  }
  // Spaces over what a longer line left behind.
  if (isatty(STDOUT_FILENO)) remaining.resize(14, ' ');
  Print("    ({:.2f}/100%){}\r", percent, remaining);
  fflush(stdout);
}

void Progress::Watch(block::Job& job) {
  job.on_progress = [this](const block::Job& running) {
    Update(running.progress_done(), running.progress_total());
  };
}

}  // namespace kvartz::cli::img
