#include "block/protocols/file_node.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/log.h"
#include "block/fiber_io.h"
#include "block/graph.h"
#include "block/protocols/file_open.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kBounceBytes = 128 << 10;  // of each request that needs it
constexpr uint64_t kZeroBytes = 64 << 10;
constexpr unsigned kMaxIovs = IOV_MAX;
constexpr unsigned kMaxZeroIovs = 16;

// What write-zeroes writes where the file system can't do it by itself. Never written to.
alignas(4096) uint8_t g_zeros[kZeroBytes];

struct FreeDeleter {
  void operator()(void* memory) const { free(memory); }
};
using AlignedBuffer = std::unique_ptr<uint8_t, FreeDeleter>;

AlignedBuffer AllocateAligned(uint64_t alignment, uint64_t size) {
  return AlignedBuffer(static_cast<uint8_t*>(aligned_alloc(alignment, size)));
}

// A place in an iovec list, for transfers that take several steps.
struct IovCursor {
  const iovec* iov = nullptr;
  unsigned count = 0;
  uint64_t skip = 0;  // within iov[0]

  template <typename Visit>  // visit(address, length) until `bytes` are passed
  void Advance(uint64_t bytes, Visit visit) {
    while (bytes > 0 && count > 0) {
      uint64_t length = std::min(bytes, iov->iov_len - skip);
      visit(static_cast<uint8_t*>(iov->iov_base) + skip, length);
      bytes -= length;
      skip += length;
      if (skip == iov->iov_len) {
        iov++;
        count--;
        skip = 0;
      }
    }
  }
};

// Loop-owned, like every Node.
class FileNode final : public Node {
 public:
  FileNode(EventLoop& loop, OpenedFile file, const ImageOptions& options)
      : Node(loop, options.path),
        options_(options),
        fd_(std::move(file.fd)),
        is_device_(file.is_device),
        ignore_flush_(options.cache == CacheMode::kUnsafe || options.no_flush) {
    size_bytes_ = file.size_bytes;
    read_only_ = options_.read_only = file.read_only;
    grows_ = options.grows && !is_device_;
    limits_.request_alignment = file.direct_alignment ? file.direct_alignment : 1;
    limits_.discard_granularity = read_only_ ? 0 : file.discard_granularity;
    limits_.write_cache =
        options.cache != CacheMode::kWritethrough && options.cache != CacheMode::kDirectSync;
    memory_alignment_ = file.direct_alignment ? file.direct_alignment : 1;
  }

  const char* driver() const override { return is_device_ ? "host_device" : "file"; }
  void LetGrow() override { grows_ = !is_device_; }
  void Drain() override {
    do {
      loop().DrainFileOps();
    } while (FinishLateOnes());
  }
  Result<Extent> Status(uint64_t offset, uint64_t length) override;
  Result<> Close() override;
  Result<> Resize(const ResizeOptions& options) override;
  Result<> SetReadOnly(bool read_only) override;
  Result<uint64_t> AllocatedBytes() override;
  InfoValue::Object Counts() const override {
    return {{"discard-nb-ok", {discards_.ok}},
            {"discard-nb-failed", {discards_.failed}},
            {"discard-bytes-ok", {discards_.ok_bytes}}};
  }
  Result<> MoveTo(EventLoop& loop) override {
    SetLoop(loop);
    return {};
  }

 private:
  // One request on its way, in one or more steps.
  struct Op {
    FileOp file;
    FileNode* node = nullptr;
    Request* request = nullptr;
    IovCursor cursor;
    uint64_t done_bytes = 0;
    std::vector<iovec> iov;  // of this step, where it isn't the request's own
    AlignedBuffer bounce;
    bool write_zeros = false;  // kWriteZeroes by writing them
    Op* next_free = nullptr;
  };

  void Submit(Request* request) override;
  Op* NewOp(Request* request);
  void Send(Op* op, FileOp::Kind kind);
  void Finish(Op* op, int result);
  void OnDone(Op* op, int64_t result);
  void OnTransferred(Op* op, int64_t result);
  void StepTransfer(Op* op);
  void StepZeros(Op* op);
  void FinishWrite(Op* op);
  bool NeedsBounce(const Request& request) const;
  int Grow(uint64_t end);
  Result<> Preallocate(uint64_t from, uint64_t end, Preallocation how);
  static void ZeroRest(Op* op);

  ImageOptions options_;
  UniqueFd fd_;
  const bool is_device_;
  const bool ignore_flush_;
  uint32_t memory_alignment_ = 1;
  bool can_punch_ = true;  // until the host refuses
  struct {
    uint64_t ok = 0, failed = 0, ok_bytes = 0;
  } discards_;
  bool can_zero_ = true;
  std::vector<std::unique_ptr<Op>> ops_;  // as many as were ever under way at once
  Op* free_ = nullptr;
  // What Status found to be data last: file systems look for the next hole page by page. Holes that
  // somebody else makes in it meanwhile read as what they are, zeros.
  uint64_t data_from_ = 0, data_end_ = 0;
};

FileNode::Op* FileNode::NewOp(Request* request) {
  if (!free_) {
    ops_.push_back(std::make_unique<Op>());
    free_ = ops_.back().get();
  }
  Op* op = free_;
  free_ = op->next_free;
  op->file = {};
  op->file.fd = fd_.get();
  op->file.owner = op;
  op->file.done = [](FileOp* file, int64_t result) {
    auto* done = static_cast<Op*>(file->owner);
    done->node->OnDone(done, result);
  };
  op->node = this;
  op->request = request;
  op->cursor = {request->iov, request->iov_count, 0};
  op->done_bytes = 0;
  op->write_zeros = false;
  return op;
}

void FileNode::Send(Op* op, FileOp::Kind kind) {
  op->file.kind = kind;
  loop().Submit(&op->file);
}

void FileNode::Finish(Op* op, int result) {
  Request* request = op->request;
  op->bounce.reset();
  op->next_free = free_;
  free_ = op;
  request->done(request, result);
}

bool FileNode::NeedsBounce(const Request& request) const {
  if (memory_alignment_ == 1) return false;
  for (unsigned i = 0; i < request.iov_count; i++) {
    auto address = reinterpret_cast<uintptr_t>(request.iov[i].iov_base);
    if ((address | request.iov[i].iov_len) % memory_alignment_ != 0) return true;
  }
  return false;
}

void FileNode::Submit(Request* request) {
  switch (request->kind) {
    case Request::Kind::kFlush:
      if (ignore_flush_ || read_only_) return FinishLater(request, 0);
      return Send(NewOp(request), FileOp::Kind::kFdatasync);
    case Request::Kind::kRead:
    case Request::Kind::kWrite: {
      if (request->length == 0) return FinishLater(request, 0);
      // From now on, so that size_bytes_ is never less than what is on its way.
      if (request->kind == Request::Kind::kWrite)
        size_bytes_ = std::max(size_bytes_, request->offset + request->length);
      Op* op = NewOp(request);
      if (NeedsBounce(*request)) {
        op->bounce = AllocateAligned(memory_alignment_, std::min(kBounceBytes, request->length));
        if (!op->bounce) {
          op->next_free = free_;
          free_ = op;
          return FinishLater(request, -ENOMEM);
        }
      }
      return StepTransfer(op);
    }
    case Request::Kind::kDiscard:
    case Request::Kind::kWriteZeroes: {
      bool discard = request->kind == Request::Kind::kDiscard;
      bool punch = limits_.discard_granularity != 0 && can_punch_ && (discard || request->unmap);
      if (discard && !punch) discards_.failed++;
      if (request->length == 0 || (discard && !punch)) return FinishLater(request, 0);
      if (request->no_fallback && !punch && !can_zero_) return FinishLater(request, -ENOTSUP);
      if (uint64_t end = request->offset + request->length; !discard && end > size_bytes_) {
        if (int error = Grow(end)) return FinishLater(request, error);
      }
      Op* op = NewOp(request);
      op->file.offset = request->offset;
      op->file.length = request->length;
      if (punch) return Send(op, FileOp::Kind::kDiscard);
      if (can_zero_) return Send(op, FileOp::Kind::kWriteZeroes);
      op->write_zeros = true;
      return StepZeros(op);
    }
  }
}

void FileNode::StepTransfer(Op* op) {
  const Request& request = *op->request;
  uint64_t left = request.length - op->done_bytes;
  op->file.offset = request.offset + op->done_bytes;
  bool read = request.kind == Request::Kind::kRead;
  if (op->bounce) {
    uint64_t step = std::min(left, kBounceBytes);
    if (!read) {
      uint8_t* to = op->bounce.get();
      IovCursor from = op->cursor;
      from.Advance(step, [&](const uint8_t* data, uint64_t length) {
        std::memcpy(to, data, length);
        to += length;
      });
    }
    op->iov.assign(1, {op->bounce.get(), step});
  } else if (op->done_bytes == 0 && request.iov_count <= kMaxIovs) {
    op->file.iov = request.iov;
    op->file.iov_count = request.iov_count;
    return Send(op, read ? FileOp::Kind::kReadv : FileOp::Kind::kWritev);
  } else {
    op->iov.clear();
    uint64_t skip = op->cursor.skip;
    for (unsigned i = 0; i < op->cursor.count && op->iov.size() < kMaxIovs; i++, skip = 0) {
      const iovec& part = op->cursor.iov[i];
      op->iov.push_back({static_cast<uint8_t*>(part.iov_base) + skip, part.iov_len - skip});
    }
  }
  op->file.iov = op->iov.data();
  op->file.iov_count = static_cast<unsigned>(op->iov.size());
  Send(op, read ? FileOp::Kind::kReadv : FileOp::Kind::kWritev);
}

void FileNode::StepZeros(Op* op) {
  uint64_t left = op->request->length - op->done_bytes;
  op->file.offset = op->request->offset + op->done_bytes;
  op->iov.clear();
  while (left > 0 && op->iov.size() < kMaxZeroIovs) {
    uint64_t length = std::min(left, kZeroBytes);
    op->iov.push_back({g_zeros, length});
    left -= length;
  }
  op->file.iov = op->iov.data();
  op->file.iov_count = static_cast<unsigned>(op->iov.size());
  Send(op, FileOp::Kind::kWritev);
}

void FileNode::ZeroRest(Op* op) {
  op->cursor.Advance(UINT64_MAX,
                     [](uint8_t* data, uint64_t length) { std::memset(data, 0, length); });
}

void FileNode::OnTransferred(Op* op, int64_t result) {
  const Request& request = *op->request;
  auto bytes = static_cast<uint64_t>(result);
  bool read = request.kind == Request::Kind::kRead;
  const uint8_t* from = op->bounce.get();
  op->cursor.Advance(bytes, [&](uint8_t* data, uint64_t length) {
    if (read && from) {
      std::memcpy(data, from, length);
      from += length;
    }
  });
  op->done_bytes += bytes;
  if (op->done_bytes == request.length) return read ? Finish(op, 0) : FinishWrite(op);
  // The end of a file whose length is no multiple of the sector size (or that somebody cut short).
  if (read && (bytes == 0 || bytes % limits_.request_alignment != 0)) {
    ZeroRest(op);
    return Finish(op, 0);
  }
  if (bytes == 0) return Finish(op, -EIO);
  return op->write_zeros ? StepZeros(op) : StepTransfer(op);
}

// FUA, and what O_DSYNC doesn't cover: zeros made by the file system.
void FileNode::FinishWrite(Op* op) {
  bool by_host = op->request->kind == Request::Kind::kWriteZeroes && !op->write_zeros;
  bool sync = limits_.write_cache ? op->request->fua : by_host;
  if (sync && !ignore_flush_) return Send(op, FileOp::Kind::kFdatasync);
  Finish(op, 0);
}

void FileNode::OnDone(Op* op, int64_t result) {
  if (result == -EINTR || result == -EAGAIN) return Send(op, op->file.kind);
  switch (op->file.kind) {
    case FileOp::Kind::kFsync:
    case FileOp::Kind::kFdatasync:
      return Finish(op, static_cast<int>(result));
    case FileOp::Kind::kReadv:
    case FileOp::Kind::kWritev:
      return result < 0 ? Finish(op, static_cast<int>(result)) : OnTransferred(op, result);
    case FileOp::Kind::kDiscard:
    case FileOp::Kind::kWriteZeroes:
      data_end_ = 0;
      break;
  }
  bool discard = op->request->kind == Request::Kind::kDiscard;
  if (discard && result == 0) {
    discards_.ok++;
    discards_.ok_bytes += op->request->length;
  } else if (discard) {
    discards_.failed++;
  }
  if (result == 0) return discard ? Finish(op, 0) : FinishWrite(op);
  if (result != -EOPNOTSUPP && result != -EINVAL) return Finish(op, static_cast<int>(result));
  // The host can't (EINVAL: not for these bounds). A discard is a hint; zeros are made another way.
  bool punched = op->file.kind == FileOp::Kind::kDiscard;
  if (result == -EOPNOTSUPP) (punched ? can_punch_ : can_zero_) = false;
  if (discard) return Finish(op, 0);
  if (punched && can_zero_) return Send(op, FileOp::Kind::kWriteZeroes);
  if (op->request->no_fallback) return Finish(op, -ENOTSUP);
  op->write_zeros = true;
  StepZeros(op);
}

// What is added reads as zeros. Nothing under way reaches beyond size_bytes_.
int FileNode::Grow(uint64_t end) {
  if (ftruncate(fd_.get(), static_cast<off_t>(end)) < 0) return -errno;
  size_bytes_ = end;
  return 0;
}

// Asking the file system for extents doesn't wait for data.
Result<Extent> FileNode::Status(uint64_t offset, uint64_t length) {
  Extent extent = {.length = length, .allocated = true, .data = true, .has_offset = true};
  extent.offset = offset;
  extent.file = this;
  if (is_device_) return extent;
  if (offset >= data_from_ && offset < data_end_) {
    extent.length = std::min(length, data_end_ - offset);
    return extent;
  }
  auto at = static_cast<off_t>(offset);
  off_t data = lseek(fd_.get(), at, SEEK_DATA);
  if (data < 0 && errno != ENXIO) return extent;  // the file system can't tell
  if (data < 0 || data > at) {
    extent.zero = true;
    extent.data = false;
    if (data >= 0) extent.length = std::min(length, static_cast<uint64_t>(data) - offset);
    return extent;
  }
  off_t hole = lseek(fd_.get(), at, SEEK_HOLE);
  if (hole > at) {
    // The file's end may be within a sector that counts as data.
    uint64_t end = (static_cast<uint64_t>(hole) + 511) / 512 * 512;
    extent.length = std::min(length, end - offset);
    data_from_ = offset;
    data_end_ = end;
  }
  return extent;
}

Result<> FileNode::Close() {
  if (read_only_) return {};
  return Flush(*this);
}

Result<uint64_t> FileNode::AllocatedBytes() {
  struct stat st;
  if (fstat(fd_.get(), &st) < 0)
    return Fail(ErrnoError(errno, fmt::format("cannot examine '{}'", name())));
  return static_cast<uint64_t>(st.st_blocks) * 512;
}

Result<> FileNode::Preallocate(uint64_t from, uint64_t end, Preallocation how) {
  if (how == Preallocation::kFalloc) {
    if (fallocate(fd_.get(), 0, static_cast<off_t>(from), static_cast<off_t>(end - from)) < 0)
      return Fail(ErrnoError(errno, fmt::format("cannot preallocate '{}'", name())));
    return {};
  }
  for (uint64_t at = from; at < end;) {
    uint64_t length = std::min(kZeroBytes, end - at);
    TRY(WriteExactly(*this, at, std::span<const uint8_t>(g_zeros, length)));
    at += length;
  }
  return {};
}

Result<> FileNode::Resize(const ResizeOptions& options) {
  uint64_t old_size = size_bytes_;
  if (is_device_) {
    if (options.size > old_size || (options.exact && options.size != old_size))
      return Unsupported("another size: it is a device");
    return {};
  }
  if (read_only_) return Fail(ErrnoError(EROFS, fmt::format("cannot resize '{}'", name())));
  if (options.size > uint64_t{INT64_MAX} ||
      ftruncate(fd_.get(), static_cast<off_t>(options.size)) < 0) {
    return Fail(ErrnoError(options.size > uint64_t{INT64_MAX} ? EFBIG : errno,
                           fmt::format("cannot resize '{}' to {}", name(), options.size)));
  }
  size_bytes_ = options.size;
  data_end_ = 0;
  if (options.size <= old_size || options.preallocation == Preallocation::kOff ||
      options.preallocation == Preallocation::kMetadata) {
    return {};
  }
  Result<> allocated = Preallocate(old_size, options.size, options.preallocation);
  if (!allocated && ftruncate(fd_.get(), static_cast<off_t>(old_size)) == 0) size_bytes_ = old_size;
  return allocated;
}

// The new file takes the place of the old one under its number, for what is under way.
Result<> FileNode::SetReadOnly(bool read_only) {
  if (read_only == read_only_) return {};
  ImageOptions options = options_;
  options.read_only = read_only;
  OpenedFile file = TRY(ReopenImageFile(options, fd_.get()));
  loop().Flush();
  if (dup3(file.fd.get(), fd_.get(), O_CLOEXEC) < 0)
    return Fail(ErrnoError(errno, fmt::format("cannot reopen '{}'", name())));
  options_ = options;
  read_only_ = read_only;
  limits_.discard_granularity = read_only_ ? 0 : file.discard_granularity;
  return {};
}

// The driver: options "filename", "locking", "aio".
Result<NodePtr> OpenFile(const OpenEnv& env, const NodeOptions& node, Options& options) {
  ImageOptions image = {.path = options.Take("filename", ""),
                        .read_only = node.read_only,
                        .share_write = node.share_write,
                        .force_share = node.force_share,
                        .grows = node.grows,
                        .auto_read_only = node.auto_read_only,
                        .no_flush = node.cache_no_flush};
  image.cache = node.cache_direct ? (node.writethrough ? CacheMode::kDirectSync : CacheMode::kNone)
                : node.writethrough ? CacheMode::kWritethrough
                                    : CacheMode::kWriteback;
  if (image.path.empty()) return Fail(ErrorCode::kInvalid, "filename= is missing");
  std::string locking = options.Take("locking", node.locking ? "auto" : "off");
  if (locking != "auto" && locking != "on" && locking != "off")
    return Fail(ErrorCode::kInvalid, fmt::format("locking={}: it is auto, on or off", locking));
  if (locking == "off") image.locking = ImageOptions::Locking::kOff;
  TRY(CheckAio(options.Take("aio", "threads")));
  TRY(options.RefuseRest("file", {"filename", "locking", "aio"}));
  return OpenFileNode(env.loop, image);
}

}  // namespace

extern const Driver kFileDriver;
extern const Driver kHostDeviceDriver;
const Driver kFileDriver = {.name = "file", .kind = Driver::Kind::kProtocol, .open = OpenFile};
const Driver kHostDeviceDriver = {
    .name = "host_device", .kind = Driver::Kind::kProtocol, .open = OpenFile};

namespace {

constexpr OptionRow kFileCreateOptions[] = {
    {"nocow", OptionRow::Type::kBool, "Turn off copy-on-write (valid only on btrfs)"},
    {"extent_size_hint", OptionRow::Type::kSize,
     "Extent size hint for the image file, 0 to disable"},
};

// Of a file that is empty. They only make it faster, so it does without them where they fail.
void Apply(const NewFileOptions& options, int fd, const std::string& path) {
  auto warn = [&](const char* what) {
    KLOG(kWarn, "{}", ErrnoError(errno, fmt::format("'{}': no {} here", path, what)).what);
  };
  if (options.nocow) {
    int flags = 0;
    if (ioctl(fd, FS_IOC_GETFLAGS, &flags) == 0) {
      flags |= FS_NOCOW_FL;
      ioctl(fd, FS_IOC_SETFLAGS, &flags);  // other file systems write in place anyway
    }
  }
  if (options.extent_size_hint > 0) {
    fsxattr attributes = {};
    if (ioctl(fd, FS_IOC_FSGETXATTR, &attributes) < 0) return warn("extent_size_hint");
    attributes.fsx_xflags |= FS_XFLAG_EXTSIZE;
    attributes.fsx_extsize =
        static_cast<uint32_t>(std::min<uint64_t>(options.extent_size_hint, UINT32_MAX));
    if (ioctl(fd, FS_IOC_FSSETXATTR, &attributes) < 0) warn("extent_size_hint");
  }
}

}  // namespace

std::span<const OptionRow> FileCreateOptions() { return kFileCreateOptions; }

Result<NodePtr> CreateFile(const OpenEnv& env, const std::string& filename) {
  if (env.create_on) return env.create_on;
  ImageOptions image = {.path = filename.starts_with("file:") ? filename.substr(5) : filename};
  image.grows = true;
  OpenedFile file = TRY(CreateImageFile(image));
  Apply(env.new_files, file.fd.get(), image.path);
  return std::make_shared<FileNode>(env.loop, std::move(file), image);
}

Result<std::shared_ptr<Node>> OpenFileNode(EventLoop& loop, const ImageOptions& options) {
  return std::make_shared<FileNode>(loop, TRY(OpenImageFile(options)), options);
}

}  // namespace kvartz::block
