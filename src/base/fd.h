// Owned file descriptors.
#pragma once

#include <utility>

#include "base/result.h"

namespace kvartz {

// Owns one descriptor; closes it when destroyed. Movable.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) Reset(std::exchange(other.fd_, -1));
    return *this;
  }
  ~UniqueFd() { Reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int Release() { return std::exchange(fd_, -1); }
  void Reset(int fd = -1);

 private:
  int fd_ = -1;
};

// A counting eventfd, non-blocking, close-on-exec.
class EventFd {
 public:
  static Result<EventFd> Create();
  void Signal() const;   // any thread
  bool Consume() const;  // true if it was signalled since the last call
  int fd() const { return fd_.get(); }

 private:
  UniqueFd fd_;
};

// A sealed-size memfd of `size` bytes (a multiple of the page size).
Result<UniqueFd> CreateMemFd(const char* name, unsigned long size, unsigned extra_flags = 0);

}  // namespace kvartz
