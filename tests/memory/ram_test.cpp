#include "memory/ram.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <vector>

#include "memory/gpa.h"

namespace kvartz {
namespace {

using testing::HasSubstr;
constexpr uint64_t kMiB = 1 << 20;

TEST(RamBlock, IsZeroedAndSharedThroughItsDescriptor) {
  auto ram = RamBlock::Create("ram", 4 * kMiB);
  ASSERT_TRUE(ram) << ram.error().what;
  EXPECT_EQ((*ram)->size(), 4 * kMiB);
  EXPECT_EQ((*ram)->host()[12345], 0);
  ASSERT_GE((*ram)->fd(), 0);
  (*ram)->host()[4097] = 42;
  void* other = mmap(nullptr, 4 * kMiB, PROT_READ, MAP_SHARED, (*ram)->fd(), 0);
  ASSERT_NE(other, MAP_FAILED);
  EXPECT_EQ(static_cast<uint8_t*>(other)[4097], 42);
  munmap(other, 4 * kMiB);
}

// The kernel reads for us, and says what can't be.
bool CanBeRead(const uint8_t* at) {
  uint8_t byte = 0;
  const iovec ours{&byte, 1}, theirs{const_cast<uint8_t*>(at), 1};
  return process_vm_readv(getpid(), &ours, 1, &theirs, 1, 0) == 1;
}

TEST(RamBlock, NothingCanBeReachedBesideIt) {
  for (const uint64_t size : {uint64_t{4096}, 4 * kMiB}) {
    auto ram = RamBlock::Create("ram", size);
    ASSERT_TRUE(ram);
    const uint8_t* host = (*ram)->host();
    EXPECT_TRUE(CanBeRead(host));
    EXPECT_TRUE(CanBeRead(host + size - 1));
    for (const uint64_t distance : {uint64_t{1}, uint64_t{4096}, uint64_t{64} << 10, kMiB}) {
      EXPECT_FALSE(CanBeRead(host - distance)) << distance;
      EXPECT_FALSE(CanBeRead(host + size + distance - 1)) << distance;
    }
  }
}

TEST(RamBlock, NobodyCanShrinkOrGrowTheFile) {
  auto ram = RamBlock::Create("ram", kMiB);
  ASSERT_TRUE(ram);
  EXPECT_EQ(ftruncate((*ram)->fd(), 0), -1);
  EXPECT_EQ(ftruncate((*ram)->fd(), 2 * kMiB), -1);
  int seals = fcntl((*ram)->fd(), F_GET_SEALS);
  EXPECT_EQ(seals & (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL),
            F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
}

TEST(RamBlock, AnonymousHasNoDescriptor) {
  auto ram = RamBlock::Create("ram", kPageSize,
                              {.huge_pages = RamOptions::HugePages::kOff, .shared = false});
  ASSERT_TRUE(ram);
  EXPECT_EQ((*ram)->fd(), -1);
  (*ram)->host()[kPageSize - 1] = 1;
}

TEST(RamBlockDeathTest, AnOverrunFaults) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  auto ram = RamBlock::Create("ram", kPageSize);
  ASSERT_TRUE(ram);
  volatile uint8_t* host = (*ram)->host();
  // By signal; a sanitizer reports it and exits instead.
  EXPECT_DEATH(host[kPageSize] = 1, "");
  EXPECT_DEATH(host[-1] = 1, "");
}

TEST(RamBlock, PreallocationTouchesEveryPage) {
  auto ram = RamBlock::Create("ram", kMiB, {.prealloc = true});
  ASSERT_TRUE(ram) << ram.error().what;
  std::vector<unsigned char> resident(kMiB / kPageSize);
  ASSERT_EQ(mincore((*ram)->host(), kMiB, resident.data()), 0);
  for (unsigned char page : resident) EXPECT_EQ(page & 1, 1);
}

TEST(RamBlock, TooMuchIsRefusedWithTheFigures) {
  auto huge = RamBlock::Create("pc.ram", 1ull << 44, {.prealloc = true});
  ASSERT_FALSE(huge);
  EXPECT_EQ(huge.error().code, ErrorCode::kNoSpace);
  EXPECT_THAT(huge.error().what,
              HasSubstr("memory 'pc.ram' wants 16777216 MiB at once and the host has "));
  // More than the address space.
  auto beyond = RamBlock::Create("pc.ram", 1ull << 62);
  ASSERT_FALSE(beyond);
  EXPECT_THAT(beyond.error().what, HasSubstr("for memory 'pc.ram'"));
}

TEST(RamBlock, HugePagesThatTheHostLacksAreRefused) {
  auto odd = RamBlock::Create("ram", 3 * kMiB, {.huge_pages = RamOptions::HugePages::kHugetlb2M});
  ASSERT_FALSE(odd);
  EXPECT_THAT(odd.error().what, HasSubstr("must be a multiple of 2 MiB"));
  auto many =
      RamBlock::Create("ram", 1ull << 36, {.huge_pages = RamOptions::HugePages::kHugetlb2M});
  ASSERT_FALSE(many);
  EXPECT_THAT(many.error().what, HasSubstr("needs 32768 huge pages of 2 MiB"));
}

}  // namespace
}  // namespace kvartz
