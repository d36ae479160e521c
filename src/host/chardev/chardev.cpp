#include "host/chardev/chardev.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>

#include "base/check.h"
#include "base/log.h"
#include "host/chardev/backend.h"
#include "host/chardev/ringbuf.h"

namespace kvartz::host {
namespace {

constexpr size_t kOutMax = 65536;  // accepted but not yet written
constexpr size_t kInMax = 4096;    // mux: read ahead of the users, so that Ctrl-a is always seen
constexpr size_t kPortsMax = 8;
constexpr uint8_t kEscapeKey = 0x01;  // Ctrl-a

Result<std::unique_ptr<CharBackend>> MakeBackend(Chardev& chardev, EventLoop& loop) {
  switch (chardev.config().kind) {
    case ChardevConfig::Kind::kNull:
      return MakeNullBackend(chardev);
    case ChardevConfig::Kind::kRingbuf:
      return MakeRingbufBackend(chardev);
    case ChardevConfig::Kind::kStdio:
      return MakeStdioBackend(chardev, loop);
    case ChardevConfig::Kind::kFile:
      return MakeFileBackend(chardev, loop);
    case ChardevConfig::Kind::kPipe:
      return MakePipeBackend(chardev, loop);
    case ChardevConfig::Kind::kPty:
      return MakePtyBackend(chardev, loop);
    case ChardevConfig::Kind::kSocket:
      return MakeSocketBackend(chardev, loop);
  }
  return Fail(ErrorCode::kUnsupported, "unknown kind of chardev");
}

}  // namespace

Chardev::Port::~Port() {
  std::erase(chardev_.ports_, this);
  if (chardev_.focus_ >= chardev_.ports_.size()) chardev_.focus_ = 0;
}

size_t Chardev::Port::Write(std::span<const uint8_t> data) { return chardev_.Write(*this, data); }

size_t Chardev::Port::Write(std::string_view text) {
  return Write(std::span(reinterpret_cast<const uint8_t*>(text.data()), text.size()));
}

void Chardev::Port::AcceptInput() {
  chardev_.Pump();
  chardev_.backend_->InputRoomChanged();
}

bool Chardev::Port::open() const { return chardev_.open_; }

void Chardev::Port::Disconnect() { chardev_.backend_->Disconnect(); }

Chardev::Chardev(const ChardevConfig& config, EventLoop& loop, std::function<void()> quit)
    : config_(config),
      loop_(loop),
      quit_(std::move(quit)),
      self_(std::make_shared<Chardev*>(this)) {}

Chardev::~Chardev() {
  VERIFY(ports_.empty());
  *self_ = nullptr;
}

Result<std::unique_ptr<Chardev>> Chardev::Create(const ChardevConfig& config, EventLoop& loop,
                                                 std::function<void()> quit) {
  std::unique_ptr<Chardev> chardev(new Chardev(config, loop, std::move(quit)));
  if (!config.logfile.empty()) {
    int flags = O_WRONLY | O_CREAT | O_CLOEXEC | (config.logappend ? O_APPEND : O_TRUNC);
    int fd = ::open(config.logfile.c_str(), flags, 0666);
    if (fd < 0) return Fail(ErrnoError(errno, "cannot open the log file " + config.logfile));
    chardev->log_fd_ = UniqueFd(fd);
  }
  chardev->backend_ = TRY(MakeBackend(*chardev, loop));
  chardev->backend_->Start();
  return chardev;
}

Result<std::unique_ptr<Chardev::Port>> Chardev::Connect(CharUser& user) {
  if (ports_.size() >= (config_.mux ? kPortsMax : 1)) {
    return Fail(ErrorCode::kBusy, fmt::format("chardev '{}' is in use{}", config_.id,
                                              config_.mux ? "" : "; give it mux=on to share it"));
  }
  std::unique_ptr<Port> port(new Port(*this, user));
  ports_.push_back(port.get());
  // Not from within Connect: the user isn't ready before it has its port.
  loop_.Post([self = self_, connected = port.get()] {
    Chardev* chardev = *self;
    if (!chardev || std::ranges::find(chardev->ports_, connected) == chardev->ports_.end()) return;
    chardev->Announce(*connected);
    if (chardev->config_.mux && chardev->ports_[chardev->focus_] == connected) {
      connected->user_.CharEventArrived(CharEvent::kFocusIn);
    }
    chardev->Pump();
    chardev->backend_->InputRoomChanged();
  });
  return port;
}

std::string Chardev::description() const { return backend_->Describe(); }

// ---- output ----

size_t Chardev::Write(Port& port, std::span<const uint8_t> data) {
  if (!open_) return data.size();
  size_t taken = std::min(data.size(), kOutMax - std::min(kOutMax, out_.size() - out_begin_));
  WriteOut(data.first(taken));
  port.wants_writable_ = taken < data.size();
  return taken;
}

void Chardev::WriteOut(std::span<const uint8_t> data) {
  if (log_fd_ && !data.empty() && write(log_fd_.get(), data.data(), data.size()) < 0) {
    KLOG(kWarn, "chardev '{}': cannot write to {}; no more is logged", config_.id, config_.logfile);
    log_fd_.Reset();
  }
  if (out_begin_ == out_.size()) data = data.subspan(backend_->Write(data));
  out_.append(reinterpret_cast<const char*>(data.data()), data.size());
}

void Chardev::Flush() {
  std::span<const uint8_t> rest(reinterpret_cast<const uint8_t*>(out_.data()) + out_begin_,
                                out_.size() - out_begin_);
  if (!rest.empty()) out_begin_ += backend_->Write(rest);
  if (out_begin_ == out_.size()) {
    out_.clear();
    out_begin_ = 0;
  } else if (out_begin_ > kOutMax / 2) {
    out_.erase(0, out_begin_);
    out_begin_ = 0;
  }
}

void Chardev::Writable() {
  Flush();
  if (out_.size() - out_begin_ > kOutMax / 2) return;
  for (size_t i = 0; i < ports_.size(); ++i) {
    if (std::exchange(ports_[i]->wants_writable_, false)) ports_[i]->user_.CharWritable();
  }
}

void Chardev::Drain(int timeout_ms) {
  int64_t deadline = loop_.clock().NowNs() + int64_t{timeout_ms} * 1'000'000;
  while (out_begin_ < out_.size()) {
    int64_t left_ms = (deadline - loop_.clock().NowNs()) / 1'000'000;
    pollfd wait{backend_->output_fd(), POLLOUT, 0};
    if (left_ms <= 0 || wait.fd < 0 || poll(&wait, 1, static_cast<int>(left_ms)) <= 0) return;
    size_t before = out_.size() - out_begin_;
    Flush();
    if (out_.size() - out_begin_ == before && (wait.revents & (POLLERR | POLLHUP))) return;
  }
}

// ---- input ----

size_t Chardev::InputRoom() const {
  if (ports_.empty()) return 0;
  if (config_.mux) return kInMax - std::min(kInMax, in_.size());
  return in_.empty() ? ports_[0]->user_.CanReceive() : 0;
}

void Chardev::Input(std::span<const uint8_t> data) {
  for (uint8_t byte : data) {
    if (config_.mux && escape_seen_) {
      escape_seen_ = false;
      MuxCommand(byte);
    } else if (config_.mux && byte == kEscapeKey) {
      escape_seen_ = true;
    } else {
      in_.push_back(static_cast<char>(byte));
    }
  }
  Pump();
}

void Chardev::Pump() {
  if (pumping_) return;
  pumping_ = true;
  while (!in_.empty() && !ports_.empty()) {
    CharUser& user = ports_[focus_]->user_;
    size_t count = std::min(in_.size(), user.CanReceive());
    if (count == 0) break;
    std::string piece = in_.substr(0, count);
    in_.erase(0, count);
    user.Receive(std::span(reinterpret_cast<const uint8_t*>(piece.data()), piece.size()));
  }
  pumping_ = false;
}

void Chardev::SetOpen(bool open) {
  if (open_ == open) return;
  open_ = open;
  if (!open) {
    out_.clear();
    out_begin_ = 0;
    in_.clear();
  }
  for (size_t i = 0; i < ports_.size(); ++i) Announce(*ports_[i]);
  // Nothing is refused while closed: who waits for room may go on.
  if (!open) Writable();
}

void Chardev::Break() {
  Pump();
  if (!ports_.empty()) ports_[focus_]->user_.CharEventArrived(CharEvent::kBreak);
}

void Chardev::Announce(Port& port) {
  if (std::exchange(port.told_open_, open_) == open_) return;
  port.user_.CharEventArrived(open_ ? CharEvent::kOpened : CharEvent::kClosed);
}

std::string Chardev::RingbufRead(size_t max_bytes) {
  if (config_.kind != ChardevConfig::Kind::kRingbuf) return {};
  return static_cast<RingbufBackend&>(*backend_).Take(max_bytes);
}

void Chardev::RingbufWrite(std::string_view data) {
  Input(std::span(reinterpret_cast<const uint8_t*>(data.data()), data.size()));
}

// ---- mux ----

void Chardev::Say(std::string_view text) {
  WriteOut(std::span(reinterpret_cast<const uint8_t*>(text.data()), text.size()));
}

void Chardev::MuxCommand(uint8_t key) {
  switch (key) {
    case 'x':
      Say("\r\nkvartz-vmm: ended by Ctrl-a x\r\n");
      if (quit_) quit_();
      break;
    case 'c':
      FocusNext();
      break;
    case 'b':
      Break();
      break;
    case kEscapeKey:
      in_.push_back(kEscapeKey);
      break;
    case 'h':
    case '?':
      Say("\r\n"
          "C-a h       this list\r\n"
          "C-a x       end the virtual machine\r\n"
          "C-a c       switch between console and monitor\r\n"
          "C-a b       send a break\r\n"
          "C-a C-a     send a C-a\r\n");
      break;
    default:
      break;
  }
}

void Chardev::FocusNext() {
  if (ports_.size() < 2) return;
  Pump();
  in_.clear();
  ports_[focus_]->user_.CharEventArrived(CharEvent::kFocusOut);
  focus_ = (focus_ + 1) % ports_.size();
  ports_[focus_]->user_.CharEventArrived(CharEvent::kFocusIn);
}

}  // namespace kvartz::host
