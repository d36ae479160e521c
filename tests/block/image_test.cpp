// Disk images on files: data and errors.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <random>
#include <vector>

#include "block/image_helpers.h"
#include "block/sync_io.h"

namespace kvartz::block {
namespace {

using testing::HasSubstr;
struct Variant {
  EventLoop::Backend backend;
  CacheMode cache;
  const char* name;
};

class ImageTest : public testing::TestWithParam<Variant> {
 protected:
  void SetUp() override {
    auto loop = EventLoop::Create(GetParam().backend);
    if (!loop) GTEST_SKIP() << loop.error().what;
    loop_ = std::move(*loop);
  }
  std::shared_ptr<Node> Open(const std::string& path, bool read_only = false) {
    auto node = OpenImage(
        *loop_, {.path = path, .format = "raw", .cache = GetParam().cache, .read_only = read_only});
    if (!node && node.error().code == ErrorCode::kUnsupported) return nullptr;
    EXPECT_TRUE(node) << node.error().what;
    return node ? *node : nullptr;
  }

  TempDir dir_;
  std::unique_ptr<EventLoop> loop_;
};

#define OPEN_OR_SKIP(name, ...)                   \
  std::shared_ptr<Node> name = Open(__VA_ARGS__); \
  if (!name) GTEST_SKIP() << "the file system of /tmp has no direct I/O"

TEST_P(ImageTest, RandomRequestsAgreeWithMemory) {
  OPEN_OR_SKIP(node, dir_.File("a.img", kMiB));
  ASSERT_EQ(node->size_bytes(), kMiB);
  std::mt19937 random(1);
  auto below = [&](uint64_t n) { return random() % n; };
  std::string reference(kMiB, '\0');
  std::vector<bool> known(kMiB / 512, true);
  const uint64_t unit = std::max<uint64_t>(512, node->limits().request_alignment);
  for (int round = 0; round < 400; round++) {
    uint64_t sectors = 1 + below(below(4) == 0 ? 300 : 16);
    uint64_t offset = below(kMiB / unit) * unit;
    uint64_t length = std::min(sectors * unit, kMiB - offset);
    // Buffers cut and aligned any way that a guest may choose.
    std::string arena(length + 64, static_cast<char>('a' + round % 26));
    std::vector<iovec> iov;
    uint64_t skew = below(2) ? below(16) : 0;
    for (uint64_t at = 0; at < length;) {
      uint64_t part = std::min(length - at, below(3) == 0 ? 1 + below(700) : (1 + below(8)) * 512);
      iov.push_back({arena.data() + skew + at, part});
      at += part;
    }
    Request request = {.offset = offset,
                       .length = length,
                       .iov = iov.data(),
                       .iov_count = static_cast<unsigned>(iov.size())};
    request.fua = below(4) == 0;
    request.unmap = below(2) == 0;
    auto sector = static_cast<size_t>(offset / 512),
         end = static_cast<size_t>((offset + length) / 512);
    switch (below(6)) {
      case 0:
      case 1:
        request.kind = Request::Kind::kWrite;
        ASSERT_EQ(Do(*loop_, *node, request), 0);
        reference.replace(offset, length, arena, skew, length);
        std::fill(known.begin() + static_cast<ptrdiff_t>(sector),
                  known.begin() + static_cast<ptrdiff_t>(end), true);
        break;
      case 2:
        request.kind = Request::Kind::kWriteZeroes;
        ASSERT_EQ(Do(*loop_, *node, request), 0);
        reference.replace(offset, length, length, '\0');
        std::fill(known.begin() + static_cast<ptrdiff_t>(sector),
                  known.begin() + static_cast<ptrdiff_t>(end), true);
        break;
      case 3:
        request.kind = Request::Kind::kDiscard;
        ASSERT_EQ(Do(*loop_, *node, request), 0);
        std::fill(known.begin() + static_cast<ptrdiff_t>(sector),
                  known.begin() + static_cast<ptrdiff_t>(end), false);
        break;
      default:
        ASSERT_EQ(Do(*loop_, *node, request), 0);
        for (size_t s = sector; s < end; s++) {
          if (!known[s]) continue;
          ASSERT_EQ(arena.substr(skew + s * 512 - offset, 512), reference.substr(s * 512, 512));
        }
    }
  }
  ASSERT_EQ(Do(*loop_, *node, {.kind = Request::Kind::kFlush}), 0);
  // What another reader of the file sees.
  std::ifstream file(node->name(), std::ios::binary);
  std::string back(kMiB, '?');
  file.read(back.data(), static_cast<std::streamsize>(back.size()));
  ASSERT_EQ(file.gcount(), static_cast<std::streamsize>(kMiB));
  for (size_t s = 0; s < known.size(); s++) {
    if (!known[s]) continue;
    ASSERT_EQ(back.substr(s * 512, 512), reference.substr(s * 512, 512)) << s;
  }
}

TEST_P(ImageTest, LengthIsRoundedUpToASectorAndTheRestReadsAsZeros) {
  std::string path = dir_.File("odd.img", 0);
  std::ofstream(path) << std::string(1000, 'x');
  OPEN_OR_SKIP(node, path);
  uint64_t unit = std::max<uint64_t>(512, node->limits().request_alignment);
  uint64_t size = (1000 + unit - 1) / unit * unit;
  ASSERT_EQ(node->size_bytes(), size);
  std::string data(size, '?');
  ASSERT_EQ(ReadWrite(*loop_, *node, Request::Kind::kRead, 0, data), 0);
  EXPECT_EQ(data, std::string(1000, 'x') + std::string(size - 1000, '\0'));
  data.assign(size, 'y');
  ASSERT_EQ(ReadWrite(*loop_, *node, Request::Kind::kWrite, 0, data), 0);
  std::string back(size, '?');
  ASSERT_EQ(ReadWrite(*loop_, *node, Request::Kind::kRead, 0, back), 0);
  EXPECT_EQ(back, data);
}

TEST_P(ImageTest, MoreBuffersThanOneHostCallTakes) {
  OPEN_OR_SKIP(node, dir_.File("a.img", 4 * kMiB));
  constexpr size_t kParts = 2500;
  std::string data(kParts * 512, '\0');
  for (size_t i = 0; i < data.size(); i++) data[i] = static_cast<char>(i / 512 * 7 + i);
  data.resize(data.size() / 4096 * 4096);
  auto run = [&](Request::Kind kind, std::string& buffer) {
    std::vector<iovec> iov;
    for (size_t at = 0; at < buffer.size(); at += 512)
      iov.push_back({buffer.data() + at, std::min<size_t>(512, buffer.size() - at)});
    iov.insert(iov.begin() + 1, iovec{nullptr, 0});
    return Do(*loop_, *node,
              {.kind = kind,
               .offset = 4096,
               .length = buffer.size(),
               .iov = iov.data(),
               .iov_count = static_cast<unsigned>(iov.size())});
  };
  ASSERT_EQ(run(Request::Kind::kWrite, data), 0);
  std::string back(data.size(), '?');
  ASSERT_EQ(run(Request::Kind::kRead, back), 0);
  EXPECT_EQ(back, data);
}

TEST_P(ImageTest, RequestsThatMakeNoSenseAreRefused) {
  OPEN_OR_SKIP(node, dir_.File("a.img", kMiB));
  std::string data(4096, 'x');
  EXPECT_EQ(ReadWrite(*loop_, *node, Request::Kind::kRead, kMiB - 512, data), -EINVAL);
  EXPECT_EQ(ReadWrite(*loop_, *node, Request::Kind::kWrite, UINT64_MAX - 511, data), -EINVAL);
  EXPECT_EQ(
      Do(*loop_, *node, {.kind = Request::Kind::kDiscard, .offset = 512, .length = UINT64_MAX}),
      -EINVAL);
  iovec iov = {data.data(), 512};
  EXPECT_EQ(
      Do(*loop_, *node,
         {.kind = Request::Kind::kWrite, .offset = 0, .length = 4096, .iov = &iov, .iov_count = 1}),
      -EINVAL);
  std::string nothing;
  EXPECT_EQ(ReadWrite(*loop_, *node, Request::Kind::kRead, kMiB, nothing), 0);
}

TEST_P(ImageTest, ReadOnlyImagesAreNotWritten) {
  OPEN_OR_SKIP(node, dir_.File("a.img", kMiB), true);
  std::string data(4096, 'x');
  EXPECT_TRUE(node->read_only());
  EXPECT_EQ(ReadWrite(*loop_, *node, Request::Kind::kWrite, 0, data), -EROFS);
  EXPECT_EQ(Do(*loop_, *node, {.kind = Request::Kind::kDiscard, .length = 4096}), -EROFS);
  EXPECT_EQ(Do(*loop_, *node, {.kind = Request::Kind::kWriteZeroes, .length = 4096}), -EROFS);
  EXPECT_EQ(ReadWrite(*loop_, *node, Request::Kind::kRead, 0, data), 0);
  EXPECT_EQ(data, std::string(4096, '\0'));
  EXPECT_EQ(Do(*loop_, *node, {.kind = Request::Kind::kFlush}), 0);
}

TEST_P(ImageTest, DrainFinishesWhatIsUnderWay) {
  OPEN_OR_SKIP(node, dir_.File("a.img", kMiB));
  std::string data(4096, 'x');
  std::string back(4096, '?');
  iovec iov = {data.data(), data.size()}, back_iov = {back.data(), back.size()};
  int done = 0;
  Request requests[8];
  for (unsigned i = 0; i < 8; i++) {
    requests[i] = {.kind = i == 7 ? Request::Kind::kRead : Request::Kind::kWrite,
                   .offset = i * 4096ull,
                   .length = 4096};
    if (i == 6) requests[i].offset = kMiB;  // ends with an error, before it began
    requests[i].iov = i == 7 ? &back_iov : &iov;
    requests[i].iov_count = 1;
    requests[i].owner = &done;
    requests[i].done = [](Request* request, int) { ++*static_cast<int*>(request->owner); };
    node->Start(&requests[i]);
  }
  EXPECT_EQ(done, 0);
  node->Drain();
  EXPECT_EQ(done, 8);
  node.reset();
  loop_->RunOnce(0);  // what was posted for the errors finds nothing left to do
}

TEST_P(ImageTest, DiscardAndUnmapGiveSpaceBack) {
  std::string path = dir_.File("a.img", kMiB);
  OPEN_OR_SKIP(node, path);
  std::string data(kMiB, 'x');
  ASSERT_EQ(ReadWrite(*loop_, *node, Request::Kind::kWrite, 0, data), 0);
  ASSERT_EQ(Do(*loop_, *node, {.kind = Request::Kind::kFlush}), 0);
  auto is_zero = [&](uint64_t offset) {
    return RunInFiber(*loop_, [&] { return node->Status(offset, kMiB - offset)->zero; });
  };
  EXPECT_FALSE(is_zero(0));
  EXPECT_FALSE(is_zero(kMiB / 2));
  struct stat before, after;
  ASSERT_EQ(stat(path.c_str(), &before), 0);
  ASSERT_EQ(Do(*loop_, *node, {.kind = Request::Kind::kDiscard, .length = kMiB / 2}), 0);
  Request zeroes = {
      .kind = Request::Kind::kWriteZeroes, .unmap = true, .offset = kMiB / 2, .length = kMiB / 4};
  ASSERT_EQ(Do(*loop_, *node, zeroes), 0);
  ASSERT_EQ(stat(path.c_str(), &after), 0);
  if (after.st_blocks == before.st_blocks)
    GTEST_SKIP() << "the file system of /tmp doesn't punch holes";
  EXPECT_LE(after.st_blocks, before.st_blocks / 4 + 16);
  EXPECT_TRUE(is_zero(0));
  EXPECT_TRUE(is_zero(kMiB / 2));
  EXPECT_FALSE(is_zero(kMiB - 512));
}

INSTANTIATE_TEST_SUITE_P(
    Modes, ImageTest,
    testing::Values(
        Variant{EventLoop::Backend::kIoUring, CacheMode::kWriteback, "UringWriteback"},
        Variant{EventLoop::Backend::kIoUring, CacheMode::kNone, "UringNone"},
        Variant{EventLoop::Backend::kIoUring, CacheMode::kDirectSync, "UringDirectsync"},
        Variant{EventLoop::Backend::kEpoll, CacheMode::kWritethrough, "EpollWritethrough"},
        Variant{EventLoop::Backend::kEpoll, CacheMode::kNone, "EpollNone"},
        Variant{EventLoop::Backend::kEpoll, CacheMode::kUnsafe, "EpollUnsafe"}),
    [](const auto& variant) { return variant.param.name; });

// A block device of the host over a file, for as long as it lives.
class LoopDevice {
 public:
  LoopDevice(const std::string& path, uint32_t block_size) {
    UniqueFd control(open("/dev/loop-control", O_RDWR | O_CLOEXEC));
    UniqueFd file(open(path.c_str(), O_RDWR | O_CLOEXEC));
    int number = control ? ioctl(control.get(), LOOP_CTL_GET_FREE) : -1;
    if (number < 0) return;
    path_ = "/dev/loop" + std::to_string(number);
    fd_.Reset(open(path_.c_str(), O_RDWR | O_CLOEXEC));
    loop_config config = {};
    config.fd = static_cast<uint32_t>(file.get());
    config.block_size = block_size;
    config.info.lo_flags = LO_FLAGS_AUTOCLEAR;
    usable_ = fd_ && ioctl(fd_.get(), LOOP_CONFIGURE, &config) == 0;
  }
  bool usable() const { return usable_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  UniqueFd fd_;
  bool usable_ = false;
};

TEST(HostDevice, HasItsOwnSectorSizeWithDirectIo) {
  TempDir dir;
  std::string path = dir.File("device", 4 * kMiB);
  LoopDevice device(path, 4096);
  if (!device.usable()) GTEST_SKIP() << "the host gives no loop device";
  auto loop = MakeLoop();
  for (CacheMode cache : {CacheMode::kNone, CacheMode::kWriteback}) {
    auto node = OpenImage(*loop, {.path = device.path(), .format = "raw", .cache = cache});
    ASSERT_TRUE(node) << node.error().what;
    EXPECT_EQ((*node)->size_bytes(), 4 * kMiB);
    bool direct = cache == CacheMode::kNone;
    EXPECT_EQ((*node)->limits().request_alignment, direct ? 4096u : 1u);
    std::string data(8192, 'x'), back(8192, '?'), small(512, 'y');
    EXPECT_EQ(ReadWrite(*loop, **node, Request::Kind::kWrite, 4096, data), 0);
    EXPECT_EQ(ReadWrite(*loop, **node, Request::Kind::kWrite, 512, small), direct ? -EINVAL : 0);
    auto run = [&](Request request) { return Do(*loop, **node, request); };
    using enum Request::Kind;
    EXPECT_EQ(run({.kind = kFlush}), 0);
    EXPECT_EQ(run({.kind = kWriteZeroes, .unmap = true, .offset = 4096, .length = 4096}), 0);
    EXPECT_EQ(run({.kind = kWriteZeroes, .offset = 8192, .length = 512}), direct ? -EINVAL : 0);
    EXPECT_EQ(run({.kind = kDiscard, .offset = kMiB, .length = kMiB}), 0);
    EXPECT_EQ(run({.kind = kDiscard, .offset = 512, .length = 512}), 0);
    EXPECT_EQ(ReadWrite(*loop, **node, kRead, 4096, back), 0);
    size_t zeros = direct ? 4096 : 4096 + 512;
    EXPECT_EQ(back, std::string(zeros, '\0') + std::string(8192 - zeros, 'x'));
  }
}

TEST(RawNode, ShowsAPartOfTheFile) {
  TempDir dir;
  std::string path = dir.File("a.img", 0);
  std::ofstream(path) << std::string(1024, 'a') << std::string(1024, 'b') << std::string(1024, 'c');
  auto loop = MakeLoop();
  ImageOptions options = {.path = path, .format = "raw", .raw_offset = 1024, .raw_size = 1024};
  auto node = OpenImage(*loop, options);
  ASSERT_TRUE(node) << node.error().what;
  EXPECT_EQ((*node)->size_bytes(), 1024u);
  std::string data(1024, '?');
  ASSERT_EQ(ReadWrite(*loop, **node, Request::Kind::kRead, 0, data), 0);
  EXPECT_EQ(data, std::string(1024, 'b'));
  EXPECT_EQ(ReadWrite(*loop, **node, Request::Kind::kRead, 512, data), -EINVAL);
  (*node).reset();
  options.raw_size = 4096;
  EXPECT_THAT(OpenError(options), HasSubstr("reach beyond the end"));
  options.raw_size = 1000;
  EXPECT_THAT(OpenError(options), HasSubstr("must be multiples of 512"));
}

TEST(OpenImage, ErrorsNameTheThingAndTheRemedy) {
  TempDir dir;
  std::string absent = dir.path() + "/absent.img";
  EXPECT_EQ(OpenError({.path = absent}),
            "disk image '" + absent +
                "' doesn't exist: check the path, or create it (truncate -s 10G '" + absent + "')");
  EXPECT_EQ(OpenError({.path = dir.path() + "/no/way/a.img"}),
            "disk image '" + dir.path() + "/no/way/a.img' doesn't exist: there is no directory '" +
                dir.path() + "/no'");
  EXPECT_EQ(OpenError({.path = dir.path()}), "disk image '" + dir.path() + "' is a directory");
  EXPECT_EQ(OpenError({.path = dir.path(), .read_only = true}),
            "disk image '" + dir.path() + "' is a directory");
  EXPECT_THAT(OpenError({.path = "/dev/null"}), HasSubstr("is neither a file nor a block device"));
  std::string fifo = dir.path() + "/fifo";
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_THAT(OpenError({.path = fifo}), HasSubstr("is neither a file nor a block device"));
  EXPECT_THAT(OpenError({.path = dir.File("empty.img", 0)}), HasSubstr("is empty: give it a size"));
  std::string vmdk = dir.File("q.img", 0);
  std::ofstream(vmdk) << "KDMV" << std::string(600, '\0');
  EXPECT_THAT(OpenError({.path = vmdk}),
              HasSubstr("disk image '" + vmdk + "': not supported yet: VMDK version 0"));
  EXPECT_THAT(OpenError({.path = vmdk, .format = "vmdk"}), HasSubstr("not supported yet"));
  EXPECT_THAT(OpenError({.path = vmdk, .format = "qcow7"}),
              HasSubstr("unknown image format 'qcow7'"));
  EXPECT_EQ(OpenError({.path = vmdk, .format = "raw"}), "");
}

// Root may do everything: run as nobody in a child.
std::string OpenErrorAsNobody(const ImageOptions& options) {
  int fds[2];
  EXPECT_EQ(pipe(fds), 0);
  pid_t child = fork();
  if (child == 0) {
    std::string text =
        setgid(65534) == 0 && setuid(65534) == 0 ? OpenError(options) : "cannot change user";
    [[maybe_unused]] ssize_t n = write(fds[1], text.data(), text.size());
    _exit(0);
  }
  close(fds[1]);
  std::string text(4096, '\0');
  ssize_t n = read(fds[0], text.data(), text.size());
  text.resize(n > 0 ? static_cast<size_t>(n) : 0);
  close(fds[0]);
  waitpid(child, nullptr, 0);
  return text;
}

TEST(OpenImage, PermissionErrorsNameThePartOfThePath) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root, to become somebody else";
  TempDir dir;
  std::string path = dir.File("a.img", kMiB);
  ASSERT_EQ(chmod(dir.path().c_str(), 0700), 0);
  EXPECT_THAT(OpenErrorAsNobody({.path = path}),
              HasSubstr("uid 65534 may not enter the directory '" + dir.path() + "'"));
  ASSERT_EQ(chmod(dir.path().c_str(), 0755), 0);
  EXPECT_THAT(OpenErrorAsNobody({.path = path}), HasSubstr("is not readable by uid 65534"));
  ASSERT_EQ(chmod(path.c_str(), 0444), 0);
  EXPECT_THAT(
      OpenErrorAsNobody({.path = path}),
      HasSubstr(
          "is not writable by uid 65534: give it access, or attach the image with readonly=on"));
  EXPECT_EQ(OpenErrorAsNobody({.path = path, .format = "raw", .read_only = true}), "");
}

TEST(ParseCacheMode, KnowsQemusNames) {
  EXPECT_EQ(ParseCacheMode("none").value(), CacheMode::kNone);
  EXPECT_EQ(ParseCacheMode("writethrough").value(), CacheMode::kWritethrough);
  EXPECT_THAT(ParseCacheMode("fast").error().what, HasSubstr("unknown cache mode 'fast'"));
}

}  // namespace
}  // namespace kvartz::block
