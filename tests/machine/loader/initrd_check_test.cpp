// Archives made by cpio, zstd, xz and lz4, cut off at various places.
#include "machine/loader/initrd_check.h"

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "machine/temp_file.h"

namespace kvartz::machine {
namespace {

using Bytes = std::vector<uint8_t>;

// A newc header, name and contents.
Bytes Entry(const std::string& name, const std::string& data) {
  std::string header = fmt::format("070701{:08x}{:08x}{:032x}{:08x}{:032x}{:08x}{:08x}", 1, 0100644,
                                   0, data.size(), 0, name.size() + 1, 0);
  Bytes out(header.begin(), header.end());
  out.insert(out.end(), name.c_str(), name.c_str() + name.size() + 1);
  while (out.size() % 4) out.push_back(0);
  out.insert(out.end(), data.begin(), data.end());
  while (out.size() % 4) out.push_back(0);
  return out;
}

Bytes Archive() {
  Bytes out = Entry("a/file", std::string(10001, 'x')), trailer = Entry("TRAILER!!!", "");
  out.insert(out.end(), trailer.begin(), trailer.end());
  return out;
}

std::string Check(const Bytes& bytes) {
  test::TempFile file(bytes);
  Result<> checked = CheckInitrd(*BootFile::Open("initrd", file.path()));
  return checked ? "" : checked.error().what;
}

void CheckAllCuts(const Bytes& whole) {
  EXPECT_EQ(Check(whole), "");
  for (size_t size : {whole.size() - 9, whole.size() / 2, size_t{20}}) {
    EXPECT_NE(Check(Bytes(whole.begin(), whole.begin() + size)).find("truncated"),
              std::string::npos)
        << size << " of " << whole.size();
  }
}

TEST(InitrdCheck, Cpio) {
  Bytes archive = Archive();
  CheckAllCuts(archive);
  Bytes two = archive;
  two.resize((two.size() + 511) & ~511ull);
  two.insert(two.end(), archive.begin(), archive.end());
  EXPECT_EQ(Check(two), "");
  EXPECT_NE(Check(Bytes(two.begin(), two.end() - 200)).find("truncated"), std::string::npos);
}

class Compressed : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, Compressed,
                         testing::Values("zstd -q", "zstd -q --no-check -19", "xz --check=crc32",
                                         "lz4 -q -l"));

TEST_P(Compressed, AllCuts) {
  std::string tool = GetParam().substr(0, GetParam().find(' '));
  if (std::system(("command -v " + tool + " > /dev/null 2>&1").c_str()) != 0)
    GTEST_SKIP() << tool << " is not installed";
  // Incompressible enough to have several blocks.
  Bytes data = Archive();
  uint32_t random = 1;
  for (int i = 0; i < 300000; i++) data.push_back((random = random * 1664525 + 1013904223) >> 24);
  test::TempFile plain(data);
  std::string packed = plain.path() + ".packed";
  ASSERT_EQ(std::system((GetParam() + " -c " + plain.path() + " > " + packed).c_str()), 0);
  std::ifstream in(packed, std::ios::binary);
  Bytes bytes{std::istreambuf_iterator<char>(in), {}};
  std::filesystem::remove(packed);
  CheckAllCuts(bytes);
}

TEST(InitrdCheck, OthersAreTakenAsTheyAre) {
  EXPECT_EQ(Check({0x1f, 0x8b, 8, 0, 0, 0, 0, 0}), "");
  EXPECT_EQ(Check(Bytes(100, 0)), "");
  EXPECT_EQ(Check({'x'}), "");
}

}  // namespace
}  // namespace kvartz::machine
