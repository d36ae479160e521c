// Guest RAM: host memory that the guest, its devices and other processes may share.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/result.h"
#include "memory/dirty_bitmap.h"

namespace kvartz {

struct RamOptions {
  enum class HugePages { kOff, kTransparent, kHugetlb2M, kHugetlb1G };
  HugePages huge_pages = HugePages::kTransparent;
  bool prealloc = false;  // touch every page now; fails if the host can't give them
  bool shared = true;     // memfd, mapped shared (vhost-user, local migration); false: anonymous
};

// One block of guest RAM or ROM. Guard pages on both sides: an overrun faults instead of reaching
// the VMM's memory. Immutable but for its contents and its dirty bitmap.
class RamBlock {
 public:
  // `size_bytes`: a multiple of 4096. Errors: the host has too little memory (says how much), huge
  // pages not available.
  static Result<std::shared_ptr<RamBlock>> Create(const std::string& name, uint64_t size_bytes,
                                                  const RamOptions& options = {});
  ~RamBlock();
  RamBlock(const RamBlock&) = delete;
  RamBlock& operator=(const RamBlock&) = delete;

  uint8_t* host() const { return host_; }
  uint64_t size() const { return size_; }
  const std::string& name() const { return name_; }
  int fd() const { return fd_.get(); }  // -1 if anonymous
  DirtyBitmap& dirty() { return *dirty_; }

  // The page at `offset` is about to be written by a CPU: the host gives it and its neighbours at
  // once, since taking them one fault at a time costs many times as much. Any thread.
  void ExpectWrites(uint64_t offset) {
    uint8_t& taken = taken_[offset / kTakenBytes];
    if (!__atomic_load_n(&taken, __ATOMIC_RELAXED)) [[unlikely]]
      Take(offset / kTakenBytes);
  }

 private:
  static constexpr uint64_t kTakenBytes = 64 << 10;

  RamBlock() = default;
  void Take(uint64_t chunk);

  std::string name_;
  uint8_t* host_ = nullptr;
  uint64_t size_ = 0;
  void* reservation_ = nullptr;
  uint64_t reservation_size_ = 0;
  UniqueFd fd_;
  std::unique_ptr<DirtyBitmap> dirty_;
  std::vector<uint8_t> taken_;  // by kTakenBytes
};

}  // namespace kvartz
