// Check, repair, amend.
#pragma once

#include <functional>

#include "block/formats/qcow2/layout.h"
#include "block/image_info.h"

namespace kvartz::block::qcow2 {

class Qcow2Node;

// Loop-owned. While they run, no request is under way.
class Editor final : public ImageEditor {
 public:
  explicit Editor(Qcow2Node& node) : node_(node) {}
  Result<CheckResult> Check(Repair repair, const ReportFn& report) override;
  Result<> Amend(Options& options, const ProgressFn& progress) override;
  Result<> RecordBacking(const std::string& filename, const std::string& format) override;
  Result<> MakeEmpty() override;

 private:
  // Counts all references anew, in refcounts of 1 << `order` bits.
  Result<> ChangeRefcountOrder(uint32_t order);
  // Writes what `change` makes of the header, or leaves it as it was.
  Result<> ChangeHeader(const std::function<void(Header&)>& change);
  Qcow2Node& node_;
};

}  // namespace kvartz::block::qcow2
