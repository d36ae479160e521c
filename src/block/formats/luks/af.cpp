#include "block/formats/luks/af.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/endian.h"

namespace kvartz::block::luks {
namespace {

// Each digest-sized piece becomes the hash of its number and itself; the last is cut short.
void Diffuse(const HashAlg& hash, std::span<uint8_t> block) {
  uint8_t digest[kMaxDigestBytes];
  uint32_t number = 0;
  for (size_t at = 0; at < block.size(); at += hash.bytes, number++) {
    std::span<uint8_t> piece = block.subspan(at, std::min(hash.bytes, block.size() - at));
    Be32 prefix = number;
    HashBytes(hash, {reinterpret_cast<const uint8_t*>(&prefix), sizeof(prefix)}, piece,
              std::span(digest).first(hash.bytes));
    std::memcpy(piece.data(), digest, piece.size());
  }
  explicit_bzero(digest, sizeof(digest));
}

void Xor(std::span<uint8_t> into, std::span<const uint8_t> with) {
  for (size_t i = 0; i < into.size(); i++) into[i] ^= with[i];
}

}  // namespace

void AfSplit(const HashAlg& hash, uint32_t stripes, std::span<const uint8_t> key,
             std::span<uint8_t> split) {
  VERIFY(stripes > 0 && split.size() == stripes * key.size());
  SecretBytes sum(key.size());
  auto rest = split.first((stripes - 1) * key.size());
  RandomBytes(rest);
  for (size_t at = 0; at < rest.size(); at += key.size()) {
    Xor(sum, rest.subspan(at, key.size()));
    Diffuse(hash, sum);
  }
  Xor(sum, key);
  std::copy(sum.begin(), sum.end(), split.end() - static_cast<ptrdiff_t>(key.size()));
}

void AfMerge(const HashAlg& hash, uint32_t stripes, std::span<const uint8_t> split,
             std::span<uint8_t> key) {
  VERIFY(stripes > 0 && split.size() == stripes * key.size());
  std::fill(key.begin(), key.end(), 0);
  for (uint32_t stripe = 0; stripe < stripes; stripe++) {
    Xor(key, split.subspan(stripe * key.size(), key.size()));
    if (stripe + 1 < stripes) Diffuse(hash, key);
  }
}

}  // namespace kvartz::block::luks
