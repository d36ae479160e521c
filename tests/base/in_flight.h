// An open file that no process has: one that was sent and not received, as what a killed process
// had open until its last requests end.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include <cstring>
#include <thread>

#include "base/fd.h"

namespace kvartz {

class InFlight {
 public:
  explicit InFlight(UniqueFd file) {
    int ends[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, ends), 0);
    from_.Reset(ends[0]);
    to_.Reset(ends[1]);
    char byte = 0;
    iovec iov = {&byte, 1};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message = {};
    message.msg_iov = &iov;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    const int fd = file.get();
    std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
    EXPECT_EQ(sendmsg(from_.get(), &message, 0), 1);
  }
  ~InFlight() {
    if (ender_.joinable()) ender_.join();
  }
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;

  void EndAfterMs(int ms) {
    ender_ = std::thread([this, ms] {
      poll(nullptr, 0, ms);
      from_.Reset();
      to_.Reset();
    });
  }

 private:
  UniqueFd from_, to_;
  std::thread ender_;
};

}  // namespace kvartz
