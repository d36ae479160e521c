// What filters have in common: they show their file's contents as they are, and do something about
// the requests.
#pragma once

#include "block/node.h"

namespace kvartz::block {

// Loop-owned. Requests that a filter Passes on as they are aren't its own any more; those that it
// Handles run in a fiber each.
class FilterNode : public Node {
 public:
  FilterNode(NodePtr file, const char* driver);

  const char* driver() const override { return driver_; }
  Node* file() const override { return file_.get(); }
  bool is_filter() const override { return true; }
  void LetGrow() override {
    file_->LetGrow();
    grows_ = file_->grows();
  }
  void Drain() override;
  Result<> SetFile(NodePtr file) override;
  void FileResized() override;
  bool HasItself(uint64_t offset, uint64_t length) override {
    return file_->HasItself(offset, length);
  }
  Result<Extent> Status(uint64_t offset, uint64_t length) override;
  Result<> Resize(const ResizeOptions& options) override;
  Result<> SetReadOnly(bool read_only) override;
  Result<ImageInfo> Info() override { return file_->Info(); }

 protected:
  void Submit(Request* request) override { Pass(request); }
  void Pass(Request* request) {
    if (grows_) Grow(*request);
    file_->Start(request);
  }
  void Handle(Request* request);
  // Fiber: 0 or -errno.
  virtual int Process(Request& request);
  // Drains what else the filter's requests wait for.
  virtual void DrainMore() {}
  NodePtr file_;

 private:
  void OnDebug(DebugEvent event) override { file_->Debug(event); }
  void Grow(const Request& request);
  const char* const driver_;
};

}  // namespace kvartz::block
