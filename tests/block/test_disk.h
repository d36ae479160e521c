// Images in a directory of a test's own, used straight-line: each call runs the loop until it is
// done. And the peer's tools on the same images.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "block/fiber_io.h"
#include "block/graph.h"
#include "block/image_helpers.h"
#include "block/sync_io.h"

namespace kvartz::block {

struct CommandResult {
  int status = -1;
  std::string output;  // stderr, too
};

inline CommandResult RunCommand(const std::string& command) {
  CommandResult result;
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (!pipe) return result;
  char buffer[4096];
  size_t n = 0;
  while ((n = fread(buffer, 1, sizeof(buffer), pipe)) > 0) result.output.append(buffer, n);
  int status = pclose(pipe);
  result.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return result;
}

inline bool HavePeer() {
  static bool have = RunCommand("qemu-img --version").status == 0;
  return have;
}

#define NEEDS_PEER() \
  if (!HavePeer()) GTEST_SKIP() << "qemu-img (package qemu-utils) is not installed"

// One open image.
class TestDisk {
 public:
  explicit TestDisk(EventLoop& loop) : loop_(loop), env_{.loop = loop} {}
  ~TestDisk() {
    if (node) Close();
  }

  std::string Create(const std::string& path, const std::string& options,
                     const std::string& format = "qcow2") {
    Options parsed = Options::Parse(options).value();
    Result<> made =
        RunInFiber(loop_, [&] { return CreateImage(env_, format, path, std::move(parsed)); });
    return made ? "" : made.error().what;
  }
  std::string Open(const std::string& path, const std::string& format = "qcow2",
                   NodeOptions options = {.discard_unmap = true}) {
    Result<NodePtr> opened = RunInFiber(loop_, [&] {
      Options named = Options::Parse(more_options).value();
      named.Set("filename", path);
      named.Set("driver", format);
      return OpenNode(env_, std::move(named), options);
    });
    if (!opened) return opened.error().what;
    node = *opened;
    return "";
  }
  std::string Close() {
    Result<> closed = RunInFiber(loop_, [&] { return node->Close(); });
    node.reset();
    return closed ? "" : closed.error().what;
  }

  std::string Read(uint64_t offset, uint64_t length) {
    std::string data(length, '?');
    EXPECT_EQ(ReadWrite(loop_, *node, Request::Kind::kRead, offset, data), 0);
    return data;
  }
  int Write(uint64_t offset, std::string data) {
    return ReadWrite(loop_, *node, Request::Kind::kWrite, offset, data);
  }
  int WriteCompressed(uint64_t offset, std::string data) {
    iovec iov = {data.data(), data.size()};
    return Do(loop_, *node,
              {.kind = Request::Kind::kWrite,
               .compressed = true,
               .offset = offset,
               .length = data.size(),
               .iov = &iov,
               .iov_count = 1});
  }
  int WriteZeroes(uint64_t offset, uint64_t length, bool unmap) {
    return Do(
        loop_, *node,
        {.kind = Request::Kind::kWriteZeroes, .unmap = unmap, .offset = offset, .length = length});
  }
  int Discard(uint64_t offset, uint64_t length) {
    return Do(loop_, *node, {.kind = Request::Kind::kDiscard, .offset = offset, .length = length});
  }
  int Flush() { return Do(loop_, *node, {.kind = Request::Kind::kFlush}); }
  std::string Resize(uint64_t size, Preallocation preallocation = Preallocation::kOff) {
    return Text(RunInFiber(loop_, [&] {
      return node->Resize({.size = size, .preallocation = preallocation, .zero_added = true});
    }));
  }
  // "" if sound; else what was found.
  std::string Check(Repair repair = Repair::kNone, CheckResult* result = nullptr) {
    std::string found;
    auto checked = RunInFiber(loop_, [&] {
      return node->editor()->Check(repair, [&](const std::string& line) { found += line + "\n"; });
    });
    if (!checked) return checked.error().what;
    if (result) *result = *checked;
    return checked->corruptions + checked->leaks + checked->check_errors == 0 ? "" : found;
  }
  template <typename Body>
  auto InFiber(Body body) {
    return RunInFiber(loop_, body);
  }
  static std::string Text(const Result<>& result) { return result ? "" : result.error().what; }
  EventLoop& loop() { return loop_; }
  OpenEnv& env() { return env_; }

  NodePtr node;
  std::string more_options;  // of Open: "key=value,..."

 private:
  EventLoop& loop_;
  OpenEnv env_;
};

inline std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

inline void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

inline uint64_t FromEnvironment(const char* name, uint64_t fallback) {
  const char* text = getenv(name);
  return text ? strtoull(text, nullptr, 10) : fallback;
}

}  // namespace kvartz::block
