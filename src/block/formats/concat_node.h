// A disk in several parts, one after the other: extents of formats that have them in files.
#pragma once

#include <vector>

#include "block/formats/format_checker.h"
#include "block/node.h"

namespace kvartz::block {

// Loop-owned. Requests within one part go on to it as they are; others are split, in a fiber.
class ConcatNode final : public Node {
 public:
  struct Part {
    NodePtr node;
    uint64_t base = 0;    // in the node
    uint64_t length = 0;  // bytes; > 0
  };
  // `file`: what the parts were named by. `info`: all but the sizes is its maker's.
  ConcatNode(NodePtr file, const char* driver, std::vector<Part> parts, ImageInfo info,
             bool read_only);

  const char* driver() const override { return driver_; }
  Node* file() const override { return file_.get(); }
  void Drain() override;
  Result<Extent> Status(uint64_t offset, uint64_t length) override;
  Result<> Close() override;
  Result<> SetReadOnly(bool read_only) override;
  Result<> MoveTo(EventLoop&) override { return Unsupported("being served by another thread"); }
  Result<ImageInfo> Info() override { return info_; }
  Result<uint64_t> AllocatedBytes() override;
  ImageEditor* editor() override { return &editor_; }

 private:
  void Submit(Request* request) override;
  int Split(const Request& request);
  size_t PartOf(uint64_t offset) const;
  // Of the parts that are images. What holds data only is as it should be.
  Result<CheckResult> CheckParts(const ReportFn& report);

  const NodePtr file_;
  const char* const driver_;
  const std::vector<Part> parts_;
  std::vector<uint64_t> starts_;
  const ImageInfo info_;
  unsigned under_way_ = 0;
  bool starting_ = false;
  FormatChecker editor_{*this, [this](const ReportFn& report) { return CheckParts(report); }};
};

}  // namespace kvartz::block
