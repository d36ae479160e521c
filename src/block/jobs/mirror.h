// Jobs mirror and (of the image that a disk writes to) commit: a copy that is kept in step until
// the disk moves over to it.
#pragma once

#include <memory>
#include <string>

#include "block/filters/mirror_top.h"
#include "block/jobs/copy_job.h"
#include "block/jobs/range_copier.h"

namespace kvartz::block {

class MirrorJob final : public CopyJob {
 public:
  // `whole_bytes`: not 0, the target is to be put on another image and has what is copied in such
  // pieces, whole; for the rest of one would be zeros, not what it will stand on.
  MirrorJob(Registry& registry, const MirrorSettings& settings, const char* type,
            uint32_t whole_bytes);
  const char* type() const override { return type_; }
  // Fiber, main loop, source quiesced: inserts the filter. On error nothing has changed.
  Result<> Prepare();
  // Of a commit: what only the base has isn't copied, and it is made read-only again if it stays
  // one.
  void CommitInto(bool base_was_read_only) {
    commits_ = true;
    base_was_read_only_ = base_was_read_only;
  }

 private:
  Result<> DoRun() override;
  Result<> DoFinalize() override;
  void DoClean(const Result<>& result) override;
  int CopyRange(uint64_t offset, uint64_t length, bool* reading) override;
  bool MayStop() override;
  std::string SourceName() const override { return settings_.source->name(); }
  std::string TargetName() const override { return settings_.target->name(); }
  Result<> CopyTheRest();
  Result<> Pivot();

  const char* const type_;
  MirrorSettings settings_;
  const uint32_t whole_bytes_;
  RangeCopier copier_;
  std::shared_ptr<MirrorTopNode> filter_;
  bool commits_ = false, base_was_read_only_ = false;
  bool background_ = true, ready_now_ = false, pivoted_ = false;
  unsigned passes_ = 0;  // since it was to end
};

}  // namespace kvartz::block
