#include "block/graph.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "block/test_disk.h"

namespace kvartz::block {
namespace {

using testing::HasSubstr;

class GraphTest : public testing::Test {
 protected:
  TempDir dir_;
  std::unique_ptr<EventLoop> loop_ = MakeLoop();
  TestDisk disk_{*loop_};
};

TEST_F(GraphTest, FormatsAreFoundOutAndOptionsGoDown) {
  std::string path = dir_.path() + "/a";
  ASSERT_EQ(disk_.Create(path, "size=1M"), "");
  ASSERT_EQ(disk_.Open(path, ""), "");
  EXPECT_STREQ(disk_.node->driver(), "qcow2");
  EXPECT_STREQ(disk_.node->file()->driver(), "file");
  disk_.Close();
  ASSERT_EQ(disk_.Open("json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"" +
                           path + "\"}}",
                       ""),
            "");
  EXPECT_EQ(disk_.node->size_bytes(), kMiB);
  disk_.Close();
  EXPECT_THAT(
      disk_.Open("json:{\"driver\":\"qcow2\",\"colour\":1,\"file.filename\":\"" + path + "\"}", ""),
      HasSubstr("qcow2 has no option 'colour'"));
  EXPECT_THAT(disk_.Open("gopher://x/y", ""), HasSubstr("unknown protocol 'gopher'"));
  EXPECT_THAT(disk_.Create(path, "size=1M,cluster_sise=4k"),
              HasSubstr("did you mean 'cluster_size'?"));
}

TEST_F(GraphTest, StatusTellsTheLayerAndHoles) {
  std::string base = dir_.path() + "/base", top = dir_.path() + "/top";
  ASSERT_EQ(disk_.Create(base, "size=512k"), "");
  ASSERT_EQ(disk_.Open(base), "");
  EXPECT_EQ(disk_.Write(65536, std::string(65536, 'b')), 0);
  disk_.Close();
  ASSERT_EQ(disk_.Create(top, "size=1M,backing_file=base,backing_fmt=qcow2"), "");
  ASSERT_EQ(disk_.Open(top), "");
  EXPECT_EQ(disk_.Write(0, std::string(65536, 't')), 0);
  EXPECT_EQ(disk_.WriteZeroes(131072, 65536, true), 0);
  auto status = [&](uint64_t offset) {
    auto found =
        disk_.InFiber([&] { return StatusAbove(*disk_.node, nullptr, offset, kMiB - offset); });
    EXPECT_TRUE(found);
    return *found;
  };
  ChainExtent at = status(0);
  EXPECT_TRUE(at.depth == 0 && at.extent.data && at.extent.has_offset);
  EXPECT_EQ(at.extent.length, 65536u);
  at = status(65536);
  EXPECT_TRUE(at.depth == 1 && at.extent.data && !at.extent.zero);
  EXPECT_EQ(at.extent.length, 65536u);
  at = status(131072);
  EXPECT_TRUE(at.depth == 0 && at.extent.zero && !at.extent.data);
  at = status(600 << 10);  // behind the end of the base
  EXPECT_TRUE(at.extent.zero);
  EXPECT_EQ(at.extent.length, kMiB - (600 << 10));
}

TEST_F(GraphTest, RawFilesTellTheirHoles) {
  std::string path = dir_.File("a", kMiB);
  ASSERT_EQ(disk_.Open(path, "raw"), "");
  EXPECT_EQ(disk_.Write(524288, std::string(65536, 'x')), 0);
  auto first = disk_.InFiber([&] { return disk_.node->Status(0, kMiB); });
  ASSERT_TRUE(first);
  EXPECT_TRUE(first->zero);
  EXPECT_EQ(first->length, 524288u);
  auto data = disk_.InFiber([&] { return disk_.node->Status(524288, 524288); });
  ASSERT_TRUE(data);
  EXPECT_TRUE(data->data && !data->zero);
  EXPECT_EQ(data->offset, 524288u);
  EXPECT_EQ(disk_.Resize(2 * kMiB, Preallocation::kFull), "");
  EXPECT_EQ(disk_.node->size_bytes(), 2 * kMiB);
  EXPECT_EQ(disk_.Read(2 * kMiB - 512, 512), std::string(512, '\0'));
}

TEST_F(GraphTest, AnImageIsReopenedForWritingAndBack) {
  std::string path = dir_.path() + "/a";
  ASSERT_EQ(disk_.Create(path, "size=1M"), "");
  ASSERT_EQ(disk_.Open(path, "qcow2", {.read_only = true}), "");
  EXPECT_EQ(disk_.Write(0, std::string(512, 'x')), -EROFS);
  EXPECT_EQ(TestDisk::Text(disk_.InFiber([&] { return disk_.node->SetReadOnly(false); })), "");
  EXPECT_EQ(disk_.Write(0, std::string(512, 'x')), 0);
  EXPECT_EQ(TestDisk::Text(disk_.InFiber([&] { return disk_.node->SetReadOnly(true); })), "");
  EXPECT_EQ(disk_.Write(0, std::string(512, 'x')), -EROFS);
  EXPECT_EQ(disk_.Read(0, 512), std::string(512, 'x'));
  EXPECT_EQ(disk_.Check(), "");
}

TEST_F(GraphTest, DirectIoWorksBelowAFormat) {
  std::string path = dir_.path() + "/a";
  ASSERT_EQ(disk_.Create(path, "size=4M"), "");
  ASSERT_EQ(disk_.Open(path, "qcow2", {.cache_direct = true}), "");
  std::string data(100 << 10, 'd');
  EXPECT_EQ(disk_.Write(8192, data), 0);
  EXPECT_EQ(disk_.WriteCompressed(kMiB, std::string(131072, 'c')), 0);
  auto made = disk_.InFiber([&] { return disk_.node->snapshots()->Create({.name = "s"}); });
  EXPECT_TRUE(made) << made.error().what;
  EXPECT_EQ(disk_.Read(8192, data.size()), data);
  EXPECT_EQ(disk_.Read(kMiB, 131072), std::string(131072, 'c'));
  EXPECT_EQ(disk_.Check(), "");
}

}  // namespace
}  // namespace kvartz::block
