// Chardevs on descriptors: standard input and output, files, named pipes, pseudo terminals.
#include <fcntl.h>
#include <fmt/core.h>
#include <poll.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <optional>

#include "base/log.h"
#include "base/print.h"
#include "host/chardev/backend.h"
#include "host/chardev/chardev.h"
#include "host/chardev/terminal.h"

namespace kvartz::host {
namespace {

constexpr size_t kReadMax = 4096;
// A write of this size to a pipe that polls writable doesn't block (POSIX: PIPE_BUF).
constexpr size_t kPipeWriteMax = 4096;

// Whether the loop can wait for `fd`: files and /dev/null are always ready and can't be watched.
bool Watchable(int fd) {
  struct stat info;
  if (fstat(fd, &info) != 0) return false;
  if (S_ISREG(info.st_mode) || S_ISDIR(info.st_mode)) return false;
  return !(S_ISCHR(info.st_mode) && major(info.st_rdev) == 1);
}

// Loop-owned.
class FdBackend : public CharBackend {
 public:
  FdBackend(Chardev& chardev, EventLoop& loop, UniqueFd input, UniqueFd output,
            std::string description)
      : chardev_(chardev),
        loop_(loop),
        input_(std::move(input)),
        output_(std::move(output)),
        input_watchable_(input_ && Watchable(input_.get())),
        output_watchable_(output_ && Watchable(output_.get())),
        description_(std::move(description)),
        self_(std::make_shared<FdBackend*>(this)) {}

  ~FdBackend() override {
    *self_ = nullptr;
    StopWatching();
  }

  void Start() override { chardev_.SetOpen(true); }

  size_t Write(std::span<const uint8_t> data) override {
    size_t done = 0;
    while (done < data.size() && output_) {
      // Several processes may share the descriptor, so it stays in blocking mode: ask first, write
      // no more than fits.
      pollfd ready{output_.get(), POLLOUT, 0};
      size_t count = data.size() - done;
      if (output_watchable_) {
        if (poll(&ready, 1, 0) <= 0 || !(ready.revents & (POLLOUT | POLLERR | POLLHUP))) {
          want_write_ = true;
          UpdateWatch();
          return done;
        }
        count = std::min(count, kPipeWriteMax);
      }
      ssize_t written = write(output_.get(), data.data() + done, count);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0 && errno == EAGAIN) {
        want_write_ = true;
        UpdateWatch();
        return done;
      }
      if (written < 0) {
        OutputFailed(errno);
        break;
      }
      done += static_cast<size_t>(written);
    }
    return data.size();
  }

  void InputRoomChanged() override {
    if (input_watchable_) {
      UpdateWatch();
    } else if (input_ && !read_posted_ && chardev_.InputRoom() > 0) {
      read_posted_ = true;
      loop_.Post([self = self_] {
        if (!*self) return;
        (*self)->read_posted_ = false;
        (*self)->ReadInput();
        (*self)->InputRoomChanged();
      });
    }
  }

  std::string Describe() const override { return description_; }
  int output_fd() const override { return output_.get(); }

 protected:
  // The input ended or failed.
  virtual void InputEnded() {
    StopWatching();
    input_.Reset();
    input_watchable_ = false;
    UpdateWatch();
  }

  virtual void OutputFailed(int errno_value) {
    KLOG(kWarn, "chardev '{}': {}", chardev_.id(),
         ErrnoError(errno_value, "cannot write; output is dropped").what);
    StopWatching();
    output_.Reset();
    output_watchable_ = want_write_ = false;
  }

  bool same() const { return same_; }
  void set_same() { same_ = true; }

  void UpdateWatch() {
    bool read = input_watchable_ && chardev_.InputRoom() > 0;
    bool write = output_watchable_ && want_write_;
    if (same_) {
      Rewatch(input_.get(), read, write, &watched_in_);
    } else {
      Rewatch(input_.get(), read, false, &watched_in_);
      Rewatch(output_.get(), false, write, &watched_out_);
    }
  }

  void StopWatching() {
    if (watched_in_) loop_.Unwatch(input_.get());
    if (watched_out_) loop_.Unwatch(output_.get());
    watched_in_ = watched_out_ = false;
  }

  // One descriptor in both roles: both UniqueFds hold duplicates, only the input's is watched.
  bool same_ = false;
  bool want_write_ = false;
  Chardev& chardev_;
  EventLoop& loop_;
  UniqueFd input_, output_;
  bool input_watchable_, output_watchable_;

 private:
  void Rewatch(int fd, bool read, bool write, bool* watched) {
    FdEvents events = read && write ? FdEvents::kReadWrite
                      : read        ? FdEvents::kRead
                      : write       ? FdEvents::kWrite
                                    : FdEvents::kNone;
    if (events == FdEvents::kNone) {
      if (*watched) loop_.Unwatch(fd);
      *watched = false;
    } else if (*watched) {
      loop_.Rearm(fd, events);
    } else {
      *watched = true;
      loop_.Watch(fd, events, [self = self_, fd](FdEvents ready) {
        if (*self) (*self)->Ready(fd, ready);
      });
    }
  }

  void Ready(int fd, FdEvents ready) {
    auto self = self_;
    auto has = [ready](FdEvents bit) {
      return (static_cast<uint32_t>(ready) & static_cast<uint32_t>(bit)) != 0;
    };
    if (has(FdEvents::kWrite) && (same_ || fd == output_.get())) {
      want_write_ = false;
      UpdateWatch();
      chardev_.Writable();
    }
    if (*self && has(FdEvents::kRead) && fd == input_.get()) ReadInput();
    if (*self && input_watchable_) UpdateWatch();
  }

  void ReadInput() {
    uint8_t buffer[kReadMax];
    size_t room = std::min(chardev_.InputRoom(), sizeof(buffer));
    if (room == 0 || !input_) return;
    ssize_t count = read(input_.get(), buffer, room);
    if (count < 0 && (errno == EINTR || errno == EAGAIN)) return;
    if (count <= 0) {
      InputEnded();
    } else {
      chardev_.Input(std::span(buffer, static_cast<size_t>(count)));
    }
  }

  const std::string description_;
  bool watched_in_ = false, watched_out_ = false;
  bool read_posted_ = false;
  std::shared_ptr<FdBackend*> self_;
};

// ---- stdio ----

// Loop-owned; one in a process.
class StdioBackend final : public FdBackend {
 public:
  static inline bool in_use = false;

  StdioBackend(Chardev& chardev, EventLoop& loop, UniqueFd input, UniqueFd output)
      : FdBackend(chardev, loop, std::move(input), std::move(output), "stdio") {
    in_use = true;
  }
  ~StdioBackend() override {
    terminal::Restore();
    in_use = false;
  }
};

Result<UniqueFd> Duplicate(int fd) {
  int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  if (copy < 0) return Fail(ErrnoError(errno, fmt::format("cannot duplicate descriptor {}", fd)));
  return UniqueFd(copy);
}

// Standard output without waiting: a description of our own, as O_NONBLOCK on the shared one would
// reach the shell.
Result<UniqueFd> NonBlockingOutput() {
  struct stat info;
  if (isatty(1) || (fstat(1, &info) == 0 && S_ISFIFO(info.st_mode))) {
    UniqueFd own(open("/proc/self/fd/1", O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
    if (own) return own;
  }
  return Duplicate(1);
}

// ---- pty ----

// Loop-owned. Nobody at the other end until a process opens the slave side, which inotify tells.
class PtyBackend final : public FdBackend {
 public:
  PtyBackend(Chardev& chardev, EventLoop& loop, UniqueFd input, UniqueFd output, UniqueFd opens,
             const std::string& path)
      : FdBackend(chardev, loop, std::move(input), std::move(output), "pty:" + path),
        opens_(std::move(opens)) {
    set_same();
  }
  ~PtyBackend() override {
    if (started_) loop_.Unwatch(opens_.get());
  }

  void Start() override {
    started_ = true;
    loop_.Watch(opens_.get(), FdEvents::kRead, [this](FdEvents) {
      char events[1024];
      while (read(opens_.get(), events, sizeof(events)) > 0) {
      }
      if (chardev_.open()) return;
      chardev_.SetOpen(true);
      UpdateWatch();
    });
  }

 private:
  void InputEnded() override { Closed(); }
  void OutputFailed(int) override { Closed(); }
  void Closed() {
    StopWatching();
    want_write_ = false;
    input_watchable_ = false;
    chardev_.SetOpen(false);
    input_watchable_ = true;
  }

  UniqueFd opens_;
  bool started_ = false;
};

}  // namespace

Result<std::unique_ptr<CharBackend>> MakeStdioBackend(Chardev& chardev, EventLoop& loop) {
  if (StdioBackend::in_use) {
    return Fail(ErrorCode::kBusy,
                "stdio is in use by another chardev; share it with mon:stdio or mux=on");
  }
  UniqueFd input, output;
  // Closed standard descriptors are no error: nothing is read, nothing written.
  if (fcntl(0, F_GETFD) >= 0) input = TRY(Duplicate(0));
  if (fcntl(1, F_GETFD) >= 0) output = TRY(NonBlockingOutput());
  if (input && isatty(0)) {
    TRY(terminal::EnterRaw(
        0, chardev.config().signal ? terminal::Signals::kOn : terminal::Signals::kOff));
  }
  return std::make_unique<StdioBackend>(chardev, loop, std::move(input), std::move(output));
}

Result<std::unique_ptr<CharBackend>> MakeFileBackend(Chardev& chardev, EventLoop& loop) {
  const ChardevConfig& config = chardev.config();
  int flags = O_WRONLY | O_CREAT | O_CLOEXEC | (config.append ? O_APPEND : O_TRUNC);
  UniqueFd output(open(config.path.c_str(), flags, 0666));
  if (!output) return Fail(ErrnoError(errno, "cannot open " + config.path));
  UniqueFd input;
  if (!config.input_path.empty()) {
    input.Reset(open(config.input_path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!input) return Fail(ErrnoError(errno, "cannot open " + config.input_path));
  }
  return std::make_unique<FdBackend>(chardev, loop, std::move(input), std::move(output), "file");
}

Result<std::unique_ptr<CharBackend>> MakePipeBackend(Chardev& chardev, EventLoop& loop) {
  const std::string& path = chardev.config().path;
  constexpr int kFlags = O_RDWR | O_NONBLOCK | O_CLOEXEC;  // O_RDWR: doesn't wait for the other end
  UniqueFd input(open((path + ".in").c_str(), kFlags));
  UniqueFd output(open((path + ".out").c_str(), kFlags));
  if (!input || !output) {
    output.Reset(open(path.c_str(), kFlags));
    if (!output) {
      return Fail(ErrnoError(
          errno,
          fmt::format("cannot open {0}.in and {0}.out, nor {0}; make them with mkfifo", path)));
    }
    input = TRY(Duplicate(output.get()));
  }
  return std::make_unique<FdBackend>(chardev, loop, std::move(input), std::move(output),
                                     "pipe:" + path);
}

Result<std::unique_ptr<CharBackend>> MakePtyBackend(Chardev& chardev, EventLoop& loop) {
  UniqueFd master(posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
  char path[128];
  if (!master || grantpt(master.get()) != 0 || unlockpt(master.get()) != 0 ||
      ptsname_r(master.get(), path, sizeof(path)) != 0) {
    return Fail(ErrnoError(errno, "cannot make a pseudo terminal"));
  }
  {
    UniqueFd slave(open(path, O_RDWR | O_NOCTTY | O_CLOEXEC));
    termios mode;
    if (!slave || tcgetattr(slave.get(), &mode) != 0)
      return Fail(ErrnoError(errno, fmt::format("cannot open {}", path)));
    cfmakeraw(&mode);
    tcsetattr(slave.get(), TCSANOW, &mode);
  }
  if (fcntl(master.get(), F_SETFL, O_NONBLOCK) != 0) return Fail(ErrnoError(errno, "fcntl"));
  UniqueFd opens(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
  if (!opens || inotify_add_watch(opens.get(), path, IN_OPEN) < 0) {
    return Fail(ErrnoError(errno, fmt::format("cannot watch {}", path)));
  }
  UniqueFd writer = TRY(Duplicate(master.get()));
  // Management programs and people read the path from here.
  Print("char device redirected to {} (label {})\n", path, chardev.id());
  fflush(stdout);
  return std::make_unique<PtyBackend>(chardev, loop, std::move(master), std::move(writer),
                                      std::move(opens), path);
}

}  // namespace kvartz::host
