// A sparse extent of a VMDK: the whole image, or one of several files.
#pragma once

#include <list>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "block/formats/format_checker.h"
#include "block/formats/mapped_node.h"
#include "block/formats/vmdk/layout.h"

namespace kvartz::block::vmdk {

class SparseNode final : public MappedNode {
 public:
  // Fiber. Reads header, grain directory and descriptor (where there is one).
  static Result<std::shared_ptr<SparseNode>> Open(NodePtr file, const NodeOptions& node);
  SparseNode(NodePtr file, bool read_only, const SparseHeader& header, std::vector<Le32> directory,
             std::vector<Le32> redundant, Descriptor descriptor, std::string text);

  const char* driver() const override { return "vmdk"; }
  Result<ImageInfo> Info() override;
  const Descriptor& descriptor() const { return descriptor_; }
  bool names_backing() const override { return descriptor_.parent_cid != kNoParent; }
  // The first one is the parent, as the image left it.
  Result<> SetBacking(NodePtr backing) override;
  // Of a part of an image: what it shows of that one's parent.
  Result<> SetPartOfBacking(NodePtr part) { return MappedNode::SetBacking(std::move(part)); }
  std::optional<BackingWish> TakeBackingWish() override { return std::exchange(wish_, {}); }
  void set_backing_wish(BackingWish wish) { wish_ = std::move(wish); }
  ImageEditor* editor() override { return &editor_; }

 private:
  using Table = std::vector<Le32>;

  int Find(uint64_t offset, Place& place) override;
  int NewPlace(uint64_t index, uint64_t& offset) override;
  int Publish(uint64_t index, uint64_t offset) override;
  int MarkZero(uint64_t index) override;
  int ReadCompressed(const Place& place, uint64_t index, std::span<uint8_t> block) override;
  int WriteCompressed(uint64_t index, std::span<const uint8_t> block) override;
  int BeginWriting() override;
  bool HasParents() const override { return true; }

  bool is_compressed() const { return (header_.flags & kCompressed) != 0; }
  // The table that `index` is in; null and an error in `rc`. Stays until the fiber waits.
  Table* Load(uint64_t index, int& rc);
  int SetEntry(uint64_t index, uint32_t value);
  uint64_t End() const;
  Result<CheckResult> CheckAll(const ReportFn& report);

  const SparseHeader header_;
  const std::vector<Le32> directory_, redundant_;  // sectors of grain tables
  const Descriptor descriptor_;
  std::string text_;  // of the descriptor
  // Grain tables, a bounded number of them, those used last first.
  std::list<std::pair<uint32_t, Table>> tables_;
  std::unordered_map<uint32_t, std::list<std::pair<uint32_t, Table>>::iterator> by_number_;
  FiberMutex loading_;
  FormatChecker editor_{*this, [this](const ReportFn& report) { return CheckAll(report); }};
  std::optional<BackingWish> wish_;
  bool parent_checked_ = false;
};

}  // namespace kvartz::block::vmdk
