// Job: do two nodes read the same?
#pragma once

#include <optional>

#include "block/jobs/job.h"
#include "block/node.h"

namespace kvartz::block {

struct CompareResult {
  std::optional<uint64_t> differs_at = {};         // contents: the first sector that differs
  std::optional<uint64_t> status_differs_at = {};  // strict: one has what the other lacks
};

// Where one is longer, the rest of it must read as zeros.
class CompareJob final : public Job {
 public:
  enum class Mode : uint8_t { kContents, kStrict };
  CompareJob(std::string id, NodePtr first, NodePtr second, Mode mode);
  const char* type() const override { return "compare"; }
  const CompareResult& result() const { return result_; }
  // What went wrong was examining (true) or reading.
  bool failed_to_examine() const { return failed_to_examine_; }

 private:
  Result<> DoRun() override;
  Result<uint64_t> ComparePiece(uint64_t offset, uint64_t common);
  Result<uint64_t> CheckRest(Node& longer, uint64_t offset);
  bool Differs(const uint8_t* a, const uint8_t* b, uint64_t length, uint64_t offset);

  const NodePtr first_, second_;
  const Mode mode_;
  CompareResult result_;
  bool failed_to_examine_ = false;
  std::unique_ptr<uint8_t[]> a_, b_;
};

}  // namespace kvartz::block
