#include "block/dirty_bitmap.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace kvartz::block {
namespace {

// Against one flag for each bit.
TEST(DirtyBitmap, DoesWhatAPlainArrayDoes) {
  std::mt19937_64 random(1);
  for (uint32_t granularity : {512u, 4096u, 65536u}) {
    uint64_t size = granularity * 70000ull + 100;
    DirtyBitmap bitmap("b", size, granularity);
    std::vector<bool> model((size + granularity - 1) / granularity);
    for (int i = 0; i < 400; i++) {
      uint64_t at = random() % size, length = random() % (random() % 8 == 0 ? size : 300000);
      uint64_t end = std::min(size, at + length);
      if (random() % 2 == 0) {
        bitmap.Set(at, length);
        for (uint64_t n = at / granularity; n * granularity < end; n++) model[n] = true;
      } else {
        bitmap.Clear(at, length);
        for (uint64_t n = (at + granularity - 1) / granularity; n < model.size(); n++) {
          if (std::min(size, (n + 1) * granularity) > end) break;
          model[n] = false;
        }
      }
      uint64_t probe = random() % size;
      EXPECT_EQ(bitmap.Test(probe), model[probe / granularity]);
      auto next = bitmap.NextDirty(probe, size);
      uint64_t n = probe / granularity;
      while (n < model.size() && !model[n]) n++;
      ASSERT_EQ(next.has_value(), n < model.size());
      if (next) {
        EXPECT_EQ(next->offset, std::max(probe, n * granularity));
        while (n < model.size() && model[n]) n++;
        EXPECT_EQ(next->offset + next->length, std::min(size, n * granularity));
      }
    }
    auto dirty = static_cast<uint64_t>(std::count(model.begin(), model.end(), true));
    EXPECT_EQ(bitmap.dirty_bytes(), dirty * granularity);
    DirtyBitmap copy("c", size, granularity);
    std::vector<uint8_t> bytes(1000);
    for (uint64_t at = 0; at < bitmap.stored_bytes(); at += bytes.size()) {
      if (bitmap.Save(at, bytes)) copy.Load(at, bytes);
    }
    for (size_t n = 0; n < model.size(); n++) ASSERT_EQ(copy.Test(n * granularity), model[n]);
    DirtyBitmap coarse("d", size, 1 << 20);
    coarse.Merge(bitmap);
    for (size_t n = 0; n < model.size(); n++) {
      ASSERT_TRUE(!model[n] || coarse.Test(n * granularity));
    }
  }
}

TEST(DirtyBitmap, WhatIsAddedByAnotherSizeIsClean) {
  DirtyBitmap bitmap("b", 1 << 20, 65536);
  bitmap.Set(0, 1 << 20);
  bitmap.Resize(512 << 10);
  EXPECT_EQ(bitmap.dirty_bytes(), 512u << 10);
  bitmap.Resize(2 << 20);
  EXPECT_EQ(bitmap.dirty_bytes(), 512u << 10);
  EXPECT_EQ(bitmap.NextClean(0), 512u << 10);
}

}  // namespace
}  // namespace kvartz::block
