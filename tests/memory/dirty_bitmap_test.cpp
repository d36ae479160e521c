#include "memory/dirty_bitmap.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

#include "base/sync.h"
#include "memory/gpa.h"

namespace kvartz {
namespace {

std::vector<uint64_t> Pages(DirtyBitmap& bitmap) {
  std::vector<uint64_t> pages;
  bitmap.Collect([&](uint64_t page) { pages.push_back(page); });
  return pages;
}

TEST(DirtyBitmap, MarksNothingWhileItIsOff) {
  DirtyBitmap bitmap(100 * kPageSize);
  bitmap.Mark(0, kPageSize);
  EXPECT_TRUE(Pages(bitmap).empty());
  bitmap.SetEnabled(true);
  EXPECT_TRUE(Pages(bitmap).empty());
}

TEST(DirtyBitmap, CollectsEachPageOnce) {
  DirtyBitmap bitmap(200 * kPageSize);
  bitmap.SetEnabled(true);
  bitmap.Mark(kPageSize - 1, 2);                // 0 and 1
  bitmap.Mark(5 * kPageSize, 1);                // 5
  bitmap.Mark(5 * kPageSize + 100, 0);          // nothing
  bitmap.Mark(62 * kPageSize, 68 * kPageSize);  // over two word borders
  bitmap.Mark(199 * kPageSize, kPageSize);
  std::vector<uint64_t> expected = {0, 1, 5};
  for (uint64_t page = 62; page < 130; page++) expected.push_back(page);
  expected.push_back(199);
  EXPECT_EQ(Pages(bitmap), expected);
  EXPECT_TRUE(Pages(bitmap).empty());
}

TEST(DirtyBitmap, EnablingStartsClean) {
  DirtyBitmap bitmap(10 * kPageSize);
  bitmap.SetEnabled(true);
  bitmap.Mark(0, 1);
  bitmap.SetEnabled(false);
  bitmap.SetEnabled(true);
  EXPECT_TRUE(Pages(bitmap).empty());
}

TEST(DirtyBitmap, MergesALogAtAnyPage) {
  for (uint64_t first : {0u, 1u, 60u, 64u, 100u}) {
    DirtyBitmap bitmap(300 * kPageSize);
    bitmap.SetEnabled(true);
    // Bits 0, 63, 64 and 69 of 70; what is beyond the count is ignored.
    uint64_t log[] = {1ull | 1ull << 63, 1ull | 1ull << 5 | 1ull << 6};
    bitmap.Merge(log, first, 70);
    EXPECT_EQ(Pages(bitmap), (std::vector<uint64_t>{first, first + 63, first + 64, first + 69}))
        << first;
  }
  DirtyBitmap bitmap(70 * kPageSize);
  bitmap.SetEnabled(true);
  uint64_t ones[] = {~0ull, ~0ull};
  bitmap.Merge(ones, 60, 128);  // reaches beyond the end
  EXPECT_EQ(Pages(bitmap).size(), 10u);
}

TEST(DirtyBitmap, NoMarkIsLostBetweenThreads) {
  constexpr uint64_t kPages = 4096;
  DirtyBitmap bitmap(kPages * kPageSize);
  bitmap.SetEnabled(true);
  std::set<uint64_t> seen;
  {
    std::vector<Thread> writers;
    for (uint64_t t = 0; t < 2; t++) {
      writers.emplace_back("writer", [&, t] {
        for (uint64_t page = t; page < kPages; page += 2) bitmap.Mark(page * kPageSize, 8);
      });
    }
    for (int i = 0; i < 50; i++) bitmap.Collect([&](uint64_t page) { seen.insert(page); });
  }
  bitmap.Collect([&](uint64_t page) { seen.insert(page); });
  EXPECT_EQ(seen.size(), kPages);
}

}  // namespace
}  // namespace kvartz
