#include "block/protocols/file_lock.h"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "base/lingering.h"

namespace kvartz::block {
namespace {

// One byte a permission: who uses it holds a read lock at kUsed + permission, who doesn't bear that
// others use it one at kUnshared + permission. Whether somebody does shows in whether a write lock
// could be had there.
constexpr off_t kUsed = 100;
constexpr off_t kUnshared = 200;
enum Permission : off_t { kConsistentRead = 0, kWrite = 1 };

// 0 or errno.
int TakeLock(int fd, off_t byte) {
  struct flock lock = {};
  lock.l_type = F_RDLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return fcntl(fd, F_OFD_SETLK, &lock) < 0 ? errno : 0;
}

bool HeldByOthers(int fd, off_t byte) {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

struct DirCloser {
  void operator()(DIR* dir) const { closedir(dir); }
};
using Directory = std::unique_ptr<DIR, DirCloser>;
struct FileCloser {
  void operator()(FILE* file) const { fclose(file); }
};
using File = std::unique_ptr<FILE, FileCloser>;

// Whether /proc/PID/fdinfo/FD shows a lock on `byte`.
bool FdHoldsByte(const std::string& fdinfo, off_t byte) {
  File file(fopen(fdinfo.c_str(), "re"));
  if (!file) return false;
  char line[256];
  while (fgets(line, sizeof(line), file.get())) {
    // "lock:\t1: OFDLCK ADVISORY  READ -1 00:2f:1234 100 101"
    long long first = 0, last = 0;
    if (sscanf(line, "lock: %*s OFDLCK %*s %*s %*s %*s %lld %lld", &first, &last) == 2 &&
        byte >= first && byte <= last) {
      return true;
    }
  }
  return false;
}

struct Holder {
  int pid = 0;  // 0: not found (another user's process, or another host's)
  std::string name;
};

// The locks belong to open files, and the host tells no process for those: look for one that has
// the file open.
Holder FindHolder(int our_fd, off_t byte) {
  struct stat image;
  if (fstat(our_fd, &image) < 0) return {};
  Directory proc(opendir("/proc"));
  while (dirent* process = proc ? readdir(proc.get()) : nullptr) {
    int pid = atoi(process->d_name);
    if (pid <= 0) continue;
    std::string base = fmt::format("/proc/{}", pid);
    Directory fds(opendir((base + "/fd").c_str()));
    while (dirent* entry = fds ? readdir(fds.get()) : nullptr) {
      if (entry->d_name[0] == '.' || (pid == getpid() && atoi(entry->d_name) == our_fd)) continue;
      struct stat st;
      if (stat((base + "/fd/" + entry->d_name).c_str(), &st) < 0) continue;
      if (st.st_dev != image.st_dev || st.st_ino != image.st_ino) continue;
      if (!FdHoldsByte(base + "/fdinfo/" + entry->d_name, byte)) continue;
      Holder holder{pid, ""};
      char name[64] = "";
      File comm(fopen((base + "/comm").c_str(), "re"));
      if (comm && fgets(name, sizeof(name), comm.get())) holder.name = name;
      while (!holder.name.empty() && holder.name.back() == '\n') holder.name.pop_back();
      return holder;
    }
  }
  return {};
}

std::string NameOf(const Holder& holder) {
  if (holder.pid == getpid()) return "this machine itself";
  if (holder.pid == 0) return "another process (of another user or host; root can see which)";
  return fmt::format("another machine (pid {}, {})", holder.pid, holder.name);
}

// `holder`: whoever keeps it from us.
Result<> TryLockImage(int fd, const std::string& path, LockWish wish, Holder& holder) {
  for (auto [wanted, byte] : {std::pair{true, kUsed + kConsistentRead},
                              {wish.write, kUsed + kWrite},
                              {!wish.share_write, kUnshared + kWrite}}) {
    int error = wanted ? TakeLock(fd, byte) : 0;
    if (error == EINVAL || error == ENOLCK || error == EOPNOTSUPP) return {};
    if (error == EAGAIN) {
      holder = FindHolder(fd, byte);
      return Fail(ErrorCode::kBusy, fmt::format("disk image '{}' is being locked by {}: try again",
                                                path, NameOf(holder)));
    }
    if (error != 0)
      return Fail(ErrnoError(error, fmt::format("cannot lock disk image '{}'", path)));
  }
  if (HeldByOthers(fd, kUnshared + kConsistentRead)) {
    holder = FindHolder(fd, kUnshared + kConsistentRead);
    return Fail(ErrorCode::kBusy,
                fmt::format("disk image '{}' is in exclusive use by {}: stop it first", path,
                            NameOf(holder)));
  }
  if (wish.write && HeldByOthers(fd, kUnshared + kWrite)) {
    bool writes = HeldByOthers(fd, kUsed + kWrite);
    holder = FindHolder(fd, kUnshared + kWrite);
    return Fail(ErrorCode::kBusy, writes
                                      ? fmt::format("disk image '{}' is in use by {}: stop it "
                                                    "first, since two writers destroy the data "
                                                    "(file.locking=off overrides)",
                                                    path, NameOf(holder))
                                      : fmt::format("disk image '{}' is in use by {}, which reads "
                                                    "it: stop it, or attach the image with "
                                                    "readonly=on (file.locking=off overrides)",
                                                    path, NameOf(holder)));
  }
  if (!wish.share_write && HeldByOthers(fd, kUsed + kWrite)) {
    holder = FindHolder(fd, kUsed + kWrite);
    return Fail(ErrorCode::kBusy, fmt::format("disk image '{}' is in use by {}, which writes to "
                                              "it: stop it first (file.locking=off overrides)",
                                              path, NameOf(holder)));
  }
  return {};
}

}  // namespace

Result<> LockImage(int fd, const std::string& path, LockWish wish) {
  for (Lingering lingering;;) {
    Holder holder;
    Result<> locked = TryLockImage(fd, path, wish, holder);
    if (locked || locked.error().code != ErrorCode::kBusy || holder.pid != 0) return locked;
    if (!lingering.Wait()) return locked;
    UnlockImage(fd);
  }
}

void UnlockImage(int fd) {
  struct flock lock = {};
  lock.l_type = F_UNLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = kUsed;
  lock.l_len = 2 * (kUnshared - kUsed);
  fcntl(fd, F_OFD_SETLK, &lock);
}

}  // namespace kvartz::block
