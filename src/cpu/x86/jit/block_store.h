// Where translated units are kept, and the memory that their code lies in. That is used up from its
// beginning to its end, region by region; when all is full, the oldest region is emptied and filled
// anew, so that what is in use keeps most of its translations.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "cpu/accel.h"
#include "cpu/x86/jit/code_memory.h"
#include "cpu/x86/jit/translator.h"
#include "cpu/x86/jit/unit.h"

namespace kvartz::cpu::x86::jit {

struct CodePage;

constexpr uint32_t kNoExit = UINT32_MAX;

// A unit. It stays where it is until its region is emptied, even if it is dropped before: code of
// it may be running.
struct Block {
  uint64_t key = 0;
  Block* hash_next = nullptr;
  uint16_t mode = 0;
  uint16_t offset = 0;  // in its page
  uint16_t region = 0;
  EntryPoints entries;
  uint8_t* end = nullptr;         // behind its code, as it runs
  CodePage* page = nullptr;       // null: dropped
  CodePage* next_page = nullptr;  // of an instruction that crosses into it
  uint32_t first_exit = 0, first_mark = 0, first_range = 0;  // in its region
  uint32_t exit_count = 0, mark_count = 0, range_count = 0;
  uint32_t incoming = kNoExit;  // exits tied to it
  uint64_t digest = 0;          // of its ranges
};

// A page of guest code with units of one mode.
struct CodePage {
  uint64_t key = 0;
  const uint8_t* host = nullptr;
  CodeWatch watch{};
  const uint32_t* word = nullptr;  // as it was when the page came to be
  bool stale = false;              // written since: its units are to be looked at
  unsigned slot = 0;               // of State::code_pages
  std::vector<Block*> blocks;
};

struct Exit {
  ExitSite site;
  Block* from = nullptr;
  Block* to = nullptr;                          // tied to it
  uint32_t next = kNoExit, previous = kNoExit;  // that are, too
};

// Owned by the vCPU's thread.
class BlockStore {
 public:
  struct Region {
    size_t begin = 0, end = 0, used = 0;  // offsets in code memory
    std::deque<Block> blocks;             // in the order of their code
    std::vector<Exit> exits;
    std::vector<InsnMark> marks;
    std::vector<CodeRange> ranges;
  };

  // Empty, in [begin, end) of code memory; `room`: what one unit may need.
  void Reset(size_t begin, size_t end, size_t room);

  Region& region() { return regions_[current_]; }
  const Region& region() const { return regions_[current_]; }
  bool HasRoom() const { return region().end - region().used >= room_; }
  // The region that comes next; its units have to be dropped before Advance.
  Region& oldest() { return regions_[(current_ + 1) % regions_.size()]; }
  void Advance();

  // Its code lies at region().used; what else it has is taken over.
  Block* Add(const Translator::Buffers& buffers, const std::vector<CodeRange>& ranges);

  // Numbers of exits that the next unit will have.
  uint32_t NextExit() const { return ExitNumber(current_, region().exits.size()); }
  static constexpr uint32_t exit_step() { return kMaxRegions; }
  Exit& exit(uint32_t number) { return regions_[number % kMaxRegions].exits[number / kMaxRegions]; }
  // Of one unit.
  template <typename Fn>
  void ForExits(const Block& block, Fn fn) {
    const unsigned at = RegionOf(block);
    for (uint32_t i = block.first_exit; i < block.first_exit + block.exit_count; ++i)
      fn(ExitNumber(at, i));
  }
  const InsnMark* marks(const Block& block) const {
    return regions_[RegionOf(block)].marks.data() + block.first_mark;
  }
  const CodeRange* ranges(const Block& block) const {
    return regions_[RegionOf(block)].ranges.data() + block.first_range;
  }
  // Ties an exit to a unit, in the books.
  void Tie(uint32_t number, Block* to);
  void Untie(uint32_t number);

  Block* Find(uint64_t key) const {
    Block* block = buckets_[Bucket(key)];
    while (block != nullptr && block->key != key) block = block->hash_next;
    return block;
  }
  void Insert(Block* block);
  void Remove(Block* block);
  // Whose code holds the byte at `run`, dropped ones too; `base`: code memory as it runs.
  Block* At(const uint8_t* base, const uint8_t* run);

  size_t live() const { return live_; }
  size_t dropped() const;
  size_t bytes_used() const;

 private:
  static constexpr unsigned kMaxRegions = 8;
  static uint32_t ExitNumber(unsigned region, size_t index) {
    return static_cast<uint32_t>(index) * kMaxRegions + region;
  }
  static unsigned RegionOf(const Block& block) { return block.region; }
  size_t Bucket(uint64_t key) const {
    return (key * 0x9e3779b97f4a7c15 >> 40) & (buckets_.size() - 1);
  }

  std::vector<Region> regions_;
  unsigned current_ = 0;
  size_t room_ = 0, live_ = 0;
  std::vector<Block*> buckets_;
};

}  // namespace kvartz::cpu::x86::jit
