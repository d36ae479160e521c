// LUKS2's header on disk: a binary part, then JSON, both twice.
#include <fmt/format.h>

#include <algorithm>
#include <boost/json.hpp>
#include <charconv>
#include <cstring>

#include "base/base64.h"
#include "base/endian.h"
#include "block/formats/luks/volume.h"

namespace kvartz::block::luks {
namespace {

namespace json = boost::json;

constexpr uint8_t kMagic[6] = {'L', 'U', 'K', 'S', 0xba, 0xbe};
constexpr uint8_t kSecondMagic[6] = {'S', 'K', 'U', 'L', 0xba, 0xbe};
constexpr uint64_t kMinHeaderBytes = 16 << 10;
constexpr size_t kMaxJsonDepth = 16;
constexpr size_t kMaxSlots = 32;
constexpr uint32_t kMaxStripes = 65536;
constexpr uint64_t kSector = 512;
constexpr uint64_t kMaxOffset = uint64_t{1} << 60;

// Section 2.1. Big-endian.
struct BinaryDisk {
  uint8_t magic[6];
  Be16 version;
  Be64 header_size;  // with the JSON area
  Be64 sequence;
  char label[48];
  char checksum_alg[32];
  uint8_t salt[64];
  char uuid[40];
  char subsystem[48];
  Be64 header_offset;  // where this copy is
  uint8_t padding[184];
  uint8_t checksum[64];
  uint8_t padding4096[7 * 512];
};
static_assert(sizeof(BinaryDisk) == kLuks2BinaryBytes);

template <typename... Values>
std::unexpected<Error> Bad(fmt::format_string<Values...> format, Values&&... values) {
  return Fail(ErrorCode::kInvalid,
              "broken LUKS2 header: " + fmt::format(format, std::forward<Values>(values)...));
}

template <typename... Values>
std::unexpected<Error> Missing(fmt::format_string<Values...> format, Values&&... values) {
  return Fail(ErrorCode::kUnsupported, "not supported yet: LUKS2 with " +
                                           fmt::format(format, std::forward<Values>(values)...));
}

// A JSON object, with its place for messages.
class Reader {
 public:
  Reader(const json::object& object, std::string where)
      : object_(object), where_(std::move(where)) {}

  Result<Reader> Object(const char* name) const {
    const json::value* value = object_.if_contains(name);
    if (!value || !value->is_object()) return Bad("{} has no object '{}'", where_, name);
    return Reader(value->get_object(), fmt::format("{}.{}", where_, name));
  }
  Result<std::string> Text(const char* name) const {
    const json::value* value = object_.if_contains(name);
    if (!value || !value->is_string()) return Bad("{} has no text '{}'", where_, name);
    return std::string(value->get_string());
  }
  // A number, or (of 64 bits) a text of digits.
  Result<uint64_t> Number(const char* name, uint64_t most) const {
    const json::value* value = object_.if_contains(name);
    uint64_t number = 0;
    bool good = false;
    if (value && value->is_int64() && value->get_int64() >= 0) {
      number = static_cast<uint64_t>(value->get_int64());
      good = true;
    } else if (value && value->is_string()) {
      const json::string& text = value->get_string();
      auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
      good = error == std::errc() && end == text.data() + text.size();
    }
    if (!good) return Bad("{} has no number '{}'", where_, name);
    if (number > most) return Bad("{}: {} is {}", where_, name, number);
    return number;
  }
  Result<std::vector<uint8_t>> Bytes(const char* name) const {
    std::optional<std::vector<uint8_t>> bytes = DecodeBase64(TRY(Text(name)));
    if (!bytes || bytes->empty()) return Bad("{}: {} is no base64 text", where_, name);
    return *bytes;
  }
  // Names of members of another object: "0", "1"...
  Result<std::vector<uint32_t>> Ids(const char* name) const {
    const json::value* value = object_.if_contains(name);
    if (!value || !value->is_array()) return Bad("{} has no list '{}'", where_, name);
    std::vector<uint32_t> ids;
    for (const json::value& item : value->get_array())
      ids.push_back(TRY(Id(item.is_string() ? std::string_view(item.get_string()) : "")));
    return ids;
  }
  Result<const HashAlg*> Hash(const char* name) const {
    std::string text = TRY(Text(name));
    return RequireHash(text);
  }
  // Only `wanted` is known here.
  Result<> Type(const char* wanted, const char* what) const {
    std::string type = TRY(Text("type"));
    if (type == wanted) return {};
    return Missing("{} '{}'", what, type);
  }
  Result<uint32_t> Id(std::string_view text) const {
    uint32_t id = 0;
    auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), id);
    if (error != std::errc() || end != text.data() + text.size())
      return Bad("{}: '{}' is no number of an object", where_, text);
    return id;
  }
  bool Has(const char* name) const { return object_.contains(name); }
  const json::object& object() const { return object_; }
  const std::string& where() const { return where_; }

 private:
  const json::object& object_;
  std::string where_;
};

Result<CipherSpec> CipherOf(const std::string& encryption, uint64_t key_bytes) {
  size_t dash = encryption.find('-');
  if (dash == std::string::npos) return Bad("encryption '{}' has no mode", encryption);
  return ParseCipher(encryption.substr(0, dash), encryption.substr(dash + 1),
                     static_cast<uint32_t>(key_bytes));
}

Result<Kdf> ParseKdf(const Reader& reader) {
  Kdf kdf;
  std::string type = TRY(reader.Text("type"));
  kdf.salt = TRY(reader.Bytes("salt"));
  if (type == "pbkdf2") {
    kdf.hash = TRY(reader.Hash("hash"));
    kdf.iterations = TRY(reader.Number("iterations", UINT32_MAX));
  } else if (type == "argon2i" || type == "argon2id") {
    kdf.kind = type == "argon2i" ? Kdf::Kind::kArgon2i : Kdf::Kind::kArgon2id;
    kdf.iterations = TRY(reader.Number("time", UINT32_MAX));
    kdf.memory_kib = static_cast<uint32_t>(TRY(reader.Number("memory", UINT32_MAX)));
    kdf.lanes = static_cast<uint32_t>(TRY(reader.Number("cpus", UINT32_MAX)));
    if (kdf.memory_kib == 0 || kdf.lanes == 0) return Bad("{} needs no memory", reader.where());
  } else {
    return Missing("keys made by '{}'", type);
  }
  if (kdf.iterations == 0) return Bad("{} has no iterations", reader.where());
  return kdf;
}

// Sections 3.2 to 3.2.3.
Result<Slot> ParseSlot(const Reader& reader, uint32_t id) {
  Slot slot;
  slot.id = id;
  slot.key_bytes = static_cast<uint32_t>(TRY(reader.Number("key_size", kMaxKeyBytes)));
  Reader af = TRY(reader.Object("af"));
  TRY(af.Type("luks1", "keys split by"));
  slot.stripes = static_cast<uint32_t>(TRY(af.Number("stripes", kMaxStripes)));
  slot.af_hash = TRY(af.Hash("hash"));
  if (slot.key_bytes == 0 || slot.stripes == 0) return Bad("{} is empty", reader.where());
  Reader area = TRY(reader.Object("area"));
  TRY(area.Type("raw", "key areas of type"));
  std::string encryption = TRY(area.Text("encryption"));
  uint64_t area_key_bytes = TRY(area.Number("key_size", kMaxKeyBytes));
  slot.cipher = TRY(CipherOf(encryption, area_key_bytes));
  slot.area_offset = TRY(area.Number("offset", kMaxOffset));
  uint64_t size = TRY(area.Number("size", kMaxOffset));
  slot.area_bytes = (uint64_t{slot.stripes} * slot.key_bytes + kSector - 1) / kSector * kSector;
  if (size < slot.area_bytes) return Bad("{} has no room for the key", area.where());
  Reader kdf = TRY(reader.Object("kdf"));
  slot.kdf = TRY(ParseKdf(kdf));
  slot.active = true;
  return slot;
}

Result<> ParseSlots(const Reader& root, Header& header) {
  Reader slots = TRY(root.Object("keyslots"));
  if (slots.object().size() > kMaxSlots) return Bad("{} key slots", slots.object().size());
  for (const auto& member : slots.object()) {
    uint32_t id = TRY(slots.Id(std::string_view(member.key())));
    if (!member.value().is_object()) return Bad("key slot {} is no object", id);
    Reader reader(member.value().get_object(), fmt::format("key slot {}", id));
    TRY(reader.Type("luks2", "key slots of type"));
    header.slots.push_back(TRY(ParseSlot(reader, id)));
  }
  std::sort(header.slots.begin(), header.slots.end(),
            [](const Slot& a, const Slot& b) { return a.id < b.id; });
  return {};
}

// Section 3.3: the one segment is the payload.
Result<std::string> ParseSegment(const Reader& root, Header& header) {
  Reader segments = TRY(root.Object("segments"));
  if (segments.object().empty()) return Bad("there is no segment");
  if (segments.object().size() > 1) return Missing("several segments (a reencryption under way)");
  const auto& member = *segments.object().begin();
  if (!member.value().is_object()) return Bad("the segment is no object");
  Reader segment(member.value().get_object(), "segment");
  TRY(segment.Type("crypt", "segments of type"));
  if (segment.Has("integrity")) return Missing("integrity protection");
  header.payload_offset = TRY(segment.Number("offset", kMaxOffset));
  header.iv_tweak = TRY(segment.Number("iv_tweak", UINT64_MAX));
  header.sector_bytes = static_cast<uint32_t>(TRY(segment.Number("sector_size", 4096)));
  if (header.sector_bytes != 512 && header.sector_bytes != 1024 && header.sector_bytes != 2048 &&
      header.sector_bytes != 4096)
    return Bad("sectors of {} bytes", header.sector_bytes);
  if (TRY(segment.Text("size")) != "dynamic")
    header.payload_bytes =
        TRY(segment.Number("size", kMaxOffset)) / header.sector_bytes * header.sector_bytes;
  if (header.payload_offset % kSector != 0)
    return Bad("the payload is at {}", header.payload_offset);
  // Where the header is apart, the payload begins at 0.
  if (header.payload_offset < kLuks2BinaryBytes)
    return Fail(ErrorCode::kUnsupported,
                "not supported yet: LUKS headers apart from their payload");
  std::string encryption = TRY(segment.Text("encryption"));
  uint64_t key_bytes = encryption.find("-xts") != std::string::npos ? 64 : 32;
  for (const Slot& slot : header.slots) {
    const std::vector<uint32_t>& ids = header.digest.slots;
    if (std::find(ids.begin(), ids.end(), slot.id) != ids.end()) key_bytes = slot.key_bytes;
  }
  header.cipher = TRY(CipherOf(encryption, key_bytes));
  return std::string(member.key());
}

// Section 3.4: of the payload's key.
Result<> ParseDigests(const Reader& root, Header& header) {
  Reader segments = TRY(root.Object("segments"));
  std::string segment =
      segments.object().empty() ? "" : std::string(segments.object().begin()->key());
  Reader digests = TRY(root.Object("digests"));
  for (const auto& member : digests.object()) {
    if (!member.value().is_object()) return Bad("a digest is no object");
    Reader reader(member.value().get_object(), "digest");
    std::vector<uint32_t> of = TRY(reader.Ids("segments"));
    uint32_t id = TRY(reader.Id(segment));
    if (std::find(of.begin(), of.end(), id) == of.end()) continue;
    TRY(reader.Type("pbkdf2", "digests of type"));
    header.digest.hash = TRY(reader.Hash("hash"));
    header.digest.iterations = TRY(reader.Number("iterations", UINT32_MAX));
    header.digest.salt = TRY(reader.Bytes("salt"));
    header.digest.digest = TRY(reader.Bytes("digest"));
    header.digest.slots = TRY(reader.Ids("keyslots"));
    if (header.digest.iterations == 0) return Bad("the key's digest has no iterations");
    if (header.digest.digest.size() > kMaxDigestBytes) return Bad("the key's digest is too long");
    return {};
  }
  return Bad("the segment's key has no digest");
}

Result<> RefuseRequirements(const Reader& root) {
  Reader config = TRY(root.Object("config"));
  if (!config.Has("requirements")) return {};
  Reader requirements = TRY(config.Object("requirements"));
  const json::value* mandatory = requirements.object().if_contains("mandatory");
  if (!mandatory) return {};
  if (!mandatory->is_array()) return Bad("the requirements are no list");
  if (mandatory->get_array().empty()) return {};
  const json::value& first = mandatory->get_array()[0];
  return Missing("requirement '{}'", first.is_string() ? std::string(first.get_string()) : "?");
}

template <size_t kSize>
std::string FieldText(const char (&field)[kSize]) {
  std::string text(field, std::find(field, field + kSize, '\0'));
  std::replace_if(text.begin(), text.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return text;
}

}  // namespace

uint64_t Luks2HeaderBytes(std::span<const uint8_t> binary) {
  if (binary.size() < kLuks2BinaryBytes) return 0;
  BinaryDisk disk;
  std::memcpy(&disk, binary.data(), sizeof(disk));
  if (std::memcmp(disk.magic, kMagic, sizeof(kMagic)) != 0 &&
      std::memcmp(disk.magic, kSecondMagic, sizeof(kMagic)) != 0)
    return 0;
  uint64_t bytes = disk.header_size;
  bool sensible = bytes >= kMinHeaderBytes && bytes <= kMaxLuks2Bytes && (bytes & (bytes - 1)) == 0;
  return disk.version == 2 && sensible ? bytes : 0;
}

Result<Header> ParseLuks2Json(std::span<const uint8_t> area) {
  const auto* text = reinterpret_cast<const char*>(area.data());
  size_t length = static_cast<size_t>(std::find(text, text + area.size(), '\0') - text);
  json::error_code error;
  json::parse_options options;
  options.max_depth = kMaxJsonDepth;
  json::value value = json::parse({text, length}, error, {}, options);
  if (error || !value.is_object()) return Bad("its JSON area is no JSON object");
  Reader root(value.get_object(), "the header");
  Header header;
  header.version = 2;
  TRY(RefuseRequirements(root));
  TRY(ParseSlots(root, header));
  TRY(ParseDigests(root, header));
  TRY(ParseSegment(root, header));
  // Keys of something else don't open the payload.
  std::erase_if(header.slots, [&](const Slot& slot) {
    const std::vector<uint32_t>& ids = header.digest.slots;
    return std::find(ids.begin(), ids.end(), slot.id) == ids.end();
  });
  for (const Slot& slot : header.slots) {
    if (slot.key_bytes != header.cipher.key_bytes)
      return Bad("key slot {} has a key of another size", slot.id);
  }
  header.hash = header.digest.hash;
  return header;
}

Result<Header> ParseLuks2(std::span<const uint8_t> binary, std::span<const uint8_t> json_area,
                          uint64_t at, uint64_t* sequence) {
  BinaryDisk disk;
  if (Luks2HeaderBytes(binary) != kLuks2BinaryBytes + json_area.size())
    return Bad("its size makes no sense");
  std::memcpy(&disk, binary.data(), sizeof(disk));
  const uint8_t(&magic)[6] = at == 0 ? kMagic : kSecondMagic;
  if (std::memcmp(disk.magic, magic, sizeof(magic)) != 0 || disk.header_offset != at)
    return Bad("it is of another place");
  const HashAlg* hash = TRY(RequireHash(FieldText(disk.checksum_alg)));
  uint8_t stored[kMaxDigestBytes], made[kMaxDigestBytes];
  std::memcpy(stored, disk.checksum, hash->bytes);
  std::memset(disk.checksum, 0, sizeof(disk.checksum));
  HashBytes(*hash, {reinterpret_cast<const uint8_t*>(&disk), sizeof(disk)}, json_area,
            std::span(made).first(hash->bytes));
  if (std::memcmp(stored, made, hash->bytes) != 0) return Bad("its checksum is wrong");
  Header header = TRY(ParseLuks2Json(json_area));
  header.uuid = FieldText(disk.uuid);
  header.label = FieldText(disk.label);
  *sequence = disk.sequence;
  return header;
}

// The newest copy that is sound.
Result<Header> ReadLuks2(const Area& area) {
  Result<Header> best = Fail(ErrorCode::kInvalid, "this is no LUKS volume");
  uint64_t best_sequence = 0, first_bytes = 0;
  bool found = false;
  std::vector<uint8_t> binary(kLuks2BinaryBytes), json_area;
  for (uint64_t at = 0; at <= kMaxLuks2Bytes; at = at == 0 ? kMinHeaderBytes : at * 2) {
    // A sound first copy tells where the second is.
    if (at != 0 && first_bytes != 0 && at != first_bytes) continue;
    if (!area.Read(at, binary)) break;
    uint64_t bytes = Luks2HeaderBytes(binary);
    if (bytes == 0) continue;
    json_area.resize(bytes - kLuks2BinaryBytes);
    Result<> read = area.Read(at + kLuks2BinaryBytes, json_area);
    uint64_t sequence = 0;
    Result<Header> parsed = read ? ParseLuks2(binary, json_area, at, &sequence)
                                 : Result<Header>(std::unexpected(read.error()));
    if (parsed && at == 0) first_bytes = bytes;
    if (parsed ? !found || sequence > best_sequence : at == 0) {
      best = std::move(parsed);
      best_sequence = sequence;
      found = best.has_value();
    }
  }
  return best;
}

}  // namespace kvartz::block::luks
