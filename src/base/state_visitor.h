// State is declared once: `void VisitState(StateVisitor& v)` lists a component's fields, and the
// same list saves, loads, dumps and compares. The stream is tagged and named: unknown optional
// fields are skipped, missing ones keep the value they have after reset, and everything that is
// read is checked (it may come from a hostile peer).
//
//   void Uart::VisitState(StateVisitor& v) {
//     v.Version(1);
//     v.Field("ier", ier_);
//     v.Field("fifo", rx_fifo_, kFifoSize);       // std::vector<uint8_t>, at most kFifoSize
//     if (v.loading()) UpdateIrq();
//   }
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/result.h"

namespace kvartz {

// One traversal, by one thread. After an error every call is a no-op and the fields keep their
// values.
class StateVisitor {
 public:
  virtual ~StateVisitor() = default;

  virtual bool loading() const = 0;
  bool saving() const { return !loading(); }

  // A named group; names are unique within their parent. When loading, `body` runs only if the
  // section is there, in any order. A required one must be there, and when a program that doesn't
  // know it finds it in a stream that is an error too; optional ones are left at the values of
  // reset or skipped.
  enum class Presence { kRequired, kOptional };
  virtual void Section(std::string_view name, const std::function<void()>& body,
                       Presence presence = Presence::kRequired) = 0;
  // Version of the enclosing section; when loading returns the saved one (0: it had none), newer
  // than `current` is an error.
  virtual uint32_t Version(uint32_t current) = 0;

  template <typename T>
    requires(std::is_integral_v<T> || std::is_enum_v<T>)
  void Field(std::string_view name, T& value) {
    uint64_t raw = 0;
    if constexpr (std::is_signed_v<T>) {
      raw = static_cast<uint64_t>(static_cast<int64_t>(value));
    } else {
      raw = static_cast<uint64_t>(value);
    }
    if (!Integer(name, raw, sizeof(T), std::is_signed_v<T>)) return;
    value = static_cast<T>(raw);
  }
  template <typename T, size_t kCount>
    requires(std::is_integral_v<T>)
  void Field(std::string_view name, std::array<T, kCount>& values) {
    FixedBytes(name, std::span(reinterpret_cast<uint8_t*>(values.data()), sizeof(T) * kCount));
  }
  template <typename T, size_t kCount>
    requires(std::is_integral_v<T>)
  void Field(std::string_view name, T (&values)[kCount]) {
    FixedBytes(name, std::span(reinterpret_cast<uint8_t*>(values), sizeof(T) * kCount));
  }
  // Bytes of a size that is fixed by the program; another size in the stream is an error.
  virtual void FixedBytes(std::string_view name, std::span<uint8_t> bytes) = 0;
  // Bytes of varying length; more than `max_size` in the stream is an error.
  virtual void Field(std::string_view name, std::vector<uint8_t>& bytes, size_t max_size) = 0;
  virtual void Field(std::string_view name, std::string& text, size_t max_size) = 0;

  // Marks what was loaded as wrong (an index out of range, say): "section: text".
  virtual void Reject(std::string_view text) = 0;
  // A loaded value outside [low, high] is rejected by name.
  void Bounded(std::string_view name, uint64_t value, uint64_t low, uint64_t high);
  virtual bool failed() const = 0;

 protected:
  // Returns false if the field wasn't there (or after an error): the value stays.
  virtual bool Integer(std::string_view name, uint64_t& value, unsigned size_bytes,
                       bool is_signed) = 0;
};

// Saves into bytes: header (magic, format version), sections, CRC-32C.
std::vector<uint8_t> SaveState(const std::function<void(StateVisitor&)>& visit);
// Loads from bytes. Errors: damaged, truncated, a required part is missing, a value is out of range
// (each by section name).
Result<> LoadState(std::span<const uint8_t> bytes, const std::function<void(StateVisitor&)>& visit);
// The state as readable text, one field a line ("uart0.ier = 0x5"), for dumps and for comparing in
// tests.
std::string DumpState(const std::function<void(StateVisitor&)>& visit);

}  // namespace kvartz
