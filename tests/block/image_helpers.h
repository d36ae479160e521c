// A directory of image files, and requests that are waited for.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "base/fd.h"
#include "block/node.h"

namespace kvartz::block {

constexpr uint64_t kMiB = 1 << 20;

class TempDir {
 public:
  // kMemory: flushes cost nothing there.
  enum class Place { kDisk, kMemory };
  explicit TempDir(Place place = Place::kDisk) {
    char disk[] = "/tmp/kvartz-block-XXXXXX", memory[] = "/dev/shm/kvartz-block-XXXXXX";
    char* path = place == Place::kMemory ? mkdtemp(memory) : nullptr;
    if (!path) path = mkdtemp(disk);
    EXPECT_NE(path, nullptr);
    path_ = path;
  }
  ~TempDir() { [[maybe_unused]] int rc = system(("rm -rf " + path_).c_str()); }
  std::string File(const std::string& name, uint64_t size) const {
    std::string path = path_ + "/" + name;
    UniqueFd fd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    EXPECT_TRUE(fd);
    EXPECT_EQ(ftruncate(fd.get(), static_cast<off_t>(size)), 0);
    return path;
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline std::unique_ptr<EventLoop> MakeLoop(EventLoop::Backend backend = EventLoop::Backend::kAuto) {
  auto loop = EventLoop::Create(backend);
  EXPECT_TRUE(loop);
  return std::move(*loop);
}

inline int Do(EventLoop& loop, Node& node, Request request) {
  struct Outcome {
    bool done = false;
    int result = 0;
  } outcome;
  request.owner = &outcome;
  request.done = [](Request* finished, int result) {
    *static_cast<Outcome*>(finished->owner) = {true, result};
  };
  node.Start(&request);
  EXPECT_FALSE(outcome.done);
  while (!outcome.done) loop.RunOnce(-1);
  return outcome.result;
}

inline int ReadWrite(EventLoop& loop, Node& node, Request::Kind kind, uint64_t offset,
                     std::string& data) {
  iovec iov = {data.data(), data.size()};
  return Do(loop, node,
            {.kind = kind, .offset = offset, .length = data.size(), .iov = &iov, .iov_count = 1});
}

inline std::string OpenError(const ImageOptions& options) {
  auto loop = MakeLoop();
  auto node = OpenImage(*loop, options);
  return node ? "" : node.error().what;
}

}  // namespace kvartz::block
