// From passphrases to the volume's key, and key slots.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <functional>

#include "base/check.h"
#include "base/workers.h"
#include "block/fiber_io.h"
#include "block/formats/luks/af.h"
#include "block/formats/luks/volume.h"
#include "block/formats/random_id.h"

namespace kvartz::block::luks {
namespace {

constexpr uint32_t kSector = 512;
constexpr uint64_t kMaxAreaBytes = 64 << 20;  // of a key slot

std::span<const uint8_t> BytesOf(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

// The range widened to what the node takes.
struct Aligned {
  Aligned(const Node& node, uint64_t offset, size_t length) {
    uint64_t unit = node.limits().request_alignment;
    from = offset / unit * unit;
    bytes.resize((offset + length + unit - 1) / unit * unit - from);
    skip = offset - from;
  }
  uint64_t from = 0, skip = 0;
  SecretBytes bytes;
};

// What takes long, on a thread of its own while the fiber waits.
Result<> Compute(EventLoop& loop, const std::function<Result<>()>& body) {
  Workers worker(loop, 1);
  Result<> result;
  worker.Run([&] { result = body(); });
  return result;
}

uint64_t HostMemoryKib() {
  return static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) *
         static_cast<uint64_t>(sysconf(_SC_PAGESIZE)) / 1024;
}

Result<> CheckCost(const Kdf& kdf, uint32_t slot, const CostLimits& limits) {
  if (kdf.kind == Kdf::Kind::kPbkdf2) {
    if (kdf.iterations <= limits.iterations) return {};
    return Fail(ErrorCode::kUnsupported,
                fmt::format("key slot {} asks for {} iterations; {} are accepted", slot,
                            kdf.iterations, limits.iterations));
  }
  if (uint64_t kib = HostMemoryKib(); kdf.memory_kib >= kib) {
    return Fail(ErrorCode::kNoSpace,
                fmt::format("key slot {} asks for Argon2 over {} KiB; this host has {}", slot,
                            kdf.memory_kib, kib));
  }
  if (kdf.iterations <= limits.passes && kdf.memory_kib <= limits.memory_kib &&
      kdf.lanes <= limits.lanes)
    return {};
  return Fail(
      ErrorCode::kUnsupported,
      fmt::format("key slot {} asks for Argon2 with {} passes over {} KiB in {} lanes; {}, {} and "
                  "{} are accepted",
                  slot, kdf.iterations, kdf.memory_kib, kdf.lanes, limits.passes, limits.memory_kib,
                  limits.lanes));
}

Result<> Derive(const Kdf& kdf, std::string_view passphrase, std::span<uint8_t> out) {
  if (kdf.kind == Kdf::Kind::kPbkdf2)
    return DerivePbkdf2(*kdf.hash, BytesOf(passphrase), kdf.salt, kdf.iterations, out);
  Argon2Cost cost = {.id = kdf.kind == Kdf::Kind::kArgon2id,
                     .passes = static_cast<uint32_t>(kdf.iterations),
                     .memory_kib = kdf.memory_kib,
                     .lanes = kdf.lanes};
  return DeriveArgon2(cost, BytesOf(passphrase), kdf.salt, out);
}

Result<bool> IsKey(const KeyDigest& digest, std::span<const uint8_t> key) {
  std::vector<uint8_t> made(digest.digest.size());
  TRY(DerivePbkdf2(*digest.hash, key, digest.salt, digest.iterations, made));
  return SameBytes(made, digest.digest);
}

// The key that `slot` gives for the passphrase, right or wrong.
Result<SecretBytes> OpenSlot(const Slot& slot, std::string_view passphrase, SecretBytes area) {
  SecretBytes slot_key(slot.cipher.key_bytes), key(slot.key_bytes);
  TRY(Derive(slot.kdf, passphrase, slot_key));
  auto cipher = TRY(SectorCipher::Create(slot.cipher, slot_key));
  cipher->Decrypt(0, kSector, area);
  area.resize(uint64_t{slot.stripes} * slot.key_bytes);
  AfMerge(*slot.af_hash, slot.stripes, area, key);
  return key;
}

// Iterations that take `ms` of this host's time.
Result<uint64_t> IterationsFor(EventLoop& loop, const HashAlg& hash, size_t bytes, uint64_t ms) {
  uint64_t in_second = 0;
  Result<> computed = Compute(loop, [&]() -> Result<> {
    in_second = TRY(MeasurePbkdf2(hash, bytes));
    return {};
  });
  TRY(std::move(computed));
  uint64_t wanted = 0;
  constexpr uint64_t kMost = CostLimits{}.iterations;
  if (__builtin_mul_overflow(in_second, ms, &wanted) || wanted / 1000 > kMost) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("iter-time={}: that are more than {} iterations", ms, kMost));
  }
  return std::max(wanted / 1000, kMinIterations);
}

}  // namespace

Result<> Area::Read(uint64_t at, std::span<uint8_t> bytes) const {
  if (at > length || bytes.size() > length - at)
    return Fail(ErrorCode::kInvalid, "broken LUKS header: it reaches beyond its end");
  Aligned range(*node, offset + at, bytes.size());
  if (range.from > node->size_bytes() || range.bytes.size() > node->size_bytes() - range.from)
    return Fail(ErrorCode::kInvalid, "broken LUKS header: it reaches beyond the end of the file");
  TRY(ReadExactly(*node, range.from, range.bytes));
  std::copy_n(range.bytes.begin() + static_cast<ptrdiff_t>(range.skip), bytes.size(),
              bytes.begin());
  return {};
}

Result<> Area::Write(uint64_t at, std::span<const uint8_t> bytes) const {
  VERIFY(at <= length && bytes.size() <= length - at);
  Aligned range(*node, offset + at, bytes.size());
  if (range.bytes.size() != bytes.size()) TRY(ReadExactly(*node, range.from, range.bytes));
  std::copy(bytes.begin(), bytes.end(), range.bytes.begin() + static_cast<ptrdiff_t>(range.skip));
  return WriteExactly(*node, range.from, range.bytes);
}

Result<> Area::Flush() const { return block::Flush(*node); }

Result<Unlocked> Unlock(const Area& area, const Header& header, std::string_view passphrase,
                        std::optional<uint32_t> only, const CostLimits& limits) {
  if (passphrase.size() > kMaxPassphrase)
    return Fail(ErrorCode::kInvalid, "the passphrase is longer than 8 MiB");
  if (header.digest.iterations > limits.iterations) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("the key's digest asks for {} iterations; {} are accepted",
                            header.digest.iterations, limits.iterations));
  }
  bool any = false;
  for (const Slot& slot : header.slots) {
    if (!slot.active || (only && slot.id != *only)) continue;
    any = true;
    TRY(CheckCost(slot.kdf, slot.id, limits));
    if (slot.area_bytes > kMaxAreaBytes)
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("key slot {} has {} bytes", slot.id, slot.area_bytes));
    SecretBytes material(slot.area_bytes);
    TRY(area.Read(slot.area_offset, material));
    SecretBytes key;
    bool right = false;
    Result<> computed = Compute(area.node->loop(), [&]() -> Result<> {
      key = TRY(OpenSlot(slot, passphrase, std::move(material)));
      right = TRY(IsKey(header.digest, key));
      return {};
    });
    TRY(std::move(computed));
    if (right) return Unlocked{std::move(key), slot.id};
  }
  if (!any) return Fail(ErrorCode::kState, "no key slot is active: its contents are lost");
  return Fail(ErrorCode::kPermission, "wrong passphrase: it opens no key slot");
}

Result<> AddKey(const Area& area, Header& header, uint32_t slot, std::span<const uint8_t> key,
                std::string_view passphrase, uint64_t iter_time_ms) {
  VERIFY(header.version == 1 && slot < header.slots.size() && !header.slots[slot].active);
  VERIFY(key.size() == header.cipher.key_bytes);
  if (passphrase.size() > kMaxPassphrase)
    return Fail(ErrorCode::kInvalid, "the passphrase is longer than 8 MiB");
  EventLoop& loop = area.node->loop();
  Slot made = header.slots[slot];
  made.kdf.iterations = TRY(IterationsFor(loop, *header.hash, key.size(), iter_time_ms));
  made.kdf.salt.resize(32);
  RandomBytes(made.kdf.salt);
  made.stripes = kStripes;
  SecretBytes material(made.area_bytes);
  Result<> computed = Compute(loop, [&]() -> Result<> {
    SecretBytes slot_key(made.cipher.key_bytes);
    TRY(Derive(made.kdf, passphrase, slot_key));
    auto cipher = TRY(SectorCipher::Create(made.cipher, slot_key));
    AfSplit(*made.af_hash, made.stripes, key, std::span(material).first(key.size() * made.stripes));
    cipher->Encrypt(0, kSector, material);
    return {};
  });
  TRY(std::move(computed));
  TRY(area.Write(made.area_offset, material));
  TRY(area.Flush());
  Header changed = header;
  made.active = true;
  changed.slots[slot] = made;
  TRY(WriteLuks1(area, changed));
  header = std::move(changed);
  return {};
}

Result<> EraseKey(const Area& area, Header& header, uint32_t slot) {
  VERIFY(header.version == 1 && slot < header.slots.size());
  Header changed = header;
  Slot& erased = changed.slots[slot];
  erased.active = false;
  erased.kdf.iterations = 0;
  std::fill(erased.kdf.salt.begin(), erased.kdf.salt.end(), 0);
  TRY(WriteLuks1(area, changed));
  header = std::move(changed);
  std::vector<uint8_t> noise(header.slots[slot].area_bytes);
  RandomBytes(noise);
  TRY(area.Write(header.slots[slot].area_offset, noise));
  return area.Flush();
}

Result<SecretBytes> Format(const Area& area, const CreateOptions& options,
                           std::string_view passphrase, Header& header) {
  constexpr uint64_t kAlign = 4096;
  constexpr uint64_t kDigestShare = 8;  // of the time that a passphrase takes
  header = {};
  header.cipher = options.cipher;
  header.hash = options.hash;
  header.payload_offset = HeaderBytes(options.cipher);
  auto id = RandomId();
  for (size_t i = 0; i < id.size(); i++)
    header.uuid += fmt::format("{}{:02x}", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", id[i]);
  uint64_t slot_bytes = (header.payload_offset - kAlign) / 8;
  for (uint32_t i = 0; i < 8; i++) {
    Slot slot;
    slot.id = i;
    slot.kdf.hash = slot.af_hash = options.hash;
    slot.kdf.salt.resize(32);
    slot.cipher = options.cipher;
    slot.key_bytes = options.cipher.key_bytes;
    slot.area_offset = kAlign + i * slot_bytes;
    slot.area_bytes = (uint64_t{slot.key_bytes} * kStripes + kSector - 1) / kSector * kSector;
    header.slots.push_back(std::move(slot));
  }
  SecretBytes key(options.cipher.key_bytes);
  RandomBytes(key);
  KeyDigest& digest = header.digest;
  digest.hash = options.hash;
  digest.salt.resize(32);
  RandomBytes(digest.salt);
  digest.digest.resize(20);
  EventLoop& loop = area.node->loop();
  digest.iterations = TRY(IterationsFor(loop, *options.hash, digest.digest.size(),
                                        options.iter_time_ms / kDigestShare));
  Result<> computed = Compute(loop, [&] {
    return DerivePbkdf2(*digest.hash, key, digest.salt, digest.iterations, digest.digest);
  });
  TRY(std::move(computed));
  TRY(AddKey(area, header, 0, key, passphrase, options.iter_time_ms));
  return key;
}

}  // namespace kvartz::block::luks
