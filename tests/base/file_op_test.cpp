// File operations of the event loop.
#include <sys/stat.h>

#include <vector>

#include "base/loop_fixture.h"

namespace kvartz {
namespace {

class FileOpTest : public EventLoopTest {};

TEST_P(FileOpTest, FileOperationsReadAndWrite) {
  UniqueFd file = TempFile();
  std::string hello = "hello, ", world = "world";
  iovec out[] = {{hello.data(), hello.size()}, {world.data(), world.size()}};
  EXPECT_EQ(Do({.kind = FileOp::Kind::kWritev,
                .fd = file.get(),
                .iov = out,
                .iov_count = 2,
                .offset = 4096}),
            12);
  EXPECT_EQ(Do({.kind = FileOp::Kind::kFdatasync, .fd = file.get()}), 0);
  EXPECT_EQ(Do({.kind = FileOp::Kind::kFsync, .fd = file.get()}), 0);
  std::string text(12, '?');
  iovec in[] = {{text.data(), 3}, {text.data() + 3, 9}};
  EXPECT_EQ(Do({.kind = FileOp::Kind::kReadv,
                .fd = file.get(),
                .iov = in,
                .iov_count = 2,
                .offset = 4096}),
            12);
  EXPECT_EQ(text, "hello, world");
  iovec one = {text.data(), 5};
  EXPECT_EQ(Do({.kind = FileOp::Kind::kReadv,
                .fd = file.get(),
                .iov = &one,
                .iov_count = 1,
                .offset = 4103}),
            5);
  EXPECT_EQ(text.substr(0, 5), "world");
  EXPECT_EQ(Do({.kind = FileOp::Kind::kReadv,
                .fd = file.get(),
                .iov = &one,
                .iov_count = 1,
                .offset = 1 << 20}),
            0);
}

TEST_P(FileOpTest, DiscardAndWriteZeroesClearWithoutGrowing) {
  UniqueFd file = TempFile();
  std::string data(64 << 10, 'x');
  ASSERT_EQ(pwrite(file.get(), data.data(), data.size(), 0), static_cast<ssize_t>(data.size()));
  int64_t discard =
      Do({.kind = FileOp::Kind::kDiscard, .fd = file.get(), .offset = 8192, .length = 16384});
  if (discard == -EOPNOTSUPP) GTEST_SKIP() << "the file system of /tmp doesn't punch holes";
  EXPECT_EQ(discard, 0);
  int64_t zero =
      Do({.kind = FileOp::Kind::kWriteZeroes, .fd = file.get(), .offset = 100, .length = 1000});
  EXPECT_TRUE(zero == 0 || zero == -EOPNOTSUPP) << zero;
  std::string back(data.size(), '?');
  ASSERT_EQ(pread(file.get(), back.data(), back.size(), 0), static_cast<ssize_t>(back.size()));
  for (size_t i = 0; i < back.size(); i++) {
    bool cleared = (i >= 8192 && i < 24576) || (zero == 0 && i >= 100 && i < 1100);
    ASSERT_EQ(back[i], cleared ? '\0' : 'x') << i;
  }
  struct stat st;
  ASSERT_EQ(fstat(file.get(), &st), 0);
  EXPECT_EQ(st.st_size, static_cast<off_t>(data.size()));
}

TEST_P(FileOpTest, FailedFileOperationReportsTheErrno) {
  char byte;
  iovec iov = {&byte, 1};
  EXPECT_EQ(Do({.kind = FileOp::Kind::kReadv, .fd = -1, .iov = &iov, .iov_count = 1}), -EBADF);
  UniqueFd read_only(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  EXPECT_EQ(Do({.kind = FileOp::Kind::kWritev, .fd = read_only.get(), .iov = &iov, .iov_count = 1}),
            -EBADF);
}

TEST_P(FileOpTest, MoreFileOperationsThanTheRingHasEntries) {
  constexpr size_t kCount = 5000;  // and than it has completions
  UniqueFd file = TempFile();
  std::vector<uint32_t> values(kCount);
  std::vector<iovec> iovs(kCount);
  std::vector<FileOp> ops(kCount);
  size_t done = 0;
  for (size_t i = 0; i < kCount; i++) {
    values[i] = static_cast<uint32_t>(i);
    iovs[i] = {&values[i], 4};
    ops[i] = {.kind = FileOp::Kind::kWritev,
              .fd = file.get(),
              .iov = &iovs[i],
              .iov_count = 1,
              .offset = i * 4};
    ops[i].owner = &done;
    ops[i].done = [](FileOp* op, int64_t result) {
      EXPECT_EQ(result, 4);
      ++*static_cast<size_t*>(op->owner);
    };
    loop_->Submit(&ops[i]);
  }
  RunUntil([&] { return done == kCount; });
  std::vector<uint32_t> back(kCount);
  ASSERT_EQ(pread(file.get(), back.data(), kCount * 4, 0), static_cast<ssize_t>(kCount * 4));
  EXPECT_EQ(back, values);
}

TEST_P(FileOpTest, DestructionWaitsForFileOperations) {
  UniqueFd file = TempFile();
  char byte = 'x';
  iovec iov = {&byte, 1};
  bool done = false;
  FileOp op = {.kind = FileOp::Kind::kWritev, .fd = file.get(), .iov = &iov, .iov_count = 1};
  op.owner = &done;
  op.done = [](FileOp* finished, int64_t result) {
    EXPECT_EQ(result, 1);
    *static_cast<bool*>(finished->owner) = true;
  };
  loop_->Submit(&op);
  loop_.reset();
  EXPECT_TRUE(done);
}

TEST_P(FileOpTest, DrainWithinACompletionFinishesTheOthersOfTheBatchButDispatchesNothing) {
  struct Context {
    EventLoop* loop;
    int done = 0;
    int done_after_drain = 0;
  } context{loop_.get()};
  UniqueFd file = TempFile();
  Pipe pipe;
  int dispatched = 0;
  char byte = 'x';
  iovec iov = {&byte, 1};
  FileOp ops[3];
  for (auto& op : ops) {
    op = {.kind = FileOp::Kind::kWritev, .fd = file.get(), .iov = &iov, .iov_count = 1};
    op.owner = &context;
    op.done = [](FileOp* finished, int64_t) {
      auto& c = *static_cast<Context*>(finished->owner);
      c.done++;
      c.loop->DrainFileOps();
      if (c.done_after_drain == 0) c.done_after_drain = c.done;
    };
    loop_->Submit(&op);
  }
  loop_->Watch(pipe.read_end.get(), FdEvents::kRead, [&](FdEvents) {
    dispatched++;
    loop_->Unwatch(pipe.read_end.get());
  });
  loop_->RunOnce(0);
  pipe.Write("x");
  loop_->DrainFileOps();
  EXPECT_EQ(context.done, 3);
  EXPECT_EQ(context.done_after_drain, 3);
  RunUntil([&] { return dispatched == 1; });
}

FOR_EACH_LOOP_BACKEND(FileOpTest);

}  // namespace
}  // namespace kvartz
