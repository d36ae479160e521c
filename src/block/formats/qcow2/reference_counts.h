// How often each cluster of a file is referred to, as a check counts it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>

namespace kvartz::block::qcow2 {

// References by cluster; memory is taken where there are any, not much more than the tables take
// that refer to them, however far apart these are.
class ReferenceCounts {
 public:
  uint32_t Get(uint64_t cluster) const {
    auto it = chunks_.find(cluster / kChunk);
    return it == chunks_.end() ? 0 : it->second[cluster % kChunk];
  }
  void Add(uint64_t cluster) {
    if (!last_ || last_key_ != cluster / kChunk) {
      last_key_ = cluster / kChunk;
      last_ = &chunks_[last_key_];
    }
    uint32_t& count = (*last_)[cluster % kChunk];
    if (count != UINT32_MAX) count++;
    max_ = std::max(max_, count);
    end_ = std::max(end_, cluster + 1);
  }
  // From `cluster` on, the first that may have any; UINT64_MAX: none.
  uint64_t Next(uint64_t cluster) const {
    auto it = chunks_.lower_bound(cluster / kChunk);
    return it == chunks_.end() ? UINT64_MAX : std::max(cluster, it->first * kChunk);
  }
  uint64_t end() const { return end_; }  // behind the last that is referenced
  uint32_t max() const { return max_; }

 private:
  static constexpr uint64_t kChunk = 64;
  using Chunk = std::array<uint32_t, kChunk>;
  std::map<uint64_t, Chunk> chunks_;
  Chunk* last_ = nullptr;  // that was added to
  uint64_t last_key_ = 0;
  uint64_t end_ = 0;
  uint32_t max_ = 0;
};

}  // namespace kvartz::block::qcow2
