// Integers of a stated byte order, for structures of wires, files and guests. Trivially copyable,
// unaligned (align 1).
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace kvartz {

template <typename T, std::endian kOrder>
class EndianInt {
 public:
  EndianInt() = default;
  EndianInt(T value) { *this = value; }  // NOLINT: implicit by design
  EndianInt& operator=(T value) {
    if constexpr (kOrder != std::endian::native) value = Swap(value);
    std::memcpy(bytes_, &value, sizeof(T));
    return *this;
  }
  operator T() const {  // NOLINT: implicit by design
    T value;
    std::memcpy(&value, bytes_, sizeof(T));
    return kOrder == std::endian::native ? value : Swap(value);
  }

 private:
  static T Swap(T v) {
    if constexpr (sizeof(T) == 2) return __builtin_bswap16(v);
    if constexpr (sizeof(T) == 4) return __builtin_bswap32(v);
    return __builtin_bswap64(v);
  }
  uint8_t bytes_[sizeof(T)] = {};
};

using Le16 = EndianInt<uint16_t, std::endian::little>;
using Le32 = EndianInt<uint32_t, std::endian::little>;
using Le64 = EndianInt<uint64_t, std::endian::little>;
using Be16 = EndianInt<uint16_t, std::endian::big>;
using Be32 = EndianInt<uint32_t, std::endian::big>;
using Be64 = EndianInt<uint64_t, std::endian::big>;

}  // namespace kvartz
