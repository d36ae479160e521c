#include "block/formats/concat_node.h"

#include <algorithm>

#include "base/check.h"
#include "base/fiber.h"
#include "block/io_batch.h"

namespace kvartz::block {

ConcatNode::ConcatNode(NodePtr file, const char* driver, std::vector<Part> parts, ImageInfo info,
                       bool read_only)
    : Node(file->loop(), file->name()),
      file_(std::move(file)),
      driver_(driver),
      parts_(std::move(parts)),
      info_(std::move(info)) {
  read_only_ = read_only;
  for (const Part& part : parts_) {
    starts_.push_back(size_bytes_);
    size_bytes_ += part.length;
    limits_.request_alignment =
        std::max(limits_.request_alignment, part.node->limits().request_alignment);
    limits_.write_cache = limits_.write_cache && part.node->limits().write_cache;
    read_only_ = read_only_ || part.node->read_only();
  }
}

size_t ConcatNode::PartOf(uint64_t offset) const {
  return static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), offset) -
                             starts_.begin()) -
         1;
}

Result<CheckResult> ConcatNode::CheckParts(const ReportFn& report) {
  CheckResult all;
  for (const Part& part : parts_) {
    if (!part.node->editor()) continue;
    CheckResult one = TRY(part.node->editor()->Check(Repair::kNone, report));
    all.corruptions += one.corruptions;
    all.leaks += one.leaks;
    all.check_errors += one.check_errors;
  }
  return all;
}

void ConcatNode::Drain() {
  do {
    for (const Part& part : parts_) part.node->Drain();
  } while (FinishLateOnes() || under_way_ > 0);
}

void ConcatNode::Submit(Request* request) {
  if (parts_.empty()) return FinishLater(request, 0);
  if (request->kind != Request::Kind::kFlush || parts_.size() == 1) {
    size_t index = request->kind == Request::Kind::kFlush ? 0 : PartOf(request->offset);
    const Part& part = parts_[index];
    uint64_t within = request->offset - starts_[index];
    if (request->kind == Request::Kind::kFlush || request->length <= part.length - within) {
      request->offset = part.base + within;
      return part.node->Start(request);
    }
  }
  under_way_++;
  starting_ = true;
  Fiber::Start([this, request] { request->result = Split(*request); },
               [this, request] {
                 under_way_--;
                 if (starting_) return FinishLater(request, request->result);
                 request->done(request, request->result);
               });
  starting_ = false;
}

int ConcatNode::Split(const Request& request) {
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

Result<Extent> ConcatNode::Status(uint64_t offset, uint64_t length) {
  size_t index = PartOf(offset);
  const Part& part = parts_[index];
  uint64_t within = offset - starts_[index];
  return part.node->Status(part.base + within, std::min(length, part.length - within));
}

Result<> ConcatNode::Close() {
  Result<> result;
  for (const Part& part : parts_) {
    Result<> closed = part.node->Close();
    if (result) result = std::move(closed);
  }
  Result<> closed = file_->Close();
  return result ? std::move(closed) : std::move(result);
}

Result<> ConcatNode::SetReadOnly(bool read_only) {
  for (const Part& part : parts_) TRY(part.node->SetReadOnly(read_only));
  TRY(file_->SetReadOnly(read_only));
  read_only_ = read_only;
  return {};
}

Result<uint64_t> ConcatNode::AllocatedBytes() {
  uint64_t bytes = TRY(file_->AllocatedBytes());
  for (const Part& part : parts_) bytes += TRY(part.node->AllocatedBytes());
  return bytes;
}

}  // namespace kvartz::block
