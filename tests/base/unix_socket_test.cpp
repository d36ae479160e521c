#include "base/unix_socket.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <optional>

#include "base/in_flight.h"

namespace kvartz {
namespace {

class UnixSocketTest : public testing::Test {
 protected:
  UnixSocketTest() {
    char directory[] = "/tmp/kvartz-unix-XXXXXX";
    EXPECT_NE(mkdtemp(directory), nullptr);
    directory_ = directory;
    path_ = directory_ + "/socket";
  }
  ~UnixSocketTest() override {
    unlink(path_.c_str());
    rmdir(directory_.c_str());
  }
  static UniqueFd Socket() { return UniqueFd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)); }
  int Bind(const UniqueFd& fd) { return BindUnix(fd.get(), *UnixName(path_)); }
  // What a process listens on that is gone.
  UniqueFd ListenInAnother() {
    UniqueFd fd = Socket();
    EXPECT_EQ(Bind(fd), 0);
    pid_t child = fork();
    if (child == 0) _exit(listen(fd.get(), 8));
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
    return fd;
  }
  std::string directory_, path_;
};

TEST_F(UnixSocketTest, NamesHaveALength) {
  EXPECT_TRUE(UnixName("a"));
  EXPECT_FALSE(UnixName(""));
  EXPECT_TRUE(UnixName(std::string(107, 'x')));
  EXPECT_FALSE(UnixName(std::string(108, 'x')));
}

TEST_F(UnixSocketTest, WhatIsLeftBehindIsReplaced) {
  {
    UniqueFd first = Socket();
    EXPECT_EQ(Bind(first), 0);
    EXPECT_EQ(listen(first.get(), 8), 0);
    EXPECT_EQ(Bind(Socket()), EADDRINUSE);
  }
  EXPECT_EQ(Bind(Socket()), 0);
}

TEST_F(UnixSocketTest, AListenerThatIsGoneIsWaitedFor) {
  std::optional<InFlight> file(ListenInAnother());
  file->EndAfterMs(60);
  EXPECT_EQ(Bind(Socket()), 0);
  file.reset();
  unlink(path_.c_str());
  file.emplace(ListenInAnother());
  EXPECT_EQ(Bind(Socket()), EADDRINUSE);  // not for ever
}

TEST_F(UnixSocketTest, AnotherFileStays) {
  std::ofstream(path_) << "x";
  EXPECT_EQ(Bind(Socket()), EEXIST);
  struct stat st;
  EXPECT_EQ(stat(path_.c_str(), &st), 0);
  EXPECT_EQ(st.st_size, 1);
}

}  // namespace
}  // namespace kvartz
