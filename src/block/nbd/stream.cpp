#include "block/nbd/stream.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace kvartz::block::nbd {
namespace {
constexpr size_t kBufferBytes = 64 << 10;
constexpr size_t kMostIov = 1024;
constexpr size_t kTlsRecord = 16 << 10;
}  // namespace

Stream::Stream(EventLoop& loop, UniqueFd socket)
    : loop_(&loop), socket_(std::move(socket)), buffer_(kBufferBytes) {
  Watch();
}

Stream::~Stream() { Leave(); }

void Stream::Watch() {
  loop_->Watch(socket_.get(), FdEvents::kNone, [this](FdEvents ready) { OnReady(ready); });
}

void Stream::Leave() {
  if (loop_) loop_->Unwatch(socket_.get());
  loop_ = nullptr;
}

void Stream::Join(EventLoop& loop) {
  loop_ = &loop;
  interrupted_ = false;
  armed_ = FdEvents::kNone;
  Watch();
}

void Stream::Interrupt() {
  interrupted_ = true;
  if (Fiber* reader = std::exchange(reader_, nullptr)) {
    Rearm();
    reader->Wake();
  }
}

void Stream::Rearm() {
  auto wanted = static_cast<FdEvents>((reader_ ? 1u : 0u) | (writer_ ? 2u : 0u));
  if (std::exchange(armed_, wanted) != wanted) loop_->Rearm(socket_.get(), wanted);
}

// Those who are woken may wait again at once, or end the stream.
void Stream::OnReady(FdEvents ready) {
  bool read = static_cast<uint32_t>(ready) & 1, write = static_cast<uint32_t>(ready) & 2;
  Fiber* reader = read ? std::exchange(reader_, nullptr) : nullptr;
  Fiber* writer = write ? std::exchange(writer_, nullptr) : nullptr;
  Rearm();
  if (reader) reader->Wake();
  if (writer) writer->Wake();
}

void Stream::Await(Fiber*& waiter) {
  waiter = Fiber::Current();
  Rearm();
  Fiber::Suspend();
}

// False: it was interrupted.
bool Stream::AwaitData() {
  if (!interrupted_) Await(reader_);
  return !interrupted_;
}

void Stream::Shutdown() {
  if (std::exchange(shut_, true)) return;
  if (tls_) tls_->Bye();
  shutdown(socket_.get(), SHUT_RDWR);
}

bool Stream::PeerIsGone() const {
  pollfd peer = {socket_.get(), POLLRDHUP, 0};
  return poll(&peer, 1, 0) == 1;
}

Result<> Stream::StartTls(std::shared_ptr<const TlsCredentials> credentials,
                          const std::string& hostname) {
  if (Buffered(1)) return Fail(ErrorCode::kInvalid, "the peer sent data before TLS began");
  auto session = TRY(TlsSession::Create(std::move(credentials), socket_.get(), hostname));
  while (true) {
    TlsSession::Step step = TRY(session->Handshake());
    if (step == TlsSession::Step::kDone) break;
    if (shut_) return Fail(ErrorCode::kIo, "TLS handshake failed: the connection is closed");
    Await(step == TlsSession::Step::kAwaitRead ? reader_ : writer_);
  }
  tls_ = std::move(session);
  return {};
}

int64_t Stream::ReceiveTls(iovec* iov, int count) {
  int64_t total = 0;
  for (int i = 0; i < count; i++) {
    if (total > 0 && !tls_->Pending()) break;
    int64_t got = tls_->Receive({static_cast<uint8_t*>(iov[i].iov_base), iov[i].iov_len});
    if (got <= 0) {
      if (total > 0) break;
      if (got == 0) return -EPIPE;
      return got;
    }
    total += got;
    if (static_cast<size_t>(got) < iov[i].iov_len) break;
  }
  return total;
}

int64_t Stream::Receive(iovec* iov, int count) {
  while (tls_) {
    int64_t got = ReceiveTls(iov, count);
    if (got != -EAGAIN) return got;
    if (shut_) return -EPIPE;
    if (!AwaitData()) return -ECANCELED;
  }
  size_t room = 0;
  for (int i = 0; i < count; i++) room += iov[i].iov_len;
  while (true) {
    // It gave less than there was room for: nothing is left, so waiting comes first.
    if (drained_ && !shut_ && !AwaitData()) return -ECANCELED;
    drained_ = false;
    ssize_t got = readv(socket_.get(), iov, count);
    drained_ = got > 0 && static_cast<size_t>(got) < room;
    if (got > 0) return got;
    if (got == 0) return -EPIPE;
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return -errno;
    if (shut_) return -EPIPE;
    if (!AwaitData()) return -ECANCELED;
  }
}

int Stream::Read(std::span<uint8_t> bytes) {
  while (!bytes.empty()) {
    size_t held = std::min(bytes.size(), end_ - begin_);
    std::memcpy(bytes.data(), buffer_.data() + begin_, held);
    begin_ += held;
    bytes = bytes.subspan(held);
    if (bytes.empty()) break;
    // Into place, and what comes after it into the buffer.
    iovec iov[2] = {{bytes.data(), bytes.size()}, {buffer_.data(), buffer_.size()}};
    begin_ = end_ = 0;
    int64_t got = Receive(iov, 2);
    if (got < 0) return static_cast<int>(got);
    auto count = static_cast<size_t>(got);
    size_t direct = std::min(count, bytes.size());
    bytes = bytes.subspan(direct);
    end_ = count - direct;
  }
  return 0;
}

int Stream::Skip(uint64_t bytes) {
  std::vector<uint8_t> waste(std::min<uint64_t>(bytes, kBufferBytes));
  while (bytes > 0) {
    uint64_t part = std::min<uint64_t>(bytes, waste.size());
    if (int rc = Read({waste.data(), part})) return rc;
    bytes -= part;
  }
  return 0;
}

// A record's worth, gathered: small pieces would be records of their own. What the session was
// given once must come again until it is taken.
int64_t Stream::SendTls(std::span<iovec> iov) {
  if (to_send_.empty()) {
    for (const iovec& part : iov) {
      const auto* bytes = static_cast<const uint8_t*>(part.iov_base);
      to_send_.insert(to_send_.end(), bytes,
                      bytes + std::min(part.iov_len, kTlsRecord - to_send_.size()));
      if (to_send_.size() == kTlsRecord) break;
    }
  }
  int64_t sent = tls_->Send(to_send_);
  if (sent > 0) to_send_.clear();
  return sent;
}

int64_t Stream::Send(std::span<iovec> iov) {
  if (tls_) return SendTls(iov);
  msghdr message = {};
  message.msg_iov = iov.data();
  message.msg_iovlen = std::min(iov.size(), kMostIov);
  ssize_t sent = sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
  return sent < 0 ? -errno : sent;
}

int Stream::Write(std::span<iovec> iov) {
  while (!iov.empty()) {
    if (iov[0].iov_len == 0) {
      iov = iov.subspan(1);
      continue;
    }
    int64_t sent = Send(iov);
    if (sent < 0) {
      if (sent == -EINTR) continue;
      if (sent != -EAGAIN) return static_cast<int>(sent);
      if (shut_) return -EPIPE;
      Await(writer_);
      continue;
    }
    auto left = static_cast<size_t>(sent);
    while (left > 0) {
      size_t part = std::min(left, iov[0].iov_len);
      iov[0].iov_base = static_cast<uint8_t*>(iov[0].iov_base) + part;
      iov[0].iov_len -= part;
      left -= part;
      if (iov[0].iov_len == 0) iov = iov.subspan(1);
    }
  }
  return 0;
}

int Stream::Write(std::span<const uint8_t> bytes) {
  iovec iov = {const_cast<uint8_t*>(bytes.data()), bytes.size()};
  return Write({&iov, 1});
}

}  // namespace kvartz::block::nbd
