#include "memory/ram.h"

#include <fmt/format.h>
#include <linux/memfd.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "base/check.h"
#include "memory/gpa.h"

namespace kvartz {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kHuge2M = 2 * kMiB;
constexpr uint64_t kHuge1G = 1024 * kMiB;
// An access that went wrong by a whole page, or by a few, must end here, too.
constexpr uint64_t kGuardBytes = kMiB;
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

// What the host could give without swapping; UINT64_MAX if it doesn't say.
uint64_t HostAvailableBytes() {
  FILE* file = fopen("/proc/meminfo", "re");
  if (!file) return UINT64_MAX;
  uint64_t available = UINT64_MAX;
  char line[128];
  while (fgets(line, sizeof(line), file)) {
    unsigned long long kib = 0;
    if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) available = kib * 1024;
  }
  fclose(file);
  return available;
}

uint64_t PageBytes(RamOptions::HugePages huge_pages) {
  switch (huge_pages) {
    case RamOptions::HugePages::kHugetlb2M:
      return kHuge2M;
    case RamOptions::HugePages::kHugetlb1G:
      return kHuge1G;
    default:
      return kPageSize;
  }
}

bool IsHugetlb(const RamOptions& options) { return PageBytes(options.huge_pages) != kPageSize; }

unsigned HugeFlags(const RamOptions& options) {
  switch (options.huge_pages) {
    case RamOptions::HugePages::kHugetlb2M:
      return MFD_HUGETLB | MFD_HUGE_2MB;
    case RamOptions::HugePages::kHugetlb1G:
      return MFD_HUGETLB | MFD_HUGE_1GB;
    default:
      return 0;
  }
}

Error NoMemory(const std::string& name, uint64_t size, const RamOptions& options, int error) {
  if (IsHugetlb(options)) {
    uint64_t page = PageBytes(options.huge_pages);
    return {ErrorCode::kNoSpace,
            fmt::format("memory '{}' needs {} huge pages of {} MiB and the host hasn't that many "
                        "free; reserve them "
                        "in /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
                        name, size / page, page / kMiB, page / 1024)};
  }
  return ErrnoError(error,
                    fmt::format("cannot allocate {} MiB for memory '{}'", size / kMiB, name));
}

// Touches every page. Errors: errno.
int Populate(uint8_t* host, uint64_t size, uint64_t page_bytes) {
  if (madvise(host, size, MADV_POPULATE_WRITE) == 0) return 0;
  if (errno != EINVAL) return errno;  // EINVAL: an older kernel
  for (uint64_t offset = 0; offset < size; offset += page_bytes) {
    *reinterpret_cast<volatile uint8_t*>(host + offset) = 0;
  }
  return 0;
}

}  // namespace

Result<std::shared_ptr<RamBlock>> RamBlock::Create(const std::string& name, uint64_t size_bytes,
                                                   const RamOptions& options) {
  uint64_t page_bytes = PageBytes(options.huge_pages);
  VERIFY(size_bytes != 0 && size_bytes % kPageSize == 0);
  if (size_bytes % page_bytes != 0) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("the size of memory '{}' must be a multiple of {} MiB with these huge pages",
                    name, page_bytes / kMiB));
  }
  if (options.prealloc && !IsHugetlb(options) && size_bytes > HostAvailableBytes()) {
    return Fail(ErrorCode::kNoSpace,
                fmt::format("memory '{}' wants {} MiB at once and the host has {} MiB available; "
                            "give the machine less "
                            "memory, or don't preallocate it",
                            name, size_bytes / kMiB, HostAvailableBytes() / kMiB));
  }

  std::shared_ptr<RamBlock> block(new RamBlock);
  block->name_ = name;
  block->size_ = size_bytes;
  block->dirty_ = std::make_unique<DirtyBitmap>(size_bytes);
  if (options.shared || IsHugetlb(options)) {
    auto fd = CreateMemFd(name.c_str(), size_bytes, HugeFlags(options));
    if (!fd) {
      if (IsHugetlb(options)) return Fail(NoMemory(name, size_bytes, options, ENOMEM));
      return Fail(std::move(fd).error());
    }
    block->fd_ = std::move(*fd);
  }

  // A reservation of addresses: guard, room to align, the memory, guard.
  uint64_t align = size_bytes >= page_bytes && page_bytes > kHuge2M ? page_bytes : kHuge2M;
  uint64_t reserve = 0;
  if (__builtin_add_overflow(size_bytes, 2 * kGuardBytes + align, &reserve)) reserve = UINT64_MAX;
  void* reservation =
      mmap(nullptr, reserve, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reservation == MAP_FAILED) return Fail(NoMemory(name, size_bytes, {}, errno));
  block->reservation_ = reservation;
  block->reservation_size_ = reserve;
  auto start = reinterpret_cast<uintptr_t>(reservation) + kGuardBytes;
  auto* host = reinterpret_cast<uint8_t*>((start + align - 1) / align * align);

  int flags = MAP_FIXED | (block->fd_ ? (options.shared ? MAP_SHARED : MAP_PRIVATE)
                                      : MAP_PRIVATE | MAP_ANONYMOUS);
  if (mmap(host, size_bytes, PROT_READ | PROT_WRITE, flags, block->fd_.get(), 0) == MAP_FAILED) {
    return Fail(NoMemory(name, size_bytes, options, errno));
  }
  block->host_ = host;
  if (options.huge_pages == RamOptions::HugePages::kTransparent)
    madvise(host, size_bytes, MADV_HUGEPAGE);
  madvise(host, size_bytes, MADV_DONTDUMP);
  if (options.prealloc) {
    if (int error = Populate(host, size_bytes, page_bytes)) {
      return Fail(NoMemory(name, size_bytes, options, error));
    }
  }
  block->taken_.assign((size_bytes + kTakenBytes - 1) / kTakenBytes,
                       options.prealloc || IsHugetlb(options) ? 1 : 0);
  return block;
}

// An error is none of ours: the host's, which then gives pages one by one, or an older kernel's.
void RamBlock::Take(uint64_t chunk) {
  __atomic_store_n(&taken_[chunk], uint8_t{1}, __ATOMIC_RELAXED);
  const uint64_t begin = chunk * kTakenBytes;
  madvise(host_ + begin, std::min(kTakenBytes, size_ - begin), MADV_POPULATE_WRITE);
}

RamBlock::~RamBlock() {
  if (reservation_) munmap(reservation_, reservation_size_);
}

}  // namespace kvartz
