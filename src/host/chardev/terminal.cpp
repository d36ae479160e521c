#include "host/chardev/terminal.h"

#include <errno.h>
#include <signal.h>
#include <termios.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>

namespace kvartz::host::terminal {
namespace {

// What the signal handlers need; written before they are installed.
std::atomic<int> g_fd{-1};
termios g_saved;
termios g_raw;

constexpr int kDeadly[] = {SIGHUP, SIGINT, SIGQUIT, SIGILL,  SIGABRT,
                           SIGBUS, SIGFPE, SIGSEGV, SIGTERM, SIGSYS};

void Set(const termios& mode) {
  int fd = g_fd.load();
  if (fd < 0) return;
  // A background process that changes the terminal would be stopped.
  sigset_t ttou, before;
  sigemptyset(&ttou);
  sigaddset(&ttou, SIGTTOU);
  pthread_sigmask(SIG_BLOCK, &ttou, &before);
  tcsetattr(fd, TCSANOW, &mode);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void OnDeadly(int signal_number) {
  Set(g_saved);
  // SA_RESETHAND made the default action current: die of the same signal.
  raise(signal_number);
}

// After Ctrl-Z and fg the shell has set its own mode.
void OnContinue(int) {
  int saved_errno = errno;
  Set(g_raw);
  errno = saved_errno;
}

void Install(int signal_number, void (*handler)(int), int flags) {
  struct sigaction before;
  // A handler that somebody else installed (a sanitizer, an engine that takes faults) stays.
  if (sigaction(signal_number, nullptr, &before) != 0 || before.sa_handler != SIG_DFL) return;
  struct sigaction action = {};
  action.sa_handler = handler;
  action.sa_flags = flags;
  sigaction(signal_number, &action, nullptr);
}

}  // namespace

Result<> EnterRaw(int fd, Signals signals) {
  if (g_fd.load() >= 0) return Fail(ErrorCode::kBusy, "the terminal is in use by another chardev");
  if (tcgetattr(fd, &g_saved) != 0)
    return Fail(ErrnoError(errno, "cannot read the terminal's mode"));
  g_raw = g_saved;
  g_raw.c_iflag &= ~(IGNBRK | BRKINT | PARMRK | ISTRIP | INLCR | IGNCR | ICRNL | IXON);
  g_raw.c_oflag |= OPOST;
  g_raw.c_lflag &= ~(ECHO | ECHONL | ICANON | IEXTEN);
  if (signals == Signals::kOff) g_raw.c_lflag &= ~ISIG;
  g_raw.c_cflag = (g_raw.c_cflag & ~(CSIZE | PARENB)) | CS8;
  g_raw.c_cc[VMIN] = 1;
  g_raw.c_cc[VTIME] = 0;
  g_fd = fd;
  for (int deadly : kDeadly) Install(deadly, OnDeadly, SA_RESETHAND);
  Install(SIGCONT, OnContinue, SA_RESTART);
  static bool at_exit = false;
  if (!at_exit) std::atexit(Restore);
  at_exit = true;
  Set(g_raw);
  return {};
}

void Restore() {
  Set(g_saved);
  g_fd = -1;
}

}  // namespace kvartz::host::terminal
