// blkdebug: requests fail from an event on, by states.
#include <cerrno>

#include "block/test_disk.h"

namespace kvartz::block {
namespace {

class FaultTest : public testing::Test {
 protected:
  std::string Open(const std::string& rules, const std::string& format = "qcow2") {
    std::string path = dir_.path() + "/a." + format;
    if (access(path.c_str(), F_OK) != 0) {
      EXPECT_EQ(disk_.Create(path, "size=1M", format), "");
    }
    Options options = Options::Parse("driver=" + format +
                                     ",file.driver=blkdebug,file.image.driver=file,"
                                     "file.image.filename=" +
                                     path + rules)
                          .value();
    Result<NodePtr> node = disk_.InFiber([&] { return OpenNode(disk_.env(), std::move(options)); });
    if (!node) return node.error().what;
    disk_.node = *node;
    return "";
  }
  static std::string Rule(const std::string& kind, int index, const std::string& words) {
    std::string text, rest = words;
    for (size_t at = 0; at < rest.size();) {
      size_t end = std::min(rest.find(' ', at), rest.size());
      text += ",file." + kind + "." + std::to_string(index) + "." + rest.substr(at, end - at);
      at = end + 1;
    }
    return text;
  }
  int Write(uint64_t offset = 0) { return disk_.Write(offset, std::string(4096, 'x')); }

  TempDir dir_;
  std::unique_ptr<EventLoop> loop_ = MakeLoop();
  TestDisk disk_{*loop_};
};

TEST_F(FaultTest, FailsFromAnEventOn) {
  for (const char* format : {"raw", "qcow2"}) {
    ASSERT_EQ(Open(Rule("inject-error", 0, "event=write_aio errno=28 once=on"), format), "");
    EXPECT_EQ(Write(), -ENOSPC) << format;
    EXPECT_EQ(Write(), 0) << format;
    EXPECT_EQ(disk_.Close(), "");
  }
  // Until something else happens.
  ASSERT_EQ(Open(Rule("inject-error", 0, "event=read_aio iotype=read") +
                     Rule("inject-error", 1, "event=write_aio iotype=flush"),
                 "raw"),
            "");
  std::string data(512, '?');
  EXPECT_EQ(ReadWrite(*loop_, *disk_.node, Request::Kind::kRead, 0, data), -EIO);
  EXPECT_EQ(ReadWrite(*loop_, *disk_.node, Request::Kind::kRead, 0, data), -EIO);
  EXPECT_EQ(Write(), 0);
  EXPECT_EQ(disk_.Flush(), -EIO);
  disk_.node.reset();
}

TEST_F(FaultTest, StatesFollowEvents) {
  ASSERT_EQ(Open(Rule("set-state", 0, "event=write_aio state=1 new_state=2") +
                     Rule("set-state", 1, "event=write_aio state=2 new_state=3") +
                     Rule("inject-error", 0, "event=write_aio state=2 once=on"),
                 "raw"),
            "");
  EXPECT_EQ(Write(), 0);
  EXPECT_EQ(Write(), -EIO);
  EXPECT_EQ(Write(), 0);
  EXPECT_EQ(Write(), 0);
  EXPECT_EQ(disk_.Close(), "");
}

// Each of these is passed when a new image is written to and flushed; what fails then, may fail,
// and leaves a sound image.
TEST_F(FaultTest, FormatsTellOfTheirTables) {
  for (const char* event : {"cluster_alloc iotype=write", "l2_update", "refblock_update",
                            "l1_update", "flush_to_disk", "pwritev", "pwritev_done"}) {
    unlink((dir_.path() + "/a.qcow2").c_str());
    ASSERT_EQ(Open(Rule("inject-error", 0, std::string("event=") + event + " once=on")), "");
    int failed = 0;
    for (int i = 0; i < 3; i++) {
      failed += Write(static_cast<uint64_t>(i) << 18) != 0;
      failed += disk_.Flush() != 0;
    }
    EXPECT_EQ(failed, 1) << event;
    EXPECT_EQ(disk_.Close(), "") << event;
    ASSERT_EQ(disk_.Open(dir_.path() + "/a.qcow2"), "") << event;
    CheckResult result;
    disk_.Check(Repair::kNone, &result);
    EXPECT_EQ(result.corruptions, 0u) << event;
    EXPECT_EQ(disk_.Close(), "");
  }
}

TEST_F(FaultTest, RefusesWhatItDoesNotKnow) {
  EXPECT_NE(Open(Rule("inject-error", 0, "event=nonesuch")).find("event=nonesuch; there are none,"),
            std::string::npos);
  EXPECT_EQ(Open(Rule("set-state", 0, "event=none")),
            "file: set-state needs 'event' and 'new_state'");
  EXPECT_EQ(Open(",file.config=x"), "file: not supported yet: blkdebug's config=");
  EXPECT_NE(Open(Rule("inject-error", 0, "event=none iotype=x")).find("iotype=x: it is read"),
            std::string::npos);
}

}  // namespace
}  // namespace kvartz::block
