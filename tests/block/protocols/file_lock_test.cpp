// Locks on images, between our machines and with QEMU's.
#include "block/protocols/file_lock.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/in_flight.h"
#include "block/image_helpers.h"

namespace kvartz::block {
namespace {

using testing::HasSubstr;

TEST(ImageLocks, TwoWritersAreRefusedReadersShare) {
  TempDir dir;
  std::string path = dir.File("a.img", kMiB);
  auto loop = MakeLoop();
  ImageOptions writer = {.path = path, .format = "raw"};
  ImageOptions reader = {.path = path, .format = "raw", .read_only = true};
  {
    auto first = OpenImage(*loop, writer);
    ASSERT_TRUE(first);
    EXPECT_THAT(OpenError(writer),
                HasSubstr("is in use by this machine itself: stop it first, since two writers"));
    EXPECT_THAT(OpenError(reader),
                HasSubstr("is in use by this machine itself, which writes to it"));
    ImageOptions unlocked = writer;
    unlocked.locking = ImageOptions::Locking::kOff;
    EXPECT_EQ(OpenError(unlocked), "");
  }
  {
    auto first = OpenImage(*loop, reader);
    ASSERT_TRUE(first);
    EXPECT_EQ(OpenError(reader), "");
    EXPECT_THAT(OpenError(writer),
                HasSubstr("which reads it: stop it, or attach the image with readonly=on"));
  }
  {
    ImageOptions shared = writer;
    shared.share_write = true;
    auto first = OpenImage(*loop, shared);
    ASSERT_TRUE(first);
    EXPECT_EQ(OpenError(shared), "");
    EXPECT_NE(OpenError(writer), "");
  }
  EXPECT_EQ(OpenError(writer), "");
}

TEST(ImageLocks, WhatNobodyHasOpenIsWaitedFor) {
  TempDir dir;
  std::string path = dir.File("a.img", kMiB);
  ImageOptions writer = {.path = path, .format = "raw"};
  auto locked = [&] {
    UniqueFd fd(open(path.c_str(), O_RDWR | O_CLOEXEC));
    EXPECT_TRUE(LockImage(fd.get(), path, {.write = true}));
    return fd;
  };
  {
    InFlight file(locked());
    file.EndAfterMs(60);
    EXPECT_EQ(OpenError(writer), "");
  }
  InFlight file(locked());
  EXPECT_THAT(OpenError(writer), HasSubstr("is in use by another process"));
}

// The peer: QEMU, stopped at its start with the image attached.
class Qemu {
 public:
  Qemu(const std::string& path, const std::string& more) {
    int in[2], out[2];
    EXPECT_EQ(pipe2(in, O_CLOEXEC), 0);
    EXPECT_EQ(pipe2(out, O_CLOEXEC), 0);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(in[0], STDIN_FILENO);
      dup2(out[1], STDOUT_FILENO);
      dup2(out[1], STDERR_FILENO);
      std::string drive = "file=" + path + ",format=raw,if=none,id=d" + more;
      execlp("qemu-system-x86_64", "qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-nodefaults",
             "-display", "none", "-S", "-drive", drive.c_str(), "-device", "virtio-blk-pci,drive=d",
             "-qmp", "stdio", nullptr);
      _exit(127);
    }
    close(in[0]);
    close(out[1]);
    in_.Reset(in[1]);
    out_.Reset(out[0]);
    // The answer comes once the machine stands; an error message and the end of the stream
    // otherwise.
    std::string command = "{\"execute\": \"qmp_capabilities\"}\n";
    [[maybe_unused]] ssize_t written = write(in_.get(), command.data(), command.size());
    char buffer[4096];
    while (!runs()) {
      ssize_t n = read(out_.get(), buffer, sizeof(buffer));
      if (n <= 0) break;
      output_.append(buffer, static_cast<size_t>(n));
    }
  }
  ~Qemu() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  bool runs() const { return output_.find("\"return\"") != output_.npos; }
  const std::string& output() const { return output_; }
  pid_t pid() const { return pid_; }

 private:
  pid_t pid_;
  std::string output_;
  UniqueFd in_, out_;
};

TEST(ImageLocks, AgreeWithQemu) {
  signal(SIGPIPE, SIG_IGN);
  if (system("command -v qemu-system-x86_64 >/dev/null") != 0)
    GTEST_SKIP() << "qemu-system-x86_64 isn't installed";
  TempDir dir;
  std::string path = dir.File("a.img", kMiB);
  ImageOptions writer = {.path = path, .format = "raw"};
  ImageOptions reader = {.path = path, .format = "raw", .read_only = true};
  {
    Qemu peer(path, "");
    ASSERT_TRUE(peer.runs()) << peer.output();
    std::string who = "another machine (pid " + std::to_string(peer.pid()) + ", qemu-system-x86)";
    EXPECT_THAT(OpenError(writer), HasSubstr("is in use by " + who + ": stop it first"));
    EXPECT_THAT(OpenError(reader), HasSubstr("is in use by " + who + ", which writes to it"));
  }
  {
    Qemu peer(path, ",readonly=on");
    ASSERT_TRUE(peer.runs()) << peer.output();
    EXPECT_THAT(OpenError(writer), HasSubstr("which reads it"));
    EXPECT_EQ(OpenError(reader), "");
  }
  auto loop = MakeLoop();
  {
    auto node = OpenImage(*loop, writer);
    ASSERT_TRUE(node);
    EXPECT_THAT(Qemu(path, "").output(), HasSubstr("Failed to get \"write\" lock"));
    EXPECT_THAT(Qemu(path, ",readonly=on").output(),
                HasSubstr("Failed to get shared \"write\" lock"));
  }
  {
    auto node = OpenImage(*loop, reader);
    ASSERT_TRUE(node);
    EXPECT_THAT(Qemu(path, "").output(), HasSubstr("Failed to get \"write\" lock"));
    EXPECT_TRUE(Qemu(path, ",readonly=on").runs());
  }
}

}  // namespace
}  // namespace kvartz::block
