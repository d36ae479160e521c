// A LUKS header of any bytes, of either version (or LUKS2's JSON alone): read, told of, unlocked at
// little cost, and the volume used.
#include <cstdint>
#include <string>

#include "block/crypto/crypt_node.h"
#include "block/fiber_io.h"
#include "block/formats/luks/volume.h"
#include "block/graph.h"
#include "block/memory_node.h"
#include "block/sync_io.h"

namespace {

using namespace kvartz;         // NOLINT
using namespace kvartz::block;  // NOLINT

constexpr size_t kFileBytes = 96 << 10;  // so that key slots and payload may be within it
constexpr luks::CostLimits kCheap = {.iterations = 16, .memory_kib = 64, .passes = 2, .lanes = 2};

void UseVolume(const NodePtr& file, const luks::Header& header) {
  SecretBytes key(header.cipher.key_bytes, 1);
  auto cipher = SectorCipher::Create(header.cipher, key);
  if (!cipher || header.payload_offset > file->size_bytes()) return;
  CryptNode node(file, *cipher,
                 {.offset = header.payload_offset,
                  .size = (file->size_bytes() - header.payload_offset) / header.sector_bytes *
                          header.sector_bytes,
                  .sector_bytes = header.sector_bytes,
                  .first_sector = header.iv_tweak},
                 false);
  std::vector<uint8_t> wrote(1300, 0x5a), got(1300);
  for (uint64_t at : {uint64_t{0}, uint64_t{700}, node.size_bytes() / 2 + 1}) {
    if (at > node.size_bytes() || wrote.size() > node.size_bytes() - at) continue;
    if (WriteAt(node, at, wrote) != 0 || ReadAt(node, at, got) != 0 || got != wrote) std::abort();
    (void)WriteZeroesAt(node, at, 600);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static std::unique_ptr<EventLoop> loop =
      std::move(*EventLoop::Create(EventLoop::Backend::kEpoll));
  std::span<const uint8_t> bytes(data, size);
  (void)luks::ParseLuks1(bytes);
  Result<luks::Header> from_json = luks::ParseLuks2Json(bytes);
  if (from_json) (void)luks::Describe(*from_json, false);
  std::string text(reinterpret_cast<const char*>(data), size);
  text.resize(std::max(size, kFileBytes));
  auto file = std::make_shared<MemoryNode>(*loop, std::move(text));
  RunInFiber(*loop, [&] {
    luks::Area area = {file.get()};
    Result<luks::Header> header = luks::ReadHeader(area);
    if (!header && from_json) header = std::move(from_json);
    if (!header) return;
    (void)luks::Describe(*header, true);
    (void)luks::Unlock(area, *header, "passphrase", {}, kCheap);
    UseVolume(file, *header);
    Options options;
    options.Set("driver", "luks");
    options.SetNode("file", file);
    OpenEnv env = {.loop = *loop};
    if (auto node = OpenNode(env, std::move(options), {.no_io = true})) (void)(*node)->Info();
  });
  return 0;
}
