// HTTP and HTTPS for an event loop: parts of one resource, by range requests (RFC 9110, section
// 14).
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "base/event_loop.h"
#include "base/fiber.h"
#include "base/result.h"

namespace kvartz::block {

struct HttpOptions {
  std::string url = {};
  std::string username = {}, password = {};  // empty username: none
  std::string proxy_username = {}, proxy_password = {};
  std::string cookie = {};  // empty: none
  bool verify_peer = true;
  // For connecting, and how long less than 1 KiB a second may come.
  uint64_t timeout_s = 5;
};

// Loop-owned. What a server says is hostile: a reply that isn't the part that was asked for, of the
// resource that was there at first, is an error.
class HttpClient : public std::enable_shared_from_this<HttpClient> {
 public:
  static Result<std::shared_ptr<HttpClient>> Create(EventLoop& loop, HttpOptions options);
  ~HttpClient();
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;

  // Fiber: asks for the first byte. Errors say what to do: no such host, no ranges, 404, 401...
  Result<> Open();
  uint64_t size_bytes() const { return size_bytes_; }
  // Fiber: [offset, offset + out.size()), which is within size_bytes().
  Result<> Read(uint64_t offset, std::span<uint8_t> out);

 private:
  struct Transfer;
  struct Impl;
  HttpClient(EventLoop& loop, HttpOptions options);
  Result<> Run(Transfer& transfer);
  Result<> Outcome(const Transfer& transfer) const;
  void Configure(Transfer& transfer) const;
  void Act(int fd, int events);
  void OnSocket(int fd, int what);
  void OnTimer(long timeout_ms);

  EventLoop& loop_;
  const HttpOptions options_;
  uint64_t size_bytes_ = 0;
  std::string etag_;
  Timer timer_;
  std::set<int> watched_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvartz::block
