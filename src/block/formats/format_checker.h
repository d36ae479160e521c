// The editor of formats whose images can be checked, and nothing else.
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "block/image_info.h"
#include "block/node.h"

namespace kvartz::block {

class FormatChecker final : public ImageEditor {
 public:
  using CheckFn = std::function<Result<CheckResult>(const ReportFn& report)>;
  // Part of `node`. `check` repairs nothing.
  FormatChecker(const Node& node, CheckFn check) : node_(node), check_(std::move(check)) {}

  Result<CheckResult> Check(Repair repair, const ReportFn& report) override {
    if (repair != Repair::kNone)
      return Fail(ErrorCode::kUnsupported,
                  std::string("not supported yet: repair of format ") + node_.driver());
    return check_(report);
  }
  Result<> Amend(Options&, const ProgressFn&) override {
    return node_.Unsupported("amended options");
  }
  Result<> RecordBacking(const std::string&, const std::string&) override {
    return node_.Unsupported("a backing file");
  }
  Result<> MakeEmpty() override { return node_.Unsupported("being emptied"); }

 private:
  const Node& node_;
  const CheckFn check_;
};

}  // namespace kvartz::block
