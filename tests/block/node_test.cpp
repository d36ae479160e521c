// What each node does before its requests: thresholds, discards that are ignored.
#include "block/node.h"

#include <sys/stat.h>

#include "block/test_disk.h"

namespace kvartz::block {
namespace {

uint64_t Allocated(const std::string& path) {
  struct stat st = {};
  EXPECT_EQ(stat(path.c_str(), &st), 0);
  return static_cast<uint64_t>(st.st_blocks) * 512;
}

TEST(NodeTest, GivesSpaceBackWhereItsUserSaysSo) {
  TempDir dir(TempDir::Place::kMemory);
  auto loop = MakeLoop();
  for (const char* format : {"raw", "qcow2"}) {
    for (bool unmap : {false, true}) {
      TestDisk disk(*loop);
      std::string path = dir.path() + "/" + format + (unmap ? "1" : "0");
      ASSERT_EQ(disk.Create(path, "size=4M", format), "");
      ASSERT_EQ(disk.Open(path, format, {.discard_unmap = unmap}), "");
      EXPECT_EQ(disk.Write(0, std::string(4 * kMiB, 'x')), 0);
      uint64_t full = Allocated(path);
      EXPECT_EQ(disk.Discard(0, kMiB), 0);
      EXPECT_EQ(disk.WriteZeroes(kMiB, kMiB, true), 0);
      EXPECT_EQ(disk.Flush(), 0);
      EXPECT_EQ(disk.Read(kMiB, 4), std::string(4, '\0'));
      if (!unmap) {
        EXPECT_EQ(disk.Read(0, 4), "xxxx");
      }
      EXPECT_EQ(disk.Close(), "");
      uint64_t given_back = full - std::min(full, Allocated(path));
      EXPECT_EQ(given_back >= 2 * kMiB - 65536, unmap) << format << " " << given_back;
    }
  }
}

TEST(NodeTest, TellsOnceOfAWriteBeyondItsThreshold) {
  TempDir dir;
  auto loop = MakeLoop();
  TestDisk disk(*loop);
  ASSERT_EQ(disk.Create(dir.path() + "/a", "size=1M", "raw"), "");
  ASSERT_EQ(disk.Open(dir.path() + "/a", "raw"), "");
  std::vector<uint64_t> exceeded;
  disk.node->SetWriteThreshold(65536, [&](uint64_t bytes) { exceeded.push_back(bytes); });
  EXPECT_EQ(disk.node->write_threshold(), 65536u);
  EXPECT_EQ(disk.Write(0, std::string(65536, 'x')), 0);
  EXPECT_EQ(disk.Read(65536, 512), std::string(512, '\0'));
  EXPECT_TRUE(exceeded.empty());
  EXPECT_EQ(disk.Write(65024, std::string(1024, 'x')), 0);
  EXPECT_EQ(disk.WriteZeroes(kMiB - 512, 512, false), 0);
  EXPECT_EQ(exceeded, std::vector<uint64_t>{512});
  EXPECT_EQ(disk.node->write_threshold(), 0u);
  EXPECT_EQ(disk.node->highest_write(), kMiB);
  disk.node->SetWriteThreshold(1, [&](uint64_t bytes) { exceeded.push_back(bytes); });
  disk.node->SetWriteThreshold(0, nullptr);
  EXPECT_EQ(disk.Write(0, std::string(512, 'x')), 0);
  EXPECT_EQ(exceeded.size(), 1u);
}

}  // namespace
}  // namespace kvartz::block
