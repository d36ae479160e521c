#include "block/filters/filter_node.h"

#include <algorithm>
#include <utility>

#include "base/fiber.h"
#include "block/fiber_io.h"

namespace kvartz::block {

FilterNode::FilterNode(NodePtr file, const char* driver)
    : Node(file->loop(), file->name()), file_(std::move(file)), driver_(driver) {
  size_bytes_ = file_->size_bytes();
  read_only_ = file_->read_only();
  grows_ = file_->grows();
  limits_ = file_->limits();
  debugged_ = file_->debugged();
}

// As the file does when it is written to beyond its end.
void FilterNode::Grow(const Request& request) {
  if (request.kind == Request::Kind::kWrite || request.kind == Request::Kind::kWriteZeroes)
    size_bytes_ = std::max(size_bytes_, request.offset + request.length);
}

void FilterNode::Drain() {
  do {
    DrainMore();
    if (file_) file_->Drain();
  } while (FinishLateOnes() || in_fibers() > 0);
}

Result<> FilterNode::SetFile(NodePtr file) {
  file_ = std::move(file);
  if (file_) {
    FileResized();
    limits_ = file_->limits();
    read_only_ = file_->read_only();
    debugged_ = file_->debugged();
  }
  return {};
}

void FilterNode::FileResized() { size_bytes_ = file_->size_bytes(); }

Result<Extent> FilterNode::Status(uint64_t offset, uint64_t length) {
  return file_->Status(offset, length);
}

Result<> FilterNode::Resize(const ResizeOptions& options) {
  TRY(file_->Resize(options));
  FileResized();
  return {};
}

Result<> FilterNode::SetReadOnly(bool read_only) {
  TRY(file_->SetReadOnly(read_only));
  read_only_ = read_only;
  limits_ = file_->limits();
  return {};
}

void FilterNode::Handle(Request* request) {
  SubmitInFiber(request, [this](Request& own) { return Process(own); });
}

int FilterNode::Process(Request& request) {
  if (grows_) Grow(request);
  Request copy = request;
  return Await(*file_, copy);
}

}  // namespace kvartz::block
