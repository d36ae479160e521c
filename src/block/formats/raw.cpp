// Format raw: the file as it is, or a part of it.
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>

#include "base/log.h"
#include "block/fiber_io.h"
#include "block/graph.h"
#include "block/io_batch.h"

namespace kvartz::block {
namespace {

constexpr uint64_t kProbed = 512;  // bytes by which formats are told apart

// Loop-owned. Requests go on to the file with their offset moved; nothing is kept about them.
class RawNode final : public Node {
 public:
  RawNode(NodePtr file, uint64_t offset, uint64_t size, const NodeOptions& options, bool whole)
      : Node(file->loop(), file->name()),
        file_(std::move(file)),
        offset_(offset),
        whole_(whole),
        probed_(options.probed) {
    size_bytes_ = size;
    read_only_ = options.read_only || file_->read_only();
    limits_ = file_->limits();
  }
  // Fiber: of a node that is probed: what it begins with.
  Result<> ReadHead() {
    if (!probed_) return {};
    return ReadExactly(*file_, offset_, std::span(head_).first(std::min(size_bytes_, kProbed)));
  }
  const char* driver() const override { return "raw"; }
  Node* file() const override { return file_.get(); }
  void Drain() override {
    do {
      file_->Drain();
    } while (FinishLateOnes());
  }

  Result<Extent> Status(uint64_t offset, uint64_t length) override {
    return file_->Status(offset + offset_, length);
  }
  Result<> Resize(const ResizeOptions& options) override {
    if (!whole_) return Unsupported("another size when it is a part of a file");
    TRY(file_->Resize(options));
    size_bytes_ = file_->size_bytes();
    return {};
  }
  void FileResized() override {
    if (whole_) size_bytes_ = file_->size_bytes();
  }
  Result<> SetReadOnly(bool read_only) override {
    TRY(file_->SetReadOnly(read_only));
    read_only_ = read_only;
    return {};
  }

 private:
  void Submit(Request* request) override {
    if (probed_ && request->offset < kProbed && request->length > 0 && Disguises(*request))
      return FinishLater(request, -EPERM);
    if (file_->debugged()) Tell(request->kind);
    request->offset += offset_;
    file_->Start(request);
  }
  void Tell(Request::Kind kind) {
    if (kind == Request::Kind::kRead) file_->Debug(DebugEvent::kReadAio);
    if (kind == Request::Kind::kWrite) file_->Debug(DebugEvent::kWriteAio);
    if (kind == Request::Kind::kFlush) file_->Debug(DebugEvent::kFlushToDisk);
  }
  // A guest that writes another format's header would have its disk opened as that next time, with
  // whatever files it names.
  bool Disguises(const Request& request) {
    using Kind = Request::Kind;
    if (request.kind == Kind::kRead || request.kind == Kind::kFlush) return false;
    uint8_t head[kProbed];
    std::copy_n(head_, kProbed, head);
    const std::span changed =
        std::span(head).subspan(request.offset, std::min(request.length, kProbed - request.offset));
    if (request.kind == Kind::kWrite) {
      IovCursor(request.iov, request.iov_count).CopyOut(changed);
    } else {
      std::fill(changed.begin(), changed.end(), uint8_t{0});
    }
    Result<const Driver*> driver = ProbeFormat(head, name());
    if (driver && (*driver)->name == "raw") {
      std::copy_n(head, kProbed, head_);
      return false;
    }
    KLOG(
        kWarn,
        "'{}': a write of its first sector is refused, for it would look like format {} then; give "
        "format=raw to allow it",
        name(), driver ? (*driver)->name : "other than raw");
    return true;
  }
  const NodePtr file_;
  const uint64_t offset_;
  const bool whole_;
  const bool probed_;
  uint8_t head_[kProbed] = {};  // of a node that is probed: as the last request to it leaves it
};

Result<NodePtr> OpenRaw(const OpenEnv& env, const NodeOptions& node, Options& options) {
  uint64_t offset = TRY(options.TakeSize("offset", 0));
  uint64_t size = TRY(options.TakeSize("size", UINT64_MAX));
  bool whole = offset == 0 && size == UINT64_MAX;
  NodeOptions below = node;
  below.grows = true;
  NodePtr file = TRY(OpenChild(env, options, "file", below));
  if (!file) return Fail(ErrorCode::kInvalid, "raw needs 'file'");
  TRY(options.RefuseRest("raw", {"file", "offset", "size"}));
  if (offset > file->size_bytes() || (size != UINT64_MAX && size > file->size_bytes() - offset)) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("offset {} and size {} reach beyond the end of disk image '{}' ({} bytes)",
                    offset, size, file->name(), file->size_bytes()));
  }
  size = std::min(size, file->size_bytes() - offset);
  uint32_t unit = std::max<uint32_t>(512, file->limits().request_alignment);
  if ((offset | size) % unit != 0) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("offset and size of disk image '{}' must be multiples of {}",
                            file->name(), unit));
  }
  auto raw = std::make_shared<RawNode>(std::move(file), offset, size, node, whole);
  TRY(raw->ReadHead());
  return raw;
}

Result<> CreateRaw(const OpenEnv& env, const std::string& filename, Options& options) {
  ResizeOptions resize = {.size = TRY(options.TakeSize("size", 0))};
  resize.preallocation = TRY(ParsePreallocation(options.Take("preallocation", "off")));
  if (resize.preallocation == Preallocation::kMetadata)
    return Fail(ErrorCode::kInvalid, "preallocation=metadata: a raw image has none");
  NodePtr file = TRY(CreateFile(env, filename));
  resize.size = (resize.size + 511) / 512 * 512;
  TRY(file->Resize(resize));
  return file->Close();
}

Result<MeasureResult> MeasureRaw(Options& options, Node* source) {
  uint64_t size = TRY(options.TakeSize("size", source ? source->size_bytes() : 0));
  options.Take("preallocation");
  return MeasureResult{.required = size, .fully_allocated = size};
}

constexpr OptionRow kCreateOptions[] = {
    {"preallocation", OptionRow::Type::kString,
     "Preallocation mode (allowed values: off, falloc, full)"},
};

}  // namespace

extern const Driver kRawDriver;
const Driver kRawDriver = {
    .name = "raw",
    .kind = Driver::Kind::kFormat,
    .open = OpenRaw,
    .create_options = kCreateOptions,
    .create = CreateRaw,
    .measure = MeasureRaw,
};

}  // namespace kvartz::block
