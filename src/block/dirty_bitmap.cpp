#include "block/dirty_bitmap.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace kvartz::block {
namespace {

uint64_t Mask(uint64_t from, uint64_t end) {  // bits [from, end) of a word, from < end <= 64
  return (~uint64_t{0} << from) & (~uint64_t{0} >> (64 - end));
}

}  // namespace

DirtyBitmap::DirtyBitmap(std::string name, uint64_t size_bytes, uint32_t granularity)
    : name_(std::move(name)), size_bytes_(size_bytes), granularity_(granularity) {
  VERIFY(std::has_single_bit(granularity));
  chunks_.resize((bits() + kChunkBits - 1) / kChunkBits);
}

void DirtyBitmap::SetBits(uint64_t first, uint64_t end) {
  while (first < end) {
    Chunk& chunk = chunks_[first / kChunkBits];
    if (!chunk) chunk = std::make_unique<uint64_t[]>(kWords);
    uint64_t stop = std::min(end, (first / kChunkBits + 1) * kChunkBits);
    while (first < stop) {
      uint64_t word_end = std::min(stop, (first / 64 + 1) * 64);
      chunk[first % kChunkBits / 64] |= Mask(first % 64, (word_end - 1) % 64 + 1);
      first = word_end;
    }
  }
}

void DirtyBitmap::ClearBits(uint64_t first, uint64_t end) {
  while (first < end) {
    Chunk& chunk = chunks_[first / kChunkBits];
    uint64_t stop = std::min(end, (first / kChunkBits + 1) * kChunkBits);
    if (stop - first == kChunkBits) chunk.reset();
    while (chunk && first < stop) {
      uint64_t word_end = std::min(stop, (first / 64 + 1) * 64);
      chunk[first % kChunkBits / 64] &= ~Mask(first % 64, (word_end - 1) % 64 + 1);
      first = word_end;
    }
    first = stop;
  }
}

void DirtyBitmap::Set(uint64_t offset, uint64_t length) {
  if (length == 0 || offset >= size_bytes_) return;
  uint64_t end = length > size_bytes_ - offset ? size_bytes_ : offset + length;
  SetBits(offset / granularity_, (end - 1) / granularity_ + 1);
}

void DirtyBitmap::Clear(uint64_t offset, uint64_t length) {
  if (offset >= size_bytes_) return;
  uint64_t end = length > size_bytes_ - offset ? size_bytes_ : offset + length;
  uint64_t last = end == size_bytes_ ? bits() : end / granularity_;
  uint64_t first = (offset + granularity_ - 1) / granularity_;
  if (first < last) ClearBits(first, last);
}

void DirtyBitmap::ClearAll() {
  for (Chunk& chunk : chunks_) chunk.reset();
}

bool DirtyBitmap::Test(uint64_t offset) const {
  if (offset >= size_bytes_) return false;
  uint64_t bit = offset / granularity_;
  const Chunk& chunk = chunks_[bit / kChunkBits];
  return chunk && (chunk[bit % kChunkBits / 64] >> bit % 64 & 1) != 0;
}

uint64_t DirtyBitmap::dirty_bytes() const {
  uint64_t count = 0;
  for (const Chunk& chunk : chunks_) {
    for (uint64_t i = 0; chunk && i < kWords; i++)
      count += static_cast<uint64_t>(std::popcount(chunk[i]));
  }
  return count * granularity_;
}

uint64_t DirtyBitmap::FindBit(uint64_t from, uint64_t end, bool value) const {
  while (from < end) {
    const Chunk& chunk = chunks_[from / kChunkBits];
    if (!chunk) {
      if (!value) return from;
      from = (from / kChunkBits + 1) * kChunkBits;
      continue;
    }
    uint64_t word = chunk[from % kChunkBits / 64];
    word = (value ? word : ~word) >> from % 64;
    if (word != 0) return std::min(end, from + static_cast<uint64_t>(std::countr_zero(word)));
    from = (from / 64 + 1) * 64;
  }
  return end;
}

std::optional<DirtyBitmap::Range> DirtyBitmap::NextDirty(uint64_t offset, uint64_t end) const {
  end = std::min(end, size_bytes_);
  if (offset >= end) return std::nullopt;
  uint64_t end_bit = (end - 1) / granularity_ + 1;
  uint64_t first = FindBit(offset / granularity_, end_bit, true);
  if (first >= end_bit) return std::nullopt;
  uint64_t last = FindBit(first, end_bit, false);
  uint64_t start = std::max(offset, first * granularity_);
  return Range{start, std::min(end, last * granularity_) - start};
}

uint64_t DirtyBitmap::NextClean(uint64_t offset) const {
  if (offset >= size_bytes_) return size_bytes_;
  uint64_t bit = FindBit(offset / granularity_, bits(), false);
  return std::min(size_bytes_, std::max(offset, bit * granularity_));
}

void DirtyBitmap::Merge(const DirtyBitmap& source) {
  uint64_t at = 0;
  while (std::optional<Range> range = source.NextDirty(at, source.size_bytes())) {
    Set(range->offset, range->length);
    at = range->offset + range->length;
  }
}

void DirtyBitmap::Resize(uint64_t size_bytes) {
  uint64_t old_bits = bits();
  size_bytes_ = size_bytes;
  chunks_.resize((bits() + kChunkBits - 1) / kChunkBits);
  uint64_t end = chunks_.size() * kChunkBits;
  if (bits() < old_bits && bits() < end) ClearBits(bits(), end);
}

void DirtyBitmap::Load(uint64_t index, std::span<const uint8_t> bytes) {
  for (size_t i = 0; i < bytes.size(); i++) {
    for (unsigned bit = 0; bytes[i] != 0 && bit < 8; bit++) {
      uint64_t number = (index + i) * 8 + bit;
      if ((bytes[i] >> bit & 1) && number < bits()) SetBits(number, number + 1);
    }
  }
}

bool DirtyBitmap::Save(uint64_t index, std::span<uint8_t> bytes) const {
  uint64_t end = std::min(bits(), (index + bytes.size()) * 8);
  uint64_t first = FindBit(index * 8, end, true);
  if (first >= end) return false;
  std::memset(bytes.data(), 0, bytes.size());
  for (uint64_t bit = first; bit < end; bit = FindBit(bit + 1, end, true)) {
    bytes[bit / 8 - index] |= static_cast<uint8_t>(1u << bit % 8);
  }
  return true;
}

}  // namespace kvartz::block
