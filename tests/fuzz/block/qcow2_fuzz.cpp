// A qcow2 image of any bytes: opened, read, checked, written, repaired.
#include <algorithm>
#include <cstdint>
#include <string>

#include "block/fiber_io.h"
#include "block/formats/qcow2/bitmaps.h"
#include "block/formats/qcow2/layout.h"
#include "block/formats/qcow2/snapshots.h"
#include "block/graph.h"
#include "block/memory_node.h"
#include "block/sync_io.h"

namespace {

using namespace kvartz;         // NOLINT
using namespace kvartz::block;  // NOLINT

constexpr uint64_t kMostFileBytes = 4 << 20;  // entries may name any place of the file

Result<NodePtr> Open(EventLoop& loop, const std::shared_ptr<MemoryNode>& file, NodeOptions node) {
  Options options;
  options.Set("driver", "qcow2");
  options.SetNode("file", file);
  OpenEnv env = {.loop = loop, .follow_backing = false, .follow_data_file = false};
  Result<NodePtr> opened = OpenNode(env, options, node);
  if (opened) return opened;
  options.Set("backing", "");
  return OpenNode(env, std::move(options), node);
}

void Use(NodePtr node, uint8_t seed) {
  uint64_t size = node->size_bytes();
  std::vector<uint8_t> buffer(3000, seed);
  std::vector<uint64_t> places = {0, 512, size / 2 / 512 * 512};
  if (size >= buffer.size()) places.push_back(size - buffer.size());
  for (uint64_t at : places) {
    if (at >= size) continue;
    uint64_t length = std::min<uint64_t>(buffer.size(), size - at);
    (void)node->Status(at, length);
    ReadAt(*node, at, std::span(buffer).first(length));
    if (node->read_only()) continue;
    WriteAt(*node, at, std::span(buffer).first(length));
    WriteZeroesAt(*node, at, length, true);
    DiscardAt(*node, at, length);
    FlushNode(*node);
  }
}

void Change(NodePtr node) {
  SnapshotStore* snapshots = node->snapshots();
  (void)snapshots->Create({.name = "x"});
  std::vector<SnapshotInfo> list = snapshots->List();
  for (size_t i = 0; i < std::min<size_t>(list.size(), 3); i++) {
    (void)snapshots->Apply(list[i].id);
    (void)snapshots->Delete(list[i].id);
  }
  (void)node->bitmaps()->Add({.name = "y"});
  (void)node->Resize({.size = 8192});
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static std::unique_ptr<EventLoop> loop =
      std::move(*EventLoop::Create(EventLoop::Backend::kEpoll));
  std::span<const uint8_t> bytes(data, size);
  uint64_t used = 0;
  (void)qcow2::ParseHeader(bytes);
  (void)qcow2::ParseSnapshots(bytes, 3, 1 << 20, &used);
  (void)qcow2::ParseBitmaps(bytes, 3);
  std::string text(reinterpret_cast<const char*>(data), size);
  NodeOptions ways[] = {{.read_only = true}, {.for_check = true}, {.discard_unmap = true}};
  for (const NodeOptions& way : ways) {
    auto file = std::make_shared<MemoryNode>(*loop, text);
    file->set_room(kMostFileBytes);
    RunInFiber(*loop, [&] {
      Result<NodePtr> node = Open(*loop, file, way);
      if (!node) return;
      Use(*node, data[size / 2]);
      if (!(*node)->read_only()) {
        (void)(*node)->editor()->Check(way.for_check ? Repair::kAll : Repair::kNone,
                                       [](const std::string&) {});
        if (!way.for_check) Change(*node);
      }
      (void)(*node)->Info();
      (void)(*node)->Close();
    });
  }
  return 0;
}
