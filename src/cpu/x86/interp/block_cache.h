// Decoded code: straight runs of instructions within a page, found by the host address of their
// first byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/result.h"
#include "cpu/x86/cpu.h"
#include "cpu/x86/decode/insn.h"

namespace kvartz::cpu::x86 {

// Instructions that run one after the other unless one of them faults, branches or sets a request.
// A block that consists of a single instruction across a page boundary depends on the second page,
// too.
struct alignas(64) Block {
  struct Link {
    const uint8_t* host = nullptr;
    Block* block = nullptr;
  };

  const uint8_t* host;    // the first byte
  CodeWatch watch;        // the code is as decoded while this holds
  const uint8_t* second;  // the page that the single instruction ends in; null: all in one page
  CodeWatch second_watch;
  Link links[2];  // blocks that came next, newest first
  Block* next;    // in its hash bucket
  uint16_t mode;  // ModeKey
  uint16_t count;
  uint16_t bytes;
  bool direct;        // ends with a direct branch, or with none: few blocks can be next
  bool changes_mode;  // ends with an instruction that may change what ModeKey depends on, or the
                      // address space
  Insn insns[];

  bool valid() const {
    return __atomic_load_n(watch.word, __ATOMIC_RELAXED) == watch.value &&
           (second == nullptr ||
            __atomic_load_n(second_watch.word, __ATOMIC_RELAXED) == second_watch.value);
  }
};

// One CPU's decoded code. Owned by its vCPU thread. Bounded: when the memory is used up, all blocks
// go at once.
class BlockCache {
 public:
  // `features`: those of the guest's CPUID table; instructions of others raise #UD. Errors: no
  // memory.
  static Result<std::unique_ptr<BlockCache>> Create(const FeatureSet& features);
  ~BlockCache();
  BlockCache(const BlockCache&) = delete;
  BlockCache& operator=(const BlockCache&) = delete;

  // The block at cpu.rip, decoded if need be, and known to be valid. `host`: its first byte
  // (FetchCode). Raises what fetching or decoding its first instruction raises. Blocks found before
  // may be gone after this.
  Block* Find(Cpu& cpu, uint64_t linear, const uint8_t* host, uint16_t mode) {
    Block* first = Bucket(host, mode);
    if (first != nullptr && first->host == host && first->mode == mode &&
        first->second == nullptr && first->valid()) [[likely]] {
      return first;
    }
    return FindSlow(cpu, linear, host, mode);
  }
  // The instruction at cpu.rip where no memory answers: decoded each time. Valid until the next
  // call.
  const Insn* DecodeUncached(Cpu& cpu, uint64_t linear);
  void Flush();

  uint64_t decoded_blocks() const { return decoded_blocks_; }
  uint64_t flushes() const { return flushes_; }

 private:
  static constexpr unsigned kBucketBits = 14;
  BlockCache(const FeatureSet& features, uint8_t* arena);
  Block*& Bucket(const uint8_t* host, uint16_t mode) {
    const uint64_t hash = (reinterpret_cast<uintptr_t>(host) + mode) * 0x9e3779b97f4a7c15;
    return buckets_[hash >> (64 - kBucketBits)];
  }
  Block* FindSlow(Cpu& cpu, uint64_t linear, const uint8_t* host, uint16_t mode);
  bool Revalidate(Cpu& cpu, uint64_t linear, Block* block);
  Block* Build(Cpu& cpu, uint64_t linear, const uint8_t* host, uint16_t mode);
  void BuildCrossing(Cpu& cpu, uint64_t linear, Block* block);
  DecodeContext Context(const Cpu& cpu) const;

  FeatureSet features_;
  uint8_t* const arena_;
  size_t used_ = 0;
  std::unique_ptr<Block*[]> buckets_;
  uint64_t decoded_blocks_ = 0;
  uint64_t flushes_ = 0;
  Insn uncached_{};
};

// The run loop is to be left (cpu.h, `request`).
inline bool Requested(const Cpu& cpu) {
  return __atomic_load_n(&cpu.requests, __ATOMIC_RELAXED) != 0;
}

// What decoding depends on, besides the bytes.
inline uint16_t ModeKey(const Cpu& cpu) {
  return static_cast<uint16_t>(static_cast<unsigned>(cpu.code_mode) |
                               (cpu.protected_mode() && !cpu.virtual_8086() ? 4 : 0) |
                               (cpu.cpl == 0 ? 8 : 0));
}

}  // namespace kvartz::cpu::x86
