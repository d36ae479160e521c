// What a request pays on its way from a device to a node: 4 KiB random reads of one file, as the
// node takes them, by way of Disk, and by way of filters that have nothing to do.
//
//   disk-path FILE [ROUNDS [REQUESTS [DEPTH]]]    FILE: raw, best in memory (/dev/shm)
//
// Rounds of all ways are interleaved. Prints a line a way, as JSON: name, and the nanoseconds a
// request took in each round.
#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "base/clock.h"
#include "block/disk.h"
#include "block/filters/copy_before_write.h"
#include "block/filters/copy_on_read.h"
#include "block/filters/mirror_top.h"
#include "block/graph.h"
#include "block/sync_io.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kBytes = 4096;

[[noreturn]] void Die(const std::string& what) {
  fmt::print(stderr, "disk-path: {}\n", what);
  exit(1);
}

// Loop-owned. Keeps `depth` requests under way until `count` are done.
class Load {
 public:
  Load(EventLoop& loop, Disk& disk, unsigned depth) : loop_(loop), disk_(disk), slots_(depth) {
    for (Slot& slot : slots_) {
      slot.load = this;
      slot.data.resize(kBytes);
      slot.iov = {slot.data.data(), kBytes};
    }
  }
  // Nanoseconds a request; `node`: straight there, past the disk.
  double Run(uint64_t count, Node* node) {
    node_ = node;
    started_ = done_ = 0;
    count_ = count;
    random_.seed(1);
    int64_t begin = loop_.clock().NowNs();
    for (Slot& slot : slots_) Next(slot);
    while (done_ < count_) loop_.RunOnce(-1);
    return static_cast<double>(loop_.clock().NowNs() - begin) / static_cast<double>(count);
  }

 private:
  struct Slot {
    Request request;
    DiskRequest disk_request;
    iovec iov;
    std::vector<uint8_t> data;
    Load* load;
  };
  void Next(Slot& slot) {
    if (started_ >= count_) return;
    started_++;
    uint64_t offset = random_() % (disk_.size_bytes() / kBytes) * kBytes;
    auto fill = [&](auto& request) {
      request.kind = Request::Kind::kRead;
      request.offset = offset;
      request.length = kBytes;
      request.iov = &slot.iov;
      request.iov_count = 1;
      request.owner = &slot;
    };
    if (node_) {
      slot.request = {};
      fill(slot.request);
      slot.request.done = [](Request* done, int result) { Done(done->owner, result); };
      node_->Start(&slot.request);
    } else {
      fill(slot.disk_request);
      slot.disk_request.done = [](DiskRequest* done, int result) { Done(done->owner, result); };
      disk_.Start(&slot.disk_request);
    }
  }
  static void Done(void* owner, int result) {
    if (result != 0) Die(fmt::format("a read failed: {}", -result));
    Slot& slot = *static_cast<Slot*>(owner);
    slot.load->done_++;
    slot.load->Next(slot);
  }

  EventLoop& loop_;
  Disk& disk_;
  std::vector<Slot> slots_;
  Node* node_ = nullptr;
  uint64_t count_ = 0, started_ = 0, done_ = 0;
  std::mt19937_64 random_;
};

struct Way {
  std::string name;
  NodePtr top;
  bool disk = true;
  std::vector<double> ns = {};
};

int Run(const std::string& path, int rounds, uint64_t requests, unsigned depth) {
  std::unique_ptr<EventLoop> loop = *EventLoop::Create();
  auto group = std::make_shared<ThrottleGroup>("g", loop->clock());
  OpenEnv env = {.loop = *loop, .throttle_group = [&](const std::string&) { return group; }};
  Result<NodePtr> opened = RunInFiber(*loop, [&] { return OpenFilename(env, path, "raw"); });
  if (!opened) Die(opened.error().what);
  NodePtr node = *opened;
  auto throttle = [&](const NodePtr& file) {
    Options options;
    options.Set("driver", "throttle");
    options.Set("throttle-group", "g");
    options.SetNode("file", file);
    return *RunInFiber(*loop, [&] { return OpenNode(env, std::move(options)); });
  };
  std::vector<Way> ways = {
      {"node", node, false},
      {"disk", node},
      {"disk, mirror_top", std::make_shared<MirrorTopNode>(node, "mirror_top")},
      {"disk, copy-before-write", std::make_shared<CopyBeforeWriteNode>(node)},
      {"disk, copy-on-read",
       std::make_shared<CopyOnReadNode>(node, CopyOnReadNode::Copies::kReads)},
      {"disk, throttle without limits", throttle(node)},
  };
  Disk disk(*loop, "bench");
  disk.ReplaceNode(node);
  Load load(*loop, disk, depth);
  for (int round = -1; round < rounds; round++) {  // the first one warms up
    for (Way& way : ways) {
      disk.ReplaceNode(way.top);
      double ns = load.Run(requests, way.disk ? nullptr : way.top.get());
      if (round >= 0) way.ns.push_back(ns);
    }
  }
  for (const Way& way : ways) {
    std::string list;
    for (double ns : way.ns) list += fmt::format("{}{:.1f}", list.empty() ? "" : ", ", ns);
    fmt::print("{{\"name\": \"{}\", \"ns\": [{}]}}\n", way.name, list);
  }
  disk.ReplaceNode(nullptr);
  return RunInFiber(*loop, [&] { return node->Close(); }) ? 0 : 1;
}

}  // namespace
}  // namespace kvartz::block

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  auto number = [&](int index, uint64_t fallback) {
    return argc > index ? strtoull(argv[index], nullptr, 10) : fallback;
  };
  return kvartz::block::Run(argv[1], static_cast<int>(number(2, 7)), number(3, 200000),
                            static_cast<unsigned>(number(4, 16)));
}
