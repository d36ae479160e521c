// LUKS1's header on disk.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/endian.h"
#include "block/fiber_io.h"
#include "block/formats/luks/volume.h"

namespace kvartz::block::luks {
namespace {

constexpr uint8_t kMagic[6] = {'L', 'U', 'K', 'S', 0xba, 0xbe};
constexpr uint32_t kActive = 0x00ac71f3, kDead = 0x0000dead;
constexpr size_t kSlots = 8;
constexpr uint64_t kSector = 512;
constexpr uint32_t kMaxStripes = 65536;

// Section 3, figures 1 and 2. Big-endian.
struct SlotDisk {
  Be32 active;
  Be32 iterations;
  uint8_t salt[32];
  Be32 key_material_offset;  // sectors
  Be32 stripes;
};
static_assert(sizeof(SlotDisk) == 48);

struct HeaderDisk {
  uint8_t magic[6];
  Be16 version;
  char cipher_name[32];
  char cipher_mode[32];
  char hash_spec[32];
  Be32 payload_offset;  // sectors
  Be32 key_bytes;
  uint8_t mk_digest[20];
  uint8_t mk_digest_salt[32];
  Be32 mk_digest_iterations;
  char uuid[40];
  SlotDisk slots[kSlots];
};
static_assert(sizeof(HeaderDisk) == kLuks1Bytes);

template <typename... Values>
std::unexpected<Error> Bad(fmt::format_string<Values...> format, Values&&... values) {
  return Fail(ErrorCode::kInvalid,
              "broken LUKS header: " + fmt::format(format, std::forward<Values>(values)...));
}

template <size_t kSize>
Result<std::string> Text(const char (&field)[kSize], const char* what) {
  const char* end = std::find(field, field + kSize, '\0');
  if (end == field + kSize) return Bad("the {} isn't terminated", what);
  for (const char* at = field; at < end; at++) {
    if (*at < ' ' || *at > '~') return Bad("the {} isn't text", what);
  }
  return std::string(field, end);
}

template <size_t kSize>
void SetText(char (&field)[kSize], const std::string& text) {
  std::memcpy(field, text.data(), std::min(text.size(), kSize - 1));
}

Result<Slot> ParseSlot(const SlotDisk& disk, uint32_t id, const Header& header) {
  Slot slot;
  slot.id = id;
  if (disk.active != kActive && disk.active != kDead)
    return Bad("key slot {} is neither active nor not", id);
  slot.active = disk.active == kActive;
  slot.stripes = disk.stripes;
  slot.area_offset = uint64_t{disk.key_material_offset} * kSector;
  slot.key_bytes = header.cipher.key_bytes;
  slot.cipher = header.cipher;
  slot.af_hash = slot.kdf.hash = header.hash;
  slot.kdf.iterations = disk.iterations;
  slot.kdf.salt.assign(disk.salt, disk.salt + sizeof(disk.salt));
  if (slot.stripes == 0 || slot.stripes > kMaxStripes)
    return Bad("key slot {} has {} stripes", id, slot.stripes);
  slot.area_bytes = (uint64_t{slot.stripes} * slot.key_bytes + kSector - 1) / kSector * kSector;
  if (slot.active && slot.kdf.iterations == 0) return Bad("key slot {} has no iterations", id);
  if (slot.area_offset < kLuks1Bytes) return Bad("key slot {} overlaps the header", id);
  if (slot.area_offset + slot.area_bytes > header.payload_offset)
    return Bad("key slot {} reaches into the payload", id);
  for (const Slot& other : header.slots) {
    if (slot.area_offset < other.area_offset + other.area_bytes &&
        other.area_offset < slot.area_offset + slot.area_bytes)
      return Bad("key slots {} and {} overlap", other.id, id);
  }
  return slot;
}

}  // namespace

int VersionOf(std::span<const uint8_t> head) {
  if (head.size() < 8 || std::memcmp(head.data(), kMagic, sizeof(kMagic)) != 0) return 0;
  int version = head[6] << 8 | head[7];
  return version == 1 || version == 2 ? version : 0;
}

Result<Header> ParseLuks1(std::span<const uint8_t> bytes) {
  if (bytes.size() < kLuks1Bytes || VersionOf(bytes) != 1)
    return Fail(ErrorCode::kInvalid, "this is no LUKS1 volume");
  HeaderDisk disk;
  std::memcpy(&disk, bytes.data(), sizeof(disk));
  Header header;
  std::string cipher = TRY(Text(disk.cipher_name, "cipher's name"));
  std::string mode = TRY(Text(disk.cipher_mode, "cipher's mode"));
  std::string hash = TRY(Text(disk.hash_spec, "hash's name"));
  header.uuid = TRY(Text(disk.uuid, "UUID"));
  if (disk.key_bytes == 0 || disk.key_bytes > kMaxKeyBytes)
    return Bad("a key of {} bytes", uint32_t{disk.key_bytes});
  header.cipher = TRY(ParseCipher(cipher, mode, disk.key_bytes));
  header.hash = TRY(RequireHash(hash));
  header.payload_offset = uint64_t{disk.payload_offset} * kSector;
  if (header.payload_offset < kLuks1Bytes)
    return Fail(ErrorCode::kUnsupported,
                "not supported yet: LUKS headers apart from their payload");
  header.digest.hash = header.hash;
  header.digest.iterations = disk.mk_digest_iterations;
  header.digest.salt.assign(disk.mk_digest_salt, disk.mk_digest_salt + sizeof(disk.mk_digest_salt));
  header.digest.digest.assign(disk.mk_digest, disk.mk_digest + sizeof(disk.mk_digest));
  if (header.digest.iterations == 0) return Bad("the key's digest has no iterations");
  for (uint32_t i = 0; i < kSlots; i++)
    header.slots.push_back(TRY(ParseSlot(disk.slots[i], i, header)));
  return header;
}

uint64_t HeaderBytes(const CipherSpec& cipher) {
  constexpr uint64_t kAlign = 4096;
  uint64_t area = (uint64_t{cipher.key_bytes} * kStripes + kAlign - 1) / kAlign * kAlign;
  return kAlign + kSlots * area;
}

Result<> WriteLuks1(const Area& area, const Header& header) {
  HeaderDisk disk = {};
  std::memcpy(disk.magic, kMagic, sizeof(kMagic));
  disk.version = 1;
  SetText(disk.cipher_name, header.cipher.name());
  SetText(disk.cipher_mode, header.cipher.mode_name());
  SetText(disk.hash_spec, std::string(header.hash->name));
  SetText(disk.uuid, header.uuid);
  disk.payload_offset = static_cast<uint32_t>(header.payload_offset / kSector);
  disk.key_bytes = header.cipher.key_bytes;
  std::copy(header.digest.digest.begin(), header.digest.digest.end(), disk.mk_digest);
  std::copy(header.digest.salt.begin(), header.digest.salt.end(), disk.mk_digest_salt);
  disk.mk_digest_iterations = static_cast<uint32_t>(header.digest.iterations);
  for (const Slot& slot : header.slots) {
    SlotDisk& to = disk.slots[slot.id];
    to.active = slot.active ? kActive : kDead;
    to.iterations = static_cast<uint32_t>(slot.kdf.iterations);
    std::copy(slot.kdf.salt.begin(), slot.kdf.salt.end(), to.salt);
    to.key_material_offset = static_cast<uint32_t>(slot.area_offset / kSector);
    to.stripes = slot.stripes;
  }
  TRY(area.Write(0, {reinterpret_cast<const uint8_t*>(&disk), sizeof(disk)}));
  return area.Flush();
}

Result<Header> ReadHeader(const Area& area) {
  uint64_t held = std::min(
      area.length, area.node->size_bytes() - std::min(area.offset, area.node->size_bytes()));
  std::vector<uint8_t> head(std::min<uint64_t>(held, kLuks1Bytes));
  TRY(area.Read(0, head));
  switch (VersionOf(head)) {
    case 1: {
      Header header = TRY(ParseLuks1(head));
      for (const Slot& slot : header.slots) {
        if (slot.area_offset + slot.area_bytes > held)
          return Bad("key slot {} is beyond the end", slot.id);
      }
      return header;
    }
    case 2:
      return ReadLuks2(area);
    default:
      return Fail(ErrorCode::kInvalid, "this is no LUKS volume");
  }
}

}  // namespace kvartz::block::luks
