#include "cpu/x86/interp/block_cache.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

namespace kvartz::cpu::x86 {
namespace {

TEST(BlockCache, NoMemoryIsAnError) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        rlimit none = {};
        setrlimit(RLIMIT_AS, &none);
        auto cache = BlockCache::Create(FeatureSet::All());
        if (!cache) fprintf(stderr, "%s\n", cache.error().what.c_str());
        _exit(cache ? 1 : 0);
      },
      testing::ExitedWithCode(0), "decoded code: Cannot allocate memory");
}

}  // namespace
}  // namespace kvartz::cpu::x86
