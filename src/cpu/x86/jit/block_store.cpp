#include "cpu/x86/jit/block_store.h"

#include <algorithm>

#include "base/check.h"

namespace kvartz::cpu::x86::jit {

void BlockStore::Reset(size_t begin, size_t end, size_t room) {
  constexpr size_t kRooms = 16;  // in a region, or there are fewer regions
  room_ = room;
  const size_t count = std::clamp<size_t>((end - begin) / (room * kRooms), 1, kMaxRegions);
  const size_t size = (end - begin) / count & ~size_t{63};
  regions_ = std::vector<Region>(count);
  for (size_t i = 0; i < count; ++i) {
    regions_[i].begin = regions_[i].used = begin + i * size;
    regions_[i].end = begin + (i + 1) * size;
  }
  current_ = 0;
  live_ = 0;
  buckets_.assign(size_t{1} << 14, nullptr);
}

void BlockStore::Advance() {
  Region& next = oldest();
  next.used = next.begin;
  next.blocks.clear();
  next.exits.clear();
  next.marks.clear();
  next.ranges.clear();
  current_ = (current_ + 1) % static_cast<unsigned>(regions_.size());
}

Block* BlockStore::Add(const Translator::Buffers& buffers, const std::vector<CodeRange>& ranges) {
  Region& region = regions_[current_];
  Block* block = &region.blocks.emplace_back();
  const auto append = [](auto& all, const auto& own, uint32_t* first, uint32_t* count) {
    *first = static_cast<uint32_t>(all.size());
    *count = static_cast<uint32_t>(own.size());
    all.insert(all.end(), own.begin(), own.end());
  };
  block->region = static_cast<uint16_t>(current_);
  append(region.marks, buffers.marks, &block->first_mark, &block->mark_count);
  append(region.ranges, ranges, &block->first_range, &block->range_count);
  block->first_exit = static_cast<uint32_t>(region.exits.size());
  block->exit_count = static_cast<uint32_t>(buffers.exits.size());
  for (const ExitSite& site : buffers.exits) region.exits.push_back({.site = site, .from = block});
  return block;
}

void BlockStore::Tie(uint32_t number, Block* to) {
  Exit& tied = exit(number);
  VERIFY(tied.to == nullptr);
  tied.to = to;
  tied.previous = kNoExit;
  tied.next = to->incoming;
  if (tied.next != kNoExit) exit(tied.next).previous = number;
  to->incoming = number;
}

void BlockStore::Untie(uint32_t number) {
  Exit& tied = exit(number);
  if (tied.to == nullptr) return;
  (tied.previous == kNoExit ? tied.to->incoming : exit(tied.previous).next) = tied.next;
  if (tied.next != kNoExit) exit(tied.next).previous = tied.previous;
  tied.to = nullptr;
}

void BlockStore::Insert(Block* block) {
  if (live_ >= buckets_.size()) {
    std::vector<Block*> old(buckets_.size() * 4, nullptr);
    std::swap(old, buckets_);
    for (Block* chain : old) {
      while (chain != nullptr) {
        Block* moved = chain;
        chain = chain->hash_next;
        Block*& bucket = buckets_[Bucket(moved->key)];
        moved->hash_next = bucket;
        bucket = moved;
      }
    }
  }
  Block*& bucket = buckets_[Bucket(block->key)];
  block->hash_next = bucket;
  bucket = block;
  ++live_;
}

void BlockStore::Remove(Block* block) {
  Block** link = &buckets_[Bucket(block->key)];
  while (*link != block) link = &(*link)->hash_next;
  *link = block->hash_next;
  --live_;
}

Block* BlockStore::At(const uint8_t* base, const uint8_t* run) {
  const auto offset = static_cast<size_t>(run - base);
  for (Region& region : regions_) {
    if (offset < region.begin || offset >= region.used) continue;
    auto it = std::upper_bound(
        region.blocks.begin(), region.blocks.end(), run,
        [](const uint8_t* at, const Block& block) { return at < block.entries.checked; });
    if (it == region.blocks.begin()) return nullptr;
    --it;
    return run < it->end ? &*it : nullptr;
  }
  return nullptr;
}

size_t BlockStore::dropped() const {
  size_t blocks = 0;
  for (const Region& region : regions_) blocks += region.blocks.size();
  return blocks - live_;
}

size_t BlockStore::bytes_used() const {
  size_t bytes = 0;
  for (const Region& region : regions_) bytes += region.used - region.begin;
  return bytes;
}

}  // namespace kvartz::cpu::x86::jit
