// A dirty bitmap: which parts of a disk were written since it was last cleared. One bit for
// `granularity` bytes. Memory is taken for parts that have set bits only.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace kvartz::block {

// Loop-owned, by the loop of the node it is attached to.
class DirtyBitmap {
 public:
  // `granularity`: bytes, a power of two, 512 to 2 GiB.
  DirtyBitmap(std::string name, uint64_t size_bytes, uint32_t granularity);

  const std::string& name() const { return name_; }
  uint64_t size_bytes() const { return size_bytes_; }
  uint32_t granularity() const { return granularity_; }
  // Tracks writes of the node that it is attached to.
  bool enabled() const { return enabled_; }
  void set_enabled(bool enabled) { enabled_ = enabled; }
  // A job uses it: it can't be changed or removed.
  bool busy() const { return busy_; }
  void set_busy(bool busy) { busy_ = busy; }

  // Ranges in bytes; those that cover a part of a bit's range touch that bit (Clear: not).
  void Set(uint64_t offset, uint64_t length);
  void Clear(uint64_t offset, uint64_t length);
  void ClearAll();
  bool Test(uint64_t offset) const;
  uint64_t dirty_bytes() const;  // granularity * set bits
  // The first dirty (clean) range at or after `offset` below `end`; its end is at most `end`.
  struct Range {
    uint64_t offset = 0;
    uint64_t length = 0;
  };
  std::optional<Range> NextDirty(uint64_t offset, uint64_t end) const;
  // The first bit at or after `offset` (bytes) that is clean; size_bytes() if none.
  uint64_t NextClean(uint64_t offset) const;
  void Merge(const DirtyBitmap& source);  // of any granularity
  void Resize(uint64_t size_bytes);       // what is added is clean

  // As a run of bytes, bit n of byte n/8 first at its least significant bit: `index` counts bytes.
  uint64_t stored_bytes() const { return (bits() + 7) / 8; }
  void Load(uint64_t index, std::span<const uint8_t> bytes);
  // False (and nothing written) if all of them are zero.
  bool Save(uint64_t index, std::span<uint8_t> bytes) const;

 private:
  static constexpr uint64_t kChunkBits = 1 << 15;
  static constexpr uint64_t kWords = kChunkBits / 64;
  using Chunk = std::unique_ptr<uint64_t[]>;
  uint64_t bits() const { return (size_bytes_ + granularity_ - 1) / granularity_; }
  void SetBits(uint64_t first, uint64_t end);
  void ClearBits(uint64_t first, uint64_t end);
  // The first bit of `value` in [from, end), or end.
  uint64_t FindBit(uint64_t from, uint64_t end, bool value) const;

  std::string name_;
  uint64_t size_bytes_;
  uint32_t granularity_;
  bool enabled_ = true, busy_ = false;
  std::vector<Chunk> chunks_;
};

}  // namespace kvartz::block
