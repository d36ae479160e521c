// A VMDK whose disk is in several files, one part after the other, that its descriptor names.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/fiber.h"
#include "block/formats/format_checker.h"
#include "block/formats/vmdk/layout.h"
#include "block/formats/vmdk/sparse.h"
#include "block/node.h"

namespace kvartz::block::vmdk {

// Loop-owned. Requests within one part go on to it as they are; others are split, in a fiber.
class SplitNode final : public Node {
 public:
  struct Part {
    NodePtr node;
    uint64_t base = 0;                     // in the node
    uint64_t length = 0;                   // bytes; > 0
    std::string type;                      // as the descriptor names it
    std::shared_ptr<SparseNode> sparse{};  // the node, if it is one
  };
  // `file`: the descriptor's, `text` what is in it.
  SplitNode(NodePtr file, Descriptor descriptor, std::string text, std::vector<Part> parts,
            bool read_only);

  const char* driver() const override { return "vmdk"; }
  Node* file() const override { return file_.get(); }
  Node* backing() const override { return backing_.get(); }
  bool names_backing() const override { return descriptor_.parent_cid != kNoParent; }
  const Descriptor& descriptor() const { return descriptor_; }
  // The first one is the parent, as the image left it.
  Result<> SetBacking(NodePtr backing) override;
  std::optional<BackingWish> TakeBackingWish() override { return std::exchange(wish_, {}); }
  void set_backing_wish(BackingWish wish) { wish_ = std::move(wish); }
  void Drain() override;
  Result<Extent> Status(uint64_t offset, uint64_t length) override;
  Result<> Close() override;
  Result<> SetReadOnly(bool read_only) override;
  Result<> MoveTo(EventLoop&) override { return Unsupported("being served by another thread"); }
  Result<ImageInfo> Info() override;
  Result<uint64_t> AllocatedBytes() override;
  ImageEditor* editor() override { return &editor_; }

 private:
  void Submit(Request* request) override;
  int Handle(const Request& request);
  int BeginWriting();
  int Split(const Request& request);
  size_t PartOf(uint64_t offset) const;
  // Of the parts that are images. What holds data only is as it should be.
  Result<CheckResult> CheckParts(const ReportFn& report);

  const NodePtr file_;
  Descriptor descriptor_;
  std::string text_;
  const std::vector<Part> parts_;
  std::vector<uint64_t> starts_;
  NodePtr backing_;
  std::optional<BackingWish> wish_;
  bool parent_checked_ = false;
  FiberMutex beginning_;
  bool wrote_ = false;
  FormatChecker editor_{*this, [this](const ReportFn& report) { return CheckParts(report); }};
};

}  // namespace kvartz::block::vmdk
