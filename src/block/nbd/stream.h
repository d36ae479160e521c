// A stream socket for fibers: reads and writes that wait.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/event_loop.h"
#include "base/fd.h"
#include "base/fiber.h"
#include "base/tls.h"

namespace kvartz::block::nbd {

// Loop-owned. At most one fiber reads and one writes at a time. Reads are buffered.
class Stream {
 public:
  Stream(EventLoop& loop, UniqueFd socket);  // non-blocking
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // Fiber: from now on within TLS. `hostname`: whom a client wants to talk to. Errors: as
  // TlsSession's; the peer sent something before it.
  Result<> StartTls(std::shared_ptr<const TlsCredentials> credentials, const std::string& hostname);
  bool has_tls() const { return tls_ != nullptr; }

  // Fiber. 0 or -errno; -EPIPE at the end of the stream (also within what is read).
  int Read(std::span<uint8_t> bytes);
  int Skip(uint64_t bytes);
  // Bytes are there already: the next Read of so many doesn't wait.
  bool Buffered(size_t bytes) const { return end_ - begin_ >= bytes; }
  // Fiber: all of them, whose array is changed.
  int Write(std::span<iovec> iov);
  int Write(std::span<const uint8_t> bytes);

  // Both ways: who waits gets an error. Any time.
  void Shutdown();
  // The peer sends nothing any more, though there may be something left to read.
  bool PeerIsGone() const;
  // Who reads gets -ECANCELED where it would wait, until Join.
  void Interrupt();
  // To another loop, when nobody reads or writes: Leave here, Join on the other one's thread.
  void Leave();
  void Join(EventLoop& loop);

  template <typename T>
  int ReadStruct(T& value) {
    return Read({reinterpret_cast<uint8_t*>(&value), sizeof value});
  }

 private:
  void OnReady(FdEvents ready);
  void Watch();
  void Await(Fiber*& waiter);
  bool AwaitData();
  void Rearm();
  int64_t Receive(iovec* iov, int count);
  int64_t ReceiveTls(iovec* iov, int count);
  int64_t Send(std::span<iovec> iov);
  int64_t SendTls(std::span<iovec> iov);

  EventLoop* loop_;
  const UniqueFd socket_;
  std::unique_ptr<TlsSession> tls_;
  std::vector<uint8_t> to_send_;  // with tls_: what it was given and hasn't taken yet
  std::vector<uint8_t> buffer_;
  size_t begin_ = 0, end_ = 0;
  Fiber* reader_ = nullptr;
  Fiber* writer_ = nullptr;
  FdEvents armed_ = FdEvents::kNone;
  bool shut_ = false, drained_ = false, interrupted_ = false;
};

}  // namespace kvartz::block::nbd
