#include "block/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvartz::block {
namespace {

using testing::HasSubstr;

TEST(Options, SizesAsPeopleWriteThem) {
  EXPECT_EQ(ParseSize("512").value(), 512u);
  EXPECT_EQ(ParseSize("1k").value(), 1024u);
  EXPECT_EQ(ParseSize("1.5G").value(), 1610612736u);
  EXPECT_EQ(ParseSize("64T").value(), 64ull << 40);
  EXPECT_EQ(ParseSize("0x200").value(), 512u);
  for (const char* bad : {"", "k", "1x", "-1", "1.5", "99999999999E", "1kk"})
    EXPECT_FALSE(ParseSize(bad)) << bad;
}

TEST(Options, ListsAndJsonMeanTheSame) {
  Options list =
      Options::Parse("driver=qcow2,file.driver=file,file.filename=a,,b,read-only").value();
  Options json = Options::ParseJson(R"({"driver":"qcow2","read-only":true,
      "file":{"driver":"file","filename":"a,b"}})")
                     .value();
  for (Options* options : {&list, &json}) {
    EXPECT_EQ(options->Take("driver", ""), "qcow2");
    EXPECT_TRUE(options->HasBelow("file"));
    Options file = options->TakeBelow("file");
    EXPECT_EQ(file.Take("filename", ""), "a,b");
    EXPECT_EQ(options->TakeBool("read-only", false).value(), true);
    EXPECT_TRUE(options->RefuseRest("x"));
    EXPECT_EQ(file.RefuseRest("file", {"filename"}).error().what, "file has no option 'driver'");
  }
  EXPECT_THAT(Options::Parse("cluster_sise=1")->RefuseRest("qcow2", {"cluster_size"}).error().what,
              HasSubstr("did you mean 'cluster_size'?"));
  EXPECT_FALSE(Options::ParseJson("[1]"));
  EXPECT_FALSE(Options::ParseJson("{"));
}

}  // namespace
}  // namespace kvartz::block
