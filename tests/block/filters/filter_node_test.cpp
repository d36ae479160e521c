// What all filters have in common.
#include "block/filters/filter_node.h"

#include "block/test_disk.h"

namespace kvartz::block {
namespace {

TEST(FilterNodeTest, GrowsWithItsFile) {
  TempDir dir;
  auto loop = MakeLoop();
  TestDisk disk(*loop);
  std::string path = dir.path() + "/a";
  ASSERT_EQ(disk.Create(path, "size=64M"), "");
  for (const char* filter : {"copy-on-read", "blkdebug"}) {
    std::string child = filter == std::string("blkdebug") ? "image" : "file";
    Options options = Options::Parse("driver=qcow2,file.driver=" + std::string(filter) + ",file." +
                                     child + ".driver=file,file." + child + ".filename=" + path)
                          .value();
    disk.node = disk.InFiber([&] { return OpenNode(disk.env(), std::move(options)).value(); });
    char fill = filter[0];
    for (uint64_t at = 0; at < 32 * kMiB; at += 4 * kMiB)
      EXPECT_EQ(disk.Write(at + (fill == 'b' ? kMiB : 0), std::string(kMiB, fill)), 0) << at;
    EXPECT_EQ(disk.WriteZeroes(40 * kMiB, kMiB, false), 0);
    EXPECT_EQ(disk.Read(28 * kMiB, 4), fill == 'b' ? std::string(4, 'c') : std::string(4, fill));
    EXPECT_EQ(disk.node->file()->size_bytes(), disk.node->file()->file()->size_bytes());
    EXPECT_EQ(disk.Close(), "");
  }
  ASSERT_EQ(disk.Open(path), "");
  EXPECT_EQ(disk.Check(), "");
  EXPECT_EQ(disk.Read(29 * kMiB, 4), "bbbb");
}

}  // namespace
}  // namespace kvartz::block
