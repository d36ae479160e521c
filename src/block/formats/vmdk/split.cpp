#include "block/formats/vmdk/split.h"

#include <algorithm>
#include <cerrno>

#include "base/check.h"
#include "block/fiber_io.h"
#include "block/formats/vmdk/parent.h"
#include "block/io_batch.h"

namespace kvartz::block::vmdk {
namespace {

// What a part has of the disk below: from `start` on. That disk's owner closes it.
class Window final : public Node {
 public:
  Window(NodePtr whole, uint64_t start, uint64_t length)
      : Node(whole->loop(), whole->name()), whole_(std::move(whole)), start_(start) {
    size_bytes_ = std::min(length, whole_->size_bytes() - std::min(start, whole_->size_bytes()));
    read_only_ = true;
    limits_ = whole_->limits();
  }
  const char* driver() const override { return whole_->driver(); }
  void Drain() override {
    do {
      whole_->Drain();
    } while (FinishLateOnes());
  }
  Result<> Close() override { return {}; }

 private:
  void Submit(Request* request) override {
    request->offset += start_;
    whole_->Start(request);
  }
  const NodePtr whole_;
  const uint64_t start_;
};

}  // namespace

SplitNode::SplitNode(NodePtr file, Descriptor descriptor, std::string text, std::vector<Part> parts,
                     bool read_only)
    : Node(file->loop(), file->name()),
      file_(std::move(file)),
      descriptor_(std::move(descriptor)),
      text_(std::move(text)),
      parts_(std::move(parts)) {
  read_only_ = read_only || file_->read_only();
  for (const Part& part : parts_) {
    starts_.push_back(size_bytes_);
    size_bytes_ += part.length;
    limits_.request_alignment =
        std::max(limits_.request_alignment, part.node->limits().request_alignment);
    limits_.write_cache = limits_.write_cache && part.node->limits().write_cache;
    read_only_ = read_only_ || part.node->read_only();
  }
}

Result<> SplitNode::SetBacking(NodePtr backing) {
  if (backing && !parent_checked_) {
    TRY(CheckParent(*this, descriptor_, *backing));
    parent_checked_ = true;
  }
  for (size_t i = 0; i < parts_.size(); i++) {
    if (!parts_[i].sparse) continue;
    TRY(parts_[i].sparse->SetPartOfBacking(
        backing ? std::make_shared<Window>(backing, starts_[i], parts_[i].length) : nullptr));
    limits_.request_alignment =
        std::max(limits_.request_alignment, parts_[i].node->limits().request_alignment);
  }
  backing_ = std::move(backing);
  return {};
}

size_t SplitNode::PartOf(uint64_t offset) const {
  return static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), offset) -
                             starts_.begin()) -
         1;
}

Result<CheckResult> SplitNode::CheckParts(const ReportFn& report) {
  CheckResult all;
  for (const Part& part : parts_) {
    if (!part.sparse) continue;
    CheckResult one = TRY(part.sparse->editor()->Check(Repair::kNone, report));
    all.corruptions += one.corruptions;
    all.leaks += one.leaks;
    all.check_errors += one.check_errors;
  }
  return all;
}

void SplitNode::Drain() {
  do {
    if (backing_) backing_->Drain();
    for (const Part& part : parts_) part.node->Drain();
    file_->Drain();
  } while (FinishLateOnes() || in_fibers() > 0);
}

void SplitNode::Submit(Request* request) {
  const bool is_flush = request->kind == Request::Kind::kFlush;
  const size_t index = is_flush ? 0 : PartOf(request->offset);
  const Part& part = parts_[index];
  const uint64_t within = request->offset - starts_[index];
  const bool in_one = is_flush ? parts_.size() == 1 : request->length <= part.length - within;
  if (in_one && (wrote_ || is_flush || request->kind == Request::Kind::kRead)) {
    request->offset = part.base + within;
    return part.node->Start(request);
  }
  SubmitInFiber(request, [this](Request& own) { return Handle(own); });
}

int SplitNode::Handle(const Request& request) {
  if (request.kind != Request::Kind::kRead && request.kind != Request::Kind::kFlush) {
    FiberLock lock(beginning_);
    if (!wrote_) {
      if (int rc = BeginWriting()) return rc;
      wrote_ = true;
    }
  }
  return Split(request);
}

// Another content, another CID, before any of it: so a child notices.
int SplitNode::BeginWriting() {
  const uint32_t cid = NewCid();
  std::string text = WithCid(text_, cid);
  if (int rc = WriteAt(*file_, 0, {reinterpret_cast<const uint8_t*>(text.data()), text.size()}))
    return rc;
  text_ = std::move(text);
  descriptor_.cid = cid;
  return FlushNode(*file_);
}

int SplitNode::Split(const Request& request) {
  IoBatch batch;
  IovCursor cursor(request.iov, request.iov_count);
  if (request.kind == Request::Kind::kFlush) {
    for (const Part& part : parts_) {
      IoBatch::Item& item = batch.Add();
      item.request.kind = request.kind;
      batch.Start(*part.node, item);
    }
    return batch.Wait();
  }
  bool moves = request.kind == Request::Kind::kRead || request.kind == Request::Kind::kWrite;
  const uint64_t end = request.offset + request.length;
  for (uint64_t at = request.offset; at < end;) {
    size_t index = PartOf(at);
    const Part& part = parts_[index];
    uint64_t within = at - starts_[index];
    IoBatch::Item& item = batch.Add();
    item.request.kind = request.kind;
    item.request.fua = request.fua;
    item.request.unmap = request.unmap;
    item.request.no_fallback = request.no_fallback;
    item.request.offset = part.base + within;
    item.request.length = std::min(end - at, part.length - within);
    if (moves) cursor.Take(item.request.length, item.iov);
    at += item.request.length;
    batch.Start(*part.node, item);
  }
  return batch.Wait();
}

Result<Extent> SplitNode::Status(uint64_t offset, uint64_t length) {
  size_t index = PartOf(offset);
  const Part& part = parts_[index];
  uint64_t within = offset - starts_[index];
  return part.node->Status(part.base + within, std::min(length, part.length - within));
}

Result<> SplitNode::Close() {
  Result<> result;
  for (const Part& part : parts_) {
    Result<> closed = part.node->Close();
    if (result) result = std::move(closed);
  }
  Result<> closed = Node::Close();
  return result ? std::move(closed) : std::move(result);
}

Result<> SplitNode::SetReadOnly(bool read_only) {
  for (const Part& part : parts_) TRY(part.node->SetReadOnly(read_only));
  TRY(file_->SetReadOnly(read_only));
  read_only_ = read_only;
  wrote_ = false;
  return {};
}

Result<ImageInfo> SplitNode::Info() {
  ImageInfo info = {.format = driver(), .virtual_size = size_bytes_};
  TellParent(*this, descriptor_, info);
  InfoValue::Array extents;
  for (const Part& part : parts_) {
    InfoValue::Object extent = {{"filename", {part.node->name()}},
                                {"format", {part.type}},
                                {"virtual-size", {part.length}}};
    if (part.sparse) {
      uint64_t grain_bytes = TRY(part.sparse->Info()).cluster_size;
      extent.push_back({"cluster-size", {grain_bytes}});
      info.cluster_size = grain_bytes;
    }
    extents.push_back({std::move(extent)});
  }
  info.specific = {{"create-type", {descriptor_.create_type}},
                   {"cid", {uint64_t{descriptor_.cid}}},
                   {"parent-cid", {uint64_t{descriptor_.parent_cid}}},
                   {"extents", {std::move(extents)}}};
  return info;
}

Result<uint64_t> SplitNode::AllocatedBytes() {
  uint64_t bytes = TRY(file_->AllocatedBytes());
  for (const Part& part : parts_) bytes += TRY(part.node->AllocatedBytes());
  return bytes;
}

}  // namespace kvartz::block::vmdk
