#include "base/file_error.h"

#include <gtest/gtest.h>

#include <cerrno>

namespace kvartz {
namespace {

TEST(OpenFileError, NamesTheMissingDirectory) {
  const Error error = OpenFileError("kernel", "/nowhere/at/all/vmlinuz", ENOENT);
  EXPECT_EQ(error.code, ErrorCode::kNotFound);
  EXPECT_EQ(error.what,
            "kernel '/nowhere/at/all/vmlinuz' doesn't exist: there is no directory '/nowhere'");
}

TEST(OpenFileError, SaysWhatToDoAboutAMissingFile) {
  EXPECT_EQ(OpenFileError("initrd", "/usr/no-such-file", ENOENT).what,
            "initrd '/usr/no-such-file' doesn't exist: check the path");
  EXPECT_EQ(OpenFileError("disk image", "/usr/no-such-file", ENOENT, "create it").what,
            "disk image '/usr/no-such-file' doesn't exist: create it");
}

TEST(OpenFileError, OtherErrorsKeepTheHostsWords) {
  EXPECT_EQ(OpenFileError("kernel", "/usr", EISDIR).what, "kernel '/usr' is a directory");
  EXPECT_EQ(OpenFileError("kernel", "/usr", EMFILE).what,
            "cannot open kernel '/usr': Too many open files");
}

}  // namespace
}  // namespace kvartz
